"""Compilations of the plain dropout kernel, and of the integers that Triton specialises, for benchmarks/aot.py."""

from collections.abc import Iterator
from typing import Any

from benchmarks.aot import TRITON_DTYPES, Variant
from fastdistil.kernels import dropout


def _dropout_variant(dtype: str, **ones: Any) -> Variant:
    """`ones`: integers that are 1 at a launch, which Triton makes constants."""
    signature = {
        "x_ptr": f"*{dtype}", "seed_ptr": "*i64",
        "H": "i32", "R": "i32", "C": "i32", "first": "i32", "stream": "i32",
        "threshold": "i32", "scale": "fp32", "ROWS": "constexpr", "COLUMNS": "constexpr",
    }  # fmt: skip
    tile = {"ROWS": dropout.BLOCK_ROWS, "COLUMNS": dropout.BLOCK_COLUMNS}
    return Variant(
        name=f"dropout {dtype}" + "".join(f" {name}=1" for name in ones),
        kernel=dropout._dropout_kernel,
        signature=signature | dict.fromkeys(ones, "constexpr"),
        constexprs=tile | ones,
        divisible=() if "C" in ones else ("C",),
    )


def _keys_variant(**ones: Any) -> Variant:
    signature = {
        "seed_ptr": "*i64", "out_ptr": "*i32", "N": "i32", "stream": "i32",
        "H": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    return Variant(
        name="dropout keys" + "".join(f" {name}=1" for name in ones),
        kernel=dropout._keys_kernel,
        signature=signature | dict.fromkeys(ones, "constexpr"),
        constexprs={"H": 12, "BLOCK": 256} | ones,
    )


def variants() -> Iterator[Variant]:
    """The kernel that reads and writes: hidden states of every dtype."""
    for dtype in TRITON_DTYPES:
        yield _dropout_variant(dtype)


def specialised_variants() -> Iterator[Variant]:
    """Launches with a 1 in their arguments: one head, one token, a rate of 2^-32. No wide loads to ask of these."""
    yield _dropout_variant("fp32", H=1, R=1, C=1, first=1, stream=1)
    yield _dropout_variant("fp32", threshold=1)
    yield _keys_variant()
    yield _keys_variant(N=1, stream=1)
