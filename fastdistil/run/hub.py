"""Models by their names on Hugging Face's hub: fetched into the hub's own cache, and given to it.

`huggingface_hub` is imported where it is used: it costs 0.4 s, and only names need it.
"""

import functools
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastdistil.run.command import Failed, launched

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("fastdistil")

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?")
_SNAPSHOT = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})$")
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


def name_of(path: str | Path) -> tuple[str, str | None] | None:
    """(name, revision) on the hub of a name[@revision], or of a snapshot in a hub's cache on any machine; else None."""
    if found := _SNAPSHOT.search(str(path)):
        return found["name"].replace("--", "/"), found["revision"]
    found = _NAME.fullmatch(str(path))
    return (found["name"], found["revision"]) if found else None


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
        without = [] if files else [f for f in (folder, *folder.glob("[0-9]_Dense")) if not any(f.glob("*.safetensors"))]
        pickles = [(f.relative_to(folder) / name).as_posix() for f in without for name in _PICKLES]
        if pickles:
            snapshot_download(name, revision=folder.name, allow_patterns=pickles)
    return folder


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What huggingface_hub raises inside becomes a ValueError of one line: `what`, why, and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(f"{what} (its owner asks for an agreement): give it on its page, and `hf auth login`") from None
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
