"""GELU of a product on Hopper, in one kernel: one tile's GELU runs beside another tile's tensor cores. Gluon, bf16.

    forward    out = gelu(a @ b.T + bias), and z = a @ b.T where a backward follows      a (N, K), b (F, K)
    backward   out = (a @ b) * gelu'(z + bias), and its sums over rows                   a (N, K), b (K, F)

GELU takes about 18 instructions an element, its derivative 27: at K = 768 as long as the tensor cores take. So a CTA is
three partitions: a warp that loads tiles by TMA into a ring of stages, and two warpgroups, each with a tile of 128 x 128
of its own. They take turns at the tensor cores, and as many CTAs as there are multiprocessors go through all tiles.

    loads         a and b of tile 0 | of tile 1 | of tile 2 | ...
    warpgroup 0   products of tile 0 | GELU of tile 0     | products of tile 2 | ...
    warpgroup 1   (waits)            | products of tile 1 | GELU of tile 1     | ...

Results leave through shared memory by TMA, which clips rows from N on; in the backward z arrives the same way.

Barriers: `full` and `empty` of every stage; `turn` of every warpgroup, without which it might find `full` two rounds
behind, since a wait for a parity cannot tell them apart; `z_full`, z has arrived.

Measured, an H100 SXM, K = 768, F = 3072, against cuBLAS and a kernel of rows in the same run: 16,384 rows 0.134 against
0.192 ms, with z kept 0.164 against 0.191, backward 0.181 against 0.245; 32,768 rows 0.286, 0.317, 0.386 against 0.373,
0.365, 0.466. cuBLAS alone took 0.117 for the first. Of other ways, all slower: a tile of 2 x 64 x 256 that both share, b
kept in shared memory, plain Triton with TMA, with persistent programs, with warp_specialize.

Shapes: N = rows (tokens), K = depth, F = width of the feed-forward layer.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._backend import LAUNCH_OPTIONS
from .gelu import gelu, gelu_derivative

# Their names in Triton 3.6, and in later ones.
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


@gluon.jit
def _place(tile, N, F):
    """First row and column of a tile: in groups of GROUP rows of tiles, so that those under way share operands in L2."""
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
    z_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging, full, empty, turn, z_full, N, F, K,
    MINE: gl.constexpr, BACKWARD: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """A warpgroup, the first (MINE = 0) or the second."""
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    slices = K // DEPTH
    tiles = gl.cdiv(gl.cdiv(N, SIDE) * (F // SIDE) - gl.program_id(0), gl.num_programs(0))
    for i in range(MINE, tiles, 2):
        row, column = _place(gl.program_id(0) + i * gl.num_programs(0), N, F)
        if BACKWARD:  # z comes where the results go
            tma.store_wait(0)
            barrier()
            mbarrier.expect(z_full.index(MINE), SIDE * SIDE * 2)
            for part in gl.static_range(2):
                tma_load(z_desc, [row, column + part * PART], z_full.index(MINE), staging.index(part))
        columns = gl.arange(0, PART, gl.SliceLayout(0, LAYOUT))
        biases = (gl.load(bias_ptr + column + columns), gl.load(bias_ptr + column + PART + columns))
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
            mbarrier.wait(z_full.index(MINE), i // 2 & 1)
        parts = product.reshape(SIDE, 2, PART).permute(0, 2, 1).split()
        for part in gl.static_range(2):
            x = gl.convert_layout(parts[part], LAYOUT, assert_trivial=True)
            bias = biases[part].to(gl.float32)[None, :]
            at = column + part * PART
            if BACKWARD:
                buffer = staging.index(part)
                live = (row + gl.arange(0, SIDE, gl.SliceLayout(1, LAYOUT)) < N)[:, None]
                x = gl.where(live, x * gelu_derivative(buffer.load(LAYOUT).to(gl.float32) + bias), 0.0)
                gl.store(partial_ptr + (row // SIDE).to(gl.int64) * F + at + columns, gl.sum(x, axis=0))
                _store(x, out_desc, buffer, row, at)
            else:
                if KEEP:
                    _store_next(x, z_desc, staging, 2 * part, row, at)
                _store_next(gelu(x + bias), out_desc, staging, 2 * part + 1 if KEEP else part, row, at)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("N",))
def _product_kernel(
    a_desc, b_desc, z_desc, out_desc,  # z: written, in the backward read, or None
    bias_ptr, partial_ptr,             # (F,); (rows of tiles, F) fp32 in the backward, else None
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
    z_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    for s in gl.static_range(2):
        mbarrier.init(turn.index(s), count=1)
        mbarrier.init(z_full.index(s), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                z_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging0, full, empty, turn, z_full, N, F, K,
                0, BACKWARD, KEEP,
            )),
            (_consume, (
                z_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging1, full, empty, turn, z_full, N, F, K,
                1, BACKWARD, KEEP,
            )),
            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, N, F, K, BACKWARD)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _layout(columns: int) -> Any:
    """Of shared memory, as TMA fills and tensor cores read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(2 * columns, 128), element_bitwidth=16, rank=2)


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], _layout(columns))


def takes(a: Tensor, columns: int) -> bool:
    """Whether the kernel serves a product of `a` (N, K) with so many columns, on a device that it is for."""
    fits = a.shape[0] > 0 and a.shape[1] % DEPTH.value == columns % SIDE.value == 0
    return fits and a.dtype == torch.bfloat16


def launch(a: Tensor, b: Tensor, bias: Tensor, z: Tensor | None, out: Tensor, partial: Tensor | None) -> None:
    """The backward, if it has `partial` (rows of tiles, 1, F) fp32, for its sums of rows. All contiguous."""
    (N, F), K, backward = out.shape, a.shape[1], partial is not None
    side, depth, part = SIDE.value, DEPTH.value, PART.value
    b_block = (depth, side) if backward else (side, depth)
    _product_kernel[(_programs(a.device),)](
        _described(a, side, depth), _described(b, *b_block),
        None if z is None else _described(z, side, part), _described(out, side, part),
        bias, partial, N, F, K, backward, z is not None and not backward,
        _layout(depth), _layout(b_block[1]), _layout(part), num_warps=4, maxnreg=REGISTERS, **LAUNCH_OPTIONS,
    )  # fmt: skip
