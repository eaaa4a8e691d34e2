"""Command: runs -> one HTML page that opens anywhere, without a network.

    python -m fastdistil.report RUN... --out report.html

Curves, speed, where the time went (--profile), scores (RUN/evaluation.json), and in what the runs' configurations
differ. Runs that still go on are read, too. Plots are SVG inside the page; its words are in evaluation/report.html.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fastdistil import __version__
from fastdistil.model.architecture import from_record
from fastdistil.run import folder as run_folder
from fastdistil.run import options
from fastdistil.run.command import command, leave, require
from fastdistil.run.config import LOSS_TERMS, MASKED_AGREEMENT, flatten
from fastdistil.run.files import read_json, read_json_lines, write_text

if TYPE_CHECKING:
    import pandas as pd

LOSSES = {
    "loss": "loss, all terms weighted",
    **{term.name: term.title for term in LOSS_TERMS},
    "agreement": "top-1 agreement with the teacher",
    "masked_agreement": MASKED_AGREEMENT,
    "accuracy": "accuracy on masked tokens",
}
VALIDATED = {f"validation {title}": key for key, title in LOSSES.items()}
"""Rows of the summary and what they are called in metrics.jsonl."""
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
    """What a run folder says; train and validation are the lines of metrics.jsonl."""

    name: str
    record: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    profile: dict[str, Any] | None
    evaluation: dict[str, Any] | None


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: the page is there. 2: a wrong command line or run; an older page is left as it was."""
    config = options.parse(ReportConfig, args, "report")
    require("the report", "eval", "jinja2", "matplotlib", "pandas")
    write_text(config.out, page([read(*pair) for pair in zip(names(config.runs), config.runs, strict=True)]))
    print(f"{config.out}: {len(config.runs)} run(s)")
    return 0


def names(runs: tuple[Path, ...]) -> list[str]:
    """The folders' own names, or their paths where two are the same."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def read(name: str, folder: Path) -> Run:
    """A run folder's contents. Raises ValueError where it is none, or where a file in it is no JSON."""
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if isinstance(line.get("update"), int)]
    train, validation = ([x for x in lines if x.get("split") == split] for split in ("train", "validation"))
    profile, evaluation = (
        read_json(path) if path.is_file() else None
        for path in (folder / "profile" / "table.json", folder / "evaluation.json")
    )
    return Run(name, run_folder.read(folder), train, validation, profile, evaluation)


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
    try:
        return _render(environment.get_template("report.html"), runs)
    except (jinja2.UndefinedError, TypeError) as error:
        raise ValueError(
            f"profile/table.json or evaluation.json of one of {', '.join(run.name for run in runs)} is not what this "
            f"version writes ({error}): move it away"
        ) from error


def _render(template: Any, runs: list[Run]) -> str:
    return template.render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        runs=runs,
        summary=summary(runs),
        differences=differences(runs),
        plots=_plots(runs),
    )


def summary(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (what, a cell for each run); of the measures of held-out text those that some run has."""
    facts = [_facts(run) for run in runs]
    has = {"loss"}.union(*(line for run in runs for line in run.validation[-1:]))
    rows = [what for what in facts[0] if what not in VALIDATED or VALIDATED[what] in has]
    return [(what, [of_run[what] for of_run in facts]) for what in rows]


def _facts(run: Run) -> dict[str, str]:
    """Every row of the summary for one run, with a dash for what it has not measured."""
    tokens, speed, mfu = (measured(run.train, key) for key in ("tokens", "tokens_per_s", "mfu"))
    teacher = run.record.get("teacher")
    versions = run.record.get("versions") or {}
    last = run.validation[-1] if run.validation else {}
    return {
        "recipe": str(run.record["config"].get("recipe", "-")),
        "student": _size(run.record["student"]),
        "teacher": _size(teacher) if teacher else "none",
        "updates": _cell("{:,}", tokens.index.max()),
        "updates skipped, not finite": str(sum(x.get("skipped") is True for x in run.train)),
        "tokens": _cell("{:,.0f}", tokens.sum(min_count=1)),
        "tokens/s, median": _cell("{:,.0f}", speed.median()),
        "MFU, median": _cell("{:.1%}", mfu.median()),
        "training time": _duration((tokens / speed).sum(min_count=1)),
        **{row: _cell("{:.4f}", last.get(key)) for row, key in VALIDATED.items()},
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) or "-",
    }


def _size(sizes: dict[str, Any]) -> str:
    try:
        model = from_record(sizes)
    except ValueError:
        return "unknown"
    return f"{model.num_layers} layers, {model.hidden_size} wide, {model.num_parameters:,} parameters"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _cell(form: str, value: Any) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value)


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with a value for each run; none for a single run."""
    flat = [flatten(run.record["config"]) for run in runs]
    keys = sorted(set().union(*flat) - {"out", "resume"})
    values = {key: [json.dumps(f[key]) if key in f else "-" for f in flat] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def measured(lines: list[dict[str, Any]], key: str) -> "pd.Series":
    """The numbers that lines of metrics.jsonl have under `key`, by update; NaN for null, which stands for it."""
    import pandas as pd

    found = {x["update"]: x[key] for x in lines if isinstance(x.get(key, ""), int | float | None)}
    return pd.Series(found, dtype=float).replace([math.inf, -math.inf], math.nan)


def stretches(curve: "pd.Series") -> "pd.Series":
    """A training curve as at most MOST_POINTS means over equal stretches, each at the middle of its updates."""
    size = -(-len(curve) // MOST_POINTS)
    if size <= 1:
        return curve
    points: Any = curve.rename_axis("update").reset_index(name="value")
    return points.groupby(points.index // size).mean().set_index("update")["value"]


def _plots(runs: list[Run]) -> list[tuple[str, str]]:
    """(heading, <svg>) of each measure that some run has."""
    from markupsafe import Markup

    from fastdistil.evaluation import plots

    figures = []
    for key, title in (LOSSES | {"gradient_norm": "gradient norm", "tokens_per_s": "real tokens/s"}).items():
        curves = {}
        for run in runs:
            curves[run.name] = stretches(measured(run.train, key))
            curves[f"{run.name}, validation"] = measured(run.validation, key)
        curves = {name: curve for name, curve in curves.items() if curve.notna().any()}
        if curves:
            figure = plots.curves(curves, "update", title, "")
            figures.append((title, Markup(plots.to_svg(figure, key))))
    return figures


if __name__ == "__main__":
    leave(main())
