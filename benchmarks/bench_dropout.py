"""Dropout of attention weights, in place, and of hidden states, with its backward. Floor: an in-place product of as
many bytes.

python -m pytest benchmarks/bench_dropout.py -s
"""

import functools

import pytest
import torch
from torch.nn import functional as F

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.dropout import dropout, new_dropout_seed

WEIGHTS = (
    [((256, 12, 128, 128), "bfloat16")]
    if DEVICE == "cuda"
    else [((8, 12, 128, 128), "float32"), ((8, 12, 128, 128), "bfloat16")]
)
HIDDEN = [((131072, 768), "bfloat16")] if DEVICE == "cuda" else [((4096, 768), "float32"), ((4096, 768), "bfloat16")]
P = 0.1  # of every BERT


@pytest.mark.parametrize(("shape", "dtype"), WEIGHTS)
def test_in_place(benchmark, shape, dtype):
    """What attention does to its weights: no gradient of its own, the backward draws the mask again."""
    kind = getattr(torch, dtype)
    x, seed = torch.rand(shape, device=DEVICE, dtype=kind), new_dropout_seed(DEVICE)
    # Dropped again and again, x would be all zeros, or infinite; neither takes another time on any path here.
    compiled = torch.compile(functools.partial(F.dropout, p=P))
    compare(
        benchmark,
        "dropout",
        f"in place {'x'.join(map(str, shape))} {dtype}",
        {
            OURS: lambda: torch.ops.fastdistil.dropout_into(x, x, seed, 1, 0, P),
            "F.dropout": lambda: F.dropout(x, P, inplace=True),
            "torch.compile": lambda: compiled(x),
        },
        num_bytes=2 * x.numel() * kind.itemsize,
        num_flops=x.numel(),
        floor=lambda: x.mul_(1.0),
        budget_s=5.0,
    )


@pytest.mark.parametrize(("shape", "dtype"), HIDDEN)
def test_forward_and_backward(benchmark, shape, dtype):
    kind = getattr(torch, dtype)
    x = torch.randn(shape, device=DEVICE, dtype=kind, requires_grad=True)
    gradient, out = torch.randn(shape, device=DEVICE, dtype=kind), torch.empty_like(x)
    seed = new_dropout_seed(DEVICE)

    def both(dropout):
        torch.autograd.grad(dropout(x), x, gradient)

    def floor():
        torch.mul(gradient, 1.0, out=out)
        torch.mul(gradient, 1.0, out=out)

    ours = functools.partial(dropout, seed=seed, stream=1, dropout_p=P)
    eager = functools.partial(F.dropout, p=P)
    compiled = torch.compile(eager)
    compare(
        benchmark,
        "dropout",
        f"forward + backward {'x'.join(map(str, shape))} {dtype}",
        {OURS: lambda: both(ours), "F.dropout": lambda: both(eager), "torch.compile": lambda: both(compiled)},
        num_bytes=4 * x.numel() * kind.itemsize,
        num_flops=2 * x.numel(),
        floor=floor,
        budget_s=5.0,
    )
