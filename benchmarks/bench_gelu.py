"""GELU of a product and its bias, and the product with it. Floor: a copy of as many bytes; the product alone.

python -m benchmarks.bench_gelu --rows 4096 --widths 768,1024 --dtype bf16
python -m pytest benchmarks/bench_gelu.py -s
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
class Gelu(Options):
    """Check and time bias_gelu(x_NF, bias_F) beside PyTorch's and kernels of your own."""

    known: ClassVar[tuple[str, ...]] = ("ours", "eager", "compile", "cublas")

    rows: Sizes = ()
    """Rows. Without it 1,024, on a GPU 16,384."""
    widths: Sizes = ()
    """Columns. Without it 1,536, on a GPU 3,072."""
    product: tyro.conf.FlagCreatePairsOff[bool] = False
    """In its place the product of width 768 with GELU behind it or in it: whether gelu.OWN_PRODUCT is right on this
    GPU."""


def cases(options: Gelu) -> Iterator[Case]:
    if options.product:
        if options.on != "cuda":
            raise ValueError("--product: there are two ways on a GPU alone: leave it out")
        for rows, width, use in itertools.product(
            options.rows or (16384, 65536),
            options.widths or (3072,),
            ("forward", "forward, derivative kept", "backward"),
        ):
            name = f"product, {use}, {rows} x 768 x {width} bfloat16"
            yield Case(name, {"rows": rows, "width": width, "dtype": "bfloat16", "use": use}, product)
        return
    rows, widths = options.rows or options.usual((1024,), (16384,)), options.widths or options.usual((1536,), (3072,))
    for n, width, dtype, backward in itertools.product(rows, widths, options.dtypes(), options.passes(False, True)):
        name = f"{n} x {width} {dtype}{' forward+backward' * backward}"
        yield Case(name, {"rows": n, "width": width, "dtype": dtype, "backward": backward}, bias_gelu)


def bias_gelu(*, rows: int, width: int, dtype: str, backward: bool, device: str) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import Problem, copy_of, pytorch_and_ours
    from fastdistil.kernels import gelu

    x, dout = (torch.randn(rows, width, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    bias = torch.randn(width, device=device, dtype=x.dtype)

    def eager(x, bias):
        return F.gelu(x + bias)

    num_bytes = (2 + 3 * backward) * x.numel() * x.element_size()
    return Problem(
        arguments=[x.requires_grad_(backward), bias.requires_grad_(backward)],
        trained=(0, 1) if backward else (),
        dout=dout,
        definition=gelu.bias_gelu_reference,
        plain=eager,
        rowwise=[0],
        providers=pytorch_and_ours(gelu.bias_gelu, eager),
        num_bytes=num_bytes,
        num_flops=(20 + 25 * backward) * x.numel(),
        floor=copy_of(num_bytes, device),
    )


def product(*, rows: int, width: int, dtype: str, use: str, device: str) -> "Problem":
    import torch

    from benchmarks._harness import OURS, Problem, Provider
    from fastdistil.kernels import gelu

    x, weight, second, bias, z = (
        torch.randn(size, device=device, dtype=getattr(torch, dtype))
        for size in ((rows, 768), (width, 768), (768, width), (width,), (rows, width))
    )
    dbias, own = torch.zeros(width, device=device), gelu.OWN_PRODUCT

    def by(majors):
        def run():
            gelu.OWN_PRODUCT = majors
            try:
                if use == "backward":
                    gelu.gelu_backward_product(x, second, z, dbias=dbias, accumulate=True)
                else:
                    gelu.linear_gelu_forward(x, weight, bias, keep=use == "forward, derivative kept")
            finally:
                gelu.OWN_PRODUCT = own

        return run

    return Problem(
        providers={
            "ours": Provider(OURS, by(own), "kernel", True),
            "cublas": Provider("cuBLAS and a kernel of rows", by(()), "kernel", True),
        },
        baseline="cublas",
        num_bytes=(1 if use == "forward" else 2) * z.numel() * z.element_size(),
        num_flops=2 * rows * 768 * width,
        floor=lambda: torch.mm(x, weight.t(), out=z),
    )


def usual_cases() -> Iterator[Case]:
    usual = Gelu()
    yield from cases(usual)
    if usual.on == "cuda":
        yield from cases(Gelu(product=True))


def test_gelu(benchmark, case, results):
    compare(benchmark, "gelu", case, results)


main = benchmark("gelu", Gelu, cases)

if __name__ == "__main__":
    sys.exit(main())
