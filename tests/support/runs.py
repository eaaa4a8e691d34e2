"""Toy runs of `fastdistil.pretrain`: what they are made of, the words that start them, and what they leave behind."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistil.run import checkpoint
from tests.support import toy
from tests.support.launch import options

SHORT = options(
    batch__size=24,
    batch__token_budget=256,
    optim__duration=12,
    optim__unit="updates",
    data__validation_sequences=40,
    data__num_workers=0,
    log__every=4,
    log__validate_every=6,
    log__checkpoint_every=5,
    log__keep_checkpoints=9,
    engine__bucket_elements=10_000,
)
"""12 updates of 3 micro-batches."""


TWO = {"engine__zero_stage": 3, "engine__precision": "bf16", "batch__size": 40, "engine__timeout_s": 120}
"""Changes for a short run of two ranks, which divide neither its 5 micro-batches nor its parameters."""


LONG = {
    "optim__duration": 400,
    "batch__size": 33,
    "log__every": 1,
    "log__validate_every": 10_000,
    "log__keep_checkpoints": 2,
    "resume": "auto",
}
"""Changes for a run of 4 micro-batches an update that lives until something happens to it, with a checkpoint every 5
updates."""


class Done(NamedTuple):
    """A run to its end."""

    run: Path
    printed: str


def make_inputs(root: Path) -> Path:
    """`root`, which now has the folders shards and teacher."""
    toy.make_teacher(root / "teacher", toy.make_shards(root / "shards"))
    return root


def take_head_away(folder: Path) -> None:
    """Leave the encoder in a Hugging Face folder of a BERT, and nothing on it."""
    path = folder / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("cls.")}
    save_file(state, path, metadata={"format": "pt"})


def arguments(root: Path, out: Path, **changes: object) -> list[str]:
    """Module, recipe and options of a short run on what `make_inputs` made."""
    given = options(data__shards=root / "shards", teacher__path=root / "teacher", out=out)
    return ["fastdistil.pretrain", "distilbert", *given, *SHORT, *options(**changes)]


def long_arguments(root: Path, out: Path, **changes: object) -> list[str]:
    """The same of a long run, without the module."""
    return [*arguments(root, out, **LONG | changes)[1:], "--log.to", "none"]


def exact_metrics(run: Path) -> list[tuple[tuple[str, Any], ...]]:
    """Every line of metrics.jsonl as (name, exact value) pairs, speeds left out."""
    timing = {"tokens_per_s", "mfu", "time", "seconds", "memory_gib"}
    return [
        tuple((k, v.hex() if isinstance(v, float) else v) for k, v in line.items() if k not in timing)
        for line in metrics_of(run)
    ]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, of which every line must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def status(run: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((run / "status.json").read_text())


def tensors_of(run: Path, update: int) -> dict[str, Tensor]:
    """Weights and moments of the checkpoint of `update`, by their names in its files."""
    folder = checkpoint.folder_of(run, update)
    return load_file(folder / checkpoint.WEIGHTS) | load_file(folder / checkpoint.OPTIMIZER)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def same_ends(one: Path, other: Path) -> None:
    """The last checkpoints are equal bit for bit."""
    updates = [int(folder.name.removeprefix("update-")) for run in (one, other) if (folder := checkpoint.newest(run))]
    assert len(updates) == 2
    assert updates[0] == updates[1]
    assert same(tensors_of(one, updates[0]), tensors_of(other, updates[1]))
