"""What the launchers of kernels/layernorm.py and kernels/gelu.py compile, for benchmarks/aot.py."""

from collections.abc import Iterator

from benchmarks.aot import TRITON_DTYPES, Variant
from fastdistil.kernels import gelu, layernorm


def _layernorm_variant(
    dtype: str, width: int, *, backward: bool, dropout: bool, residual: bool
) -> Variant:
    settings = layernorm.tile(width)
    x, absent = f"*{dtype}", {}
    signature = {"x_ptr": x, "residual_ptr": x, "weight_ptr": x}
    if backward:
        signature = {"dout_ptr": x} | signature
        signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "seed_ptr": "*i64"}
        signature |= {"dy_ptr": x, "dx_ptr": x, "partial_ptr": "*fp32", "N": "i32", "D": "i32"}
    else:
        signature |= {"bias_ptr": x, "seed_ptr": "*i64", "out_ptr": x}
        signature |= {
            "mean_ptr": "*fp32",
            "rstd_ptr": "*fp32",
            "N": "i32",
            "D": "i32",
            "eps": "fp32",
        }
    signature |= {"stream": "i32", "threshold": "i32", "scale": "fp32", "rows_per_program": "i32"}
    signature |= {"ROWS": "constexpr", "BLOCK_D": "constexpr"}
    for name, given in (("residual_ptr", residual), ("seed_ptr", dropout), ("dx_ptr", dropout)):
        if name in signature and not given:
            absent[name] = None
            signature[name] = "constexpr"
    num_warps = settings.pop("num_warps")
    return Variant(
        name=f"layernorm {'backward' if backward else 'forward'} {dtype} D={width}"
        + " residual" * residual
        + " dropout" * dropout,
        kernel=layernorm._backward_kernel if backward else layernorm._forward_kernel,
        signature=signature,
        constexprs=absent | settings,
        divisible=("D", "rows_per_program"),
        num_warps=num_warps,
        min_ctas=1 if width > 2048 else 2,  # 16 warps are half an SM's
        max_narrow_loads=24,  # the seed, and mean and rstd of each row
    )


def _gelu_variant(dtype: str, *, backward: bool) -> Variant:
    x, tile = f"*{dtype}", dict(gelu.TILE)
    num_warps = tile.pop("num_warps")
    signature = {"x_ptr": x, "bias_ptr": x, "out_ptr": x, "N": "i32", "F": "i32"}
    if backward:
        signature = {"dout_ptr": x, "x_ptr": x, "bias_ptr": x, "dx_ptr": x}
        signature |= {"partial_ptr": "*fp32", "N": "i32", "F": "i32", "strip_rows": "i32"}
    return Variant(
        name=f"gelu {'backward' if backward else 'forward'} {dtype}",
        kernel=gelu._backward_kernel if backward else gelu._forward_kernel,
        signature=signature | dict.fromkeys(tile, "constexpr"),
        constexprs=tile,
        divisible=("F", "N", "strip_rows"),
        num_warps=num_warps,
    )


def variants() -> Iterator[Variant]:
    """Every dtype and tile, with and without residual and dropout."""
    for dtype in TRITON_DTYPES:
        for backward in (False, True):
            for width in (384, 768, 1024, 4096):
                yield _layernorm_variant(
                    dtype, width, backward=backward, dropout=True, residual=True
                )
            for residual in (False, True):
                yield _layernorm_variant(
                    dtype, 768, backward=backward, dropout=False, residual=residual
                )
            yield _gelu_variant(dtype, backward=backward)
