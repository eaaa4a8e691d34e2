"""The folder of a run: RUN/config.json says what it is, RUN/tokenizer what its ids mean. Standard library only."""

import json
import shutil
from pathlib import Path
from typing import Any

from fastdistil.config import Config, resume_differences, to_json


def check(config: Config) -> None:
    """Refuse an --out that holds something else, another run, or this run with another configuration (ValueError)."""
    run = config.out
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file: give a folder")
    if not (run / "config.json").is_file():
        if run.is_dir() and any(run.iterdir()):
            raise ValueError(f"--out {run} is not empty and holds no run: give a new folder")
        return
    if config.resume == "never":
        raise ValueError(
            f"--out {run} already holds a run: use --resume auto to go on with it, or another --out"
        )
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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a run's configuration ({error}): start another --out"
        ) from None
    return record
