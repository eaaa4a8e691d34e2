"""GELU of a GEMM's output and its bias, exact erf, forward and backward; where it gains, in the GEMM itself.

    out  = z * Phi(z),  z = x + bias,  Phi(z) = (1 + erf(z / sqrt 2)) / 2        (Hendrycks and Gimpel 2016)
    dx   = dout * (Phi(z) + z * phi(z)),  phi(z) = exp(-z^2 / 2) / sqrt(2 pi);  dbias = sum over rows of dx

The operator saves x alone, and its backward computes z again. Of the functions that a layer calls by hand the forward,
which has z, leaves gelu'(z), and the backward multiplies. fp32 arithmetic, one rounding.

Memory: the forward reads and writes (N, F) once, the backward reads it twice and writes it once. The bias gradient,
which would be one more read, is summed on the way: every program adds up a strip of 128 rows, then one reduction adds
the strips (no atomics; 1 % of the traffic in bf16).

In a GEMM of its own the forward spares both passes, but for the write of gelu'(z), and the backward the write and the
read of dout. That is `_product_kernel`, in Gluon for Hopper, bf16:

GELU takes about 18 instructions an element, with its derivative 23: at K = 768 as long as the tensor cores take. So a
CTA is three partitions: a warp that loads tiles by TMA into a ring of stages, and two warpgroups, each with a tile of
its own, 128 x 128. They take turns at the tensor cores, and as many CTAs as there are multiprocessors go through all
tiles.

    loads         a and b of tile 0 | of tile 1 | of tile 2 | ...
    warpgroup 0   products of tile 0 | GELU of tile 0     | products of tile 2 | ...
    warpgroup 1   (waits)            | products of tile 1 | GELU of tile 1     | ...

Results leave through shared memory by TMA, which clips rows from N on; in the backward gelu'(z) arrives the same way.

Barriers: `full` and `empty` of every stage; `turn` of every warpgroup, without which it might find `full` two rounds
behind, since a wait for a parity cannot tell them apart; `slope_full`, gelu'(z) has arrived.

Measured, an H100 SXM, K = 768, F = 3072, against cuBLAS and a kernel of rows in the same run: 16,384 rows 0.134 against
0.192 ms, 32,768 rows 0.286 against 0.373; cuBLAS alone took 0.117 for the first. When the forward kept z and the
backward computed gelu'(z): 0.164 against 0.191 and 0.181 against 0.245. GELU left out, the forward took as long, the
one that keeps and the backward 0.009 and 0.029 ms less. Slower were a tile that both warpgroups share, b kept in shared
memory, and plain Triton with pointers, with TMA, with persistent programs (docs/gpu.md).

Shapes: N = rows (tokens), D = width, K = depth of a product, F = width of the feed-forward layer.
"""

# What Gluon makes of its types pyright does not see.
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import (
    INTERPRET,
    LAUNCH_OPTIONS,
    TRITON_DEVICES,
    TensorDescriptor,
    add_column_sums,
    check_dtype,
    check_parameter,
    gl,
    gluon,
    hopper,
    tl,
    triton,
)
from .linear import add_column_sum, linear, linear_dx, linear_forward

INV_SQRT_2PI, MINUS_HALF_LOG2_E = tl.constexpr(0.3989422804014327), tl.constexpr(-0.7213475204444817)
# 256 columns are a warp of 16-byte loads in bf16 and divide 768, 1,536 and 3,072; 16 rows make 32 elements a thread.
TILE = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
STRIP = 128  # rows that a program of the backward sums

# Of the product with GELU behind it, and the major compute capabilities for whose tensor cores it is written.
OWN_PRODUCT: tuple[int, ...] = (9,)
mbarrier, tma, fence_async_shared = hopper.mbarrier, hopper.tma, hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
# Names in Triton 3.6, and in later ones.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
SIDE = gl.constexpr(128)  # rows and columns of a tile: 128 accumulators a thread
DEPTH = gl.constexpr(64)
STAGES = gl.constexpr(5)  # and two halves of a tile for each warpgroup: 227 of 227 KiB
GROUP = gl.constexpr(8)
PART = gl.constexpr(64)  # columns that the end of a tile takes at a time: 128 bytes, a row of the widest swizzle
# Registers a thread: 168 * 384 are an SM's, and setmaxnreg gives what the loading warp does not want to the others.
REGISTERS, PRODUCER_REGISTERS, CONSUMER_REGISTERS = 168, gl.constexpr(24), gl.constexpr(240)


def bias_gelu_reference(x_NF: Tensor, bias_F: Tensor) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs), in that dtype."""
    dtype = torch.promote_types(x_NF.dtype, torch.float32)
    return F.gelu(x_NF.to(dtype) + bias_F.to(dtype))


@triton.jit
def _tail(z):
    """(Phi(-|z|), exp(-z^2 / 2)) in fp32: one exponential, one square root and seven multiply-adds.

    Their quotient is a polynomial in 1 / (1 + 0.35 |z|), as in Abramowitz and Stegun 7.1.26, here of degree 7 and
    fitted for the least relative error, 3.1e-7 up to |z| = 13.5, where exp is 0 in fp32. So GELU is right to 8e-6 of
    itself however small it is, a 250th of what bf16 rounds by, and to 2.4e-7 absolutely, while 0.5 + 0.5 * erf, which
    cancels, is off by all of GELU below -5.4 and by up to 4.4e-7 (over 2 million z in fp32). tl.erf takes twice as many
    instructions.
    """
    root = tl.rsqrt(1.0 + 0.35 * tl.abs(z))  # a division would be eight instructions
    t = root * root
    quotient = 0.04894232749938965 * t - 0.20211882889270782
    quotient = quotient * t + 0.2406400740146637
    quotient = quotient * t - 0.017022790387272835
    quotient = quotient * t + 0.15596117079257965
    quotient = quotient * t + 0.13335518538951874
    quotient = quotient * t + 0.14027032256126404
    quotient = quotient * t - 2.7314665203448385e-05
    exponential = tl.exp2(z * z * MINUS_HALF_LOG2_E)
    return quotient * exponential, exponential


@triton.jit
def gelu(z):
    """z * Phi(z) in fp32."""
    tail, _ = _tail(z)
    return tl.maximum(z, 0.0) - tl.abs(z) * tail


@triton.jit
def gelu_derivative(z):
    """Phi(z) + z * phi(z) in fp32."""
    tail, exponential = _tail(z)
    return tl.where(z < 0, tail, 1.0 - tail) + z * (INV_SQRT_2PI * exponential)


@triton.jit(do_not_specialize=("N",))
def _forward_kernel(
    x_ptr, bias_ptr, out_ptr, slope_ptr,  # (N, F), (F,), (N, F), (N, F) or None; one of the last two may be x_ptr
    N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < N)[:, None] & (column < F)[None, :]
    at = row[:, None] * F + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + at, gelu(z).to(out_ptr.dtype.element_ty), mask=live)
    if slope_ptr is not None:
        tl.store(slope_ptr + at, gelu_derivative(z).to(slope_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("N",))
def _backward_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr,  # (N, F), ..., (strips, F) fp32; without a bias x is gelu'(z)
    N, F, strip_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = None if bias_ptr is None else tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, strip_rows, ROWS):  # not a constant: it would be unrolled, and spill
        row = strip * strip_rows + begin + tl.arange(0, ROWS)
        live = (row < N)[:, None] & (column < F)[None, :]
        at = row[:, None] * F + column[None, :]
        slope = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            slope = gelu_derivative(slope + bias[None, :])
        dout = tl.load(dout_ptr + at, mask=live, other=0.0).to(tl.float32)
        dx = dout * slope
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        dbias += dx
    tl.store(partial_ptr + strip * F + column, tl.sum(dbias, axis=0), mask=column < F)


@gluon.jit
def _place(tile, N, F):
    """First row and column of a tile, in groups of GROUP rows of tiles: those under way share operands in L2."""
    in_group = GROUP * (F // SIDE)
    first = tile // in_group * GROUP
    height = gl.minimum(gl.cdiv(N, SIDE) - first, GROUP)
    return (first + tile % in_group % height) * SIDE, tile % in_group // height * SIDE


@gluon.jit
def _produce(a_desc, b_desc, a_ring, b_ring, full, empty, N, F, K, BACKWARD: gl.constexpr):
    """The warp that loads."""
    position = 0
    for tile in range(gl.program_id(0), gl.cdiv(N, SIDE) * (F // SIDE), gl.num_programs(0)):
        row, column = _place(tile, N, F)
        for k in range(0, K, DEPTH):
            stage = position % STAGES
            mbarrier.wait(empty.index(stage), (position // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * SIDE * DEPTH * 2)
            tma_load(a_desc, [row, k], full.index(stage), a_ring.index(stage))
            if BACKWARD:
                tma_load(b_desc, [k, column], full.index(stage), b_ring.index(stage))
            else:
                tma_load(b_desc, [column, k], full.index(stage), b_ring.index(stage))
            position += 1


@gluon.jit
def _store(x, desc, buffer, row, column):
    """PART columns, by TMA through a buffer that is free."""
    buffer.store(x.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    tma_store(desc, [row, column], buffer)


@gluon.jit
def _store_next(x, desc, staging, number, row, column):
    """The same through the next of two buffers, once its last store has gone."""
    tma.store_wait(1)
    barrier()  # only one thread knew
    _store(x, desc, staging.index(number % 2), row, column)


@gluon.jit
def _consume(
    slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging, full, empty, turn, slope_full, N, F, K,
    MINE: gl.constexpr, BACKWARD: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """A warpgroup, the first (MINE = 0) or the second."""
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    slices = K // DEPTH
    tiles = gl.cdiv(gl.cdiv(N, SIDE) * (F // SIDE) - gl.program_id(0), gl.num_programs(0))
    for i in range(MINE, tiles, 2):
        row, column = _place(gl.program_id(0) + i * gl.num_programs(0), N, F)
        if BACKWARD:  # gelu'(z) comes where the results go
            tma.store_wait(0)
            barrier()
            mbarrier.expect(slope_full.index(MINE), SIDE * SIDE * 2)
            for part in gl.static_range(2):
                tma_load(slope_desc, [row, column + part * PART], slope_full.index(MINE), staging.index(part))
        columns = gl.arange(0, PART, gl.SliceLayout(0, LAYOUT))
        biases = (
            None if BACKWARD else (gl.load(bias_ptr + column + columns), gl.load(bias_ptr + column + PART + columns))
        )
        mbarrier.wait(turn.index(MINE), (i // 2 & 1) ^ (1 - MINE))  # the first has its first turn without waiting
        product = gl.zeros((SIDE, SIDE), gl.float32, ACCUMULATOR)
        position = i * slices
        for k in range(slices):
            stage = position % STAGES
            mbarrier.wait(full.index(stage), position // STAGES & 1)
            b = b_ring.index(stage)
            if not BACKWARD:
                b = b.permute((1, 0))
            product = warpgroup_mma(a_ring.index(stage), b, product, use_acc=k > 0, is_async=True)
            product = warpgroup_mma_wait(1, deps=[product])
            mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), pred=k > 0)  # of the slice before
            position += 1
        mbarrier.arrive(turn.index(1 - MINE))
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES))
        if BACKWARD:
            mbarrier.wait(slope_full.index(MINE), i // 2 & 1)
        parts = product.reshape(SIDE, 2, PART).permute(0, 2, 1).split()
        for part in gl.static_range(2):
            x = gl.convert_layout(parts[part], LAYOUT, assert_trivial=True)
            at = column + part * PART
            if BACKWARD:
                buffer = staging.index(part)
                live = (row + gl.arange(0, SIDE, gl.SliceLayout(1, LAYOUT)) < N)[:, None]
                x = gl.where(live, x * buffer.load(LAYOUT).to(gl.float32), 0.0)
                gl.store(partial_ptr + (row // SIDE).to(gl.int64) * F + at + columns, gl.sum(x, axis=0))
                _store(x, out_desc, buffer, row, at)
            else:
                z = x + biases[part].to(gl.float32)[None, :]
                value = gelu(z).to(gl.bfloat16)  # before the barriers of a store, behind which `_tail` is made again
                if KEEP:
                    _store_next(gelu_derivative(z), slope_desc, staging, 2 * part, row, at)
                _store_next(value, out_desc, staging, 2 * part + 1 if KEEP else part, row, at)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("N",))
def _product_kernel(
    a_desc, b_desc, slope_desc, out_desc,  # gelu'(z): written, in the backward read, or None
    bias_ptr, partial_ptr,                 # (F,) in the forward; (rows of tiles, F) fp32 in the backward; else None
    N, F, K: gl.constexpr, BACKWARD: gl.constexpr, KEEP: gl.constexpr,
    OPERAND: gl.constexpr, B: gl.constexpr, RESULT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    B_SHAPE: gl.constexpr = [STAGES, DEPTH, SIDE] if BACKWARD else [STAGES, SIDE, DEPTH]
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SIDE, DEPTH], OPERAND)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, B_SHAPE, B)
    staging0 = gl.allocate_shared_memory(gl.bfloat16, [2, SIDE, PART], RESULT)
    staging1 = gl.allocate_shared_memory(gl.bfloat16, [2, SIDE, PART], RESULT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    slope_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    for s in gl.static_range(2):
        mbarrier.init(turn.index(s), count=1)
        mbarrier.init(slope_full.index(s), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging0, full, empty, turn, slope_full,
                N, F, K, 0, BACKWARD, KEEP,
            )),
            (_consume, (
                slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging1, full, empty, turn, slope_full,
                N, F, K, 1, BACKWARD, KEEP,
            )),
            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, N, F, K, BACKWARD)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _or_zeros(bias: Tensor | None, x: Tensor) -> Tensor:
    """The bias of x; zeros where a head's layer has none, whose few tokens do not pay for kernels of their own."""
    return x.new_zeros(x.shape[1:]) if bias is None else bias


def _launch_forward(x: Tensor, bias: Tensor, out: Tensor, slope: Tensor | None) -> None:
    """out = gelu(x + bias), and its derivative, if anybody wants it; x itself may be one of the two."""
    if x.numel() > 0:
        N, width = x.shape
        grid = (triton.cdiv(N, TILE["ROWS"]), triton.cdiv(width, TILE["COLUMNS"]))
        _forward_kernel[grid](x, bias, out, slope, N, width, **TILE, **LAUNCH_OPTIONS)


def _launch_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, dbias: Tensor | None, accumulate: bool
) -> None:
    """dx, which may be dout itself, and dbias; without a bias x is the derivative."""
    N, width = x.shape
    strips = triton.cdiv(N, STRIP)
    partial = x.new_empty((strips, 1, width), dtype=torch.float32)
    if x.numel() > 0:
        _backward_kernel[(strips, triton.cdiv(width, TILE["COLUMNS"]))](
            dout, x, bias, dx, partial, N, width, STRIP, **TILE, **LAUNCH_OPTIONS
        )
    add_column_sums(partial, (dbias,), accumulate)


@functools.cache
def _capability(device: torch.device) -> int:
    """Major compute capability; an H100's for tensors elsewhere: in the interpreter and where nothing is launched."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def _layout(columns: int) -> Any:
    """Of shared memory, as TMA fills and tensor cores read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(2 * columns, 128), element_bitwidth=16, rank=2)


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # Not x.stride(): of a single row that may be any number, and TMA wants multiples of 16 bytes.
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, columns], _layout(columns))


def _takes_own_product(a: Tensor, b: Tensor, columns: int) -> bool:
    """Whether the kernel serves the product of `a` (N, K) and `b`, which has so many columns."""
    fits = a.numel() > 0 < columns and a.shape[1] % DEPTH.value == columns % SIDE.value == 0
    there = a.device.type in TRITON_DEVICES and not INTERPRET and _capability(a.device) in OWN_PRODUCT
    if not (there and fits and a.dtype == b.dtype == torch.bfloat16):
        return False
    return a.is_contiguous() and b.is_contiguous() and (a.data_ptr() | b.data_ptr()) % 16 == 0  # as TMA reads


def _launch_product(
    a: Tensor, b: Tensor, bias: Tensor | None, slope: Tensor | None, out: Tensor, partial: Tensor | None
) -> None:
    """The backward, if it has `partial` (rows of tiles, 1, F) fp32, for its sums of rows. All contiguous."""
    (N, F), K, backward = out.shape, a.shape[1], partial is not None
    side, depth, part = SIDE.value, DEPTH.value, PART.value
    b_block = (depth, side) if backward else (side, depth)
    _product_kernel[(_programs(a.device),)](
        _described(a, side, depth), _described(b, *b_block),
        None if slope is None else _described(slope, side, part), _described(out, side, part),
        None if backward else _or_zeros(bias, out), partial, N, F, K, backward, slope is not None and not backward,
        _layout(depth), _layout(b_block[1]), _layout(part), num_warps=4, maxnreg=REGISTERS, **LAUNCH_OPTIONS,
    )  # fmt: skip


def linear_gelu_forward(
    x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(gelu(x @ weight.T + bias) (N, F), what the backward needs (N, F) if `keep`). No checks, no gradient.

    That is gelu'(x @ weight.T + bias), on the CPU, where PyTorch's own derivative serves, x @ weight.T + bias. All
    contiguous.
    """
    if x_ND.device.type not in TRITON_DEVICES:
        z = linear_forward(x_ND, weight_FD, bias_F)
        return F.gelu(z), z if keep else None
    if _takes_own_product(x_ND, weight_FD, weight_FD.shape[0]):
        out = x_ND.new_empty(x_ND.shape[0], weight_FD.shape[0])
        slope = torch.empty_like(out) if keep else None
        _launch_product(x_ND, weight_FD, bias_F, slope, out, None)
        return out, slope
    z = x_ND @ weight_FD.t()
    out, slope = (torch.empty_like(z), z) if keep else (z, None)
    _launch_forward(z, _or_zeros(bias_F, z), out, slope)
    return out, slope


def gelu_backward_product(
    dy_ND: Tensor, weight_DF: Tensor, kept_NF: Tensor, *, dbias: Tensor | None, accumulate: bool
) -> Tensor:
    """dz (N, F) = (dy @ weight) * gelu'(z), from what `linear_gelu_forward` kept.

    dbias is where the sum of dz over its rows goes, (F,) fp32 or in the dtype of bias; with `accumulate` it is added to
    what stands there. None: nowhere.
    """
    if _takes_own_product(dy_ND, weight_DF, weight_DF.shape[1]):
        dz = torch.empty_like(kept_NF)
        partial = dz.new_empty((triton.cdiv(dz.shape[0], SIDE.value), 1, dz.shape[1]), dtype=torch.float32)
        _launch_product(dy_ND, weight_DF, None, kept_NF, dz, partial)
        add_column_sums(partial, (dbias,), accumulate)
        return dz
    dout = linear_dx(dy_ND, weight_DF)
    return _backward_into(dout, dout, kept_NF, dbias, accumulate)


def gelu_backward_rows(dout_NF: Tensor, kept_NF: Tensor, *, dbias: Tensor | None, accumulate: bool) -> Tensor:
    """dz (N, F) = dout * gelu'(z); the rest as in `gelu_backward_product`."""
    return _backward_into(torch.empty_like(dout_NF), dout_NF, kept_NF, dbias, accumulate)


def _backward_into(dz: Tensor, dout: Tensor, kept: Tensor, dbias: Tensor | None, accumulate: bool) -> Tensor:
    if dout.device.type in TRITON_DEVICES:
        _launch_backward(dout, kept, None, dz, dbias, accumulate)
        return dz
    torch.ops.aten.gelu_backward.grad_input(dout, kept, grad_input=dz)
    if dbias is not None:
        add_column_sum(dbias, dz, accumulate)
    return dz


@torch.library.custom_op("fastdistil::bias_gelu", mutates_args=(), device_types=TRITON_DEVICES)
def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """(N, F) gelu(x + bias). Inputs contiguous."""
    out = torch.empty_like(x)
    _launch_forward(x, bias, out, None)
    return out


@gelu_forward.register_fake
def _(x, bias):
    return torch.empty_like(x)


@torch.library.custom_op("fastdistil::bias_gelu_backward", mutates_args=(), device_types=TRITON_DEVICES)
def gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dbias)."""
    dx, dbias = torch.empty_like(x), torch.empty_like(bias)
    _launch_backward(dout, x, bias, dx, dbias, False)
    return dx, dbias


@gelu_backward.register_fake
def _(dout, x, bias):
    return torch.empty_like(x), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    if dout is None:
        return None, None
    return gelu_backward(dout.contiguous(), *ctx.saved_tensors)


gelu_forward.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x_NF: Tensor, bias_F: Tensor | None) -> Tensor:
    """gelu(x + bias), of the shape and dtype of x; exact erf, not its tanh approximation.

    Args:
        x_NF: a GEMM's output without its bias, (N, F) or (B, L, F); fp32, bf16 or fp16. Gets a gradient.
        bias_F: of the same dtype, or None. Gets a gradient, summed in fp32.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    if bias_F is None:
        bias_F = x_NF.new_zeros(x_NF.shape[-1:])
    if x_NF.ndim < 2 or bias_F.shape != x_NF.shape[-1:]:
        raise ValueError(
            f"bias_gelu wants (N, F) or (B, L, F) and (F,), got {tuple(x_NF.shape)} and {tuple(bias_F.shape)}"
        )
    if x_NF.ndim > 2:
        return bias_gelu(x_NF.flatten(0, -2), bias_F).view(x_NF.shape)
    check_dtype("bias_gelu", x_NF)
    check_parameter("bias_gelu", "bias", bias_F, x_NF)
    if x_NF.device.type not in TRITON_DEVICES:
        return F.gelu(x_NF + bias_F)  # PyTorch's own, which also keeps the sum
    return gelu_forward(x_NF.contiguous(), bias_F.contiguous())


def linear_gelu(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """gelu(x @ weight.T + bias), (N, F) or (B, L, F); arguments as `linear` and `bias_gelu` have them.

    On the CPU, where a GEMM adds its bias for nothing, by PyTorch's own.
    """
    if x_ND.device.type not in TRITON_DEVICES:
        return F.gelu(linear(x_ND, weight_FD, bias_F))
    return bias_gelu(F.linear(x_ND, weight_FD), bias_F)
