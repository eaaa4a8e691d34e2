"""The relations of MiniLMv2 (arXiv 2012.15828, section 3.1): how a sequence's queries, keys or values resemble one
another.

X are the queries, keys or values of one layer for a sequence of L tokens, all attention heads side by side and then cut
into A relation heads of width d_r. Widths and attention heads of teacher and student may differ, A divides both widths:

    R_a = softmax(S_a),  S_a = X_a X_a^T / sqrt(d_r)
    loss = 1/A sum_a sum_t KL(R_a,t of the teacher || R_a,t of the student)

The paper divides by L and takes the mean over sequences; here it is the mean over real tokens, as of every term. The
student takes its last layer, the teacher any.

A relation is L / d_r times larger than what it is made of. So the gradient is made at once, while the relations of some
sequences are there, and nothing of their size is kept for the backward:

    dS_a = (R_a of the student - R_a of the teacher) / A,     dX_a = (dS_a + dS_a^T) X_a / sqrt(d_r)

Shapes: N tokens of the micro-batch, D and E widths of student and teacher, S sequences of up to L tokens, A relation
heads, R their width.
"""

# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from fastdistil.kernels._backend import times_gradient

PADDED_TOKENS = {"cpu": 256, "cuda": 4096}
"""S x L whose relations are in memory at once. A CPU likes them in its cache and without padding: sequences of 20 to
256 tokens take it 4.5 times as long with 4096. A GPU likes few launches; there A = 12 and L = 128 make 25 MB a
matrix."""
MATRICES = 3
"""A x S x L x L numbers in fp32 that are there at once: logarithms of both models, and scores or probabilities."""


def relation_loss(
    student_ND: Tensor,
    teacher_NE: Tensor,
    lengths: Sequence[int],
    cu_seqlens: Tensor,
    num_heads: int,
    scale: Tensor,
    *,
    at_end: bool,
) -> tuple[Tensor, Tensor]:
    """(scale * sum, with a gradient for the student; sum) over real tokens, 0-dim fp32, nats. No host sync.

    The sum is of the mean over relation heads of KL(teacher || student).

    Args:
        student_ND, teacher_NE: queries, keys or values; rows beyond the sum of `lengths` count for nothing.
        lengths: tokens of the real sequences, known on the host.
        cu_seqlens: where they begin, on the device (SequenceLayout); may have more entries.
        num_heads: A, divides D and E.
        scale: 0-dim fp32.
        at_end: whether the loss is a summand of what backward() is called on, so that the gradient is ready.
    """
    found: Any = _Relation.apply(at_end, num_heads, lengths, student_ND, teacher_NE, cu_seqlens, scale)
    return found


class _Relation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        at_end: bool,
        num_heads: int,
        lengths: Sequence[int],
        student_ND: Tensor,
        teacher_NE: Tensor,
        cu_seqlens: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dstudent_ND = student_ND.new_zeros(student_ND.shape) if ctx.needs_input_grad[3] else None
        total = torch.zeros((), device=student_ND.device)
        for rows, bounds, longest in _groups(lengths, cu_seqlens, PADDED_TOKENS[student_ND.device.type]):
            into = None if dstudent_ND is None else dstudent_ND[rows]
            total += _of_group(student_ND[rows], teacher_NE[rows], bounds, longest, num_heads, scale, into)
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        ctx.at_end = at_end
        ctx.save_for_backward(dstudent_ND)
        return scale * total, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dtotal: None) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        (dstudent_ND,) = found if ctx.at_end else times_gradient(dloss, found)
        return None, None, None, dstudent_ND, None, None, None


def _groups(lengths: Sequence[int], cu_seqlens: Tensor, padded_tokens: int) -> Iterator[tuple[slice, Tensor, int]]:
    """(rows, where its sequences begin and end within them, the longest's tokens) of neighbours that are taken at once.

    They are padded to one length; as many as fit `padded_tokens`.
    """
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or max(*groups[-1], length) * (len(groups[-1]) + 1) > padded_tokens:
            groups.append([])
        groups[-1].append(length)
    first = row = 0
    for group in groups:
        rows = slice(row, row + sum(group))
        yield rows, cu_seqlens[first : first + len(group) + 1] - row, max(group)
        first, row = first + len(group), rows.stop


def _of_group(
    student_ND: Tensor,
    teacher_NE: Tensor,
    bounds: Tensor,
    longest: int,
    num_heads: int,
    scale: Tensor,
    dstudent_ND: Tensor | None,
) -> Tensor:
    """Sum over the real tokens of a group; `scale` times its gradient is written where one is wanted."""
    begin_S1, end_S1 = bounds[:-1, None], bounds[1:, None]
    row_SL = begin_S1 + torch.arange(longest, device=bounds.device)
    real_SL = row_SL < end_S1
    row_SL = row_SL.minimum(end_S1 - 1)  # the padding repeats the last token, whose numbers are finite

    def log_relation(x: Tensor) -> tuple[Tensor, Tensor]:
        padded = x.index_select(0, row_SL.flatten()).float()  # scores and softmax are computed in fp32
        heads_SALR = padded.view(*row_SL.shape, num_heads, -1).transpose(1, 2).contiguous()
        scores = (heads_SALR @ heads_SALR.mT).mul_(heads_SALR.shape[-1] ** -0.5)
        return heads_SALR, F.log_softmax(scores.masked_fill_(~real_SL[:, None, None], -1e30), -1)

    heads_SALR, log_q = log_relation(student_ND)
    _, log_p = log_relation(teacher_NE)
    p = log_p.exp()
    kl_SAL = log_p.sub_(log_q).mul_(p).sum(-1)
    total = kl_SAL.mean(1).masked_fill(~real_SL, 0.0).sum()
    if dstudent_ND is None:
        return total
    of_row_SL = real_SL * (scale * (heads_SALR.shape[-1] ** -0.5 / num_heads))
    dscores = log_q.exp_().sub_(p).mul_(of_row_SL[:, None, :, None])
    dx_SALR = dscores @ heads_SALR
    dx_SALR += dscores.mT @ heads_SALR
    # Back to packed rows: where each of them lies in the padded ones.
    row_N = torch.arange(len(student_ND), device=bounds.device)
    sequence_N = torch.searchsorted(bounds[1:], row_N, right=True)
    place_N = sequence_N * longest + row_N - bounds[sequence_N]
    dx_padded = dx_SALR.transpose(1, 2).reshape(-1, student_ND.shape[1])
    dstudent_ND.copy_(dx_padded.index_select(0, place_N))
    return total


def relation_bytes(num_heads: int, longest: int, device_type: str) -> int:
    """Scratch memory of `relation_loss` for sequences of up to `longest` tokens."""
    return MATRICES * 4 * num_heads * max(PADDED_TOKENS[device_type], longest) * longest
