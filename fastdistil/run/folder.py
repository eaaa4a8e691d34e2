"""The folder of a run: what it is, what became of it, and what a rank leaves behind when it hangs.

Standard library only.

config.json   what it is                  status.json   what became of it
console.log   every line of its log
tokenizer/    what its ids mean           .lock         held by the job that works here
stacks/       rank-00003.txt: where a rank stood that hung or failed
"""

import contextlib
import copy
import faulthandler
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastdistil.run import console
from fastdistil.run.config import PATHS, Config, flatten, resume_differences, to_json
from fastdistil.run.files import Lock, read_json, write_json

log = logging.getLogger("fastdistil")

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
LOCK = ".lock"
STATUS = "status.json"
STACKS = "stacks"


def lock(run: Path) -> Lock:
    """Keeps other jobs out of a run folder. Raises ValueError, naming the holder, where another process has it."""
    return Lock(run / LOCK, f"--out {run}")


def write_status(run: Path, state: str, **about: Any) -> None:
    """Replace RUN/status.json: `state` is running, finished, stopped or failed.

    A job that was killed leaves "running".
    """
    path, now = run / STATUS, time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"state": state, **about, "launcher": os.getppid(), "time": now}
    try:
        write_json(path, record)
    except OSError:  # a full disk has no room for a new file, but for this one in the place of the old
        path.write_text(json.dumps(record), encoding="utf-8")


def was_stopped(run: Path) -> bool:
    """Whether the last job in this folder was stopped by a signal, and started by the launcher that started this one.

    torchrun takes its exit status for a failure, and with --max-restarts would go on with what was asked to stop.
    """
    with contextlib.suppress(OSError, ValueError):
        status = read_json(run / STATUS)
        return (status.get("state"), status.get("launcher")) == ("stopped", os.getppid())
    return False


def holds_run(run: Path) -> bool:
    """Whether there is a run. Raises ValueError where there is something else."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file: give a folder")
    if (found := kind(run)) is not None and found.for_run:
        raise ValueError(f"--out {run} is {found.title}: give a new folder")
    if (run / "config.json").is_file():
        return True
    # What a job leaves that ended before config.json was written; the tokenizer only where its lock shows whose it is.
    names = {p.name for p in run.iterdir() if p.suffix != ".part"} if run.is_dir() else set()
    left = {LOCK, STACKS, STATUS, CHECKPOINTS, console.KEPT} | ({"tokenizer"} if LOCK in names else set())
    if names - left or has_checkpoint(run):
        raise ValueError(f"--out {run} is not empty and holds no run: give a new folder")
    return False


def check(config: Config, inputs: Mapping[str, str | None] | None = None) -> None:
    """Refuse an --out that holds something else, another run, or this run with another configuration (ValueError).

    `inputs`: digests of the contents of what these options name, each of which must be the run's own.
    """
    run = config.out
    if not holds_run(run):
        return
    if config.resume == "never":
        raise ValueError(f"--out {run} already holds a run: use --resume auto to go on with it, or another --out")
    record, now = read(run), to_json(config)
    differences = resume_differences(record["config"], now)
    if differences:
        raise ValueError(
            f"--out {run} was started with another configuration; {'; '.join(differences)}: "
            "use the old values, or another --out"
        )
    known = _inputs(record)
    for option, digest in (inputs or {}).items():
        if known.get(option, digest) != digest:
            kind, value = "text" if option.startswith("data.") else "model", flatten(now)[option]
            named = " ".join(value) if isinstance(value, list) else value
            short = [str(x)[:12] if x else "none" for x in (digest, known[option])]
            raise ValueError(
                f"--{option} {named} is not the {kind} that the run in {run} was started with (SHA-256 "
                f"{short[0]}, wanted {short[1]}): give the old one, which may lie anywhere, or another --out"
            )


def _inputs(record: dict[str, Any]) -> dict[str, Any]:
    """The digests of what a run reads; none in a run of an older version."""
    inputs = record.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def resumed(config: Config) -> dict[str, Any] | None:
    """The contents of config.json of the run that goes on; None for one that begins."""
    there = config.resume == "auto" and (config.out / "config.json").is_file()
    return read(config.out) if there else None


def has_checkpoint(run: Path, update: int | None = None) -> bool:
    """Whether there is one, or that of `update`; not whether it is whole."""
    name = "update-*[0-9]" if update is None else f"update-{update:08d}"
    return any((run / CHECKPOINTS).glob(f"{name}/{MANIFEST}"))


def finished(config: Config) -> str | None:
    """Where a run has nothing left to do: how to export it, and how to prolong it. Raises ValueError as `check`."""
    record, run = resumed(config), config.out
    try:
        status = read_json(run / "status.json")
        update = int(status["update"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if record is None or status.get("state") != "finished" or not has_checkpoint(run, update):
        return None
    check(config)
    if flatten(record["config"]).get("optim.duration") != config.optim.duration:
        return None
    unit = config.optim.unit
    return (
        f"the run in {run} is finished, after update {update}; a larger --optim.duration than its "
        f"{config.optim.duration:g} {unit} makes it go on\nnext: {export_line(run)}"
    )


def export_line(run: Path) -> str:
    """What to type to make a model of a run: a folder beside it."""
    model = run.with_name(f"{run.name}-model")
    return console.command_line("export", run, "--out", model, *(["--overwrite"] if model.exists() else []))


def start(run: Path, record: dict[str, Any], tokenizer: Path) -> float:
    """Make the folder with `record` as config.json and a copy of the tokenizer; its duration before this.

    In a started one config.json stays, but for where its text and models lie now, and a longer duration.
    """
    duration = record["config"]["optim"]["duration"]
    if not (run / "config.json").is_file():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tokenizer, run / "tokenizer", dirs_exist_ok=True)
        write_json(run / "config.json", record)
        return duration
    saved = read(run)
    if not _inputs(saved):
        log.warning(
            "%s was started by an older version, which kept no digests of text and models: those given now are taken "
            "for the ones that it was started with, and their digests are kept from now on",
            run,
        )
    before = flatten(saved["config"]).get("optim.duration", duration)
    changed = {**saved, "config": copy.deepcopy(saved["config"]), "inputs": record["inputs"] | _inputs(saved)}
    for name in (*PATHS, "optim.duration"):
        section, _, field = name.partition(".")
        changed["config"].setdefault(section, {})[field] = record["config"][section][field]
    if changed != saved:
        write_json(run / "config.json", changed)
    return before


def read(run: Path) -> dict[str, Any]:
    """The contents of RUN/config.json. Raises ValueError where it is none of ours."""
    path, found = run / "config.json", kind(run)
    if found is not None and found.for_run:
        raise ValueError(f"{run} is {found.title}, wanted a run: {found.for_run.format(run, run.parent)}")
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"{run} is not a run folder: wanted {path}, which `python -m fastdistil.pretrain` writes"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not a run's configuration ({error}): start another --out") from None
    for name in ("config", "student"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"{path} is not a run's configuration ({name} must be an object): start another --out")
    return record


class Kind(NamedTuple):
    """What a folder may be."""

    title: str
    marks: tuple[str, ...]
    """Names, as patterns, of which such a folder holds each."""
    for_model: str = ""
    """What to do with it where a model is wanted, for the folder {0} in {1}; nothing if it is one."""
    for_run: str = ""
    """Likewise where a run is wanted."""


EXPORT = "export it first, by `python -m fastdistil.export {0} --out FOLDER`, and give FOLDER"
KINDS = (
    Kind(
        "a checkpoint of a run",
        ("manifest.json", "weights.safetensors"),
        "export the run, by `python -m fastdistil.export {1}/.. --out FOLDER`, and give FOLDER",
        "give the run, {1}/..",
    ),
    Kind("a run", (STATUS,), EXPORT),
    Kind("a run", ("config.json", "checkpoints"), EXPORT),
    Kind(
        "a folder of shards", ("meta.json", "counts.npy"), "give a model's folder", "give the folder of a run on them"
    ),
    Kind("a study", ("settings.json", "logs"), "give one of {0}/models", "give one of {0}/runs"),
    Kind("a model", ("config.json", "*.safetensors"), "", "give the folder of the run that it was exported from"),
    Kind("a model", ("config.json", "*.bin"), "", "give the folder of the run that it was exported from"),
)


def kind(path: Path) -> Kind | None:
    """The first of KINDS that a folder is, by the names in it; None for any other, and where there is no folder."""
    return next((k for k in KINDS if all(any(path.glob(mark)) for mark in k.marks)), None) if path.is_dir() else None


def is_run(path: Path) -> bool:
    """Whether the folder is that of a run."""
    found = kind(path)
    return found is not None and not found.for_run


def require_model(path: Path) -> None:
    """Refuse a folder of ours that is something else where a model is wanted (ValueError)."""
    found = kind(path)
    if found is not None and found.for_model:
        raise ValueError(f"{path} is {found.title}, wanted a model: {found.for_model.format(path, path.parent)}")


GRACE = 2
"""Seconds after the timeout: the ranks that wait come first, with an exception."""


class Watchdog:
    """Writes the stacks of this process unless `restart` is called again within `timeout_s` seconds.

    A collective that waits longer than --engine.timeout-s fails on the ranks that wait, not on the one they wait for.
    When that one has done nothing for as long, it writes down where all its threads stand and ends, too. A thread of
    faulthandler's own does it, whatever the interpreter is doing. A process that the system has stopped (SIGSTOP)
    writes nothing, and torchrun kills it 30 s later.

    Args:
        alone: no other rank waits for this one: its stacks are written, it may go on.
    """

    def __init__(self, run: Path, rank: int, timeout_s: int, *, alone: bool) -> None:
        self.path = run / STACKS / f"rank-{rank:05d}.txt"
        self.seconds, self.alone = timeout_s + GRACE, alone
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")  # open now: faulthandler opens nothing
        except OSError as error:
            raise OSError(
                f"--out {run} is also where ranks that hang write their stacks ({error}): name a place where "
                "every host can write"
            ) from error
        self.update = 0  # the one that is being made, counted from 1
        faulthandler.enable()  # a crash in native code says where, on stderr
        self.restart()

    def restart(self) -> None:
        """The process is alive: count the seconds anew. Some microseconds."""
        faulthandler.dump_traceback_later(self.seconds, file=self.file, exit=not self.alone)

    def failed(self, error: BaseException) -> None:
        """Keep the traceback of what ends this rank, which a launcher may lose among others' output."""
        faulthandler.cancel_dump_traceback_later()
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        traceback.print_exception(error, file=self.file)
        self.file.flush()

    def close(self) -> None:
        """Stop watching; a file in which nothing stands is removed."""
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        with contextlib.suppress(OSError):  # others' stand there, or somebody removed the folder
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()
