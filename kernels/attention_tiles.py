"""What blocks the attention kernels of attention.py work in: data, no tuning at start-up."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import triton

MAX_HEAD_DIM = 128  # two accumulators and two operands of a wider head leave no registers on any of the GPUs


class Tile(NamedTuple):
    """Queries and keys that a program holds at once, its warps, and the blocks that are loaded or in work at once."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int = 2


class Tiles(NamedTuple):
    """Of the three kernels; the forward's depends on dropout."""

    forward: Tile
    forward_dropout: Tile
    dq: Tile
    dkdv: Tile


# For bf16 and fp16, by compute capability and head width (next power of two). Chosen by the compiled code (python -m
# benchmarks.aot), Triton 3.6.0 and 3.9.0: no spill with or without dropout, then two CTAs an SM, so that one's softmax
# runs beside the other's products, then fewest instructions a score. 128 rows of queries halve the reads of keys and
# values from L2, which at 64 would take as long as the forward itself; 64 keys, since with 128 one CTA fits.
#
# Measured by benchmarks/tiles.py, an H100 SXM, 16,384 tokens in sequences of 512, are those of width 64 on sm_90: there
# 64 rows and a third stage took 0.75 of the time of 128 rows and two, with dropout 0.90, dq with dk and dv 0.92.
TILES: dict[int, dict[int, Tiles]] = {
    80: {  # mma.sync: operands live in registers, which decide everything
        # 128 x 64 at width 16 makes ptxas spill for a third CTA.
        16: Tiles(Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 4)),
        32: Tiles(Tile(128, 64, 4), Tile(128, 64, 4), Tile(64, 64, 4), Tile(64, 64, 4)),
        # dq: 128 x 32 spills (3.6.0).
        64: Tiles(Tile(128, 64, 4), Tile(128, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
        # dkdv: the only shape of ten tried without a spill.
        128: Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 32, 8)),
    },
    90: {  # wgmma: products of 64 rows by a warpgroup, keys and values from shared memory
        16: Tiles(Tile(128, 64, 4), Tile(128, 64, 4), Tile(128, 64, 4), Tile(64, 64, 4)),
        32: Tiles(Tile(128, 64, 4), Tile(128, 64, 4), Tile(128, 64, 4), Tile(64, 64, 4)),
        64: Tiles(Tile(64, 64, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4)),
        128: Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(128, 64, 8), Tile(32, 128, 8)),
    },
    100: {  # tcgen05: 128 rows a product, accumulators in tensor memory, of which two CTAs may take 256 columns each
        16: Tiles(Tile(128, 64, 4), Tile(128, 64, 4), Tile(128, 64, 4), Tile(64, 128, 8)),
        32: Tiles(Tile(128, 64, 4), Tile(128, 64, 4), Tile(128, 64, 4), Tile(64, 128, 8)),
        # dkdv: 4 warps spill with dropout (3.6.0).
        64: Tiles(Tile(128, 64, 4), Tile(64, 64, 4), Tile(128, 64, 4), Tile(32, 128, 8)),
        128: Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 128, 8)),
    },
}
# With a window the tiles are those above, which do not spill either (Triton 3.6.0 and 3.9.0, window 64), but for four.
# dq at width 32 on sm_90: 64 rows see 192 where 128 see 256, and its loop runs 0.75 of the instructions for each, with
# dropout 0.76 (3.9.0) and 0.83 (3.6.0). dk + dv in three places: 64 queries a step spilled under 3.6.0, at width 16
# also without dropout, where 32 fit one to three CTAs more an SM.
_FEWER_QUERIES = Tile(32, 64, 4)
WINDOW_TILES: dict[tuple[int, int], Tiles] = {
    (90, 32): TILES[90][32]._replace(dq=Tile(64, 64, 4)),
    (90, 64): TILES[90][64]._replace(dkdv=_FEWER_QUERIES),
    (100, 16): TILES[100][16]._replace(dkdv=_FEWER_QUERIES),
    (100, 32): TILES[100][32]._replace(dkdv=_FEWER_QUERIES),
}
# Products of fp32 run on the FP32 units, with operands in registers: every block that tl.dot takes spills at width 64
# in one of the kernels, so this is for tests and for fp32 runs that can wait (or for backend sdpa).
FP32_TILES = Tiles(Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 4))


def block_d(head_dim: int) -> int:
    """Columns of a block: tl.dot wants a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(head_dim))


@lru_cache
def architecture(device: torch.device) -> int:
    """The compute capability whose row of a table is a GPU's: 8.x and 12.x both have mma.sync."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90  # the interpreter, or a forecast for a GPU that is elsewhere: any would do
    return {9: 90, 10: 100, 11: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def half_tiles(arch: int, width: int, window: int) -> Tiles:
    """The tiles of bf16 and fp16."""
    return WINDOW_TILES.get((arch, width), TILES[arch][width]) if window else TILES[arch][width]


def tiles_for(qkv: Tensor, window: int) -> Tiles:
    """The tiles that qkv (N, 3, H, D) runs with on its device."""
    if qkv.dtype == torch.float32:
        return FP32_TILES
    return half_tiles(architecture(qkv.device), block_d(qkv.shape[3]), window)
