"""Bidirectional attention inside each sequence of a packed micro-batch.

For the rows a..b-1 of one sequence and one head (Vaswani et al. 2017, eq. 1):

    out[a:b] = dropout(softmax(q[a:b] @ k[a:b].T / sqrt(Dh))) @ v[a:b]

No row sees another sequence, so the trailing pad sequence needs no mask: it attends to itself, and
since no loss counts its rows, nothing flows back from it.

Backends behind the one function:

    fused       kernels/flash.py: Triton on CUDA; on the CPU the PyTorch kernels below
    sdpa        PyTorch's scaled_dot_product_attention, one call for each run of equal lengths
    flash-attn  flash_attn_varlen_qkvpacked_func of that package (CUDA, bf16 and fp16)

The dropout masks of fused are those of kernels/dropout.py, with a token's row in the micro-batch as its index, so that
they do not depend on tiles or backends of it; sdpa and flash-attn draw from torch's generator.

`sdpa`, measured on two CPU cores (4,096 tokens, 12 heads of 32 and of 64, forward and backward, with and without
dropout, fp32 and bf16): against gathering the sequences into groups of exactly one length one call a run is 1.0 to 1.6
times as fast on lengths like Wikipedia's (20 sequences) and 0.9 to 1.3 times on 12 to 128 tokens. Lengths rounded up
to 16, 32 or 64, with a key mask, gain 12 % at most (16, short sequences) and lose up to a factor of 2.9 (64, the
same). So there are no gather indices.

Shapes: N tokens of the micro-batch, H heads, Dh width of a head, S sequences, L tokens of one sequence, T tiles.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import TRITON_DEVICES
from .dropout import check_dropout, keep_reference
from .flash import LOG2_E, TILE_ROWS, attention_forward
from .flash_tiles import MAX_HEAD_DIM

AttentionBackend = Literal["auto", "fused", "sdpa", "flash-attn"]
CHUNK_SCORES = 2**18  # 1 MiB of fp32, a core's L2: 2^16 to 2^22 differ by less than this machine's noise
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLayout:
    """Where the sequences of a packed micro-batch begin and end. Made once, on the host, for all layers."""

    cu_seqlens: Tensor
    """(S + 1,) int32: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]. Trailing ones may be empty."""
    tiles: Tensor
    """(T, 3) int32: start and end of a sequence, first of the up to 128 rows of a tile. A tile never crosses a boundary;
    longest sequences come first, so that the last programs to run are short ones, and tiles of nothing, all 0, last."""
    max_length: int
    """Tokens of the longest sequence."""
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
    lengths: Sequence[int], device: torch.device | str = "cpu", *, sequence_step: int = 1, tile_step: int = 1
) -> SequenceLayout:
    """The layout of sequences of `lengths` tokens, in order and the trailing pad included.

    The numbers of sequences and tiles are rounded up to a multiple of their step, with empty ones: a step that is rarely
    exceeded keeps the shapes of all micro-batches the same, for torch.compile and CUDA graphs.

    Raises ValueError if there is no sequence or one without a token.
    """
    length_S = np.asarray(lengths, dtype=np.int64)
    if length_S.size == 0 or length_S.min() < 1:
        raise ValueError(
            "sequence_layout wants at least one sequence, each of 1 token or more, got "
            f"{length_S.tolist()}: leave an empty trailing pad sequence out"
        )
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
    layout = SequenceLayout(
        cu_seqlens=torch.from_numpy(cu_seqlens),
        tiles=torch.from_numpy(tile_T3),
        max_length=int(length_S.max()),
        num_tokens=int(bounds[-1]),
        runs=tuple(zip(counts.tolist(), length_S[changes].tolist(), strict=True)),
    )
    return layout.to(device)


def attention_reference(
    qkv_N3HD: Tensor, layout: SequenceLayout, *, dropout_p: float = 0.0, seed: Tensor | None = None, stream: int = 0
) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs): (N, H, Dh) in that dtype."""
    qkv = qkv_N3HD.to(torch.promote_types(qkv_N3HD.dtype, torch.float32))
    heads = torch.arange(qkv.shape[2], device=qkv.device)
    outputs = []
    bounds = layout.cu_seqlens.tolist()
    parts = qkv.split([end - start for start, end in pairwise(bounds)])
    for part, (start, end) in zip(parts, pairwise(bounds), strict=True):
        q_HLD, k_HLD, v_HLD = part.permute(1, 2, 0, 3)
        weight_HLL = torch.softmax(q_HLD @ k_HLD.mT * q_HLD.shape[-1] ** -0.5, dim=-1)
        if seed is not None and dropout_p > 0:
            row = torch.arange(start, end, device=qkv.device)
            kept_HLL = keep_reference(seed, stream, dropout_p, heads, row, row)
            weight_HLL = torch.where(kept_HLL, weight_HLL / (1 - dropout_p), 0.0)
        outputs.append((weight_HLL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs)


def _chunks(tiles: Tensor, num_heads: int) -> Iterator[tuple[int, int, int]]:
    """(first row, B sequences, their length L) of neighbours of one length, with up to CHUNK_SCORES scores, in order."""
    # the first tile of every sequence that is not empty
    whole = tiles[(tiles[:, 0] == tiles[:, 2]) & (tiles[:, 0] < tiles[:, 1])]
    whole = whole[whole[:, 0].argsort()]
    lengths, counts = torch.unique_consecutive(whole[:, 1] - whole[:, 0], return_counts=True)
    first = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        most = max(1, CHUNK_SCORES // (num_heads * length**2))
        for done in range(0, count, most):
            batch = min(most, count - done)
            yield first, batch, length
            first += batch * length


def _by_head(rows: Tensor, batch: int) -> Tensor:
    """(B L, ..., H, D) -> (..., B H, L, D) fp32, which bmm wants: bf16 would round the scores."""
    H, D = rows.shape[-2:]
    split = rows.view(batch, rows.shape[0] // batch, -1, H, D).permute(2, 0, 3, 1, 4).float()
    return split.reshape(split.shape[0], batch * H, -1, D)


def attention_forward_torch(
    qkv: Tensor, tiles: Tensor, seed: Tensor | None, stream: int, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """`attention_forward` in PyTorch: serves CPU tensors. Scores exist for CHUNK_SCORES at a time."""
    N, _, H, D = qkv.shape
    out, lse = qkv.new_empty((N, H, D)), qkv.new_empty((H, N), dtype=torch.float32)
    for first, B, L in _chunks(tiles, H):
        rows = slice(first, first + B * L)
        q, k, v = _by_head(qkv[rows], B)
        weight = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=D**-0.5)
        top = weight.amax(2, keepdim=True)
        total = weight.sub_(top).exp_().sum(2, keepdim=True)
        chunk_lse = (top + total.log()) * LOG2_E
        lse[:, rows].view(H, B, L).copy_(chunk_lse.view(B, H, L).transpose(0, 1))
        if seed is not None:
            torch.ops.fastdistil.dropout_(weight.view(B, H, L, L), seed, stream, first, dropout_p)
        chunk_out = torch.bmm(weight, v).div_(total)
        out[rows].view(B, L, H, D).copy_(chunk_out.view(B, H, L, D).transpose(1, 2))
    return out, lse


def attention_backward_torch(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    """`attention_backward` in PyTorch: serves CPU tensors. The gradient as flash.py derives it."""
    _, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv)
    for first, B, L in _chunks(tiles, H):
        rows = slice(first, first + B * L)
        q, k, v = _by_head(qkv[rows], B)
        (chunk_out,), (chunk_dout,) = _by_head(out[rows], B), _by_head(dout[rows], B)
        delta = (chunk_dout * chunk_out).sum(2, keepdim=True)
        chunk_lse = lse[:, rows].view(H, B, L).transpose(0, 1).reshape(B * H, L, 1)
        weight = torch.baddbmm(chunk_lse * (-1 / LOG2_E), q, k.mT, alpha=D**-0.5).exp_()
        kept = weight
        if seed is not None:
            kept = weight.clone()
            torch.ops.fastdistil.dropout_(kept.view(B, H, L, L), seed, stream, first, dropout_p)
        dv = torch.bmm(kept.mT, chunk_dout)
        dscore = torch.bmm(chunk_dout, v.mT).mul_(kept).addcmul_(weight, delta, value=-1)
        dq, dk = torch.bmm(dscore, k).mul_(D**-0.5), torch.bmm(dscore.mT, q).mul_(D**-0.5)
        chunk = torch.stack([dq, dk, dv]).view(3, B, H, L, D).permute(1, 3, 0, 2, 4)
        dqkv[rows].view(B, L, 3, H, D).copy_(chunk)
    return dqkv


# The runs differ from one micro-batch to the next: traced, every new layout would recompile the
# encoder. As a graph break, the code around it is compiled once, for the constant N.
@torch.compiler.disable()
def _sdpa_by_run(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float) -> Tensor:
    num_heads, head_dim = qkv_N3HD.shape[2:]
    sizes = [batch * length for batch, length in layout.runs]
    outputs = []
    # split, not slices: its backward is one concatenation; that of a slice fills a whole (N, 3, H,
    # Dh) with zeros.
    for (batch, length), rows in zip(layout.runs, qkv_N3HD.split(sizes), strict=True):
        q_BHLD, k_BHLD, v_BHLD = rows.view(batch, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, dropout_p=dropout_p)
        outputs.append(out_BHLD.transpose(1, 2).reshape(batch * length, num_heads, head_dim))
    return torch.cat(outputs)


@torch.compiler.disable()  # a package of its own, with operators of its own
def _flash_attn(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_qkvpacked_func(qkv_N3HD, layout.cu_seqlens, layout.max_length, dropout_p=dropout_p)


def resolve_backend(
    backend: AttentionBackend, device: torch.device | str, *, dropout_p: float = 0.0, dtype: torch.dtype | None = None
) -> Literal["fused", "sdpa", "flash-attn"]:
    """What `attention(backend=...)` runs on this device, with dropout at this rate (0 in evaluation).

    auto is fused on CUDA; no other backend was timed beside it there yet. On the CPU it is sdpa without dropout and fused
    with: PyTorch's flash kernel for CPUs has no dropout, so that sdpa then writes whole score matrices and draws for each
    element. Time of sdpa over that of fused, two threads of a quiet AVX-512 machine, 12 heads of 32 / of 64, fp32 (bf16:
    0.8 to 1.3 times these ratios); at 1,024 tokens, in brackets at 4,096:

        lengths             forward, dropout 0           forward and backward, dropout 0.1
        all 128             0.69 / 0.88 (0.74 / 0.87)    2.07 / 1.75 (1.89 / 1.59)
        all 512             0.76 / 0.71 (0.58 / 0.70)    1.99 / 1.89 (3.18 / 2.48)
        like Wikipedia's    0.58 / 0.73 (0.59 / 0.74)    1.90 / 1.63 (2.40 / 2.03)

    Raises:
        ValueError: if the backend is unknown, or cannot serve the device or, where it is given, the dtype.
    """
    device_type = torch.device(device).type
    if backend == "auto":
        return "sdpa" if device_type == "cpu" and dropout_p == 0 else "fused"
    if backend not in ("fused", "sdpa", "flash-attn"):
        raise ValueError(f"attention wants backend auto, fused, sdpa or flash-attn, got {backend!r}")
    if backend == "flash-attn":
        if device_type != "cuda" or dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"attention backend flash-attn wants bf16 or fp16 on CUDA, got "
                f"{dtype or 'a tensor'} on {device_type}: use backend auto"
            )
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                "attention backend flash-attn wants the package flash-attn, which is not installed: "
                "use backend auto, or pip install flash-attn --no-build-isolation"
            )
    return backend


def attention(
    qkv_N3HD: Tensor,
    layout: SequenceLayout,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Attention of every token to all tokens of its own sequence, scaled by 1/sqrt(Dh).

    Args:
        qkv_N3HD: queries, keys and values of all heads. fp32, bf16 or fp16. Gets a gradient.
        layout: of the N tokens.
        dropout_p: probability in [0, 1) that an attention weight is dropped.
        seed: of `dropout_seed`, on the same device; without one nothing is dropped, whatever dropout_p. Backends
            other than fused draw from torch's default generator of the device instead.
        stream: this place of dropout in the model, 0 or more; other numbers draw other masks.
        backend: see `resolve_backend`.

    Returns:
        (N, H, Dh) in the dtype of the input.

    Raises:
        ValueError: where shapes, dropout or the backend do not fit.
    """
    if qkv_N3HD.ndim != 4 or qkv_N3HD.shape[1] != 3:
        raise ValueError(
            "attention wants queries, keys and values as one (N, 3, heads, head width) tensor, "
            f"got {tuple(qkv_N3HD.shape)}"
        )
    if qkv_N3HD.shape[0] != layout.num_tokens:
        raise ValueError(
            f"attention: the layout holds {layout.num_tokens} tokens, the tensor {qkv_N3HD.shape[0]}: "
            "count the trailing pad sequence in the layout's lengths"
        )
    check_dropout("attention", qkv_N3HD, seed, stream, dropout_p)
    if seed is None or dropout_p == 0:
        seed, dropout_p = None, 0.0
    dtype, device = qkv_N3HD.dtype, qkv_N3HD.device
    chosen = resolve_backend(backend, device, dropout_p=dropout_p, dtype=dtype)
    if chosen == "sdpa":
        return _sdpa_by_run(qkv_N3HD, layout, dropout_p)
    if chosen == "flash-attn":
        return _flash_attn(qkv_N3HD, layout, dropout_p)
    if dtype not in DTYPES:
        raise ValueError(f"attention wants fp32, bf16 or fp16, got {dtype}: convert it, or use backend sdpa")
    by_triton = device.type in TRITON_DEVICES
    if by_triton and qkv_N3HD.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"attention backend fused wants heads of at most {MAX_HEAD_DIM}, got {qkv_N3HD.shape[3]}: use backend sdpa"
        )
    out_NHD, _ = attention_forward(qkv_N3HD.contiguous(), layout.tiles, seed, stream, dropout_p)
    return out_NHD
