"""GeGLU: the half of a GEMM's output times GELU of its other half. Floor: a copy of as many bytes.

python -m benchmarks.bench_geglu --rows 4096 --widths 1152,2624 --dtype bf16
python -m pytest benchmarks/bench_geglu.py -s
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Geglu(Options):
    """Check and time geglu(x_N2F) beside PyTorch's and kernels of your own."""

    known: ClassVar[tuple[str, ...]] = ("ours", "eager", "compile")

    rows: Sizes = ()
    """Rows. Without it 4,096, on a GPU 16,384."""
    widths: Sizes = (1152,)
    """Columns of the output; x has twice as many."""


def cases(options: Geglu) -> Iterator[Case]:
    rows = options.rows or options.usual((4096,), (16384,))
    for n, width, dtype, backward in itertools.product(
        rows, options.widths, options.dtypes(), options.passes(False, True)
    ):
        name = f"{n} x {width} {dtype}{' forward+backward' * backward}"
        yield Case(name, {"rows": n, "width": width, "dtype": dtype, "backward": backward}, geglu)


def geglu(*, rows: int, width: int, dtype: str, backward: bool, device: str) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import Problem, copy_of, pytorch_and_ours
    from fastdistil.kernels import geglu as operator

    x, dout = (torch.randn(rows, n, device=device, dtype=getattr(torch, dtype)) for n in (2 * width, width))

    def eager(x):
        a, b = x.chunk(2, -1)
        return F.gelu(a) * b

    num_bytes = (3 + 5 * backward) * dout.numel() * dout.element_size()
    return Problem(
        arguments=[x.requires_grad_(backward)],
        trained=[0] if backward else (),
        dout=dout,
        definition=operator.geglu_reference,
        plain=eager,
        rowwise=[0],
        providers=pytorch_and_ours(operator.geglu, eager),
        num_bytes=num_bytes,
        num_flops=(20 + 30 * backward) * dout.numel(),
        floor=copy_of(num_bytes, device),
    )


def usual_cases() -> Iterator[Case]:
    return cases(Geglu())


def test_geglu(benchmark, case, results):
    compare(benchmark, "geglu", case, results)


main = benchmark("geglu", Geglu, cases)

if __name__ == "__main__":
    sys.exit(main())
