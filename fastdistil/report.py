"""Command: runs -> one HTML page that opens anywhere, without a network: `python -m fastdistil.report RUN... --out report.html`.

Curves, speed, where the time went (--profile), scores (RUN/evaluation.json), and in what the runs' configurations differ. It reads
runs that still go on, too. Plots are SVG inside the page (plots.py), its words are in report.html.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastdistil import __version__
from fastdistil.model.architecture import from_record
from fastdistil.run import folder as run_folder
from fastdistil.run.config import flatten

LOSSES = {
    "loss": "loss, all terms weighted",
    "kd": "KD: T²KL to the teacher, nats a token",
    "mlm": "masked LM: cross-entropy, nats a masked token",
    "cosine": "1 - cos of the last hidden states",
    "agreement": "top-1 agreement with the teacher",
    "accuracy": "accuracy on masked tokens",
}
MOST_POINTS = 200
"""Of a training curve: a longer one is drawn as means over equal stretches of updates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Make one self-contained HTML page about one or several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("report.html")
    """The page; an older one is replaced."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("wanted one run folder or more")
        if self.out.suffix != ".html":
            raise ValueError(f"--out must end in .html, got {self.out}")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says."""

    name: str
    record: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    profile: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def main(args: list[str] | None = None) -> int:
    """Exit status 0: the page is there. 2: a wrong command line or run; an older page is left as it was."""
    config = tyro.cli(ReportConfig, args=args, prog="python -m fastdistil.report")
    try:
        text = page([read(*pair) for pair in zip(names(config.runs), config.runs, strict=True)])
        part = config.out.with_name(f"{config.out.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(config.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{config.out}: {len(config.runs)} run(s)")
    return 0


def names(runs: tuple[Path, ...]) -> list[str]:
    """The folders' own names, or their paths where two are the same."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def read(name: str, folder: Path) -> Run:
    """A run folder's contents. Raises ValueError where it is none, or where a file in it is no JSON."""
    record = run_folder.read(folder)
    lines: list[dict[str, Any]] = []
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
            if isinstance(found["update"], int) and found["split"] in ("train", "validation"):
                lines.append(found)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # being written just now
    return Run(
        name,
        record,
        [line for line in lines if line["split"] == "train"],
        [line for line in lines if line["split"] == "validation"],
        _json(folder / "profile" / "table.json"),
        _json(folder / "evaluation.json"),
    )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None


def page(runs: list[Run]) -> str:
    """The page as text; the same runs give the same page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        summary=summary(runs),
        plots=_plots(runs),
        profiles=[(run.name, run.profile) for run in runs if run.profile],
        without_profile=[run.name for run in runs if not run.profile],
        evaluations=[(run.name, run.evaluation) for run in runs if run.evaluation],
        differences=differences(runs),
        names=[run.name for run in runs],
    )


def summary(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (what, a cell for each run)."""
    cells: dict[str, list[str]] = {}
    for run in runs:
        for key, value in _facts(run).items():
            cells.setdefault(key, []).append(value)
    return list(cells.items())


def _facts(run: Run) -> dict[str, str]:
    config, none = run.record["config"], "-"
    teacher = run.record.get("teacher")
    last = run.train[-1] if run.train else {}
    valid = run.validation[-1] if run.validation else {}
    speeds = [line["tokens_per_s"] for line in run.train if "tokens_per_s" in line]
    mfu = [line["mfu"] for line in run.train if "mfu" in line]
    tokens = sum(line["tokens"] for line in run.train)
    facts = {
        "recipe": str(config.get("recipe", none)),
        "student": _size(run.record["student"]),
        "teacher": _size(teacher) if teacher else "none",
        "updates": f"{last['update']:,}" if last else none,
        "tokens": f"{tokens:,}" if last else none,
        "tokens/s, median": f"{statistics.median(speeds):,.0f}" if speeds else none,
        "MFU, median": f"{statistics.median(mfu):.1%}" if mfu else none,
        "training time": _duration(
            sum(line["tokens"] / line["tokens_per_s"] for line in run.train if "tokens_per_s" in line)
        )
        if speeds
        else none,
    }
    for key, title in LOSSES.items():
        facts[f"validation {title}"] = f"{valid[key]:.4f}" if key in valid else none
    versions = run.record.get("versions") or {}
    return facts | {"versions": ", ".join(f"{k} {v}" for k, v in versions.items()) or none}


def _size(sizes: dict[str, Any]) -> str:
    try:
        model = from_record(sizes)
    except ValueError:
        return "unknown"
    return f"{model.num_layers} layers, {model.hidden_size} wide, {model.num_parameters:,} parameters"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with a value for each run; none for a single run."""
    flat = [flatten(run.record["config"]) for run in runs]
    keys = sorted(set().union(*flat) - {"out", "resume"})
    values = {key: [json.dumps(f[key]) if key in f else "-" for f in flat] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def stretches(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(updates, values) of a training curve: at most MOST_POINTS means over equal stretches, each drawn at its middle."""
    found = [(line["update"], line[key]) for line in lines if isinstance(line.get(key), float)]
    size = -(-len(found) // MOST_POINTS)
    parts = [found[i : i + size] for i in range(0, len(found), size)] if found else []
    x = [statistics.mean(update for update, _ in part) for part in parts]
    return x, [statistics.mean(value for _, value in part) for part in parts]


def _plots(runs: list[Run]) -> list[tuple[str, str]]:
    """(heading, <svg>) of each measure that some run has."""
    from markupsafe import Markup

    from fastdistil.evaluation import plots

    figures = []
    titles = LOSSES | {"gradient_norm": "gradient norm", "tokens_per_s": "real tokens/s"}
    for key, title in titles.items():
        series = {}
        for run in runs:
            for split, line in (("", stretches(run.train, key)), (", validation", _points(run, key))):
                if line[0]:
                    series[run.name + split] = line
        if series:
            figure = plots.curves(series, "update", title, "")
            figures.append((title, Markup(plots.to_svg(figure, key))))
    return figures


def _points(run: Run, key: str) -> tuple[list[float], list[float]]:
    found = [(v["update"], v[key]) for v in run.validation if isinstance(v.get(key), float)]
    return [float(update) for update, _ in found], [value for _, value in found]


if __name__ == "__main__":
    raise SystemExit(main())
