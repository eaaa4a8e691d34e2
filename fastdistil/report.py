"""Command: runs -> one HTML page that opens anywhere, without a network.

    python -m fastdistil.report RUN... --out report.html

What became of each student beside its teacher, in a sentence and a table; curves, speed, where the time went
(--profile), and in what the runs' configurations differ. Scores are those that `evaluate` kept in RUN/evaluation*.json,
speed what `efficiency` kept in RUN/efficiency.json; what nobody measured is said, with the command that measures it.
Runs that still go on are read, too. evaluation/page holds the page's words and looks, and uPlot, which draws curves.
"""

import base64
import contextlib
import hashlib
import math
import shlex
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from fastdistil import __version__
from fastdistil.evaluation.results import Score, kept, of_both, read_efficiency, read_scores, speed, understood
from fastdistil.model.architecture import Architecture, from_record
from fastdistil.run import folder as run_folder
from fastdistil.run import options
from fastdistil.run.command import command, leave, require
from fastdistil.run.config import LOSS_TERMS, MASKED_AGREEMENT, flatten
from fastdistil.run.files import make_room, read_json, read_json_lines, write_text

LOSSES = {
    "loss": "loss, all terms weighted",
    **{term.name: term.title for term in LOSS_TERMS},
    "agreement": "top-1 agreement with the teacher",
    "masked_agreement": MASKED_AGREEMENT,
    "accuracy": "accuracy on masked tokens",
}
VALIDATED = {f"validation {title}": key for key, title in LOSSES.items()}
"""Rows of the summary and what they are called in metrics.jsonl."""
CURVES = LOSSES | {
    "gradient_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "real tokens/s",
    "memory_gib": "memory at its peak, GiB",
}
SHARES = ("agreement", "masked_agreement", "accuracy")
"""Curves that are drawn in per cent."""
MOST_POINTS = 300
"""Of a training curve: a longer one is drawn as means over equal stretches of updates, within their extremes."""
ALL_POINTS = 40_000
"""Of all curves of a page together, about: 1.5 MB."""
PAGE = Path(__file__).parent / "evaluation" / "page"

Curve = list[tuple[float, float | None]]  # (update, value); None where it was not finite


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Make one self-contained HTML page about one or several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("report.html")
    """The page; an older one is replaced."""
    title: str | None = None
    """Of the page. None: the runs' names."""
    price_per_hour: float | None = None
    """US dollars for an hour of what a run trains on: the page then says what each has cost."""
    watts: float | None = None
    """Power of what a run trains on: the page then says what energy each has taken."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("wanted one run folder or more")
        if self.out.suffix != ".html":
            raise ValueError(f"--out must end in .html, got {self.out}")
        for name in ("price_per_hour", "watts"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, got {value}")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says; train and validation are the lines of metrics.jsonl."""

    name: str
    folder: Path
    record: dict[str, Any]
    status: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    profile: list[tuple[str, float, float, float | None]]
    """(part of an update, seconds, share, floor in seconds)."""
    knots: dict[str, list[float]]
    """Tokens and seconds of training up to each update; they begin with 0."""
    scores: list[Score]
    efficiency: dict[str, Any] | None

    @property
    def config(self) -> dict[str, Any]:
        """Its options by their names, as in "optim.lr"."""
        return flatten(self.record["config"])

    @property
    def student(self) -> Architecture | None:
        """None where an older version wrote something else."""
        return _model(self.record["student"])

    @property
    def teacher(self) -> Architecture | None:
        """None also where there is none."""
        return _model(self.record.get("teacher"))

    @property
    def state(self) -> str:
        """finished, running, stopped, failed, killed (nothing said that it ended, yet nobody works on it), unknown."""
        return self.status.get("state", "unknown")

    @property
    def updates(self) -> int:
        """Made so far."""
        return self.train[-1]["update"] if self.train else 0

    @property
    def skipped(self) -> list[int]:
        """Updates whose gradient was not finite."""
        return [line["update"] for line in self.train if line.get("skipped") is True]


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: the page is there. 2: a wrong command line or run; an older page is left as it was."""
    config = options.parse(ReportConfig, args, "report")
    require("the report", "eval", "jinja2")
    make_room(config.out)
    runs = [read(*pair) for pair in zip(names(config.runs), config.runs, strict=True)]
    text = page(runs, config)
    write_text(config.out, text)
    for run in runs:
        lacks = missing(run)
        if len(runs) == 1:  # of several the page has the commands
            for what, commands in lacks:
                print(f"not measured: {what}. To measure it:", *(f"    {line}" for line in commands), sep="\n")
        elif lacks:
            print(f"{run.name}: not measured: {' and '.join(what for what, _ in lacks)}")
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{config.out}: {count}, {len(text.encode()) / 1000:,.0f} kB; opens in any browser, without a network")
    print(f"next: {shlex.join(['python', '-m', 'webbrowser', config.out.resolve().as_uri()])}")
    return 0


def names(runs: tuple[Path, ...]) -> list[str]:
    """The folders' own names, or their paths where two are the same."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


# ---------------------------------------------------------------------------------------------- what a run folder holds
def read(name: str, folder: Path) -> Run:
    """A run folder's contents. Raises ValueError where it is none, or a file in it is not what its name says."""
    record = run_folder.read(folder)
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if isinstance(line.get("update"), int)]
    train, validation = ([x for x in lines if x.get("split") == split] for split in ("train", "validation"))
    profile, efficiency = folder / "profile" / "table.json", folder / "efficiency.json"
    return Run(
        name,
        folder,
        record,
        _status(folder),
        train,
        validation,
        understood(profile, _profile) if profile.is_file() else [],
        knots_of(train),
        read_scores(folder, flatten(record["config"]).get("teacher.path")),
        understood(efficiency, read_efficiency) if efficiency.is_file() else None,
    )


def knots_of(train: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{"update", "tokens", "seconds": values}, as the run counted them or as its lines add up to."""
    tokens = seconds = 0.0
    found: dict[str, list[float]] = {"update": [0], "tokens": [0], "seconds": [0]}
    for line in train:
        count, rate = _number(line.get("tokens")) or 0.0, _number(line.get("tokens_per_s")) or math.inf
        tokens = max(tokens, _number(line.get("tokens_seen")) or tokens + count)
        seconds = max(seconds, _number(line.get("seconds")) or seconds + count / rate)
        for name, value in (("update", line["update"]), ("tokens", tokens), ("seconds", seconds)):
            found[name].append(round(value, 3))
    return found


def _status(folder: Path) -> dict[str, Any]:
    """status.json; a run that "runs" while nobody has its lock was killed."""
    path = folder / run_folder.STATUS
    status = read_json(path) if path.is_file() else {}
    if status.get("state") == "running" and (folder / run_folder.LOCK).is_file():
        try:
            run_folder.lock(folder).release()
            return status | {"state": "killed"}
        except (ValueError, OSError):  # somebody has it, or the folder is read only and nobody can say
            pass
    return status


def _profile(found: dict[str, Any]) -> list[tuple[str, float, float, float | None]]:
    return [(part, 1.0 * row["seconds"], 1.0 * row["share"], row["floor"]) for part, row in found["parts"].items()]


def _model(sizes: dict[str, Any] | None) -> Architecture | None:
    try:
        return from_record(sizes) if sizes else None
    except ValueError:
        return None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------ what is said of a run
def about(run: Run) -> str:
    """Recipe, teacher and text by their names."""
    parts = [f"recipe {run.config.get('recipe', '–')}"]
    for title, *keys in (("teacher", "teacher.path", "teacher.others"), ("text", "data.shards")):
        values = [run.config.get(key) or [] for key in keys]
        paths = [Path(str(x)).name for value in values for x in (value if isinstance(value, list) else [value])]
        parts += [f"{title} {' + '.join(paths)}"] if paths else []
    return " · ".join(parts)


def verdict(run: Run, config: ReportConfig) -> str:
    """What became of the student, in two sentences."""
    return f"{_of_the_teacher(run)} {_of_the_training(run, config)}"


def _of_the_teacher(run: Run) -> str:
    student, teacher = run.student, run.teacher
    if teacher is None or student is None:
        return f"A model of {student.num_layers} layers, without a teacher." if student else "A model of unknown size."
    layers = f"{student.num_layers} of its {teacher.num_layers} layers"
    if 2 * student.num_layers == teacher.num_layers:
        layers = f"half its layers ({student.num_layers} of {teacher.num_layers})"
    size = f"{layers} and {100 * student.num_parameters / teacher.num_parameters:.0f} % of its parameters"
    fast = f", {faster:.1f} times as fast" if (faster := speed(run.efficiency)) else ""
    agreement = _number(run.validation[-1].get("agreement")) if run.validation else None
    if found := kept(run.scores):
        share, of, interval = found[0]
        ends = f" (95 %: {interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
        return f"The student keeps {share:.1f} %{ends} of its teacher’s score ({of}) with {size}{fast}."
    if agreement is not None:
        whom = "the mixture of its teachers" if run.record.get("others") else "its teacher"
        share = f"agrees with {whom} on {100 * agreement:.1f} % of the tokens of held-out text"
        return f"The student {share}, with {size}{fast}."
    return f"The student has {size}{fast}; what it keeps of its teacher is {_no_share(run)}."


def _no_share(run: Run) -> str:
    """Why it cannot be said what the student keeps."""
    return "undefined, for its teacher scores 0 or less" if of_both(run.scores) else "not measured"


def _of_the_training(run: Run, config: ReportConfig) -> str:
    tokens, seconds = run.knots["tokens"][-1], run.knots["seconds"][-1]
    machine = run.record.get("machine")
    where = f" on {machine}" if machine else ""
    took = f"{duration(seconds)} with {amount(tokens)} tokens{where}{_cost(seconds, config)}"
    total = run.status.get("updates")
    at = f"{run.updates:,} of {total:,}" if isinstance(total, int) else f"{run.updates:,}"
    if not run.updates:
        begun = {"failed": "It failed before its first update.", "running": "It has just begun."}
        return begun.get(run.state, "Nothing was trained yet.")
    ways = {
        "finished": f"Trained for {took}.",
        "running": f"Still training, after update {at}: {took} so far.",
        "stopped": f"Stopped after update {at}, and can go on: trained for {took}.",
        "failed": f"Failed after update {at}: trained for {took}.",
        "killed": f"Ended after update {at} without a word, as a killed process does: trained for {took}.",
    }
    return ways.get(run.state, f"Trained for {took}, up to update {at}.")


def _cost(seconds: float, config: ReportConfig) -> str:
    """What is known of it, as ", about 0.4 kWh and $1.20"."""
    parts = []
    if config.watts:
        parts.append(f"{config.watts * seconds / 3.6e6:.2g} kWh")
    if config.price_per_hour:
        parts.append(f"${config.price_per_hour * seconds / 3600:,.2f}")
    return f", about {' and '.join(parts)}" if parts else ""


def figures(run: Run) -> list[tuple[str, str]]:
    """(figure, what it is) of what is looked for first; a dash for what is not measured."""
    student, teacher, faster, found = run.student, run.teacher, speed(run.efficiency), kept(run.scores)
    rows = [(duration(run.knots["seconds"][-1]), "of training")]
    if student and teacher:
        share = f"{100 * student.num_parameters / teacher.num_parameters:.0f} %"
        rows = [
            (
                f"{found[0].share:.1f} %" if found else "–",
                "of the teacher kept" + ("" if found else f": {_no_share(run)}"),
            ),
            (f"{faster:.1f} ×" if faster else "–", "as fast" + ("" if faster else ": not measured")),
            (share, "of its parameters"),
            *rows,
        ]
    return rows


def beside(run: Run) -> list[tuple[str, str, str, str]]:
    """Rows of (what, the teacher's, the student's, their ratio) of all that is known of both."""
    student, teacher = run.student, run.teacher
    rows = []
    if student and teacher:
        for what, name in (("layers", "num_layers"), ("width", "hidden_size")):
            ours, theirs = getattr(student, name), getattr(teacher, name)
            rows.append((what, f"{theirs:,}", f"{ours:,}", f"{100 * ours / theirs:.0f} %"))
        ours, theirs = student.num_parameters, teacher.num_parameters
        rows.append(("parameters", amount(theirs), amount(ours), f"{100 * ours / theirs:.0f} %"))
    if run.efficiency is not None:
        them, us, *_ = run.efficiency["models"]
        size = [f"{model['bytes'] / 1e6:.1f} MB" for model in (them, us)]
        rows.append(("on disk", *size, f"{100 * us['bytes'] / them['bytes']:.0f} %"))
        for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
            if device in them and device in us:
                latency, texts = ([m[device][k] for m in (them, us)] for k in ("latency_ms", "throughput_per_s"))
                each = f"{latency[0] / latency[1]:.2f} × as fast"
                rows.append((f"one text, {title}", *(f"{value:.3g} ms" for value in latency), each))
                batch = f"texts/s, {run.efficiency['batch_size']} at a time, {title}"
                rows.append((batch, *(f"{value:,.0f}" for value in texts), f"{texts[1] / texts[0]:.2f} × as many"))
    for score in run.scores:
        ends = " ({:.1f} to {:.1f})".format(*score.interval) if score.interval else ""
        cells = (_cell("{:.1f}", value) for value in (score.teacher, score.student))
        model = f" ({score.model})" if score.model else ""
        rows.append((f"{score.task}{model}", *cells, _cell("{:.1f} %", score.share) + ends))
    return rows


def missing(run: Run) -> list[tuple[str, list[str]]]:
    """(what nobody has measured of a finished run with a teacher, the commands that measure it)."""
    teacher = run.config.get("teacher.path")
    is_done = run.state in ("finished", "unknown") and run_folder.has_checkpoint(run.folder)
    if run.teacher is None or teacher is None or not is_done:
        return []
    student = f"{run.folder}-model"

    def call(name: str, *words: object) -> str:
        return shlex.join(["python", "-m", f"fastdistil.{name}", *map(str, words)])

    export = [] if Path(student).exists() else [call("export", run.folder, "--out", student)]
    found = []
    if not of_both(run.scores):
        asked: tuple[str, ...] = ("--task", "glue", "--data", "GLUE")
        models = {"evaluation.json": student, "evaluation-teacher.json": teacher}
        if run.record.get("pooling"):  # embeddings are scored in seconds, both models at once
            asked, models = ("--reference", teacher, "--task", "sts", "--data", "PAIRS"), {"evaluation.json": student}
        calls = [call("evaluate", model, *asked, "--out", run.folder / file) for file, model in models.items()]
        found.append(("what it keeps of its teacher", [*export, *calls]))
    if run.efficiency is None:
        measure = call("efficiency", teacher, student, "--out", run.folder / "efficiency.json")
        found.append(("its speed beside its teacher’s", [*([] if found else export), measure]))
    return found


def summary(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (what, a cell for each run); of the measures of held-out text those that some run has."""
    facts = [_facts(run) for run in runs]
    has = {"loss"}.union(*(line for run in runs for line in run.validation[-1:]))
    rows = [(what, [of_run[what] for of_run in facts]) for what in facts[0]]
    wanted = {"updates", *(row for row, key in VALIDATED.items() if key in has)}
    return [(what, cells) for what, cells in rows if what in wanted or (what not in VALIDATED and set(cells) != {"–"})]


def _facts(run: Run) -> dict[str, str]:
    """Every row of the summary for one run, with a dash for what it has not measured."""
    versions = run.record.get("versions") or {}
    last = run.validation[-1] if run.validation else {}
    knots = run.knots
    total = run.status.get("updates")
    of_total = f" of {total:,}" if isinstance(total, int) and total != run.updates else ""
    return {
        "recipe": str(run.config.get("recipe", "–")),
        "student": _size(run.student),
        "teacher": _size(run.teacher) if run.record.get("teacher") else "none",
        "updates": f"{run.updates:,}{of_total}" if run.train else "–",
        "updates skipped, not finite": str(len(run.skipped)),
        "tokens": f"{knots['tokens'][-1]:,.0f}" if run.train else "–",
        "tokens/s, median": _cell("{:,.0f}", _median(run, "tokens_per_s")),
        "MFU, median": _cell("{:.1f} %", _median(run, "mfu"), 100),
        "training time": duration(knots["seconds"][-1]) if run.train else "–",
        "memory at its peak": _cell("{:.2f} GiB", max(_finite(run, "memory_gib"), default=None)),
        "machine": str(run.record.get("machine") or "–"),
        **{
            row: _cell("{:.1f} %", _number(last.get(key)), 100)
            if key in SHARES
            else _cell("{:.4g}", _number(last.get(key)))
            for row, key in VALIDATED.items()
        },
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) or "–",
    }


def _size(model: Architecture | None) -> str:
    if model is None:
        return "unknown"
    return f"{model.num_layers} layers, {model.hidden_size} wide, {amount(model.num_parameters)} parameters"


def _finite(run: Run, key: str) -> list[float]:
    return [value for _, value in measured(run.train, key) if value is not None]


def _median(run: Run, key: str) -> float | None:
    values = _finite(run, key)
    return statistics.median(values) if values else None


def _cell(form: str, value: float | None, times: float = 1) -> str:
    return "–" if value is None else form.format(times * value)


def amount(count: float) -> str:
    """1234567 -> 1.23 M, with a space that no line breaks at"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{count:,.0f}"


def duration(seconds: float) -> str:
    """770.1 -> 12.8 min"""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with a value for each run; none for a single run."""
    flat = [run.config for run in runs]
    keys = sorted(set().union(*flat) - {"out", "resume"})
    values = {key: [_setting(f[key]) if key in f else "–" for f in flat] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


# -------------------------------------------------------------------------------------------------- curves and the page
def measured(lines: list[dict[str, Any]], key: str) -> Curve:
    """The numbers that lines of metrics.jsonl have under `key`; None for null, which stands for what is not finite."""
    return [
        (line["update"], _number(line[key]))
        for line in lines
        if key in line and isinstance(line[key], int | float | None)
    ]


class Drawn(NamedTuple):
    """A curve as the page draws it; a stretch without a finite value is None."""

    x: list[float]
    y: list[float | None]
    low: list[float | None]
    """The least of each stretch; empty where every update has its own point."""
    high: list[float | None]


def stretches(curve: Curve, most: int = MOST_POINTS) -> Drawn:
    """At most `most` means over equal stretches, each at the middle of its updates, with the extremes of each."""
    size = -(-len(curve) // most)
    if size <= 1:
        return Drawn([x for x, _ in curve], [_short(y) for _, y in curve], [], [])
    drawn = Drawn([], [], [], [])
    for begin in range(0, len(curve), size):
        part = curve[begin : begin + size]
        values = [y for _, y in part if y is not None]
        drawn.x.append(statistics.fmean(x for x, _ in part))
        drawn.y.append(_short(statistics.fmean(values)) if values else None)
        drawn.low.append(_short(min(values)) if values else None)
        drawn.high.append(_short(max(values)) if values else None)
    return drawn


def _short(value: float | None) -> float | None:
    """With the digits that an eye can tell apart."""
    return None if value is None else float(f"{value:.5g}")


def drawing(runs: list[Run]) -> dict[str, Any]:
    """All that the page's script reads: the runs, and of each measure the curves of those that have it."""
    found = []
    for key, title in CURVES.items():
        for index, run in enumerate(runs):
            for kind, lines in (("train", run.train), ("validation", run.validation)):
                curve = measured(lines, key)
                if any(y is not None for _, y in curve):
                    found.append((key, title, index, kind, curve))
    most = max(40, min(MOST_POINTS, ALL_POINTS // max(1, len(found))))
    plots: dict[str, dict[str, Any]] = {}
    for key, title, index, kind, curve in found:
        plot = plots.setdefault(key, {"key": key, "title": title, "percent": key in SHARES, "curves": []})
        plot["curves"].append({"run": index, "kind": kind, **stretches(curve, most)._asdict()})
    for plot in plots.values():
        plot["alt"] = _alt(plot, runs)
    shown = []
    for run in runs:
        knots = run.knots
        last = len(knots["update"]) - 1
        kept_knots = sorted({round(i * last / min(last, 500)) for i in range(min(last, 500) + 1)}) if last else [0]
        some = {name: [values[i] for i in kept_knots] for name, values in knots.items()}
        shown.append({"name": run.name, "state": run.state, "knots": some, "skipped": run.skipped[:500]})
    return {"runs": shown, "plots": list(plots.values())}


def _alt(plot: dict[str, Any], runs: list[Run]) -> str:
    """What a plot shows, for those who do not see it."""
    parts = []
    for curve in plot["curves"]:
        values = [y for y in curve["y"] if y is not None]
        of = f"{runs[curve['run']].name}{', validation' if curve['kind'] == 'validation' else ''}"
        parts.append(f"{of}: from {values[0]:.4g} to {values[-1]:.4g}")
    return f"{plot['title']}, against updates. {'; '.join(parts)}."


def page(runs: list[Run], config: ReportConfig) -> str:
    """The page as text; the same runs give the same page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    uplot, licence, script, *styles = (
        Markup((PAGE / name).read_text(encoding="utf-8"))
        for name in ("uPlot.js", "uPlot.LICENSE", "report.js", "uPlot.css", "report.css")
    )
    scripts = [f"/*\n{licence}*/\n{uplot}", script]  # whoever gets the page gets a copy of uPlot, and its licence
    # The browser runs these scripts and no others, and asks nobody for anything, whatever a run is called.
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    few = ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    return environment.get_template("report.html").render(
        title=config.title or few,
        version=__version__,
        as_of=_as_of(runs),
        cards=[_card(run, config) for run in runs],
        headline=_headline(runs),
        summary=summary(runs),
        differences=differences(runs),
        profiles=[run for run in runs if run.profile],
        unprofiled=[run.name for run in runs if not run.profile],
        data=drawing(runs),
        scripts=[Markup(script) for script in scripts],
        styles=styles,
        hashes=hashes,
        most_points=MOST_POINTS,
    )


def _card(run: Run, config: ReportConfig) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "skipped": len(run.skipped),
        "about": about(run),
        "verdict": verdict(run, config),
        "reason": run.status.get("reason") if run.state in ("failed", "stopped") else None,
        "figures": figures(run),
        "beside": beside(run),
        "missing": missing(run),
    }


def _headline(runs: list[Run]) -> str:
    """Of several runs: how they ended, and which keeps most."""
    if len(runs) == 1:
        return ""
    counts = {state: sum(run.state == state for run in runs) for state in dict.fromkeys(run.state for run in runs)}
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    shares = {run.name: found[0] for run in runs if (found := kept(run.scores))}
    best = max(shares, key=lambda name: shares[name].share, default=None)
    of = {found.of for found in shares.values()}
    if best is None or len(shares) < 2 or len(of) > 1:  # on other tasks a share is another thing
        return f"{len(runs)} runs: {states}."
    return f"{len(runs)} runs: {states}. {best} keeps most of its teacher: {shares[best].share:.1f} % ({of.pop()})."


def _as_of(runs: list[Run]) -> str:
    """When one of the runs last said something: the page is of that time."""
    said = [str(line["time"]) for run in runs for line in (run.status, *run.train[-1:]) if "time" in line]
    times = []
    for text in said:
        with contextlib.suppress(ValueError):
            times.append(datetime.fromisoformat(text).astimezone(UTC))
    return f"{max(times):%d %B %Y, %H:%M} UTC".lstrip("0") if times else ""


if __name__ == "__main__":
    leave(main())
