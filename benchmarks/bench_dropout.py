"""Dropout of attention weights, in place, and of hidden states, with its backward. Floor: an in-place product of as
many bytes.

    python -m benchmarks.bench_dropout --rows 4096 --widths 768,3072 --dropout 0.1,0.5
    python -m pytest benchmarks/bench_dropout.py -s
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import tyro

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Rates, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout(Options):
    """Check and time dropout(x_ND, seed, stream=..., dropout_p=...), whose mask is that of dropout.keep_reference."""

    known: ClassVar[tuple[str, ...]] = ("ours", "eager", "compile")

    rows: Sizes = ()
    """Rows. Without it 4,096, on a GPU 131,072."""
    widths: Sizes = (768,)
    """Columns."""
    dropout: Rates = (0.1,)
    """Probabilities that an element is dropped."""
    in_place: tyro.conf.FlagCreatePairsOff[bool] = False
    """In its place what attention does to its weights: no gradient of its own, the backward draws the mask again.
    --rows are sequences of 128 tokens."""


def cases(options: Dropout) -> Iterator[Case]:
    if options.in_place:
        sequences = options.rows or options.usual((8,), (256,))
        for n, dtype, p in itertools.product(sequences, options.dtypes(), options.dropout):
            name = f"in place {n}x12x128x128 {dtype}{'' if p == 0.1 else f' dropout {p}'}"
            yield Case(name, {"sequences": n, "dtype": dtype, "dropout": p}, in_place)
        return
    rows = options.rows or options.usual((4096,), (131072,))
    for n, width, dtype, p, backward in itertools.product(
        rows, options.widths, options.dtypes(), options.dropout, options.passes(True)
    ):
        name = f"forward{' + backward' * backward} {n}x{width} {dtype}{'' if p == 0.1 else f' dropout {p}'}"
        sizes = {"rows": n, "width": width, "dtype": dtype, "dropout": p, "backward": backward}
        yield Case(name, sizes, hidden)


def in_place(*, sequences: int, dtype: str, dropout: float, device: str) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import OURS, Problem, Provider
    from fastdistil.kernels.dropout import new_dropout_seed

    x = torch.rand(sequences, 12, 128, 128, device=device, dtype=getattr(torch, dtype))
    seed = new_dropout_seed(device)
    # Dropped again and again, x would be all zeros, or infinite; neither takes another time on any path here.
    compiled = torch.compile(functools.partial(F.dropout, p=dropout), dynamic=False)
    return Problem(
        providers={
            "ours": Provider(
                OURS, lambda: torch.ops.fastdistil.dropout_into(x, x, seed, 1, 0, dropout), "kernel", True
            ),
            "eager": Provider("F.dropout", lambda: F.dropout(x, dropout, inplace=True), "own mask", True),
            "compile": Provider("torch.compile", lambda: compiled(x), "own mask", True),
        },
        num_bytes=2 * x.numel() * x.element_size(),
        num_flops=x.numel(),
        floor=lambda: x.mul_(1.0),
    )


def hidden(*, rows: int, width: int, dtype: str, dropout: float, backward: bool, device: str) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import Problem, pytorch_and_ours
    from fastdistil.kernels import dropout as operator

    x, gradient = (torch.randn(rows, width, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    out, seed = torch.empty_like(x), operator.new_dropout_seed(device)

    def definition(x_ND, seed, *, stream, dropout_p):
        row, column = (torch.arange(n, device=device) for n in x_ND.shape)
        kept = operator.keep_reference(seed, stream, dropout_p, torch.zeros_like(row[:1]), row, column)[0]
        return torch.where(kept, x_ND / (1 - dropout_p), 0.0)

    def eager(x, seed, *, stream, dropout_p):
        return F.dropout(x, dropout_p)

    def floor():
        for _ in range(1 + backward):
            torch.mul(gradient, 1.0, out=out)

    providers = pytorch_and_ours(operator.dropout, eager, "own mask")
    providers["eager"] = providers["eager"]._replace(title="F.dropout")
    return Problem(
        arguments=[x.requires_grad_(backward), seed],
        options={"stream": 1, "dropout_p": dropout},
        trained=[0] if backward else (),
        dout=gradient,
        definition=definition,
        providers=providers,
        num_bytes=(2 + 2 * backward) * x.numel() * x.element_size(),
        num_flops=(1 + backward) * x.numel(),
        floor=floor,
    )


def usual_cases() -> Iterator[Case]:
    yield from cases(Dropout(in_place=True))
    yield from cases(Dropout())


def test_dropout(benchmark, case, results):
    compare(benchmark, "dropout", case, results)


main = benchmark("dropout", Dropout, cases)

if __name__ == "__main__":
    sys.exit(main())
