"""Checkpoints that are whole or absent, and verified before they are believed.

    RUN/checkpoints/update-00000500/
        weights.safetensors     fp32 master weights of the student
        optimizer.safetensors   both moments of AdamW, fp32
        state.json              update, tokens seen, what is needed beside tensors
        manifest.json           size and SHA-256 of the three, and the id of the set that each of them holds; written
        last

A checkpoint is made under a temporary name (*.part), fsynced, then renamed; an old one is renamed before it is removed.
It holds full tensors, whatever the number of ranks or the ZeRO stage, and no pickle. Rank 0 alone reads and writes; the
others get tensors over the process group, so one disk decides.
"""

import atexit
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistil.run.command import Failed
from fastdistil.run.files import read_json, sha256, sync
from fastdistil.run.folder import CHECKPOINTS as FOLDER
from fastdistil.run.folder import MANIFEST
from fastdistil.run.ranks import Ranks

log = logging.getLogger("fastdistil")

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, OPTIMIZER, STATE)  # what the manifest lists
_NAME = re.compile(r"update-(\d{8,})")


class CheckpointError(Failed, OSError):
    """A checkpoint could not be written: the message says where, how many bytes it needs and how many are free."""


def folder_of(run: Path, update: int) -> Path:
    """Where the checkpoint made after `update` updates lies."""
    return run / FOLDER / f"update-{update:08d}"


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError, with bytes needed and free, where `num_bytes` will not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder} has {free:,} bytes free, a checkpoint needs {num_bytes:,}: free some space, or choose another "
            "--out"
        )


def save(run: Path, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `state["update"]`, then remove all but the newest `keep` good ones. Rank 0 only.

    Args:
        tensors: an engine's `state()`.
        state: JSON values; "update" is required.

    Raises CheckpointError naming path, bytes needed and free where it cannot be written, or the tensor that is not
    finite; earlier checkpoints stay whole.
    """
    _require_finite(run, tensors, state["update"])
    final = folder_of(run, state["update"])
    num_bytes = sum(t.nbytes for t in tensors.values())
    part = final.with_name(f"{final.name}.part")
    for litter in final.parent.glob("*.part"):  # of a save or a removal that was killed
        shutil.rmtree(litter, ignore_errors=True)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        require_space(final.parent, num_bytes + 2**20)
        part.mkdir()
        _write(part, tensors, state)
        sync(part)
        if final.exists():  # the same update again, after a resume from an older one
            _remove(final)
        os.rename(part, final)
        sync(final.parent)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises its own type on a full disk
        shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(run).free if run.exists() else 0
        raise CheckpointError(
            f"cannot write the checkpoint {final} ({num_bytes:,} bytes, {free:,} free): {error}. "
            "Earlier checkpoints are untouched"
        ) from error
    _remove_old(run, state["update"], keep)
    return final


def _require_finite(run: Path, tensors: dict[str, Tensor], update: int) -> None:
    for name, tensor in tensors.items():
        # A sum is finite only where every term is, and reads 20 times faster; but finite terms may overflow it.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise CheckpointError(
                f"no checkpoint of update {update} in {run}: {name} is not finite. Earlier checkpoints are untouched"
            )


def _write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """The four files of a checkpoint, on the disk when this returns."""
    weights = {k.removeprefix("weight."): v.contiguous() for k, v in tensors.items() if k.startswith("weight.")}
    moments = {k: v.contiguous() for k, v in tensors.items() if not k.startswith("weight.")}
    set_id = uuid.uuid4().hex
    hashes: dict[str, Future[str]] = {}
    # A file is hashed and synced while the next one is written, the largest first.
    with ThreadPoolExecutor() as pool:
        syncs = []
        for name, content in ((OPTIMIZER, moments), (WEIGHTS, weights), (STATE, state)):
            if name == STATE:
                (folder / name).write_text(json.dumps(content | {"set": set_id}, indent=1))
            else:
                save_file(content, folder / name, {"format": "pt", "set": set_id, "file": name})
            hashes[name] = pool.submit(sha256, folder / name)
            syncs.append(pool.submit(sync, folder / name))
        for done in syncs:
            done.result()
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": found.result()} for name, found in hashes.items()
    }
    (folder / MANIFEST).write_text(json.dumps({"set": set_id, "files": files}, indent=1))
    sync(folder / MANIFEST)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that it is whole or gone at every moment."""
    litter = checkpoint.with_name(f"{checkpoint.name}.old.part")
    os.rename(checkpoint, litter)
    shutil.rmtree(litter, ignore_errors=True)


def _remove_old(run: Path, update: int, keep: int) -> None:
    """Remove what is older than the newest `keep` checkpoints that look whole, counted from that of `update`.

    That one has just been read back, so a good one always stays; hashing the others again would triple the work of a
    save. Newer ones are not counted: the run went on from an older one because they are damaged.
    """
    checkpoints = [p for p in _all(run) if _update_of(p) <= update]
    if len(checkpoints) <= keep:
        return
    num_good = 0
    for checkpoint in reversed(checkpoints):
        if num_good < keep:
            num_good += verify(checkpoint, contents=False) is None
            continue
        try:
            _remove(checkpoint)
        except OSError as error:  # what was just written is safe, and the run needs no more
            log.warning("%s stays, it cannot be removed: %s", checkpoint, error)


class Saver:
    """Saves in a thread of its own: the run goes on while the disk works. Rank 0 only.

    What is being written when the process ends is finished first, whatever ends it but a signal.

    Args:
        keep: how many checkpoints stay.
        go_on: whether the run is to outlive one that cannot be written.
        then: is given the folder of each one that is whole, in that thread.
    """

    def __init__(self, run: Path, *, keep: int, go_on: bool, then: Callable[[Path], None] | None = None) -> None:
        self.run, self.keep, self.go_on, self.then = run, keep, go_on, then
        self.thread, self.open = ThreadPoolExecutor(1), None
        self.seconds = 0.0  # that the last one took to write
        atexit.register(self.thread.shutdown)  # a rank that has lost another one leaves without waiting for threads

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write what `save` would, after the one before is done; neither argument may change any more.

        The one before may have failed, which is logged: this one has more, and the disk may have room again.
        """
        try:
            if self.open is not None:
                self.open.result()
        except CheckpointError as error:
            log.error("%s without this checkpoint: %s", "going on" if self.go_on else "saving once more", error)
        self.open = self.thread.submit(self._save, tensors, state)

    def is_writing(self) -> bool:
        """Whether another `save` would have to wait."""
        return self.open is not None and not self.open.done()

    def failure(self) -> BaseException | None:
        """Why the last one could not be written, where the run is to end for that."""
        return self.open.exception() if self.open is not None and self.open.done() and not self.go_on else None

    def _save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        begin = time.perf_counter()
        checkpoint = save(self.run, tensors, state, keep=self.keep)
        self.seconds = time.perf_counter() - begin
        log.info("wrote %s (%.1f s)", checkpoint, self.seconds)
        if self.then is not None:
            self.then(checkpoint)

    def close(self) -> None:
        """Wait for the last one, which must succeed: nothing comes after it. Raises CheckpointError."""
        if self.open is not None:
            self.open.result()
        self.thread.shutdown()


def _all(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not."""
    folder = run / FOLDER
    found = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_update_of)


def _update_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("update-"))


def verify(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None. Compares every file with the manifest.

    Without `contents` all but the hashes.
    """
    if checkpoint.is_symlink():
        return "it is a link"
    for name in (*FILES, MANIFEST):
        path = checkpoint / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing, or no file of its own"
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except ValueError as error:
        return f"{MANIFEST} cannot be read ({error})"
    files = manifest["files"] if manifest.keys() == {"set", "files"} else None
    if not isinstance(files, dict) or sorted(files) != sorted(FILES):
        return f"{MANIFEST} does not list exactly {', '.join(FILES)}"
    try:
        return _first_difference(checkpoint, manifest["set"], files, contents=contents)
    except OSError as error:
        return f"a file cannot be read ({error})"
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"a file is not a checkpoint's ({error!r})"


def _first_difference(checkpoint: Path, set_id: Any, files: dict[str, Any], *, contents: bool) -> str | None:
    """What of a checkpoint is not as its manifest says, or belongs to another one."""
    for name in FILES:
        path, wanted = checkpoint / name, files[name]
        size = path.stat().st_size
        if not isinstance(wanted, dict) or wanted.keys() != {"bytes", "sha256"} or size != wanted["bytes"]:
            return f"{name} has {size} bytes, the manifest says {wanted}"
        if contents and sha256(path) != wanted["sha256"]:
            return f"{name} differs from its SHA-256 in the manifest"
    for name in (WEIGHTS, OPTIMIZER):
        with safe_open(checkpoint / name, "pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("set"), metadata.get("file")) != (set_id, name):
                return f"{name} belongs to another checkpoint, or to another place in this one"
    state = read_json(checkpoint / STATE)
    if state["set"] != set_id:
        return f"{STATE} belongs to another checkpoint"
    if folder_of(checkpoint.parent.parent, state["update"]) != checkpoint:
        return f"it holds update {state['update']}, which its name does not say"
    return None


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; says why a newer one was passed over. None where there is none at all.

    Raises ValueError where there are checkpoints and none can be used: starting over silently would lose them.
    """
    candidates = _all(run)
    for checkpoint in reversed(candidates):
        reason = verify(checkpoint)
        if reason is None:
            return checkpoint
        again = "going on with the run makes it again; with a finished one, once it is removed"
        log.warning("passing over %s: %s (%s)", checkpoint, reason, again)
    if candidates:
        raise ValueError(
            f"none of the {len(candidates)} checkpoints in {run / FOLDER} can be used (reasons above): restore one, or "
            "start another --out"
        )
    return None


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(fp32 weights, what else `save` was given) of a checkpoint that verifies."""
    state = read_json(checkpoint / STATE)
    del state["set"]
    return load_file(checkpoint / WEIGHTS), state


class Checkpoint(NamedTuple):
    """What a run goes on from: full tensors for `Engine.load`, on the CPU, and the JSON values saved with them."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def load(run: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest good checkpoint, on every rank; None where the run has none.

    Raises ValueError, on every rank alike, where there are checkpoints and none can be used.
    """
    tensors: dict[str, Tensor] = {}
    header: Any = None
    with ranks.together():  # or the others would wait for a broadcast that never comes
        if ranks.is_main and (checkpoint := newest(run)) is not None:
            weights, state = _read(checkpoint)
            tensors = {f"weight.{k}": v for k, v in weights.items()} | load_file(checkpoint / OPTIMIZER)
            header = state, [(name, tuple(t.shape)) for name, t in tensors.items()]
    header = ranks.broadcast_object(header)
    if header is None:
        return None
    state, shapes = header
    for name, shape in shapes:
        on_device = tensors[name].to(ranks.device) if ranks.is_main else torch.empty(shape, device=ranks.device)
        tensors[name] = ranks.broadcast_tensor(on_device).cpu()  # a sync, once at the start
    return Checkpoint(tensors, state)


def load_weights(run: Path, update: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(fp32 student weights by our names, state) of a run's checkpoint: the newest good one, or that of `update`.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    checkpoint = newest(run) if update is None else folder_of(run, update)
    if checkpoint is None or not checkpoint.is_dir():
        have = ", ".join(p.name for p in _all(run)) or "none"
        raise FileNotFoundError(
            f"{run} has no checkpoint{'' if update is None else f' of update {update}'} (found: {have}): let the run "
            "reach one, see --log.checkpoint-every"
        )
    if (reason := verify(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} cannot be used: {reason}")
    return _read(checkpoint)
