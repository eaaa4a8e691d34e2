"""Milliseconds of the blocks that a kernel might work in, on this GPU: what the tables of kernels/ should say.

    python -m benchmarks.tiles [--only attention]       fastest first, the one in use marked
    python -m benchmarks.tiles --compile                without a GPU: whether they compile, into Triton's cache

Shapes are BERT-base's, and of attention also MiniLM's and that of ModernBERT's local layers, 16,384 tokens in sequences
of 512. Of a backward in two kernels, one is varied at a time. The product with GELU is varied by gelu_variants.py.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import gelu_variants
from fastdistil.kernels import attention, attention_tiles, distill, layernorm
from fastdistil.kernels.attention_tiles import Tile
from fastdistil.kernels.layout import sequence_layout

N, D, H, L, V = 16384, 768, 12, 512, 30528


class Variant(NamedTuple):
    """One kernel in one block."""

    kernel: str
    tile: str
    in_use: bool
    patch: Callable[[], AbstractContextManager[Any]]
    """In which the call launches this block."""
    call: Callable[[], object]


def variants(device: torch.device) -> Iterator[Variant]:
    """All there are to be tried; on meta tensors after no_gpu.pretend()."""
    for head_dim in (64, 32):
        yield from _attention(device, head_dim)
    yield from _attention(device, 64, window=64)
    yield from _layernorm(device)
    yield from _rows(device)
    for use, form, _, call in gelu_variants.uses(device, N):
        yield Variant(f"product with GELU {use}", form, form == gelu_variants.IN_USE, nullcontext, call)


FORWARD = [(128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (128, 32, 4), (64, 32, 4)]
DQ = [(128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4), (64, 128, 4), (128, 64, 4)]
DKDV = [(64, 64, 4), (32, 64, 4), (64, 128, 8), (32, 128, 8), (64, 128, 4), (128, 64, 4), (32, 128, 4)]
STAGES = (2, 3)


def _attention(device: torch.device, head_dim: int, window: int = 0) -> Iterator[Variant]:
    qkv = torch.randn(N, 3, H, head_dim, device=device).bfloat16()
    dout = torch.randn(N, H, head_dim, device=device).bfloat16()
    tiles = sequence_layout([L] * (N // L), tile_step=16).tiles.to(device)
    seed = torch.tensor(5, device=device)
    used = attention_tiles.half_tiles(attention_tiles.architecture(device), head_dim, window)
    out, lse, keys = attention._launch_forward(qkv, tiles, seed, 4, 0.1, window)
    shape_name = f"attention {head_dim}" + f" window {window}" * (window > 0)

    def variant(kernel: str, field: str, shape: tuple[int, int, int], call: Callable[[], object]) -> Iterator[Variant]:
        for stages in STAGES:
            tile = Tile(*shape, stages)
            patched = used._replace(**{field: tile})
            patch = partial(mock.patch.object, attention, "tiles_for", lambda *_, t=patched: t)
            name = f"{tile.BLOCK_M} x {tile.BLOCK_N}, {tile.num_warps} warps, {stages} stages"
            yield Variant(f"{shape_name} {kernel}", name, patched == used, patch, call)

    def forward(seed: Any, p: float) -> object:
        return attention._launch_forward(qkv, tiles, seed, 4, p, window)

    def backward() -> object:
        return attention._launch_backward(dout, qkv, out, lse, keys, tiles, 0.1, window, sums=True)

    for shape in FORWARD:
        yield from variant("forward", "forward", shape, partial(forward, None, 0.0))
        yield from variant("forward, dropout", "forward_dropout", shape, partial(forward, seed, 0.1))
    for shape in DQ:
        yield from variant("backward by dq", "dq", shape, backward)
    for shape in DKDV:
        yield from variant("backward by dk, dv", "dkdv", shape, backward)


NORMS = [(rows, each) for rows in (1, 2, 4) for each in (4, 8, 16, 32, 64)]  # at once, and of a program


def _layernorm(device: torch.device) -> Iterator[Variant]:
    x, residual, dy = (torch.randn(4 * N, D, device=device).bfloat16() for _ in range(3))
    weight, bias = (torch.randn(D, device=device).bfloat16() for _ in range(2))
    sums = dict(zip(("dweight", "dbias", "dx_sum"), torch.zeros(3, D, device=device), strict=True))
    for p, seed in ((0.0, None), (0.1, torch.tensor(5, device=device))):
        forward = partial(layernorm.forward, x, residual, weight, bias, 1e-12, seed, 3, p)
        backward = partial(layernorm.backward, dy, forward()[1], weight, seed, 3, p, **sums, accumulate=True)
        ahead, back = layernorm.forward_tile(D, 2, dropout=seed is not None), layernorm.tile(D, 2)
        for rows, each in NORMS:
            name = f"{rows} rows, {each} rows a program"
            tile = ahead | {"ROWS": rows}
            patches = {"forward_tile": lambda *_, t=tile, **__: t, "FORWARD_ROWS_PER_PROGRAM": each}
            patch = partial(mock.patch.multiple, layernorm, **patches)
            same = tile == ahead and each == layernorm.FORWARD_ROWS_PER_PROGRAM
            yield Variant(f"LayerNorm of {4 * N} forward p={p}", name, same, patch, forward)
            tile = back | {"ROWS": rows}
            patches = {"tile": lambda *_, t=tile: t, "_rows_per_program": lambda *_, e=each: e}
            patch = partial(mock.patch.multiple, layernorm, **patches)
            same = tile == back and each == layernorm._rows_per_program(4 * N, rows)
            if each >= 16:
                yield Variant(f"LayerNorm of {4 * N} backward p={p}", name, same, patch, backward)


def _rows(device: torch.device) -> Iterator[Variant]:
    z, y = (torch.randn(4096, V, device=device).bfloat16() for _ in range(2))
    labels = torch.full((4096,), -100, device=device)
    labels[::7] = 7
    scales = torch.full((2,), 1e-4, device=device)
    for warps in (4, 8, 16, 32):
        patch = partial(mock.patch.object, distill, "NUM_WARPS", warps)
        call = partial(distill.forward, z, y, labels, None, z, 0, 2.0, scales, V - 6)
        yield Variant("row kernel of 4096", f"{warps} warps", warps == distill.NUM_WARPS, patch, call)


def measure(ms: Callable[[Callable[[], object]], float], device: torch.device, only: str = "") -> dict[str, Any]:
    """{kernel: {tile: milliseconds or what is wrong}}, fastest first, the tile in use marked with a *."""
    found: dict[str, dict[str, Any]] = {}
    for kernel, tile, in_use, patch, call in variants(device):
        if only not in kernel:
            continue
        with patch():
            try:
                took: Any = ms(call)
            except Exception as error:  # more shared memory or registers than there are
                took = f"{type(error).__name__}: {str(error)[:60]}"
        found.setdefault(kernel, {})[tile + " *" * in_use] = took
    numbers = {k: {t: x for t, x in rows.items() if not isinstance(x, str)} for k, rows in found.items()}
    return {
        kernel: dict(sorted(numbers[kernel].items(), key=lambda row: row[1]))
        | {tile: x for tile, x in rows.items() if isinstance(x, str)}
        for kernel, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the kernels to try")
    parser.add_argument("--compile", action="store_true", help="without a GPU, for sm_90")
    args = parser.parse_args()
    if args.compile:
        from benchmarks.no_gpu import pretend

        pretend()
        found = measure(lambda call: float(call() is None), torch.device("meta"), args.only)
    else:
        from triton.testing import do_bench_cudagraph

        def ms(call: Callable[[], object]) -> float:
            took: Any = do_bench_cudagraph(call, rep=10, return_mode="median")
            return round(took, 4)

        found = measure(ms, torch.device("cuda"), args.only)
    for kernel, rows in found.items():
        print(kernel)
        for tile, took in rows.items():
            print(f"    {tile:<44}{'compiled' if args.compile and not isinstance(took, str) else took}")


if __name__ == "__main__":
    main()
