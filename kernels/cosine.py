"""Sum over rows of 1 - cos(student, teacher) and its scaled gradient, in one pass.

    cos[n] = s.t / sqrt((s.s + eps) * (t.t + eps)),  eps = 1e-12      (as cosine_embedding_loss has it)
    d (1 - cos) / d s = cos * s / (s.s + eps) - t / sqrt((s.s + eps) * (t.t + eps))

    loss = scale * sum_n (1 - cos[n])

so a zero vector has cosine 0 and costs 1. fp32 arithmetic; only the gradient is saved, scaled before it is rounded: the
backward of a loss that is summed as it is has nothing left to do. Memory: two reads and one write of (N, D). Over
several mapped layers the caller sums several of these. Where widths differ the caller projects the student first, with
a linear of its own that is trained along.

Shapes: N = rows (tokens), D = width.
"""

from typing import NamedTuple

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
    times_gradient,
    tl,
    triton,
)
from .layout import KeptRows, as_rows, check_mask

EPS = 1e-12  # of torch.nn.functional.cosine_embedding_loss
MAX_WIDTH = 8192  # a row lies in registers: 16 fp32 of each model a thread, at most 16 warps


class CosineLoss(NamedTuple):
    """0-dim fp32 tensors on the device of the inputs."""

    loss: Tensor
    """scale * cosine_sum; the only one with a gradient."""
    cosine_sum: Tensor
    """Sum over real rows of 1 - cos(student, teacher)."""


def cosine_loss_reference(
    student_ND: Tensor, teacher_ND: Tensor, *, scale: float | Tensor = 1.0, num_rows: Tensor | None = None
) -> CosineLoss:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs)."""
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    index = torch.arange(student_ND.shape[0], device=student_ND.device)
    loss = F.cosine_embedding_loss(
        student_ND.to(dtype), teacher_ND.detach().to(dtype), torch.ones_like(index), reduction="none"
    )
    total = loss.sum() if num_rows is None else torch.where(index < num_rows, loss, 0.0).sum()
    return CosineLoss(scale * total, total.detach())


@triton.jit(do_not_specialize=["N"])
def _cosine_kernel(
    s_ptr, t_ptr, num_rows_ptr,  # (N, D) contiguous, 0-dim integer or None
    scale_ptr,                   # 0-dim fp32, of the gradient alone; or None
    out_ptr, ds_ptr,             # (N,) fp32, (N, D)
    N, D, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    live = (row < N)[:, None] & (column < D)[None, :]
    real = row < N
    if num_rows_ptr is not None:
        real = real & (row < tl.load(num_rows_ptr).to(tl.int64))
    at = row[:, None] * D + column[None, :]
    s = tl.load(s_ptr + at, mask=live, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + at, mask=live, other=0.0).to(tl.float32)
    s_norm2 = tl.sum(s * s, axis=1) + EPS
    t_norm2 = tl.sum(t * t, axis=1) + EPS
    inverse = 1.0 / (tl.sqrt(s_norm2) * tl.sqrt(t_norm2))
    cosine = tl.sum(s * t, axis=1) * inverse
    tl.store(out_ptr + row, tl.where(real, 1.0 - cosine, 0.0), mask=row < N)
    along_s, along_t = cosine / s_norm2, inverse
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        along_s, along_t = along_s * scale, along_t * scale
    ds = s * along_s[:, None] - t * along_t[:, None]
    ds = tl.where(real[:, None], ds, 0.0).to(ds_ptr.dtype.element_ty)
    tl.store(ds_ptr + at, ds, mask=live)


def tile(width: int) -> dict[str, int]:
    """Kernel settings for a width: a CTA takes rows until it has 2,048 elements of a model.

    That is 16 elements a thread; 32 spilled on sm_80.
    """
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK_D": block, "num_warps": max(4, block // 512)}


def _launch(student: Tensor, teacher: Tensor, num_rows: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    N, D = student.shape
    rows, dstudent = student.new_empty(N, dtype=torch.float32), torch.empty_like(student)
    settings = tile(D)
    if N > 0:
        _cosine_kernel[(triton.cdiv(N, settings["ROWS"]),)](
            student, teacher, num_rows, scale, rows, dstudent, N, D, EPS=EPS,
            **settings, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return rows, dstudent


@torch.library.custom_op("fastdistil::cosine_rows", mutates_args=(), device_types=TRITON_DEVICES)
def cosine_rows(
    student: Tensor, teacher: Tensor, num_rows: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N,) fp32 of 1 - cos, and (N, D) their gradient for the student times `scale`, 0-dim fp32.

    The inner operator, without autograd. Inputs contiguous.
    """
    return _launch(student, teacher, num_rows, scale)


@cosine_rows.register_fake
def _(student, teacher, num_rows, scale):
    rows = student.new_empty(student.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(student)


def cosine_rows_torch(
    student: Tensor, teacher: Tensor, num_rows: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`cosine_rows` in plain PyTorch, which serves CPU tensors where csrc/ is not built."""
    s, t = student.float(), teacher.float()
    s_norm2, t_norm2 = s.square().sum(1, True) + EPS, t.square().sum(1, True) + EPS
    inverse = (s_norm2.sqrt() * t_norm2.sqrt()).reciprocal()
    cosine = (s * t).sum(1, True) * inverse
    rows, ds = 1 - cosine[:, 0], s * (cosine / s_norm2) - t * inverse
    if num_rows is not None:
        real = torch.arange(s.shape[0]) < num_rows
        rows, ds = torch.where(real, rows, 0.0), torch.where(real[:, None], ds, 0.0)
    return rows, (ds if scale is None else ds * scale).to(student.dtype)


if CPU_BACKEND == "torch":
    cosine_rows.register_kernel("cpu")(cosine_rows_torch)


def forward(student: Tensor, teacher: Tensor, num_rows: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """0-dim fp32 sum of 1 - cos, and the gradient of `scale` times it: no operator, no checks, inputs contiguous."""
    launch = _launch if student.device.type in TRITON_DEVICES else cosine_rows
    rows, dstudent = launch(student, teacher, num_rows, scale)
    return rows.sum(), dstudent


@torch.library.custom_op("fastdistil::cosine", mutates_args=())
def _cosine(
    student: Tensor, teacher: Tensor, mask: Tensor | None, num_rows: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kept = None if mask is None else KeptRows(mask)
    if kept is not None:
        (student, teacher), num_rows = kept.take(student, teacher), kept.num_rows
    total, dstudent = forward(student.contiguous(), teacher.contiguous(), num_rows, scale)
    return scale * total, total, dstudent if kept is None else kept.put_back(dstudent)


@_cosine.register_fake
def _(student, teacher, mask, num_rows, scale):
    loss, total = (student.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, total, torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, total, dstudent = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total, dstudent)
    ctx.save_for_backward(dstudent)


def _backward(ctx, grad_loss, _grad_total, _grad_dstudent):
    if grad_loss is None:
        return (None,) * 5
    return *times_gradient(grad_loss, ctx.saved_tensors), *[None] * 4


_cosine.register_autograd(_backward, setup_context=_setup_context)


def cosine_loss(
    student_ND: Tensor,
    teacher_ND: Tensor,
    *,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> CosineLoss:
    """`scale` times the sum over rows of 1 - cos(student, teacher); the gradient is made in the forward.

    Args:
        student_ND: hidden states (N, D) or (B, L, D), fp32, bf16 or fp16, D up to 8,192. Gets a gradient.
        teacher_ND: of the same shape; converted to the student's dtype. Gets no gradient.
        scale: weight of the sum; 1 / (number of tokens) belongs here. A number, or a 0-dim tensor on the same device.
            Gets no gradient.
        mask: bool (N,) or (B, L), True for the rows that count; the others get gradient 0. On CUDA the host waits for
            their number.
        num_rows: 0-dim int32 or int64 tensor on the same device, in place of a mask: rows from there on count for
            nothing and get gradient 0, without a sync. All rows by default.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    op = "cosine_loss"
    if student_ND.ndim < 2 or student_ND.shape != teacher_ND.shape:
        raise ValueError(
            f"cosine_loss wants two (N, D) or (B, L, D) tensors of one shape, got student "
            f"{tuple(student_ND.shape)} and teacher {tuple(teacher_ND.shape)}: where widths differ, "
            f"project the student first"
        )
    check_dtype("cosine_loss", student_ND)
    if not 1 <= student_ND.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"cosine_loss wants a width of 1 to {MAX_WIDTH}, got {student_ND.shape[-1]}")
    check_num_rows("cosine_loss", num_rows, student_ND)
    factor = device_scalar("cosine_loss", "scale", scale, student_ND)
    rows = as_rows(op, "student", student_ND), as_rows(op, "teacher", teacher_ND.detach().to(student_ND.dtype))
    loss, total, _ = _cosine(*rows, check_mask(op, mask, student_ND, num_rows), num_rows, factor)
    return CosineLoss(loss, total)
