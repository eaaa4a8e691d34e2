"""The folder of a run: what it is, what became of it, and what a rank leaves behind when it hangs.

Standard library only.

config.json   what it is                  status.json   what became of it
tokenizer/    what its ids mean           .lock         held by the job that works here
stacks/       rank-00003.txt: where a rank stood that hung or failed
"""

import contextlib
import faulthandler
import json
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from fastdistil.run.config import Config, resume_differences, to_json
from fastdistil.run.files import Lock, read_json, write_json

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


def check(config: Config) -> None:
    """Refuse an --out that holds something else, another run, or this run with another configuration (ValueError)."""
    run = config.out
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file: give a folder")
    if not (run / "config.json").is_file():
        if run.is_dir() and any(p.name not in (LOCK, STACKS) for p in run.iterdir()):
            raise ValueError(f"--out {run} is not empty and holds no run: give a new folder")
        return
    if config.resume == "never":
        raise ValueError(f"--out {run} already holds a run: use --resume auto to go on with it, or another --out")
    differences = resume_differences(read(run)["config"], to_json(config))
    if differences:
        raise ValueError(
            f"--out {run} was started with another configuration; {'; '.join(differences)}: "
            "use the old values, or another --out"
        )


def start(run: Path, record: dict[str, Any], tokenizer: Path) -> None:
    """Make the folder with `record` as config.json and a copy of the tokenizer; a started one is left as it is."""
    if (run / "config.json").is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tokenizer, run / "tokenizer", dirs_exist_ok=True)
    write_json(run / "config.json", record)


def read(run: Path) -> dict[str, Any]:
    """The contents of RUN/config.json. Raises ValueError where it is none of ours."""
    path = run / "config.json"
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
