"""The folder of a run. Standard library only.

config.json   what it is                  status.json   what became of it
tokenizer/    what its ids mean           .lock         held by the job that works here
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from fastdistil.run.config import Config, resume_differences, to_json

LOCK = ".lock"
STACKS = "stacks"


class Lock:
    """Keeps other jobs out of a run folder while this process lives.

    A POSIX record lock: the system takes it back when the process ends, however it ends; data workers, which are forked, do not
    hold it; over NFS it holds between machines. Raises ValueError, naming the holder, where another process has it.
    """

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        # kept open, and opened nowhere else: closing any descriptor of the file gives the lock away
        self.file = (run / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            self.file.seek(0)
            holder = self.file.read(200).strip() or "another process"
            raise ValueError(
                f"--out {run} is in use by {holder}: wait for it, stop it, or choose another --out"
            ) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()


def write_status(run: Path, state: str, **about: Any) -> None:
    """Replace RUN/status.json: `state` is running, finished, stopped or failed. A job that was killed leaves "running"."""
    record = {"state": state, **about, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    part = run / "status.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(run / "status.json")


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
    part = run / "config.json.part"
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    part.replace(run / "config.json")


def read(run: Path) -> dict[str, Any]:
    """The contents of RUN/config.json. Raises ValueError where it is none of ours."""
    path = run / "config.json"
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record["config"], dict) or not isinstance(record["student"], dict):
            raise ValueError("config and student must be objects")
    except FileNotFoundError:
        raise ValueError(
            f"{run} is not a run folder: wanted {path}, which `python -m fastdistil.pretrain` writes"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's configuration ({error}): start another --out") from None
    return record
