"""Vocabulary heads and distillation loss in one operator: logits exist for a chunk of tokens at a time.

    z = student @ student_weight.T + student_bias,   y = teacher @ teacher_weight.T + teacher_bias
    loss, kd_sum, mlm_sum, num_agree = distill_loss(z, y, labels)                   (kernels/distill.py)
    dstudent = dz @ student_weight,   dweight = dz.T @ student,   dbias = dz.sum(0)

The tokens are walked in chunks: two GEMMs, the row kernel which turns z into dz in place, two GEMMs. All gradients are
made in the forward and only scaled in the backward, so what is kept is as large as the inputs. V / D being 40 at BERT's
size, making the logits again in the backward would cost more than that saves. Logits live in the dtype of the hidden
states; dweight and dbias are summed in fp32.

Cost: 8 N D V FLOP with gradient (2 of them the teacher's), 6 bytes a logit for the row kernel, and 2 for dbias, which
reads dz once more. To add it up in the row kernel, the sums of all columns have to be held from row to row: 122 KB of
fp32 at BERT's vocabulary, half the registers of an SM, since anywhere else they cost more traffic than the 2 bytes.
Compiled for sm_90 (16 warps, 32 rows one after the other, 64 sums a thread), that kernel wants more than the 128
registers there are: 239 instructions of spills, 41 without the masked-LM term, 292 with the next row's first pass
between the second's steps; and one such CTA fills an SM, where two overlap their passes today. Rows taken together per
block of columns leave L2 (four rows of 132 CTAs: 64 MB of 50). cuBLASLt could sum dz while it multiplies (its epilogue
BGRADA); PyTorch has no way to ask for that.

Several teachers of one vocabulary are averaged inside: y is then T times the logarithm of the weighted mean of their
distributions (kernels/mixture.py). Each of their chunks of logits is mixed into the first teacher's as soon as it is
made and is then written over by the next one's: three buffers for any number of teachers, where one teacher has two. A
further teacher costs 2 N E V FLOP and 6 bytes a logit.

Shapes: N = tokens, V = rows of both weights (the vocabulary, padded to a multiple of 64), D = width of the student,
E = width of the teacher.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import distill, mixture
from ._backend import host_number, read_number, times_gradient
from .distill import DistillLoss, check_operands, distill_loss_reference, scale_pair
from .layout import KeptRows, as_rows, check_mask
from .linear import add_column_sum, add_product, linear_product, runs_on_onednn

LinearDistillLoss = DistillLoss

# On CUDA all tokens at once where memory allows: the GEMMs want many rows (dstudent of 4,096 has 96 tiles of 128 x 256
# for 132 SMs), each chunk launches seven kernels, and every one but the first reads and writes the fp32 sum of dweight
# (188 MB at BERT's size). The two buffers take 0.12 MB a token of BERT's vocabulary in bf16: 8 of 80 GB at 65,536.
CUDA_MEMORY_SHARE = 1 / 8  # of the device's memory, for the buffers
# On two CPU cores the GEMMs are all that counts and want long chunks too: in fp32 512 tokens were as fast as 1,024
# (256: 12 % slower), in bf16 1,024 were 14 % faster than 512.
CPU_BUFFER_BYTES = 128 * 2**20  # of the buffers


def linear_distill_loss_reference(
    student_ND: Tensor,
    student_weight_VD: Tensor,
    student_bias_V: Tensor,
    teacher_ND: Tensor,
    teacher_weight_VE: Tensor,
    teacher_bias_V: Tensor,
    labels_N: Tensor,
    **options: Any,
) -> LinearDistillLoss:
    """The definition: two linears and `distill_loss_reference`, whose options it takes."""
    student = F.linear(student_ND, student_weight_VD, student_bias_V)
    teacher = F.linear(teacher_ND, teacher_weight_VE, teacher_bias_V)
    return distill_loss_reference(student, teacher, labels_N, **options)


def num_buffers(num_teachers: int) -> int:
    """Chunks of logits that exist at once: the student's, the teacher's, and that of another one to be mixed in."""
    return 1 + min(num_teachers, 2)


def default_chunk_tokens(
    num_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    total_memory: int | None = None,
    num_teachers: int = 1,
) -> int:
    """Tokens of a chunk, from the shapes and the device's total memory (`total_memory` for one that is not here).

    Not from what happens to be free: the order of the sums, hence the last bits of dweight, depends on the chunks, and
    a resumed run must give the same bits.
    """
    budget = CPU_BUFFER_BYTES
    if device.type == "cuda":
        budget = CUDA_MEMORY_SHARE * (total_memory or torch.cuda.get_device_properties(device).total_memory)
    affordable = int(budget / (num_buffers(num_teachers) * num_columns * dtype.itemsize)) // 256 * 256
    return max(256, affordable if device.type == "cuda" else min(1024, affordable))


def forward(
    student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    labels: Tensor, num_rows: Tensor | None, temperature: float, scales: Tensor, vocab_size: int, chunk_tokens: int,
    *, dweight: Tensor | None, dbias: Tensor | None, accumulate: bool,
    others: Sequence[tuple[Tensor, Tensor, Tensor, float]] = (),
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The loss, (3,) the sums of kd, mlm and agreement, and the gradient of `student`: no operator, no checks.

    Weights have the dtype of the hidden states they meet, `labels` is contiguous, `scales` as in `distill_rows`;
    autocast is off. The gradients of weight and bias are written to `dweight` and `dbias`, or added to what is there
    (`accumulate`). In fp32 they are the sum as it is, in the hidden states' dtype it is rounded once. Without the two
    no gradient is made. `others`: of every further teacher hidden states, weight and bias, all in the first one's
    dtype, and its share of the mixture of it and those before.
    """
    N, V = student.shape[0], weight.shape[0]
    chunk = min(chunk_tokens, N)
    z_buffer, y_buffer = _buffer(student, chunk, V), _buffer(teacher, chunk, V)
    x_buffer = _buffer(teacher, chunk, V) if others else None
    into = [] if dweight is None or dbias is None else [dweight, dbias]
    dstudent = student.new_empty(student.shape) if into else None
    # Chunks add up in fp32: in place where that is what the caller gave. One chunk needs no sum: its product is rounded
    # to the hidden states' dtype by the GEMM.
    in_place = all(x.dtype == torch.float32 or (chunk == N and x.dtype == student.dtype) for x in into)
    totals = into if in_place else [torch.empty_like(x, dtype=torch.float32) for x in into]
    rows = []
    for start in range(0, N, chunk):
        tokens = slice(start, min(start + chunk, N))
        hidden = student[tokens]
        z = _logits(hidden, weight, bias, z_buffer)
        y = _logits(teacher[tokens], teacher_weight, teacher_bias, y_buffer)
        for other, other_weight, other_bias, share in others:
            x = _logits(other[tokens], other_weight, other_bias, x_buffer)
            mixture.forward(y, x, temperature, share, vocab_size)
            del x  # before the next one's are made
        chunk_rows = distill.forward(
            z, y.to(z.dtype), labels[tokens], num_rows, z if into else None, start, temperature, scales, vocab_size
        )
        rows.append(chunk_rows)
        del y
        if dstudent is not None:  # z is dz now
            if runs_on_onednn(z):
                dstudent[tokens] = linear_product(z, weight.t(), None)
            else:
                torch.mm(z, weight, out=dstudent[tokens])
            adds = start > 0 or (accumulate and in_place)
            add_product(totals[0], z.t(), hidden, adds)
            add_column_sum(totals[1], z, adds)
        del z  # before the next chunk's are made
    if not in_place:
        for x, total in zip(into, totals, strict=True):
            x.add_(total) if accumulate else x.copy_(total)
    return *distill.weighted_sums(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1), scales), dstudent


@torch.library.custom_op("fastdistil::linear_distill", mutates_args=())
def _linear_distill(
    student: Tensor, student_weight: Tensor, student_bias: Tensor,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor, labels: Tensor,
    mask: Tensor | None, num_rows: Tensor | None,
    temperature: Tensor | None, number: float, scales: Tensor, vocab_size: int, chunk_tokens: int, needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kept = None if mask is None else KeptRows(mask)
    if kept is not None:
        (student, teacher, labels), num_rows = kept.take(student, teacher, labels), kept.num_rows
    # Under autocast the body of a custom op still casts what it calls: the dtypes are settled here.
    with torch.autocast(student.device.type, enabled=False):
        dweight, dbias = _room(needs_grad, student_weight, student_bias)
        loss, sums, dstudent = forward(
            student, student_weight.to(student.dtype), student_bias.to(student.dtype),
            teacher, teacher_weight.to(teacher.dtype), teacher_bias.to(teacher.dtype), labels.contiguous(), num_rows,
            read_number("linear_distill_loss", "temperature", temperature, number), scales, vocab_size, chunk_tokens,
            dweight=dweight if needs_grad else None, dbias=dbias if needs_grad else None, accumulate=False,
        )  # fmt: skip
        if dstudent is None:
            dstudent = student.new_empty(0)
        elif kept is not None:
            dstudent = kept.put_back(dstudent)
        return loss, sums, dstudent, dweight, dbias


def _buffer(hidden: Tensor, chunk: int, num_columns: int) -> Tensor | None:
    """Where all chunks' logits are written in turn; None for oneDNN, whose products have no `out`.

    There malloc gives every chunk the same memory again.
    """
    return None if runs_on_onednn(hidden) else hidden.new_empty(chunk, num_columns)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None:
        return linear_product(hidden, weight, bias)
    return torch.addmm(bias, hidden, weight.t(), out=buffer[: hidden.shape[0]])


def _room(needs_grad: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Where a gradient of each goes; nothing where none is wanted."""
    return tuple(x.new_empty(x.shape if needs_grad else 0) for x in tensors)


@_linear_distill.register_fake
def _(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, mask, num_rows,
    temperature, number, scales, vocab_size, chunk_tokens, needs_grad,
):  # fmt: skip
    loss = student.new_empty((), dtype=torch.float32)
    sums = student.new_empty(3, dtype=torch.float32)
    return loss, sums, *_room(needs_grad, student, student_weight, student_bias)


def _setup_context(ctx, inputs, output):
    _, sums, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, *gradients)
    ctx.save_for_backward(*gradients)


def _backward(ctx, grad_loss, *_grad_others):
    if grad_loss is None:
        return (None,) * 15
    return *times_gradient(grad_loss, ctx.saved_tensors), *[None] * 12


_linear_distill.register_autograd(_backward, setup_context=_setup_context)


def _check_heads(
    op: str, student: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError unless both have hidden states of the same tokens and a head of the same vocabulary."""
    for model, hidden, weight, bias in (
        ("student", student, student_weight, student_bias),
        ("teacher", teacher, teacher_weight, teacher_bias),
    ):
        if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{op} wants {model} hidden states (N, D) or (B, L, D) and weight (V, D), got "
                f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op} wants one {model} bias for each of the {weight.shape[0]} rows of its weight, "
                f"got shape {tuple(bias.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        found = [math.prod(x.shape[:-1]) if x.ndim == 2 else tuple(x.shape[:-1]) for x in (student, teacher)]
        raise ValueError(
            f"{op} wants hidden states of the same tokens, got {found[0]} of the student and {found[1]} of the teacher"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"{op} wants two heads of one vocabulary, got {student_weight.shape[0]} rows of the "
            f"student and {teacher_weight.shape[0]} of the teacher: pad both to the same multiple"
        )


def linear_distill_loss(
    student_ND: Tensor,
    student_weight_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_ND: Tensor,
    teacher_weight_VE: Tensor,
    teacher_bias_V: Tensor | None,
    labels_N: Tensor | None,
    *,
    temperature: float | Tensor,
    kd_scale: float | Tensor,
    mlm_scale: float | Tensor,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    num_rows: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LinearDistillLoss:
    """Weighted distillation loss of two models' hidden states under their vocabulary heads.

    Args:
        student_ND: hidden states (N, D) or (B, L, D).
        student_weight_VD, student_bias_V: of its vocabulary head; the bias may be None. All three get gradients. The
            hidden states' dtype (fp32, bf16, fp16; under autocast, its dtype) is that of the GEMMs and logits; a weight
            of another dtype is converted for them and gets its gradient in its own.
        teacher_ND, teacher_weight_VE, teacher_bias_V: get none. Likewise in a dtype and of a width of their own.
        labels_N, temperature, kd_scale, mlm_scale, mask, num_rows: as in `distill_loss`.
        vocab_size: rows of the weights that exist, by default all; those beyond it are padding, count in neither
            softmax and get gradient 0.
        chunk_tokens: tokens taken at a time; by default what measured best for the device. Memory grows with it, 2 V
            elements a token.

    Raises:
        ValueError: on shapes, dtypes, devices or scalars that do not fit.
    """
    op = "linear_distill_loss"
    _check_heads(op, student_ND, student_weight_VD, student_bias_V, teacher_ND, teacher_weight_VE, teacher_bias_V)
    vocab_size = len(student_weight_VD) if vocab_size is None else vocab_size
    labels = check_operands(op, student_ND, labels_N, vocab_size, num_rows)
    if vocab_size > student_weight_VD.shape[0]:
        raise ValueError(
            f"{op}: vocab_size {vocab_size} is more than the {student_weight_VD.shape[0]} rows of the weights"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens must be 1 or more, got {chunk_tokens}")

    device, mask = student_ND.device, check_mask(op, mask, student_ND, num_rows)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        student_ND, teacher_ND = student_ND.to(dtype), teacher_ND.to(dtype)
    student_bias, teacher_bias = (
        weight.new_zeros(len(weight)) if bias is None else bias
        for weight, bias in ((student_weight_VD, student_bias_V), (teacher_weight_VE, teacher_bias_V))
    )
    trained = (as_rows(op, "student", student_ND), student_weight_VD, student_bias)
    loss, sums, *_ = _linear_distill(
        *trained, as_rows(op, "teacher", teacher_ND.detach()), teacher_weight_VE.detach(), teacher_bias.detach(),
        labels, mask, num_rows, *host_number(op, "temperature", temperature),
        scale_pair(op, kd_scale, mlm_scale, student_ND), vocab_size,
        chunk_tokens or default_chunk_tokens(student_weight_VD.shape[0], student_ND.dtype, device),
        torch.is_grad_enabled() and any(x.requires_grad for x in trained),
    )  # fmt: skip
    return LinearDistillLoss(loss, *sums.unbind())
