"""Losses on what lies inside the encoders, beyond the paper's objective: opt-in, weight 0 unless asked for.

hidden   1 - cos(output of student layer i, output of teacher layer m_i), the mean over real tokens and all student layers.
         m is the map of the initialisation: at the first update student layer i computes the function of teacher layer m_i, and
         what it has to make up for is that the layers between m_(i-1) and m_i are gone from its input. So it is asked for the
         output of the layer it began as, neither of an earlier nor of a later one, and the last meets the teacher's last, as the
         evenly spread map has the two ends. A student that did not begin as layers of this teacher takes that spread map.
values   the value relation of MiniLMv2 (arXiv 2012.15828, section 3.1): per sequence x and relation head a of A, of width d_r,
         R_a = softmax(V_a V_a^T / sqrt(d_r)), V the values of the last layer, all heads side by side and then cut into A.
         Loss = 1/(A |x|) sum_a sum_t KL(R_a,t of the teacher || of the student), here weighted by |x|: the mean over real tokens
         as of every term, not over sequences. Widths and heads of the two may differ, A divides both widths. The paper has
         the same relations of queries and of keys besides, and of a large teacher takes an upper middle layer; we do neither.

Shapes: N tokens of the micro-batch, D and E widths of student and teacher, S sequences of up to L tokens, A relation heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdistil.kernels.cosine import cosine_loss

PADDED_TOKENS = 4096
"""S x L whose relations are in memory at once: A x S x L x L scores in fp32, 25 MB at A = 12 and L = 128."""


def hidden_cosine(student: Sequence[Tensor], teacher: Sequence[Tensor], num_rows: Tensor) -> Tensor:
    """0-dim fp32: the mean over layers of the sum over real tokens of 1 - cos; (N, D) outputs of each layer and of its example."""
    sums = [cosine_loss(s, t, num_rows=num_rows) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(sums).mean()


def value_relation(
    student_ND: Tensor, teacher_NE: Tensor, lengths: Sequence[int], cu_seqlens: Tensor, num_heads: int
) -> Tensor:
    """0-dim fp32: the sum over real tokens of the mean over relation heads of KL(teacher || student), nats.

    The student gets a gradient. No host sync; the relations, many times larger than the values, are made again in the backward.

    Args:
        student_ND, teacher_NE: values of the last layers; rows beyond the sum of `lengths` count for nothing.
        lengths: tokens of the real sequences, known on the host.
        cu_seqlens: where they begin, on the device (SequenceLayout); may have more entries.
        num_heads: A, divides D and E.
    """
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or max(*groups[-1], length) * (len(groups[-1]) + 1) > PADDED_TOKENS:
            groups.append([])
        groups[-1].append(length)
    sizes = [sum(group) for group in groups]
    sizes.append(len(student_ND) - sum(sizes))
    *students, padding_ND = student_ND.split(sizes)
    # 0 that has the values behind it: under ZeRO-3 the backward of all ranks goes one way, of one without a sequence, too
    total = padding_ND[:0].float().sum()
    first = row = 0
    for group, mine_ND, example_NE in zip(groups, students, teacher_NE.split(sizes), strict=False):
        bounds = cu_seqlens[first : first + len(group) + 1] - row
        arguments = mine_ND, example_NE, bounds, max(group), num_heads
        total = total + checkpoint(_relation, *arguments, use_reentrant=False)
        first, row = first + len(group), row + len(mine_ND)
    return total


def _relation(student_ND: Tensor, teacher_NE: Tensor, bounds: Tensor, longest: int, num_heads: int) -> Tensor:
    begin_S1, end_S1 = bounds[:-1, None], bounds[1:, None]
    row_SL = begin_S1 + torch.arange(longest, device=bounds.device)
    real_SL = row_SL < end_S1
    row_SL = row_SL.minimum(end_S1 - 1)  # the padding repeats the last token, whose number is finite

    def log_relation(values: Tensor) -> Tensor:
        padded = values.index_select(0, row_SL.flatten()).float()  # fp32: scores and softmax
        heads = padded.view(*row_SL.shape, num_heads, -1).transpose(1, 2)  # (S, A, L, d_r)
        scores = heads @ heads.mT * heads.shape[-1] ** -0.5
        return F.log_softmax(scores.masked_fill(~real_SL[:, None, None], -1e30), -1)

    log_q, log_p = log_relation(student_ND), log_relation(teacher_NE)
    kl_SAL = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl_SAL.mean(1).masked_fill(~real_SL, 0.0).sum()
