"""The Python door: `fastdistil.distil` does in this process what prepare, pretrain and export do one after the other.

    student = fastdistil.distil("all-MiniLM-L6-v2", texts, out="small", recipe="embed")
    SentenceTransformer(str(student.path))

No command, but made of them: their configurations, their messages, their folders under one `out`. Nothing heavy is
imported before the options are checked.

out/texts.jsonl   texts that were no files      out/run       the run, as pretrain writes it
out/shards        the same, prepared            out/student   the Hugging Face folder
"""

import faulthandler
import filecmp
import gc
import html
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistil import export, prepare, pretrain
from fastdistil.model import headers
from fastdistil.model.architecture import read_architecture
from fastdistil.remote import hub
from fastdistil.run import folder, options, recipes
from fastdistil.run.command import STOPPED, Failed, launched
from fastdistil.run.config import LOSS_TERMS, Config, flatten
from fastdistil.run.files import read_json, read_json_lines
from fastdistil.training.preflight import resolve

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger("fastdistil")


@dataclass(frozen=True, slots=True, repr=False)
class Distilled:
    """A student: where it lies, what it is, and how it came to be."""

    path: Path
    """Hugging Face folder: transformers' `from_pretrained` loads it, SentenceTransformer if it makes embeddings."""
    run: Path
    """The run folder, which goes on if `distil` is called with a larger duration."""
    summary: str
    """What it is, how to load it, and how to see what it kept."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record an update ("split": "train") and a validation, as metrics.jsonl holds them."""
        return list(read_json_lines(self.run / "metrics.jsonl"))

    def frame(self) -> "pd.DataFrame":
        """`metrics` as a table: a row a record, a column a name."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def plot(self) -> "Figure":
        """Losses and tokens a second over the updates; a notebook shows it as the value of a cell."""
        from matplotlib import pyplot

        train, validation = ([r for r in self.metrics if r["split"] == split] for split in ("train", "validation"))
        figure, (losses, speed) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for name in ("loss", *(term.name for term in LOSS_TERMS)):
            points = [(r["update"], r[name]) for r in train if r.get(name) is not None]
            if points:
                (line,) = losses.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
                held_out = [(r["update"], r[name]) for r in validation if r.get(name) is not None]
                losses.plot(*zip(*held_out, strict=True), "o", color=line.get_color(), markersize=4)
        speed.plot([r["update"] for r in train], [r["tokens_per_s"] for r in train], linewidth=1.4)
        losses.set(title="losses (dots: validation)", xlabel="update", yscale="log")
        losses.legend(frameon=False, fontsize=8)
        speed.set(title="tokens a second", xlabel="update", ylim=(0, None))
        pyplot.close(figure)  # else a notebook shows it twice
        return figure

    def _rows(self) -> list[tuple[str, str]]:
        """The losses of the last validation, each with its title."""
        titles = {term.name: term.title for term in LOSS_TERMS}
        last = next((r for r in reversed(self.metrics) if r["split"] == "validation"), {})
        losses = {k: v for k, v in last.items() if isinstance(v, float) and not k.endswith(("seconds", "_gib"))}
        return [(titles.get(k, k), f"{v:.4g}") for k, v in losses.items()]

    def __repr__(self) -> str:
        rows = [f"  {value:>8}  {name}" for name, value in self._rows()]
        return "\n".join([self.summary, "on validation text:", *rows])

    def _repr_html_(self) -> str:
        rows = (f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>" for name, value in self._rows())
        head = "<tr><th>on validation text</th><th></th></tr>"
        return f"<pre>{html.escape(self.summary)}</pre><table>{head}{''.join(rows)}</table>"


def distil(
    teacher: str | Path | None,
    texts: str | Path | Iterable[Any],
    *,
    out: str | Path,
    recipe: str = "distilbert",
    **overrides: Any,
) -> Distilled:
    """A student of the teacher, trained on the texts in this process; the same call again goes on where it was.

    Ctrl-C, and a notebook's stop, end it after the current update with a checkpoint. Signal handlers, logging and
    threads are then, and always, as they were. On several devices use the commands under torchrun.

    Args:
        teacher: Hugging Face folder; None for recipe mlm.
        texts: strings; rows with a column of text, as a `datasets.Dataset` has; or what `fastdistil.prepare` reads: a
            str or Path of a file or folder or hf:NAME, or several Paths. Other texts are kept in out/texts.jsonl.
        out: folder for all that is made.
        recipe: as `python -m fastdistil.pretrain` has it.
        overrides: options of the command by their sections, `optim={"lr": 3e-4, "duration": 2}`, or by their names,
            `**{"optim.lr": 3e-4}`; `prepare={"max_length": 128, "text_field": "body"}` are those of the other command.

    Raises:
        ValueError: where the commands refuse, in their words; OSError likewise.
        Failed: where the training went wrong, e.g. the loss was not finite.
        KeyboardInterrupt: where it was interrupted.
    """
    if launched().world_size > 1:
        raise ValueError(
            "distil works in one process, and this is one of several: use `torchrun -m fastdistil.pretrain ...`"
        )
    for_prepare = overrides.pop("prepare", {})
    try:
        return _distil(recipe, teacher, texts, Path(out).expanduser(), overrides, for_prepare)
    except (ValueError, OSError, Failed, KeyboardInterrupt) as error:
        raise error.with_traceback(None) from None  # it says what to do: the rest is of no use to whoever reads it


def _distil(
    recipe: str,
    teacher: str | Path | None,
    texts: str | Path | Iterable[Any],
    out: Path,
    given: dict[str, Any],
    for_prepare: dict[str, Any],
) -> Distilled:
    if (found := folder.kind(out)) is not None:  # the teacher's own, say: nothing is put beside its files
        raise ValueError(f"out {out} is {found.title}: give a new folder")
    for_prepare = {"tokenizer": teacher, **for_prepare, "out": out / "shards"}
    given = {
        "teacher": {"path": teacher} if teacher is not None else {},
        **given,
        "data.shards": out / "shards",
        "out": out / "run",
        "resume": "auto",
    }
    if _notebook() is not None:
        given = {"log.every": "2s"} | given
    with _in_this_process():
        # What is asked is found right before a text is read.
        config = recipes.parse([recipe, *_words(given)], quiet=True)
        _check_teacher(config)
        field = str(for_prepare.get("text_field", "text"))
        sources = _sources(texts, out / "texts.jsonl", field)
        if sources == [str(out / "texts.jsonl")]:
            for_prepare["text_field"] = "text"
        prepare.prepare(options.parse(prepare.PrepareConfig, [*sources, *_words(for_prepare)], "prepare"))
        _pretrain(config)
        exported = export.ExportConfig(run=config.out, out=out / "student", overwrite=True)
        student = Distilled(exported.out, config.out, export.export(exported))
        log.info(student.summary.partition("\n")[0])
        return student


def _words(given: Mapping[str, Any]) -> Iterator[str]:
    """The words of a command line that say the same: {"optim": {"lr": 1e-3}} -> --optim.lr 0.001."""
    for name, value in flatten(dict(given)).items():
        section, _, last = name.replace("_", "-").rpartition(".")
        section += "." if section else ""
        if value is False:
            yield f"--{section}no-{last}"
            continue
        yield f"--{section}{last}"
        if value is not True:
            yield from map(str, value if isinstance(value, Sequence) and not isinstance(value, str) else [value])


def _check_teacher(config: Config) -> None:
    """What pretrain would refuse of the teachers' folders, before hours of preparation.

    Raises ValueError or OSError.
    """
    for number, given in enumerate(config.teacher.paths):
        option = "--teacher.others" if number else "--teacher.path"
        path = hub.folder_of(option, given)
        try:
            headers.match(path, read_architecture(path), headers.read_headers(path), need_head=config.loss.kd > 0)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None


def _sources(texts: str | Path | Iterable[Any], path: Path, field: str) -> list[str]:
    """What prepare is to read: files that are named, or the one at `path` where the texts are written."""
    if isinstance(texts, str | Path):
        return [str(texts)]
    if isinstance(texts, Mapping):
        raise ValueError(f"texts are several splits ({', '.join(map(str, texts))}): give one of them")
    columns = getattr(texts, "column_names", getattr(texts, "columns", None))  # of a data set, of a data frame
    if columns is not None:
        if field not in columns:
            raise ValueError(
                f"texts have no column {field!r}, but {', '.join(map(str, columns))}: "
                'name it by prepare={"text_field": ...}'
            )
        texts = texts[field]  # type: ignore[index]
    rows: Iterator[Any] = iter(texts)  # type: ignore[call-overload]
    first = next(rows, None)
    if isinstance(first, Path):
        return [str(first), *map(str, rows)]
    if isinstance(first, str) and len(first) < 1000 and "\n" not in first and Path(first).exists():
        raise ValueError(f"the first of the texts is the name of a file, {first}: give files as Path({first!r})")
    if first is not None:
        _write_texts(path, (row for part in ((first,), rows) for row in part), field)
    else:
        raise ValueError("there are no texts: give strings, rows with a column of text, or the path of a file")
    return [str(path)]


def _write_texts(path: Path, rows: Iterable[Any], field: str) -> None:
    """One JSON object a text. Raises ValueError for what is no text, and where others stand there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            text = row.get(field) if isinstance(row, Mapping) else row
            if not isinstance(text, str):
                raise ValueError(f"texts[{number}] is {row!r:.80}: wanted a string, or a row with a string {field!r}")
            file.write(json.dumps({"text": text}) + "\n")
    if path.is_file() and not filecmp.cmp(part, path, shallow=False):
        part.unlink()
        raise ValueError(f"{path.parent} was begun with other texts: give those, or another out")
    part.replace(path)


def _pretrain(config: Config) -> None:
    """The run, or what is left of it. Raises KeyboardInterrupt where a signal stopped it."""
    if folder.finished(config):
        log.info("the run in %s is finished: a larger optim.duration makes it go on", config.out)
        return
    if config.dry_run:
        raise ValueError("distil trains: for a forecast use `python -m fastdistil.pretrain ... --dry-run`")
    if pretrain.run(resolve(config, world_size=1, by_torchrun=False), launched()) == STOPPED:
        reason = read_json(config.out / folder.STATUS)["reason"]
        if reason != signal.SIGINT.name:  # its handler is again what it was: this process may have to end
            signal.raise_signal(signal.Signals[reason])
        raise KeyboardInterrupt("stopped, with a checkpoint: the same call goes on from there")


def _notebook() -> Any:
    """The shell of the notebook that this process is the kernel of; None elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None


class _LiveLine(logging.Handler):
    """The newest line of the log in one place of a notebook; warnings stay above it."""

    def __init__(self) -> None:
        from IPython import display  # type: ignore[import-not-found]  # a notebook brings it

        super().__init__()
        self.shown: Any = display.display(display.HTML(""), display_id=True)
        self.display, self.kept, self.since = display, [], time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Replaces the line."""
        self.kept += [record.getMessage()] if record.levelno >= logging.WARNING else []
        seconds = f"{time.perf_counter() - self.since:.0f} s"
        lines = [*self.kept, "" if record.levelno >= logging.WARNING else f"{seconds}  {record.getMessage()}"]
        self.shown.update(self.display.HTML(f"<pre>{html.escape(chr(10).join(filter(None, lines)))}</pre>"))


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Around work in a process that is somebody else's: the log is heard, and all that it changes is put back."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `command` has it; of use if this call imports torch
    level, dumps = log.level, faulthandler.is_enabled()
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    handler = None
    if _notebook() is not None:
        handler = _LiveLine()
    elif not log.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if handler is not None:
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold files, threads and workers, as long as it is kept
        raise
    finally:
        log.setLevel(level)
        if handler is not None:
            log.removeHandler(handler)
        if threads is not None:
            sys.modules["torch"].set_num_threads(threads)
        if not dumps:
            faulthandler.disable()
        gc.collect()  # models, and executors whose threads wait for it
