"""Rotary positions of packed queries and keys, and the same in place. Floor: a copy of as many bytes; an in-place
product of them.

    python -m benchmarks.bench_rope --rows 4096 --head-widths 64,32 --dtype bf16
    python -m pytest benchmarks/bench_rope.py -s
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import tyro

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope(Options):
    """Check and time rope(qkv_N3HD, rotations_N2R) of 12 heads beside PyTorch's and kernels of your own."""

    known: ClassVar[tuple[str, ...]] = ("ours", "eager", "compile")

    rows: Sizes = ()
    """Rows. Without it 4,096, on a GPU 16,384."""
    head_widths: Sizes = (64,)
    """Columns of a head, even."""
    in_place: tyro.conf.FlagCreatePairsOff[bool] = False
    """In its place what the trainer does: queries and keys turned where they lie, no gradient."""


def cases(options: Rope) -> Iterator[Case]:
    rows = options.rows or options.usual((4096,), (16384,))
    passes = (False,) if options.in_place else options.passes(False, True)
    for n, head_dim, dtype, backward in itertools.product(rows, options.head_widths, options.dtypes(), passes):
        name = f"{'in place ' * options.in_place}{n} x 12 x {head_dim} {dtype}{' forward+backward' * backward}"
        sizes = {"rows": n, "head_dim": head_dim, "dtype": dtype}
        yield Case(name, sizes, in_place) if options.in_place else Case(name, sizes | {"backward": backward}, rope)


def rotate_half(qkv, rotations):
    """As Hugging Face writes it, from fp32."""
    import torch

    cos, sin = (torch.cat((t, t), -1)[:, None, None] for t in rotations.unbind(1))
    x1, x2 = qkv[:, :2].float().chunk(2, -1)
    turned = qkv[:, :2].float() * cos + torch.cat((-x2, x1), -1) * sin
    return torch.cat((turned.to(qkv.dtype), qkv[:, 2:]), 1)


def inputs(rows: int, head_dim: int, dtype: str, device: str):
    """(qkv, rotations): sequences of 512 tokens."""
    import torch

    from fastdistil.kernels.rope import rotations

    qkv = torch.randn(rows, 3, 12, head_dim, device=device, dtype=getattr(torch, dtype))
    return qkv, rotations(torch.arange(rows, device=device) % 512, head_dim, 10_000.0)


def rope(*, rows: int, head_dim: int, dtype: str, backward: bool, device: str) -> "Problem":
    import torch

    from benchmarks._harness import Problem, copy_of, pytorch_and_ours
    from fastdistil.kernels import rope as operator

    qkv, rotations = inputs(rows, head_dim, dtype, device)
    num_bytes = (1 + backward) * (2 * qkv.numel() * qkv.element_size() + 4 * rotations.numel())
    return Problem(
        arguments=[qkv.requires_grad_(backward), rotations],
        trained=[0] if backward else (),
        dout=torch.randn_like(qkv),
        definition=operator.rope_reference,
        plain=rotate_half,
        rowwise=[0, 1],
        providers=pytorch_and_ours(operator.rope, rotate_half),
        num_bytes=num_bytes,
        num_flops=(1 + backward) * 2 * qkv.numel(),
        floor=copy_of(num_bytes, device),
    )


def in_place(*, rows: int, head_dim: int, dtype: str, device: str) -> "Problem":
    import torch

    from benchmarks._harness import OURS, Problem, Provider
    from fastdistil.kernels.rope import rotate_

    qkv, rotations = inputs(rows, head_dim, dtype, device)
    compiled, both = torch.compile(rotate_half, dynamic=False), qkv[:, :2]
    return Problem(
        providers={
            "ours": Provider(OURS, lambda: rotate_(qkv, rotations), "kernel", True),
            "eager": Provider("eager PyTorch", lambda: qkv.copy_(rotate_half(qkv, rotations)), "in place", True),
            "compile": Provider("torch.compile", lambda: qkv.copy_(compiled(qkv, rotations)), "in place", True),
        },
        num_bytes=2 * both.numel() * qkv.element_size() + 4 * rotations.numel(),
        num_flops=3 * both.numel(),
        floor=lambda: both.mul_(1.0),
    )


def usual_cases() -> Iterator[Case]:
    yield from cases(Rope(in_place=True))
    yield from cases(Rope())


def test_rope(benchmark, case, results):
    compare(benchmark, "rope", case, results)


main = benchmark("rope", Rope, cases)

if __name__ == "__main__":
    sys.exit(main())
