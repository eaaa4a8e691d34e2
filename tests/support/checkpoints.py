"""Small checkpoints, of which everything follows from the number of the update."""

from pathlib import Path

import torch
from torch import Tensor

from fastdistil.run import checkpoint


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """What an engine's `state()` might be: 16,000 bytes of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    names = ("weight.a", "weight.b", "exp_avg.a", "exp_avg_sq.a")
    return {n: torch.randn(50, 20, generator=generator) for n in names}


def save(run: Path, update: int, keep: int = 2) -> Path:
    """Write the checkpoint of `update` with `tensors(update)`; its folder."""
    return checkpoint.save(run, tensors(update), {"update": update, "tokens": 10 * update}, keep=keep)
