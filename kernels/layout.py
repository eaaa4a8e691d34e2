"""Where the sequences of a packed micro-batch begin and end, and the tiles that the attention kernels take them in.

And what the public operators make of inputs that are not packed: rows of any leading dimensions, of which a mask says
which count.

Shapes: S sequences, T tiles, N tokens of the micro-batch; (..., D) is (N, D) or (B, L, D), B texts of L tokens.
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


def padded_layout(mask_BL: Tensor) -> SequenceLayout:
    """The layout of a padded batch, flattened to B * L rows, on its device: each text and each padding is a sequence.

    Padding attends to itself, and no text to it. Made once for all layers; on CUDA the mask is read by the host.

    Args:
        mask_BL: an attention mask of transformers: True or 1 for a token, False or 0 for padding, on either side.

    Raises ValueError where the tokens of a text do not follow one another.
    """
    if mask_BL.ndim != 2 or not mask_BL.numel():
        raise ValueError(f"padded_layout wants a mask (B, L) of a token or more, got {tuple(mask_BL.shape)}")
    real_BL = mask_BL.cpu().numpy() != 0
    begins_BL = np.diff(real_BL, axis=1, prepend=~real_BL[:, :1])
    if ((begins_BL & real_BL).sum(1) > 1).any():
        raise ValueError("padded_layout wants the tokens of a text side by side, got padding between them: move it")
    starts = np.flatnonzero(begins_BL)
    return sequence_layout(np.diff(starts, append=real_BL.size).tolist(), mask_BL.device)


def as_rows(operator: str, name: str, x: Tensor) -> Tensor:
    """(N, D) of (..., D). Raises ValueError for a tensor without rows."""
    if x.ndim < 2:
        raise ValueError(f"{operator} wants {name} of shape (N, D) or (B, L, D), got {tuple(x.shape)}")
    return x if x.ndim == 2 else x.flatten(0, -2)


def check_mask(operator: str, mask: Tensor | None, like: Tensor, num_rows: Tensor | None) -> Tensor | None:
    """(N,) bool of a mask that has the leading dimensions of `like`. Raises ValueError for any other."""
    if mask is None:
        return None
    if mask.shape != like.shape[:-1] or mask.dtype != torch.bool or mask.device != like.device:
        raise ValueError(
            f"{operator} wants mask as bool of shape {tuple(like.shape[:-1])} on {like.device}, got {mask.dtype} of "
            f"shape {tuple(mask.shape)} on {mask.device}: an attention mask of 0 and 1 is `mask.bool()`"
        )
    if num_rows is not None:
        raise ValueError(f"{operator} wants mask or num_rows, got both: leave num_rows out")
    return mask.flatten()


class KeptRows:
    """The rows of a mask that count, gathered before an operator and put back after it; on CUDA the host waits once.

    Where none counts one row stays, so that there is something to compute, and `num_rows` says that it is none.
    """

    def __init__(self, mask_N: Tensor) -> None:
        index = mask_N.nonzero()[:, 0]
        self.num_all, self.num_rows = len(mask_N), None if len(index) else index.new_zeros(())
        self.index = index if len(index) else index.new_zeros(1)

    def take(self, *tensors: Tensor) -> list[Tensor]:
        """Those rows of each."""
        return [x.index_select(0, self.index) for x in tensors]

    def put_back(self, x: Tensor) -> Tensor:
        """All rows, with 0 where none was taken."""
        return x.new_zeros((self.num_all, *x.shape[1:])).index_copy_(0, self.index, x)
