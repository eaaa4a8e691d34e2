"""Distillation loss of rows of logits and its gradient, in one pass over memory.

With student logits z, teacher logits y, temperature T, p = softmax(y / T), q = softmax(z / T):

    kd[n]  = T^2 * sum_v p[v] * (log p[v] - log q[v])          KL(p || q) (Hinton et al. 2015, sec. 2)
    mlm[n] = logsumexp(z) - z[label]                           at temperature 1, rows with a label >= 0
    loss   = kd_scale * sum_n kd[n] + mlm_scale * sum_n mlm[n]
    d loss / d z = kd_scale * T * (q - p) + mlm_scale * (softmax(z) - onehot(label))

Since sum p = sum q = 1, kd is also T^2 * sum_v (p log(p/q) - p + q), whose every term is >= 0, and exactly 0 where the
two rows agree. The kernels sum that form, in which an error of a normaliser cancels to first order, and clamp rounding
errors at 0 (here those of a row, in csrc/ those of each term): identical rows cost exactly 0, and no row less.
Everything is computed in fp32. The difference q - p is taken before it is rounded to the dtype of the logits, in which
it would cancel.

Each row is read twice, a pair of BERT rows being 122 KB in bf16: from memory for the two maxima and normalisers, then
from L2 for loss and gradient. The gradient is written over the student's logits if the caller gives that buffer. That
makes 6 bytes an element in bf16. Nothing is saved for a backward but the gradient.

The first pass sums 2^(c z), c = log2(e) / T, without taking the largest logit off. While c |z| of the largest is below
64, the sum of fewer than 2^60 columns is finite, and a power lost below 2^-126 is less than 2^-62 of it. The largest
logits are known at the end of the pass, and only a row beyond that bound is summed again, relative to its largest. An
online softmax has two more exponentials a step, and every power waits for a maximum.

Instructions last about as long as the memory. A step's logits are loaded while the step before is computed, only the
last steps of a row are masked, and a row without a label has a loop of its own: 111 instructions for eight columns of
both models in the first pass and 178 in the second (sm_90). The kernel before this one, an online softmax that clamped
each term and waited for each load, had 132 and 199: 0.342 ms for 4,096 x 30,528 in bf16 (NVIDIA H100 80GB HBM3), 1.29
for 16,384 rows. A prototype of this one with packed arithmetic in PTX (102 and 155) took 0.299 and 1.13 ms: 2.66 TB/s.
This one itself has yet to be measured.

A logit of -inf is a token that a model never says: its probability is 0, and 0 * log 0 = 0. Where the student never
says what the teacher may say, the KL is inf. A row of nothing but -inf has no distribution: loss and gradient are NaN.

Agreement: a row agrees where some column is the largest of both models (in bf16 ties are common).

Shapes: N = rows (tokens), V = columns, of which the first `vocab_size` are the vocabulary. The others (padding to a
multiple of 64, so that Triton loads 16 bytes a thread) count in no sum and get 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import (
    CPU_BACKEND,
    LAUNCH_OPTIONS,
    TRITON_DEVICES,
    check_dtype,
    check_num_rows,
    device_scalar,
    host_number,
    read_number,
    times_gradient,
    tl,
    triton,
)
from .layout import KeptRows, as_rows, check_mask

# 16 warps a row: two CTAs fill an SM, and the rows of all CTAs in flight (32 MB on an H100) stay in L2.
NUM_WARPS = 16
# Columns a thread takes in one 16-byte load, by size of the element.
COLUMNS_PER_LOAD = {2: 8, 4: 4}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a search for the largest logit begins. Finite, so that the difference of a logit of -inf and it is not NaN.
NO_LOGIT = tl.constexpr(-1e30)
# Below it in c * |z| of the largest logit, fp32 holds the sum of 2^(c z) of a row.
SAFE_POWER = tl.constexpr(64.0)


class DistillLoss(NamedTuple):
    """0-dim fp32 tensors on the device of the inputs. Sums over rows: the caller knows what to divide by."""

    loss: Tensor
    """kd_scale * kd_sum + mlm_scale * mlm_sum; the only one with a gradient."""
    kd_sum: Tensor
    """Sum over real rows of T^2 KL(teacher || student), nats."""
    mlm_sum: Tensor
    """Sum over labelled rows of the cross-entropy at temperature 1, nats."""
    num_agree: Tensor
    """Real rows in which one column is the largest of both models."""


def distill_loss_reference(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    *,
    temperature: float,
    kd_scale: float | Tensor,
    mlm_scale: float | Tensor,
    vocab_size: int | None = None,
    num_rows: Tensor | None = None,
) -> DistillLoss:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs). Tests and benchmarks compare to this."""
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    student = student_NV[:, :vocab_size].to(dtype)
    teacher = teacher_NV[:, :vocab_size].detach().to(dtype)
    real = _real_rows(student, num_rows, first_row=0)
    log_q, log_p = (torch.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    p = log_p.exp()
    kd = temperature**2 * torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    labels = torch.where(real, labels_N, -100).clamp(min=-100)
    mlm = F.cross_entropy(student, torch.where(labels < 0, -100, labels), reduction="none")
    agree = (student == student.amax(-1, True)) & (teacher == teacher.amax(-1, True))
    kd_sum, mlm_sum = torch.where(real, kd, 0.0).sum(), mlm.sum()
    loss = kd_scale * kd_sum + mlm_scale * mlm_sum
    return DistillLoss(loss, kd_sum.detach(), mlm_sum.detach(), (agree.any(-1) & real).sum().float())


def _real_rows(rows: Tensor, num_rows: Tensor | None, first_row: int) -> Tensor:
    index = first_row + torch.arange(rows.shape[0], device=rows.device)
    return torch.ones_like(index, dtype=torch.bool) if num_rows is None else index < num_rows


@triton.jit
def _load_both(s_row, t_row, columns, width, eviction: tl.constexpr):
    """Logits as they are in memory: whatever waits for them, a mask among it, is for the next step."""
    live = columns < width  # the padded width, which keeps loads 16 bytes wide
    z = tl.load(s_row + columns, mask=live, eviction_policy=eviction)
    return z, tl.load(t_row + columns, mask=live, eviction_policy=eviction)


@triton.jit
def _in_vocabulary(z, y, start, lanes, vocab_size, step: tl.constexpr):
    """In fp32, and -inf outside the vocabulary. Two instructions a column, so only where there are such columns."""
    z, y = z.to(tl.float32), y.to(tl.float32)
    if start + step > vocab_size:
        inside = start + lanes < vocab_size
        z, y = tl.where(inside, z, float("-inf")), tl.where(inside, y, float("-inf"))
    return z, y


@triton.jit
def _first_pass(next_z, next_y, s_row, t_row, lanes, width, vocab_size, c, step: tl.constexpr):
    """Of both models the largest logit and the sum of 2^(c z). `next_z` and `next_y` are those of the first step."""
    s_total = tl.zeros((lanes.shape[0],), tl.float32)
    s_max = tl.full((lanes.shape[0],), NO_LOGIT, tl.float32)
    t_total, t_max = s_total, s_max
    for start in range(0, width, step):
        z, y = _in_vocabulary(next_z, next_y, start, lanes, vocab_size, step)
        next_z, next_y = _load_both(s_row, t_row, start + step + lanes, width, "evict_last")
        s_total += tl.sum(tl.exp2(z * c), axis=1)
        t_total += tl.sum(tl.exp2(y * c), axis=1)
        s_max, t_max = tl.maximum(s_max, tl.max(z, axis=1)), tl.maximum(t_max, tl.max(y, axis=1))
    return tl.max(s_max, axis=0), tl.sum(s_total, axis=0), tl.max(t_max, axis=0), tl.sum(t_total, axis=0)


@triton.jit
def _log2_sum(row_ptr, lanes, top, width, vocab_size, c, step: tl.constexpr):
    """log2 of the sum of 2^(c (z - top)), read from L2."""
    total = tl.zeros((lanes.shape[0],), tl.float32)
    for start in range(0, width, step):
        columns = start + lanes
        z = tl.load(row_ptr + columns, mask=columns < width, eviction_policy="evict_last").to(tl.float32)
        z = tl.where(columns < vocab_size, z, float("-inf"))
        total += tl.sum(tl.exp2((z - top) * c), axis=1)
    return tl.log2(tl.sum(total, axis=0))


@triton.jit
def _second_pass(
    next_z, next_y, s_row, t_row, ds_row, lanes, width, vocab_size, c, normalisers, label, s1_log2, slope, mlm_scale,
    step: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    """KL(p || q), and 1 if a column is the top of both models, else 0; dz goes to memory. As in `_first_pass`."""
    s_top, s_log2, t_top, t_log2 = normalisers
    log_ratio = tl.zeros((lanes.shape[0],), tl.float32)
    rest = log_ratio
    nearest = tl.full((lanes.shape[0],), NO_LOGIT, tl.float32)
    for start in range(0, width, step):
        columns = start + lanes
        z, y = _in_vocabulary(next_z, next_y, start, lanes, vocab_size, step)
        next_z, next_y = _load_both(s_row, t_row, columns + step, width, "evict_first")
        z, y = z - s_top, y - t_top
        nearest = tl.maximum(nearest, tl.max(z + y, axis=1))  # 0 where a column is the top of both
        log2_q, log2_p = z * c - s_log2, y * c - t_log2
        q, p = tl.exp2(log2_q), tl.exp2(log2_p)
        # Where p is 0, either logarithm may be -inf, and 0 * inf is NaN.
        log_ratio += tl.sum(p * tl.where(p == 0.0, 0.0, log2_p - log2_q), axis=1)
        difference = q - p
        rest += tl.sum(difference, axis=1)
        if ds_row is not None:
            dz = slope * difference
            if LABELLED:
                q1 = tl.exp2(z * LOG2E - s1_log2)
                dz += mlm_scale * (q1 - tl.where(columns == label, 1.0, 0.0))
            tl.store(ds_row + columns, dz.to(ds_row.dtype.element_ty), mask=columns < width)
    kl = tl.sum(log_ratio, axis=0) * LN2 + tl.sum(rest, axis=0)
    # An ordinary maximum would make a loss of 0 of a NaN.
    return tl.maximum(kl, 0.0, tl.PropagateNan.ALL), tl.where(tl.max(nearest, axis=0) == 0.0, 1.0, 0.0)


@triton.jit
def _store_zeros(row_ptr, lanes, width, step: tl.constexpr):
    for start in range(0, width, step):
        columns = start + lanes
        tl.store(row_ptr + columns, tl.zeros(lanes.shape, row_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _store_row(out_ptr, N, row, kd, mlm, agree):
    tl.store(out_ptr + row, kd)
    tl.store(out_ptr + N + row, mlm)
    tl.store(out_ptr + 2 * N + row, agree)


# Row strides and width stay specialised: that they are multiples of 16 makes loads 16 bytes wide.
@triton.jit(do_not_specialize=["N", "first_row", "vocab_size"])
def _distill_kernel(
    s_ptr, t_ptr, label_ptr, num_rows_ptr,  # (N, V) logits, (N,) int64, 0-dim integer or None
    scales_ptr,                             # (2,) fp32: kd_scale, mlm_scale
    ds_ptr,                                 # (N, V) gradient, may be s_ptr; or None
    out_ptr,                                # (3, N) fp32: kd, mlm, agree
    s_stride, t_stride, ds_stride,          # elements between rows
    N, first_row, width, vocab_size, temperature,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: N * V passes 2^31 at 70k tokens of BERT vocabulary
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    ds_row = None if ds_ptr is None else ds_ptr + row * ds_stride
    step: tl.constexpr = LANES * VECTOR
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    # All loads that something waits for, before anything waits.
    real = True
    if num_rows_ptr is not None:
        real = first_row + row < tl.load(num_rows_ptr).to(tl.int64)
    label = tl.load(label_ptr + row)
    slope, mlm_scale = tl.load(scales_ptr) * temperature, tl.load(scales_ptr + 1)
    z, y = _load_both(s_row, t_row, lanes, width, "evict_last")
    if not real:
        if ds_row is not None:
            _store_zeros(ds_row, lanes, width, step)
        _store_row(out_ptr, N, row, 0.0, 0.0, 0.0)
        return

    # Read before any thread of this CTA writes a gradient over it. A label outside the vocabulary makes the loss NaN:
    # raising would cost a synchronisation.
    labelled = label >= 0
    inside = labelled & (label < vocab_size)
    z_label = tl.load(s_row + label, mask=inside, other=float("nan")).to(tl.float32)
    label = label.to(tl.int32)

    c = LOG2E / temperature
    s_top, s_total, t_top, t_total = _first_pass(z, y, s_row, t_row, lanes, width, vocab_size, c, step)
    z, y = _load_both(s_row, t_row, lanes, width, "evict_first")
    # log2 of the sum of 2^(c (z - top)). By a product, in which the rounding of c * top cancels.
    s_log2, t_log2 = tl.log2(s_total * tl.exp2(0.0 - s_top * c)), tl.log2(t_total * tl.exp2(0.0 - t_top * c))
    if tl.maximum(tl.abs(s_top), tl.abs(t_top)) * c >= SAFE_POWER:
        s_log2 = _log2_sum(s_row, lanes, s_top, width, vocab_size, c, step)
        t_log2 = _log2_sum(t_row, lanes, t_top, width, vocab_size, c, step)
    normalisers = s_top, s_log2, t_top, t_log2

    mlm = 0.0
    # Two loops: in one, the compiler computes the masked-LM part for every row and throws it away for 85 % of them.
    if labelled:
        s1_log2 = _log2_sum(s_row, lanes, s_top, width, vocab_size, LOG2E, step)
        mlm = (s1_log2 - (z_label - s_top) * LOG2E) * LN2
        kl, agree = _second_pass(
            z, y, s_row, t_row, ds_row, lanes, width, vocab_size, c, normalisers, label, s1_log2, slope, mlm_scale,
            step, True,
        )  # fmt: skip
    else:
        kl, agree = _second_pass(
            z, y, s_row, t_row, ds_row, lanes, width, vocab_size, c, normalisers, label, 0.0, slope, mlm_scale,
            step, False,
        )  # fmt: skip
    _store_row(out_ptr, N, row, temperature * temperature * kl, mlm, agree)


def _launch(
    student: Tensor, teacher: Tensor, labels: Tensor, num_rows: Tensor | None, dstudent: Tensor | None,
    first_row: int, temperature: float, scales: Tensor, vocab_size: int,
) -> Tensor:  # fmt: skip
    N, width = student.shape
    rows = student.new_empty((3, N), dtype=torch.float32)
    _distill_kernel[(N,)](
        student, teacher, labels, num_rows, scales, dstudent, rows,
        student.stride(0), teacher.stride(0), 0 if dstudent is None else dstudent.stride(0),
        N, first_row, width, vocab_size, temperature,
        LANES=32 * NUM_WARPS, VECTOR=COLUMNS_PER_LOAD[student.element_size()],
        **{"num_warps": NUM_WARPS}, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return rows


@torch.library.custom_op("fastdistil::distill_rows", mutates_args=("dstudent",), device_types=TRITON_DEVICES)
def distill_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, num_rows: Tensor | None, dstudent: Tensor | None,
    first_row: int, temperature: float, scales: Tensor, vocab_size: int,
) -> Tensor:  # fmt: skip
    """(3, N) fp32: kd, mlm and agreement (0 or 1) of each row; the gradient goes to `dstudent`.

    The inner operator, without autograd. `dstudent` may be `student` itself, or None for values only. Rows must be
    contiguous. `first_row` is the index of row 0 as `num_rows` counts. `scales`: (2,) fp32, kd_scale and mlm_scale, on
    the device, so that what is recorded in a CUDA graph may be divided by another number of tokens each time.
    """
    return _launch(student, teacher, labels, num_rows, dstudent, first_row, temperature, scales, vocab_size)


def forward(student: Tensor, *others: Any) -> Tensor:
    """`distill_rows` without the operator around it where Triton serves the device: what the host pays is a launch."""
    return (_launch if student.device.type in TRITON_DEVICES else distill_rows)(student, *others)


@distill_rows.register_fake
def _(student, *_others):
    return student.new_empty((3, student.shape[0]), dtype=torch.float32)


def distill_rows_torch(
    student: Tensor, teacher: Tensor, labels: Tensor, num_rows: Tensor | None, dstudent: Tensor | None,
    first_row: int, temperature: float, scales: Tensor, vocab_size: int,
) -> Tensor:  # fmt: skip
    """`distill_rows` in plain PyTorch, which serves CPU tensors where csrc/ is not built."""
    z, y = student[:, :vocab_size].float(), teacher[:, :vocab_size].float()
    real = _real_rows(student, num_rows, first_row)
    log_q, log_p = (torch.log_softmax(x / temperature, dim=-1) for x in (z, y))
    q, p = log_q.exp(), log_p.exp()
    kd = temperature**2 * ((p * (log_p - log_q)).masked_fill_(p == 0, 0.0) + (q - p)).clamp_(min=0).sum(-1)
    labels = torch.where(real & (labels >= 0), labels, -100)
    log_q1 = torch.log_softmax(z, dim=-1)
    mlm = F.nll_loss(log_q1, labels, reduction="none")
    agree = ((z == z.amax(-1, True)) & (y == y.amax(-1, True))).any(-1)
    if dstudent is not None:
        dz = torch.where(real[:, None], scales[0] * temperature * (q - p), 0.0)
        (labelled,) = torch.nonzero(labels >= 0, as_tuple=True)
        d_mlm = log_q1[labelled].exp_()
        d_mlm[torch.arange(len(labelled)), labels[labelled]] -= 1
        dz[labelled] += scales[1] * d_mlm
        dstudent.zero_()[:, :vocab_size] = dz
    return torch.where(real, torch.stack((kd, mlm, agree.float())), 0.0)


if CPU_BACKEND == "torch":
    distill_rows.register_kernel("cpu")(distill_rows_torch)


@torch.library.custom_op("fastdistil::distill", mutates_args=())
def _distill(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor | None, num_rows: Tensor | None,
    temperature: Tensor | None, number: float, scales: Tensor, vocab_size: int, needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = None if mask is None else KeptRows(mask)
    if kept is not None:
        (student, teacher, labels), num_rows = kept.take(student, teacher, labels), kept.num_rows
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    dstudent = student.new_empty(student.shape if needs_grad else 0)
    rows = distill_rows(
        student, teacher, labels.contiguous(), num_rows, dstudent if needs_grad else None, 0,
        read_number("distill_loss", "temperature", temperature, number), scales, vocab_size,
    )  # fmt: skip
    if kept is not None and needs_grad:
        dstudent = kept.put_back(dstudent)
    return *weighted_sums(rows, scales), dstudent


@_distill.register_fake
def _(student, teacher, labels, mask, num_rows, temperature, number, scales, vocab_size, needs_grad):
    loss = student.new_empty((), dtype=torch.float32)
    dstudent = student.new_empty(student.shape if needs_grad else 0)
    return loss, student.new_empty(3, dtype=torch.float32), dstudent


def weighted_sums(rows_3N: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, 0-dim, and (3,) the sums of kd, mlm and agreement, both fp32."""
    sums = rows_3N.sum(1)
    return (scales * sums[:2]).sum(), sums


def scale_pair(op: str, kd_scale: float | Tensor, mlm_scale: float | Tensor, student: Tensor) -> Tensor:
    """(2,) fp32 of both scales on the device of `student`. Raises ValueError naming `op` as device_scalar does."""
    scales = (("kd_scale", kd_scale), ("mlm_scale", mlm_scale))
    return torch.stack([device_scalar(op, name, scale, student) for name, scale in scales])


def _setup_context(ctx, inputs, output):
    _, sums, dstudent = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, dstudent)
    ctx.save_for_backward(dstudent)


def _backward(ctx, grad_loss, _grad_sums, _grad_dstudent):
    if grad_loss is None:
        return (None,) * 10
    return *times_gradient(grad_loss, ctx.saved_tensors), *[None] * 9


_distill.register_autograd(_backward, setup_context=_setup_context)


def distill_loss(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor | None,
    *,
    temperature: float | Tensor,
    kd_scale: float | Tensor,
    mlm_scale: float | Tensor,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> DistillLoss:
    """Weighted distillation loss of rows of logits; the student's gradient is made in the forward.

    Args:
        student_NV: logits (N, V) or (B, L, V), fp32, bf16 or fp16. Gets a gradient, and is left as it is: only
            `linear_distill_loss` has gradients written over logits, which are buffers of its own.
        teacher_NV: logits of the same shape and dtype. Gets none.
        labels_N: int64 (N,) or (B, L), the original id of a masked token; negative, as -100, where there is none, which
            takes the row out of the masked-LM term alone. None: nowhere. A label outside the vocabulary raises
            IndexError on the CPU and gives a loss of NaN on CUDA.
        temperature: > 0, of the KD term. A number, or a 0-dim tensor, which the host reads: one on the CPU costs no
            sync.
        kd_scale, mlm_scale: weights of the two sums; 1 / (number of tokens) belongs here. Numbers, which inside
            torch.compile are constants of the graph, or 0-dim tensors on the same device, which may change. Get none.
        vocab_size: columns that exist, the others being padding; all of them by default.
        mask: bool (N,) or (B, L), True for the rows that count, as an attention mask; the others count in no term, get
            gradient 0 and are not computed. On CUDA the host waits for their number.
        num_rows: 0-dim int32 or int64 tensor on the same device, in place of a mask: rows from there on count for
            nothing and get gradient 0, without a sync. All rows by default.

    Raises:
        ValueError: on shapes, dtypes, devices or scalars that do not fit.
    """
    op, vocab_size = "distill_loss", student_NV.shape[-1] if vocab_size is None else vocab_size
    if student_NV.ndim < 2 or student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"distill_loss wants two (N, V) or (B, L, V) tensors of one shape, got "
            f"student {tuple(student_NV.shape)} and teacher {tuple(teacher_NV.shape)}"
        )
    labels = check_operands(op, student_NV, labels_N, vocab_size, num_rows)
    if not student_NV.dtype == teacher_NV.dtype:
        raise ValueError(
            f"distill_loss wants logits of one dtype, got student {student_NV.dtype} and teacher "
            f"{teacher_NV.dtype}: convert one of them"
        )
    if vocab_size > student_NV.shape[-1]:
        raise ValueError(f"distill_loss: vocab_size {vocab_size} is more than the {student_NV.shape[-1]} columns")
    needs_grad = torch.is_grad_enabled() and student_NV.requires_grad
    loss, sums, _ = _distill(
        as_rows(op, "student", student_NV), as_rows(op, "teacher", teacher_NV.detach()), labels,
        check_mask(op, mask, student_NV, num_rows), num_rows, *host_number(op, "temperature", temperature),
        scale_pair(op, kd_scale, mlm_scale, student_NV), vocab_size, needs_grad,
    )  # fmt: skip
    return DistillLoss(loss, *sums.unbind())


def check_operands(op: str, student: Tensor, labels: Tensor | None, vocab_size: int, num_rows: Tensor | None) -> Tensor:
    """(N,) labels. Raises ValueError naming `op` unless what the two public losses share fits together."""
    check_dtype(op, student)
    if student.numel() == 0:
        raise ValueError(f"{op} wants at least one row, got none")
    if labels is None:
        labels = torch.full(student.shape[:-1], -100, device=student.device)
    if labels.shape != student.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{op} wants int64 labels of shape {tuple(student.shape[:-1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if vocab_size < 1:
        raise ValueError(f"{op}: vocab_size must be 1 or more, got {vocab_size}")
    check_num_rows(op, num_rows, student)
    if labels.device != student.device:
        raise ValueError(f"{op} wants everything on {student.device}, got labels on {labels.device}")
    return labels.flatten()
