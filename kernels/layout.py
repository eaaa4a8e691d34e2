"""Where the sequences of a packed micro-batch begin and end, and the tiles that the attention kernels take them in.

Shapes: S sequences, T tiles, N tokens of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

TILE_ROWS = 128  # of a tile; a program of the kernels takes all of them or an even part


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLayout:
    """Where the sequences of a packed micro-batch begin and end. Made once, on the host, for all layers."""

    cu_seqlens: Tensor
    """(S + 1,) int32: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]. Trailing ones may be empty."""
    tiles: Tensor
    """(T, 3) int32: start and end of a sequence, and the first of the up to 128 of its rows that are the tile.

    The longest sequences come first, so that the last programs to run are short ones. Tiles of nothing, all 0, come
    last.
    """
    max_length: int
    """Tokens of the longest sequence, or what no sequence of any micro-batch exceeds."""
    num_tokens: int
    """N, known to the host without a sync."""
    runs: tuple[tuple[int, int], ...]
    """(number of neighbouring sequences, their common length), in order: one SDPA call each."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SequenceLayout":
        """The same layout with its tensors on `device`."""
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return replace(self, cu_seqlens=cu_seqlens, tiles=self.tiles.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SequenceLayout":
        """The same layout in pinned memory, from which copies to a GPU are asynchronous."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory(), tiles=self.tiles.pin_memory())


def sequence_layout(
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    sequence_step: int = 1,
    tile_step: int = 1,
    longest: int | None = None,
) -> SequenceLayout:
    """The layout of sequences of `lengths` tokens, in order and the trailing pad included.

    The numbers of sequences and tiles are rounded up to a multiple of their step, with empty ones: a step that is
    rarely exceeded keeps the shapes of all micro-batches the same, for torch.compile and CUDA graphs. For these
    `longest` is the max_length of all, to which packed flash attention sizes its launches; without it, it is that of
    these sequences.

    Raises ValueError if there is no sequence, one without a token, or one above `longest`.
    """
    length_S = np.asarray(lengths, dtype=np.int64)
    if length_S.size == 0 or length_S.min() < 1:
        raise ValueError(
            "sequence_layout wants at least one sequence, each of 1 token or more, got "
            f"{length_S.tolist()}: leave an empty trailing pad sequence out"
        )
    if longest is not None and length_S.max() > longest:
        raise ValueError(f"sequence_layout wants sequences of at most longest={longest} tokens, got {length_S.max()}")
    bounds = np.concatenate([[0], length_S.cumsum()])
    order = np.argsort(-length_S, kind="stable")
    num_tiles = -(-length_S[order] // TILE_ROWS)
    sequence_T = np.repeat(order, num_tiles)
    place_T = np.arange(sequence_T.size) - np.repeat(num_tiles.cumsum() - num_tiles, num_tiles)
    start_T = bounds[sequence_T]
    tile_T3 = np.zeros((-(-sequence_T.size // tile_step) * tile_step, 3), np.int32)
    tile_T3[: sequence_T.size] = np.stack([start_T, bounds[sequence_T + 1], start_T + TILE_ROWS * place_T], axis=1)
    cu_seqlens = np.pad(bounds.astype(np.int32), (0, -length_S.size % sequence_step), mode="edge")
    changes = np.flatnonzero(np.diff(length_S, prepend=-1))  # first sequence of every run
    counts = np.diff(changes, append=length_S.size)
    return SequenceLayout(
        cu_seqlens=torch.from_numpy(cu_seqlens),
        tiles=torch.from_numpy(tile_T3),
        max_length=int(length_S.max()) if longest is None else longest,
        num_tokens=int(bounds[-1]),
        runs=tuple(zip(counts.tolist(), length_S[changes].tolist(), strict=True)),
    ).to(device)
