"""Checkpoints that are whole or absent, and verified before they are believed.

    RUN/checkpoints/update-00000500/
        weights.safetensors     fp32 master weights of the student
        optimizer.safetensors   both moments of AdamW, fp32
        state.json              update, tokens seen, what is needed beside tensors
        manifest.json           size and SHA-256 of the three; written last

A checkpoint is made under a temporary name, fsynced, then renamed. It holds full tensors, whatever the number of ranks or
the ZeRO stage, and no pickle. Rank 0 alone reads and writes; the others get tensors over the process group, so one disk decides.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistil import dist

log = logging.getLogger("fastdistil")

FOLDER = "checkpoints"
FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"update-(\d{8,})")


class CheckpointError(OSError):
    """A checkpoint could not be written: the message says where, how many bytes it needs and how many are free."""


def folder_of(run: Path, update: int) -> Path:
    """Where the checkpoint made after `update` updates lies."""
    return run / FOLDER / f"update-{update:08d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError with path, bytes needed and bytes free where `num_bytes` will not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder} has {free:,} bytes free, a checkpoint needs {num_bytes:,}: free some space, or choose another --out"
        )


def save(run: Path, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `state["update"]`, then remove all but the newest `keep`. Rank 0 only.

    Args:
        tensors: an engine's `state()`.
        state: JSON values; "update" is required.

    Raises CheckpointError naming path, bytes needed and free where it cannot be written; earlier checkpoints stay whole.
    """
    final = folder_of(run, state["update"])
    final.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(t.nbytes for t in tensors.values())
    require_space(final.parent, num_bytes + 2**20)
    part = final.with_name(f"{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    try:
        part.mkdir()
        weights = {
            k.removeprefix("weight."): v.contiguous()
            for k, v in tensors.items()
            if k.startswith("weight.")
        }
        moments = {k: v.contiguous() for k, v in tensors.items() if not k.startswith("weight.")}
        save_file(weights, part / FILES[0], metadata={"format": "pt"})
        save_file(moments, part / FILES[1], metadata={"format": "pt"})
        (part / FILES[2]).write_text(json.dumps(state, indent=1))
        manifest = {
            name: {"bytes": (part / name).stat().st_size, "sha256": _sha256(part / name)}
            for name in FILES
        }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for name in (*FILES, "manifest.json"):
            _fsync(part / name)
        _fsync(part)
        shutil.rmtree(
            final, ignore_errors=True
        )  # the same update again, after a resume from an older one
        os.rename(part, final)
        _fsync(final.parent)
    except Exception as error:  # safetensors raises its own type on a full disk
        shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(final.parent).free
        raise CheckpointError(
            f"cannot write the checkpoint {final} ({num_bytes:,} bytes, {free:,} free): {error}. Earlier checkpoints are untouched"
        ) from error
    # newer ones were passed over as damaged when the run went on from an older one: they must not push this one out
    not_newer = [p for p in _all(run) if _update_of(p) <= state["update"]]
    for old in not_newer[:-keep]:
        shutil.rmtree(old)
    return final


def _all(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not."""
    folder = run / FOLDER
    found = (
        [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=_update_of)


def _update_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("update-"))


def verify(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None. Compares every file with the manifest."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    if not isinstance(manifest, dict) or sorted(manifest) != sorted(FILES):
        return f"manifest.json does not list exactly {', '.join(FILES)}"
    for name in FILES:
        path, wanted = checkpoint / name, manifest[name]
        if not path.is_file() or path.is_symlink():
            return f"{name} is missing"
        if not isinstance(wanted, dict) or path.stat().st_size != wanted.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes, the manifest says {wanted}"
        if _sha256(path) != wanted.get("sha256"):
            return f"{name} differs from its SHA-256 in the manifest"
    try:
        update = json.loads((checkpoint / FILES[2]).read_bytes())["update"]
        if folder_of(checkpoint.parent.parent, update) != checkpoint:
            return f"it holds update {update}, which its name does not say"
    except (ValueError, KeyError, TypeError) as error:
        return f"state.json is not a checkpoint's ({error!r})"
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
        log.warning("passing over %s: %s", checkpoint, reason)
    if candidates:
        raise ValueError(
            f"none of the {len(candidates)} checkpoints in {run / FOLDER} can be used (reasons above): restore one, or start another --out"
        )
    return None


class Checkpoint(NamedTuple):
    """What a run goes on from: full tensors for `Engine.load`, on the CPU, and the JSON values saved with them."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def load(run: Path, place: dist.Place) -> Checkpoint | None:
    """The newest good checkpoint, on every rank; None where the run has none.

    Raises ValueError, on every rank alike, where there are checkpoints and none can be used.
    """
    tensors: dict[str, Tensor] = {}
    header: Any = None
    if place.is_main:
        try:
            checkpoint = newest(run)
            if checkpoint is not None:
                tensors = {f"weight.{k}": v for k, v in load_file(checkpoint / FILES[0]).items()}
                tensors |= load_file(checkpoint / FILES[1])
                state = json.loads((checkpoint / FILES[2]).read_bytes())
                header = state, [(name, tuple(t.shape)) for name, t in tensors.items()]
        except ValueError as error:
            header = error  # every rank must hear of it, or the others wait for a broadcast that never comes
    header = dist.broadcast_object(header, place)
    if isinstance(header, ValueError):
        raise header
    if header is None:
        return None
    state, shapes = header
    for name, shape in shapes:
        on_device = (
            tensors[name].to(place.device)
            if place.is_main
            else torch.empty(shape, device=place.device)
        )
        tensors[name] = dist.broadcast_tensor(on_device).cpu()  # a sync, once at the start
    return Checkpoint(tensors, state)


def load_weights(run: Path, update: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(fp32 student weights by our names, state) of a run's checkpoint: the newest good one, or that of `update`.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    checkpoint = newest(run) if update is None else folder_of(run, update)
    if checkpoint is None or not checkpoint.is_dir():
        have = ", ".join(p.name for p in _all(run)) or "none"
        raise FileNotFoundError(
            f"{run} has no checkpoint{'' if update is None else f' of update {update}'} (found: {have}): let the run reach one, see --log.checkpoint-every"
        )
    if (reason := verify(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} cannot be used: {reason}")
    return load_file(checkpoint / FILES[0]), json.loads((checkpoint / FILES[2]).read_bytes())
