"""Bidirectional attention inside each sequence of a packed micro-batch.

For the rows a..b-1 of one sequence and one head (Vaswani et al. 2017, eq. 1):

    out[a:b] = dropout(softmax(q[a:b] @ k[a:b].T / sqrt(Dh))) @ v[a:b]

No row sees another sequence, so the trailing pad sequence needs no mask: it attends to itself, and
since no loss counts its rows, nothing flows back from it.

The backend is PyTorch's `scaled_dot_product_attention`, called once per run of neighbouring
sequences of one length, on views of the packed tensor. Measured on two CPU cores (4,096 tokens, 12
heads of 32 and of 64, forward and backward, with and without dropout, fp32 and bf16): against
gathering the sequences into groups of exactly one length this is 1.0 to 1.6 times as fast on
lengths like Wikipedia's (20 sequences) and 0.9 to 1.3 times on 12 to 128 tokens. Lengths rounded up
to 16, 32 or 64, with a key mask, gain 12 % at most (16, short sequences) and lose up to a factor of
2.9 (64, the same). So there are no gather indices.

Shapes: N tokens of the micro-batch, H heads, Dh width of a head, S sequences, L tokens of one
sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLayout:
    """Where the sequences of a packed micro-batch begin and end. Made once for all layers."""

    cu_seqlens: Tensor
    """(S + 1,) int32 on the device: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]."""
    max_length: int
    """Tokens of the longest sequence."""
    num_tokens: int
    """N, known to the host without a sync."""
    runs: tuple[tuple[int, int], ...]
    """(number of neighbouring sequences, their common length), in order: one SDPA call each."""


def sequence_layout(lengths: Sequence[int], device: torch.device | str) -> SequenceLayout:
    """The layout of sequences of `lengths` tokens, in order and the trailing pad included.

    Raises ValueError if there is no sequence or one without a token.
    """
    lengths = [int(length) for length in lengths]
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"sequence_layout wants at least one sequence, each of 1 token or more, got {lengths}: "
            "leave an empty trailing pad sequence out"
        )
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return SequenceLayout(
        cu_seqlens=cu_seqlens.to(device, non_blocking=True),
        max_length=max(lengths),
        num_tokens=sum(lengths),
        runs=tuple((len(list(run)), length) for length, run in groupby(lengths)),
    )


def attention_reference(qkv_N3HD: Tensor, layout: SequenceLayout) -> Tensor:
    """The definition, in fp32 PyTorch, without dropout: (N, H, Dh) fp32."""
    bounds = layout.cu_seqlens.tolist()
    outputs = []
    for start, end in pairwise(bounds):
        q_HLD, k_HLD, v_HLD = qkv_N3HD[start:end].float().permute(1, 2, 0, 3)
        scores_HLL = q_HLD @ k_HLD.transpose(1, 2) * q_HLD.shape[-1] ** -0.5
        outputs.append((torch.softmax(scores_HLL, dim=-1) @ v_HLD).transpose(0, 1))
    return torch.cat(outputs)


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
        q_BHLD, k_BHLD, v_BHLD = rows.view(batch, length, 3, num_heads, head_dim).permute(
            2, 0, 3, 1, 4
        )
        out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, dropout_p=dropout_p)
        outputs.append(out_BHLD.transpose(1, 2).reshape(batch * length, num_heads, head_dim))
    return torch.cat(outputs)


def attention(qkv_N3HD: Tensor, layout: SequenceLayout, *, dropout_p: float = 0.0) -> Tensor:
    """Attention of every token to all tokens of its own sequence, scaled by 1/sqrt(Dh).

    Args:
        qkv_N3HD: contiguous; queries, keys and values of all heads. fp32, bf16 or fp16. Gets a
            gradient.
        layout: of the N tokens.
        dropout_p: probability in [0, 1) that an attention weight is dropped, drawn from torch's
            default generator of the device; 0 draws nothing. The caller passes 0 in evaluation.

    Returns:
        (N, H, Dh) in the dtype of the input. Raises ValueError where shapes or dropout_p do not
        fit.
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
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be at least 0 and below 1, got {dropout_p}")
    return _sdpa_by_run(qkv_N3HD, layout, dropout_p)
