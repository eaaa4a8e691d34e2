"""What the launchers of kernels/ compile, for benchmarks/aot.py: every Triton kernel in every tile that is used."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastdistil.kernels import (
    _backend,
    attention,
    attention_tiles,
    cosine,
    distill,
    dropout,
    embedding,
    fp8_rows,
    geglu,
    gelu,
    layernorm,
    linear,
    mixture,
    rope,
)
from fastdistil.kernels.layout import TILE_ROWS

ARCHITECTURES = (80, 90, 100)
TRITON_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # and their bytes


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation: what the launcher would pass."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Argument -> Triton type ("*bf16", "i32", "fp32"), or "constexpr"."""
    constexprs: dict[str, Any]
    """Values of the constexpr arguments; an absent optional pointer is None."""
    divisible: tuple[str, ...] = ()
    """Integers that the launcher specialises as multiples of 16. Pointers always are: torch aligns them."""
    num_warps: int = 4
    num_stages: int = 3  # Triton's default
    archs: tuple[int, ...] = ARCHITECTURES
    """Where the launchers use it."""
    min_ctas: int = 2
    """CTAs that have to fit an SM, for one's loads to run beside the other's arithmetic."""
    tensor_cores: bool = False
    """Whether its products have to be tensor-core instructions."""
    may_spill: bool = False
    max_narrow_loads: int = 3
    """Loads of less than 128 bits that may be: scalars and numbers of a row."""


def _distill_variant(dtype: str, *, gradient: bool, num_rows: bool) -> Variant:
    signature = {
        "s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "label_ptr": "*i64",
        "num_rows_ptr": "*i32" if num_rows else "constexpr", "scales_ptr": "*fp32",
        "ds_ptr": f"*{dtype}" if gradient else "constexpr", "out_ptr": "*fp32",
        "s_stride": "i32", "t_stride": "i32", "ds_stride": "i32" if gradient else "constexpr",
        "N": "i32", "first_row": "i32", "width": "i32", "vocab_size": "i32",
        "temperature": "fp32",
        "LANES": "constexpr", "VECTOR": "constexpr",
    }  # fmt: skip
    absent = {} if num_rows else {"num_rows_ptr": None}
    absent |= {} if gradient else {"ds_ptr": None, "ds_stride": 0}
    tile = {"LANES": 32 * distill.NUM_WARPS, "VECTOR": distill.COLUMNS_PER_LOAD[TRITON_DTYPES[dtype]]}
    return Variant(
        name=f"distill {dtype}" + " gradient" * gradient + " num_rows" * num_rows,
        kernel=distill._distill_kernel,
        signature=signature,
        constexprs=absent | tile,
        divisible=("s_stride", "t_stride", "ds_stride", "width"),
        num_warps=distill.NUM_WARPS,
        max_narrow_loads=5,  # number of rows, label, its logit, two scales
    )


def _mixture_variant(dtype: str) -> Variant:
    tile = {"LANES": 32 * distill.NUM_WARPS, "VECTOR": distill.COLUMNS_PER_LOAD[TRITON_DTYPES[dtype]]}
    signature = {
        "y_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "y_stride": "i32", "x_stride": "i32",
        "width": "i32", "vocab_size": "i32", "temperature": "fp32", "share": "fp32",
    }  # fmt: skip
    return Variant(
        name=f"mixture {dtype}",
        kernel=mixture._mixture_kernel,
        signature=signature | dict.fromkeys(tile, "constexpr"),
        constexprs=tile,
        divisible=("y_stride", "x_stride", "width"),
        num_warps=distill.NUM_WARPS,
    )


def _cosine_variant(dtype: str, width: int) -> Variant:
    settings = cosine.tile(width)
    signature = {
        "s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "num_rows_ptr": "*i32", "scale_ptr": "*fp32",
        "out_ptr": "*fp32", "ds_ptr": f"*{dtype}", "N": "i32", "D": "i32",
        "EPS": "constexpr", "ROWS": "constexpr", "BLOCK_D": "constexpr",
    }  # fmt: skip
    num_warps = settings.pop("num_warps")
    return Variant(
        name=f"cosine {dtype} D={width}",
        kernel=cosine._cosine_kernel,
        signature=signature,
        constexprs={"EPS": cosine.EPS, **settings},
        divisible=("D",),
        num_warps=num_warps,
    )


def _attention_variant(
    dtype: str, head_dim: int, kernel: str, arch: int, dropout: bool, *, sums: bool = True, window: int = 0
) -> Variant:
    by_width = attention_tiles.half_tiles(arch, head_dim, window)
    tiles = attention_tiles.FP32_TILES if dtype == "fp32" else by_width
    tile = {"forward": tiles.forward_dropout if dropout else tiles.forward, "dq": tiles.dq, "dkdv": tiles.dkdv}[kernel]
    pointers, scalars = {
        "forward": ("out_ptr lse_ptr", "keep_scale"),
        "dq": ("out_ptr dout_ptr lse_ptr dqkv_ptr delta_ptr partial_ptr", "keep_p dq_scale"),
        "dkdv": ("dout_ptr lse_ptr delta_ptr dqkv_ptr partial_ptr", "dk_scale dv_scale"),
    }[kernel]
    constexprs: dict[str, Any] = {
        "H": 12, "D": head_dim, "BLOCK_D": head_dim, "TILE": TILE_ROWS,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
    }  # fmt: skip
    if kernel != "forward":
        block = tile.BLOCK_M if kernel == "dq" else tile.BLOCK_N
        constexprs["ROWS"] = block // min(tiles.dq.BLOCK_M, tiles.dkdv.BLOCK_N)
    constexprs["WINDOW"] = window
    statistics = ("lse_ptr", "delta_ptr", "partial_ptr")
    signature = {
        "qkv_ptr": f"*{dtype}", "tile_ptr": "*i32", "key_ptr": "*i32",
        **{name: "*fp32" if name in statistics else f"*{dtype}" for name in pointers.split()},
        "N": "i32", "scale2": "fp32", "threshold": "i32",
        **dict.fromkeys(scalars.split(), "fp32"),
    }  # fmt: skip
    absent = {"key_ptr": not dropout, "partial_ptr": "partial_ptr" in signature and not sums}
    constexprs |= dict.fromkeys((name for name, is_so in absent.items() if is_so), None)
    return Variant(
        name=f"attention {kernel} {dtype} D={head_dim}"
        + " dropout" * dropout
        + " without sums" * (not sums)
        + f" window {window}" * (window > 0),
        kernel={"forward": attention._forward_kernel, "dq": attention._dq_kernel, "dkdv": attention._dkdv_kernel}[
            kernel
        ],
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        archs=(arch,),
        # Heads of 32 and 64, which BERT models have: two warps for each of an SM's four schedulers.
        min_ctas=8 // tile.num_warps if head_dim in (32, 64) and dtype != "fp32" else 1,
        tensor_cores=dtype != "fp32",
        # Outside the tensor cores Triton keeps whole operands in registers: no block that tl.dot takes fits.
        may_spill=dtype == "fp32",
        # lse, delta and keys of every row that a thread holds, 32 bits each: 20 to 109, but up to 398 with Triton
        # 3.6.0.
        max_narrow_loads=400,
    )


def _layernorm_variant(
    dtype: str,
    width: int,
    *,
    backward: bool,
    dropout: bool,
    residual: bool = True,
    embeddings: bool = False,
    prenorm: bool = False,
    bias: bool = True,
    **ones: Any,
) -> Variant:
    """`embeddings`: x is the sum of rows of tables, of which `residual` stands for those of positions and types.

    `prenorm`: the sum is an output, too, and stands in the backward in place of x; without a residual the gradient of
    that sum is not there either.
    """
    itemsize = TRITON_DTYPES[dtype]
    settings = layernorm.tile(width, itemsize)
    if not backward:
        settings = layernorm.forward_tile(width, itemsize, dropout=dropout)
    x, absent = f"*{dtype}", {}
    signature = {"x_ptr": x, "residual_ptr": x}
    if embeddings:
        signature = {"ids_ptr": "*i32", "position_ids_ptr": "*i32", "word_ptr": x, "position_ptr": x, "type_ptr": x}
    signature["weight_ptr"] = x
    if backward:
        signature = {"dout_ptr": x} | ({} if embeddings else {"dsum_ptr": x}) | signature
        signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "seed_ptr": "*i64"}
        signature |= {"dy_ptr": x} | ({} if embeddings else {"dx_ptr": x}) | {"partial_ptr": "*fp32"}
        absent["SUMS"] = 1 if not bias else 2 if embeddings else 3
    else:
        signature |= {"bias_ptr": x, "seed_ptr": "*i64"} | ({} if embeddings else {"sum_ptr": x})
        signature |= {"out_ptr": x, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    signature |= {"N": "i32", "D": "i32"} | ({} if backward else {"eps": "fp32"})
    signature |= {} if embeddings else {"stream": "i32"}
    signature |= {"threshold": "i32", "scale": "fp32", "rows_per_program": "i32"}
    signature |= dict.fromkeys(absent, "constexpr") | {"ROWS": "constexpr", "BLOCK_D": "constexpr"}
    optional = dict.fromkeys(("position_ids_ptr", "position_ptr", "type_ptr"), residual)
    optional |= {"residual_ptr": residual or (prenorm and backward), "x_ptr": not (prenorm and backward)}
    optional |= {"sum_ptr": prenorm, "dsum_ptr": prenorm and residual}
    optional |= {"bias_ptr": bias, "seed_ptr": dropout, "dx_ptr": dropout}
    for name, given in optional.items():
        if name in signature and not given:
            absent[name] = None
            signature[name] = "constexpr"
    num_warps = settings.pop("num_warps")
    kernels = {
        (False, False): layernorm._forward_kernel,
        (False, True): layernorm._backward_kernel,
        (True, False): embedding._embedding_forward_kernel,
        (True, True): embedding._embedding_backward_kernel,
    }
    return Variant(
        name=("embedding layernorm" if embeddings else "prenorm layernorm" if prenorm else "layernorm")
        + f" {'backward' if backward else 'forward'} {dtype} D={width}"
        + (" tables" if embeddings else " residual") * residual
        + " dropout" * dropout
        + " without bias" * (not bias),
        kernel=kernels[embeddings, backward],
        signature=signature | dict.fromkeys(ones, "constexpr"),
        constexprs=absent | settings | ones,
        divisible=() if "D" in ones else ("D",),
        num_warps=num_warps,
        min_ctas=1 if width > 2048 else 2,  # 16 warps are half an SM's
        max_narrow_loads=24,  # the seed, and mean, rstd and ids of each row
    )


def _run_variants(dtype: str) -> Iterator[Variant]:
    """Of the gradient of an embedding table."""
    tile = dict(linear.RUN_TILE)
    num_warps = tile.pop("num_warps")
    signature = {
        "index_ptr": "*i32", "total_ptr": "*fp32", "partial_ptr": "*fp32", "N": "i32", "D": "i32", "padding": "i32",
        "RUN_ROWS": "constexpr", "COLUMNS": "constexpr",
    }  # fmt: skip
    common: dict[str, Any] = {"constexprs": tile, "divisible": ("D",), "num_warps": num_warps, "max_narrow_loads": 64}
    rows = {"rows_ptr": f"*{dtype}", "index_ptr": "*i32", "order_ptr": "*i64"}
    yield Variant(
        name=f"runs {dtype}", kernel=linear._run_sums_kernel, signature=rows | signature,
        tensor_cores=dtype != "fp32", **common,
    )  # fmt: skip
    yield Variant(name="crossing runs", kernel=linear._crossing_runs_kernel, signature=signature, **common)


def _strip_sums_variant(dtype: str) -> Variant:
    tile = dict(linear.STRIP_TILE)
    num_warps = tile.pop("num_warps")
    return Variant(
        name=f"strip sums {dtype}",
        kernel=linear._strip_sums_kernel,
        signature={
            "x_ptr": f"*{dtype}", "partial_ptr": "*fp32", "N": "i32", "F": "i32", "stride": "i32", "strip_rows": "i32",
            **dict.fromkeys(tile, "constexpr"),
        },
        constexprs=tile,
        divisible=("F", "stride"),
        num_warps=num_warps,
    )  # fmt: skip


def _column_sums_variant(*, num_sums: int, out: str) -> Variant:
    """The end of sums over rows, LayerNorm's three or GELU's one, into a gradient of the dtype `out`."""
    tile = dict(_backend.SUM_TILE)
    num_warps = tile.pop("num_warps")
    outs = {f"out{m}_ptr": f"*{out}" if m < num_sums else "constexpr" for m in range(3)}
    absent = {name: None for name, kind in outs.items() if kind == "constexpr"}
    constants = {"M": num_sums} | tile
    return Variant(
        name=f"column sums of {num_sums} into {out}",
        kernel=_backend._column_sums_kernel,
        signature={"partial_ptr": "*fp32"}
        | outs
        | {"P": "i32", "K": "i32", "accumulate": "i32"}
        | dict.fromkeys(constants, "constexpr"),
        constexprs=absent | constants,
        divisible=("K",),
        num_warps=num_warps,
        max_narrow_loads=3,  # what stands in the gradient, once at the end
    )


def _gelu_variant(dtype: str, *, backward: bool, kept: bool) -> Variant:
    """`kept`: the forward leaves the derivative, by which the backward multiplies."""
    x, tile = f"*{dtype}", dict(gelu.TILE)
    num_warps = tile.pop("num_warps")
    absent: dict[str, None] = {}
    signature = {"x_ptr": x, "bias_ptr": x, "out_ptr": x, "slope_ptr": x, "N": "i32", "F": "i32"}
    if backward:
        signature = {"dout_ptr": x, "x_ptr": x, "bias_ptr": x, "dx_ptr": x}
        signature |= {"partial_ptr": "*fp32", "N": "i32", "F": "i32", "strip_rows": "i32"}
    if backward == kept:
        absent = {"bias_ptr" if backward else "slope_ptr": None}
    return Variant(
        name=f"gelu {'backward' if backward else 'forward'}{', derivative kept' if kept else ''} {dtype}",
        kernel=gelu._backward_kernel if backward else gelu._forward_kernel,
        signature=signature | dict.fromkeys([*tile, *absent], "constexpr"),
        constexprs=tile | absent,
        divisible=("F", "strip_rows"),
        num_warps=num_warps,
    )


def _geglu_variant(dtype: str, *, backward: bool) -> Variant:
    x, tile = f"*{dtype}", dict(geglu.TILE)
    num_warps = tile.pop("num_warps")
    pointers = ("dout_ptr", "x_ptr", "dx_ptr") if backward else ("x_ptr", "out_ptr")
    return Variant(
        name=f"geglu {'backward' if backward else 'forward'} {dtype}",
        kernel=geglu._backward_kernel if backward else geglu._forward_kernel,
        signature=dict.fromkeys(pointers, x) | {"N": "i32", "F": "i32"} | dict.fromkeys(tile, "constexpr"),
        constexprs=tile,
        divisible=("F",),
        num_warps=num_warps,
        max_narrow_loads=0,
    )


def _rope_variant(dtype: str, head_dim: int) -> Variant:
    tile = rope.tile(head_dim)
    num_warps = tile.pop("num_warps")
    constants = {"H": 12, "D": head_dim} | tile
    return Variant(
        name=f"rope {dtype} D={head_dim}",
        kernel=rope._rope_kernel,
        signature={
            "qkv_ptr": f"*{dtype}", "rotation_ptr": "*fp32", "out_ptr": f"*{dtype}", "N": "i32", "sign": "fp32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs=constants,
        num_warps=num_warps,
        max_narrow_loads=0,
    )  # fmt: skip


def _quantise_variant(dtype: str, width: int, *, gelu: bool) -> Variant:
    settings = fp8_rows.tile(width)
    num_warps = settings.pop("num_warps")
    bias = f"*{dtype}" if gelu else "constexpr"
    return Variant(
        name=f"quantise rows {dtype} D={width}" + " gelu" * gelu,
        kernel=fp8_rows._quantise_kernel,
        signature={
            "x_ptr": f"*{dtype}", "bias_ptr": bias, "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
            "D": "i32", "BLOCK_D": "constexpr",
        },
        constexprs=settings | ({} if gelu else {"bias_ptr": None}),
        divisible=("D",),
        num_warps=num_warps,
        archs=(89, 90, 100),  # e4m3 begins there
    )  # fmt: skip


def _dropout_variant(dtype: str, **ones: Any) -> Variant:
    """`ones`: integers that are 1 at a launch, which Triton makes constants."""
    signature = {
        "x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "seed_ptr": "*i64",
        "H": "i32", "R": "i32", "C": "i32", "first": "i32", "stream": "i32",
        "threshold": "u32", "scale": "fp32",
    }  # fmt: skip
    tile = dropout.tile(ones.get("C", 768))
    return Variant(
        name=f"dropout {dtype}" + "".join(f" {name}=1" for name in ones),
        kernel=dropout._dropout_kernel,
        signature=signature | dict.fromkeys((*tile, *ones), "constexpr"),
        constexprs=tile | ones,
        divisible=() if "C" in ones else ("C",),
    )


def _keys_variant() -> Variant:
    signature = {
        "seed_ptr": "*i64", "out_ptr": "*i32", "N": "i32", "stream": "i32",
        "H": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    return Variant(
        name="dropout keys", kernel=dropout._keys_kernel, signature=signature, constexprs={"H": 12, "BLOCK": 256}
    )


def variants() -> Iterator[Variant]:
    """Every kernel in every tile that the launchers use, in bf16.

    Other widths have the code of the next one here: the blocks are powers of two.
    """
    yield from _row_variants("bf16", layernorm_widths=(384, 768, 4096))
    for width in (384, 768, 4096):
        yield _quantise_variant("bf16", width, gelu=False)
        yield _quantise_variant("bf16", width, gelu=True)
    for arch, kernel in itertools.product(ARCHITECTURES, ("forward", "dq", "dkdv")):
        for head_dim in attention_tiles.TILES[arch]:
            yield _attention_variant("bf16", head_dim, kernel, arch, True)
            if kernel == "forward" and head_dim in (32, 64):  # which has a tile of its own without dropout
                yield _attention_variant("bf16", head_dim, kernel, arch, False)
            # That of ModernBERT, which was trained without dropout there.
            yield _attention_variant("bf16", head_dim, kernel, arch, False, window=64)


def rarer_variants() -> Iterator[Variant]:
    """Kernels of `variants` in other dtypes, or without dropout, which seldom go wrong alone.

    fp16 compiles as bf16 does, nobody trains in fp32 on these GPUs, and without dropout there is less to do.
    """
    yield from _row_variants("fp16", layernorm_widths=(768,))
    yield from _row_variants("fp32", layernorm_widths=(768,))
    for arch, kernel in itertools.product(ARCHITECTURES, ("forward", "dq", "dkdv")):
        yield _attention_variant("fp32", 64, kernel, arch, True)
        for head_dim in (32, 64) if kernel != "forward" else ():
            yield _attention_variant("bf16", head_dim, kernel, arch, False)
            yield _attention_variant("bf16", head_dim, kernel, arch, True, sums=False)
        for head_dim in attention_tiles.TILES[arch]:
            yield _attention_variant("bf16", head_dim, kernel, arch, True, window=64)


def _row_variants(dtype: str, *, layernorm_widths: tuple[int, ...]) -> Iterator[Variant]:
    yield _distill_variant(dtype, gradient=True, num_rows=True)
    yield _distill_variant(dtype, gradient=True, num_rows=False)
    yield _distill_variant(dtype, gradient=False, num_rows=True)
    yield _mixture_variant(dtype)
    for width in (384, 768, 8192):
        yield _cosine_variant(dtype, width)
    yield _dropout_variant(dtype)
    for num_sums in (1, 2, 3):
        yield _column_sums_variant(num_sums=num_sums, out=dtype)
    yield _strip_sums_variant(dtype)
    yield from _run_variants(dtype)
    for head_dim in (32, 64, 128):
        yield _rope_variant(dtype, head_dim)
    for backward in (False, True):
        for kept in (False, True):
            yield _gelu_variant(dtype, backward=backward, kept=kept)
        yield _geglu_variant(dtype, backward=backward)
        for width in layernorm_widths:
            yield _layernorm_variant(dtype, width, backward=backward, dropout=True)
            yield _layernorm_variant(dtype, width, backward=backward, dropout=True, embeddings=True)
            yield _layernorm_variant(dtype, width, backward=backward, dropout=True, prenorm=True, bias=False)
        for residual in (False, True):
            yield _layernorm_variant(dtype, 768, backward=backward, dropout=False, residual=residual)
            if residual or backward:
                yield _layernorm_variant(
                    dtype, 768, backward=backward, dropout=False, residual=residual, prenorm=True, bias=False
                )
        yield _layernorm_variant(dtype, 768, backward=backward, dropout=True, prenorm=True)
        yield _layernorm_variant(
            dtype, 768, backward=backward, dropout=False, residual=False, embeddings=True, bias=False
        )


def specialised_variants() -> Iterator[Variant]:
    """Launches with a 1 in their arguments, which Triton makes a constant: one head, one token, a rate of 2^-32.

    No wide loads to ask of these.
    """
    yield _dropout_variant("fp32", C=1)
    yield _keys_variant()
    for backward in (False, True):
        for embeddings in (False, True):
            yield _layernorm_variant("fp32", 1, backward=backward, dropout=True, embeddings=embeddings, D=1)
