"""A run's copy on an object store, made while it trains: `--mirror s3://bucket/runs/a`, or any URL that fsspec knows.

It is laid out as the run folder. Of a checkpoint the manifest is written last, once the sizes of the other files have
been read back, and removed first: a checkpoint there is whole or none, and the last good one stays until another is.
Uploads never hold the run up. torch is not needed, as a run is fetched before it is begun.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from fastdistil.remote.storage import storage
from fastdistil.run import folder
from fastdistil.run.command import Launched
from fastdistil.run.config import Config, resume_differences
from fastdistil.run.files import read_json, sha256, write_bytes

log = logging.getLogger("fastdistil")

RECORDS = ("config.json", "metrics.jsonl", "status.json", "console.log")
"""What is there beside tokenizer and checkpoints, as far as the run has it."""
_BLOCK = 2**24
_CHECKPOINT = re.compile(r"update-(\d{8,})")
_FILE = re.compile(r"\w+\.\w+")  # of a checkpoint: it leads to no other folder


class _Waiting(NamedTuple):
    """A checkpoint that is to be uploaded. Its files are open, so that it may be removed meanwhile."""

    name: str
    files: dict[str, IO[bytes]]

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class _Store:
    """Files below a URL."""

    def __init__(self, option: str, url: str) -> None:
        from fsspec.asyn import AsyncFileSystem

        self.url = url
        self.system, self.root = storage(option, url)
        # An object appears whole; a file of a file system under its name does where it is renamed to it.
        self.has_objects = isinstance(self.system, AsyncFileSystem)

    def path(self, *names: str) -> str:
        return "/".join((self.root, *names))

    def read(self, *names: str) -> bytes | None:
        """The contents of a file; None where there is none."""
        try:
            return self.system.cat_file(self.path(*names))
        except FileNotFoundError:
            return None

    def write(self, data: bytes, *names: str) -> None:
        """Replace a small file."""
        path = self.path(*names)
        if self.has_objects:
            self.system.pipe_file(path, data)
        else:
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(f"{path}.part", data)
            self.system.mv(f"{path}.part", path)
        self.require_size(path, len(data))

    def upload(self, file: IO[bytes], *names: str, num_bytes: int) -> None:
        """Write a large file, which is not whole before this returns."""
        path = self.path(*names)
        if not self.has_objects:
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        file.seek(0)
        with self.system.open(path, "wb") as there:
            shutil.copyfileobj(file, there, _BLOCK)
        self.require_size(path, num_bytes)

    def require_size(self, path: str, wanted: int) -> None:
        """Raises OSError where a file that was written has another size."""
        if (got := self.system.info(path)["size"]) != wanted:
            raise OSError(f"{path} has {got} bytes after {wanted} were written")

    def checkpoints(self) -> dict[int, str]:
        """The names of checkpoints by their updates, newest first, whole or not."""
        try:
            listed = self.system.ls(self.path(folder.CHECKPOINTS), detail=False)
        except FileNotFoundError:
            return {}
        names = [path.rstrip("/").rpartition("/")[2] for path in listed]
        found = {int(name.removeprefix("update-")): name for name in names if _CHECKPOINT.fullmatch(name)}
        return dict(sorted(found.items(), reverse=True))

    def remove(self, name: str) -> None:
        """Remove a checkpoint so that it is whole or gone at every moment."""
        path = self.path(folder.CHECKPOINTS, name)
        if self.system.exists(f"{path}/{folder.MANIFEST}"):
            self.system.rm_file(f"{path}/{folder.MANIFEST}")
        if self.system.exists(path):
            self.system.rm(path, recursive=True)


class Mirror:
    """Uploads checkpoints in a thread of its own, the newest first; what fails is said and made up by the next. Rank 0.

    Args:
        url: where to; of this run alone.
        run: the run folder.
        keep: how many checkpoints stay there.
    """

    def __init__(self, url: str, run: Path, *, keep: int) -> None:
        self.store, self.run, self.keep = _Store("--mirror", url), run, keep
        self.thread, self.lock = ThreadPoolExecutor(1), threading.Lock()
        self.open: Future[None] | None = None
        self.waiting: _Waiting | None = None
        self.newest: Path | None = None
        self.failure: str | None = None
        self.has_begun = False
        self.seconds = 0.0  # that the last upload took

    def send(self, checkpoint: Path) -> None:
        """Begin to upload a whole checkpoint, after the one that is under way; one that waits gives way to it."""
        self.newest = checkpoint
        try:
            names = (*read_json(checkpoint / folder.MANIFEST)["files"], folder.MANIFEST)
            waiting = _Waiting(checkpoint.name, {name: (checkpoint / name).open("rb") for name in names})
        except (OSError, ValueError, KeyError, TypeError) as error:
            return self._failed(checkpoint.name, error)
        with self.lock:
            before, self.waiting = self.waiting, waiting
        if before is not None:
            before.close()
        self.open = self.thread.submit(self._send)

    def _failed(self, name: str, error: Exception) -> None:
        said = (str(error).strip() or repr(error)).splitlines()[0]
        self.failure = f"{self.store.url} lacks {name} ({type(error).__name__}: {said})"
        log.error("mirror: %s; the run goes on, and the next checkpoint is tried", self.failure)

    def _send(self) -> None:
        with self.lock:
            waiting, self.waiting = self.waiting, None
        if waiting is None:  # the upload before has taken it
            return
        begin = time.monotonic()
        try:
            self._send_records()  # before the manifest: metrics up to this checkpoint are there when it is
            num_bytes = self._send_checkpoint(waiting)
        except Exception as error:  # every storage raises its own
            return self._failed(waiting.name, error)
        finally:
            waiting.close()
        self.failure = None
        if num_bytes:
            where, self.seconds = self.store.url, time.monotonic() - begin
            log.info("mirror: %s is in %s, %.1f MB in %.1f s", waiting.name, where, num_bytes / 1e6, self.seconds)
        try:
            self._remove_old(waiting.name)
        except Exception as error:  # what was just written is safe, and the run needs no more
            log.warning("mirror: an old checkpoint stays in %s: %s", self.store.url, error)

    def _send_records(self) -> None:
        records = [self.run / name for name in RECORDS]
        records += () if self.has_begun else sorted((self.run / "tokenizer").iterdir())
        for path in records:
            if path.is_file():
                self.store.write(path.read_bytes(), path.relative_to(self.run).as_posix())
        self.has_begun = True

    def _send_checkpoint(self, waiting: _Waiting) -> int:
        """Bytes that were written; 0 where it was there."""
        place = (folder.CHECKPOINTS, waiting.name)
        manifest = waiting.files[folder.MANIFEST].read()
        there = self.store.read(*place, folder.MANIFEST)
        if there == manifest:
            return 0
        if there is not None:  # the same update again, after a resume from an older one
            self.store.remove(waiting.name)
        wanted = {name: about["bytes"] for name, about in json.loads(manifest)["files"].items()}
        for name, num_bytes in wanted.items():
            self.store.upload(waiting.files[name], *place, name, num_bytes=num_bytes)
        self.store.write(manifest, *place, folder.MANIFEST)
        return sum(wanted.values())

    def _remove_old(self, name: str) -> None:
        """Remove what is older than the newest `keep` whole checkpoints, counted from `name`, as locally."""
        num_whole = 0
        for update, other in self.store.checkpoints().items():
            if update > int(name.removeprefix("update-")):
                continue
            if num_whole < self.keep and self.store.read(folder.CHECKPOINTS, other, folder.MANIFEST) is not None:
                num_whole += 1
            else:
                self.store.remove(other)

    def is_uploading(self, wait_s: float) -> bool:
        """Whether an upload is still under way after so many seconds, or its end."""
        return self.open is not None and bool(wait([self.open], wait_s).not_done)

    def try_again(self) -> None:
        """Begin the last upload anew where it has failed."""
        if self.failure is not None and self.newest is not None:
            self.send(self.newest)

    def end(self) -> None:
        """Write how the run has ended, and stop."""
        try:
            self._send_records()
        except Exception as error:
            log.error("mirror: %s does not say how the run has ended: %s", self.store.url, error)
        self.thread.shutdown()


def bring(parse: Callable[[], Config], here: Launched) -> Config:
    """What `parse` gives, read anew once its run was brought here, whose own options stand for those not given.

    With --resume auto the newest whole checkpoint of --mirror is copied into --out where that has no newer one. Ranks
    of the first host wait for the one that does it; other hosts have no part in it. Raises ValueError where the mirror
    cannot be read or written, or holds another run.
    """
    config = parse()
    if config.mirror is None or config.dry_run or here.rank != here.local_rank:
        return config
    from filelock import FileLock

    key = hashlib.sha256(str(config.out.absolute()).encode()).hexdigest()[:16]
    with _one_line(f"--mirror {config.mirror} cannot be read and written"):
        store = _Store("--mirror", config.mirror)
        with FileLock(Path(tempfile.gettempdir(), f"fastdistil-{key}.lock")):
            folder.holds_run(config.out)
            has_come = config.resume == "auto" and _fetch_newest(store, config.out)
            _require_own(store, config)
            if here.rank == 0:
                store.write(b"", ".may-write")
                store.system.rm_file(store.path(".may-write"))
    return parse() if has_come else config


def fetch(url: str, run: Path) -> None:
    """Make the folder `run` of the run at a URL, with its newest whole checkpoint.

    Raises ValueError where there is none.
    """
    with _one_line(f"{url} cannot be read"):
        if not _fetch_newest(_Store("the run", url), run):
            raise ValueError(f"{url} holds no run with a whole checkpoint: wanted what --mirror has written")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What a storage raises inside becomes a ValueError of one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # every storage raises its own
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{what} ({type(error).__name__}: {said}): see that the address and the login are right"
        ) from error


def _require_own(store: _Store, config: Config) -> None:
    """Refuse a place that holds another run."""
    found = store.read("config.json")
    if found is None or (config.resume == "auto" and not folder.holds_run(config.out)):  # it had no whole checkpoint
        return
    if config.resume == "never":
        raise ValueError(
            f"--mirror {store.url} already holds a run: use --resume auto to go on with it, or another --mirror"
        )
    try:
        theirs, ours = json.loads(found), folder.read(config.out)
        differences = resume_differences(theirs["config"], ours["config"])
        is_own = theirs["student"] == ours["student"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--mirror {store.url} holds no run that is that of {config.out} ({error})") from None
    if differences or not is_own:
        about = differences[0] if differences else "another student"
        raise ValueError(f"--mirror {store.url} holds another run than --out {config.out} ({about}): give another one")


def _fetch_newest(store: _Store, run: Path) -> bool:
    """Whether a checkpoint was copied into the run folder. Raises ValueError where there are some and none is whole."""
    here = [
        int(path.parent.name.removeprefix("update-"))
        for path in run.glob(f"{folder.CHECKPOINTS}/update-*[0-9]/{folder.MANIFEST}")
    ]
    there = {
        name: manifest
        for update, name in store.checkpoints().items()
        if update > max(here, default=-1)
        and (manifest := store.read(folder.CHECKPOINTS, name, folder.MANIFEST)) is not None
    }
    for name, manifest in there.items():
        final = run / folder.CHECKPOINTS / name
        part = final.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        reason = _copy(store, name, manifest, part)
        if reason is None:
            _fetch_records(store, run)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            log.info("mirror: brought %s of %s to %s", name, store.url, run)
            return True
        shutil.rmtree(part)
        log.warning("mirror: passing over %s of %s: %s", name, store.url, reason)
    if there and not here:
        raise ValueError(
            f"none of the {len(there)} checkpoints in {store.url} can be used (reasons above): restore one, or "
            "give another --mirror"
        )
    return False


def _copy(store: _Store, name: str, manifest: bytes, part: Path) -> str | None:
    """Copy a checkpoint to the folder `part`. Why it cannot be used, or None."""
    try:
        wanted = {file: about["sha256"] for file, about in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error!r})"
    for file, digest in wanted.items():
        if not _FILE.fullmatch(file):
            return f"its manifest names {file!r}, which is no file of a checkpoint"
        try:
            store.system.get_file(store.path(folder.CHECKPOINTS, name, file), str(part / file))
        except FileNotFoundError:
            return f"{file} is missing"
        if sha256(part / file) != digest:
            return f"{file} differs from its SHA-256 in the manifest"
    write_bytes(part / folder.MANIFEST, manifest, durable=True)
    return None


def _fetch_records(store: _Store, run: Path) -> None:
    (run / "tokenizer").mkdir(exist_ok=True)
    beside = [path.rpartition("/")[2] for path in store.system.ls(store.path("tokenizer"), detail=False)]
    for name in (*RECORDS, *(f"tokenizer/{name}" for name in beside)):  # config.json first, which makes it a run
        if (data := store.read(name)) is not None:
            write_bytes(run / name, data, durable=True)
