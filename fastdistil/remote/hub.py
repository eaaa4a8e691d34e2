"""Models by their names on Hugging Face's hub: fetched into the hub's own cache, and given to it.

`huggingface_hub` is imported where it is used: it costs 0.4 s, and only names need it.
"""

import functools
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdistil.run.command import Failed, launched

log = logging.getLogger("fastdistil")

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?")
_SNAPSHOT = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]+)$")
TOKENIZER = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "*.model"),
    *("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*.json"),
)
"""What of a model is fetched for its tokenizer, with what says how long a text it reads."""
_MODEL = (
    *(*TOKENIZER, "README.md", "[0-9]_*/*.txt", "[0-9]_*/*.safetensors"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
"""Fetched only where a folder has no safetensors."""


def snapshot(path: str | Path) -> tuple[str, str] | None:
    """(name, commit) on the hub of a folder in a hub's cache, of this machine or another; None of any other folder."""
    found = _SNAPSHOT.search(str(path))
    return (found["name"].replace("--", "/"), found["revision"]) if found else None


def name_of(path: str | Path) -> tuple[str, str | None] | None:
    """(name, revision) on the hub that a name[@revision] or a `snapshot` stands for; None of what is no name."""
    found = _NAME.fullmatch(str(path))
    return (found["name"], found["revision"]) if found else snapshot(path)


@functools.cache
def folder_of(option: str, path: str | Path, files: tuple[str, ...] = ()) -> Path:
    """The folder of a model: `path` itself where there is one, or where it is no name; else its snapshot in the cache.

    Processes that fetch the same model wait for one another, by the hub's own locks.

    Args:
        option: what named it, for the error.
        path: a folder, NAME or NAME@REVISION on the hub (a branch, a tag or a commit).
        files: patterns of what is wanted. None: the model, as safetensors if it has any.

    Raises ValueError where the hub does not give it.
    """
    named = name_of(path)
    if Path(path).exists() or named is None:
        return Path(path)
    name, revision = named
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if launched().local_rank or not sys.stderr.isatty():
        disable_progress_bars()
    log.info("%s %s is no folder here: taking the model of that name from the hub", option, path)
    with _one_line(f"{option} {path}: there is no such folder, and the hub does not give a model of that name"):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files or _MODEL)))
        without = (
            [] if files else [f for f in (folder, *folder.glob("[0-9]_Dense")) if not any(f.glob("*.safetensors"))]
        )
        pickles = [(f.relative_to(folder) / name).as_posix() for f in without for name in _PICKLES]
        if pickles:
            snapshot_download(name, revision=folder.name, allow_patterns=pickles)
    return folder


def card_of(folder: Path) -> dict[str, Any]:
    """What the metadata of a model's card say, e.g. license and language; nothing where there is none to be read."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # the card is somebody's text, and YAML's errors are as many as its features
        return {}


def require_place(name: str, *, overwrite: bool) -> None:
    """Refuse a name on the hub that this login cannot push to (ValueError), before there is anything to push.

    One that is taken is refused unless `overwrite`.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"--push wants USER/NAME or ORGANISATION/NAME, got {name}")
    from huggingface_hub import HfApi

    api, user = HfApi(), name.split("/")[0]
    with _one_line(f"--push {name}: the hub does not say whether it may be pushed to"):
        about = api.whoami()
        taken = api.repo_exists(name)
    own = [about["name"], *(one["name"] for one in about.get("orgs", ()))]
    if user not in own:
        raise ValueError(
            f"--push {name}: the login is that of {about['name']}, which may push to {' '.join(own)} alone"
        )
    if taken and not overwrite:
        raise ValueError(f"--push {name} exists on the hub: choose another, or replace its files by --overwrite")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Where on the hub the files of a folder now are. What else the repository has stays.

    Raises Failed where they could not be uploaded; the folder is whole.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with _one_line(f"{folder} is whole, and could not be pushed to {name}"):
            url = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export by fastdistil")
    except ValueError as error:
        raise Failed(f"{error}; `hf upload {name} {shlex.quote(str(folder))}` tries it again") from error
    return str(url)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What huggingface_hub raises inside becomes a ValueError of one line: `what`, why, and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise ValueError(f"{what}, and nobody has logged in: `hf auth login`") from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{what} (its owner asks for an agreement): give it on its page, and `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{what} (not found, or private): correct it, or `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{what} (it has no such revision): name a branch, a tag or a commit after the @") from None
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{what} (the hub cannot be reached, and not all of it is in the cache: {_first_line(error)}): connect, "
            "unset HF_HUB_OFFLINE, or give a folder"
        ) from None
    except Exception as error:  # the hub's, the network's and the file system's own errors
        raise ValueError(f"{what} ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next((line.strip().rstrip(".") for line in str(cause).splitlines() if line.strip()), repr(cause))
