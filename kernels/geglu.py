"""GeGLU: the half of a GEMM's output times GELU of its other half, exact erf, forward and backward.

    out = gelu(a) * b,  [a, b] = x                                                (Shazeer 2020, arXiv 2002.05202)
    da  = dout * b * gelu'(a),  db = dout * gelu(a)                               (gelu and gelu': kernels/gelu.py)

No bias: the encoders that have it have none. Only x is saved. fp32 arithmetic, one rounding.

Memory: the forward reads (N, 2 F) once and writes (N, F), the backward reads (N, 2 F) and (N, F) and writes (N, 2 F):
six and ten bytes an element of the output in bf16. gelu and gelu' have one exponential and one square root in common,
which the compiler finds.

Shapes: N = rows (tokens), F = width of the feed-forward layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import LAUNCH_OPTIONS, TRITON_DEVICES, check_dtype, tl, triton
from .gelu import gelu, gelu_derivative

# 128 columns are half a warp of 16-byte loads in bf16 and divide 1,152, ModernBERT-base's F, where 256 leave a tenth
# of the threads without work; 16 rows make 16 elements of each half a thread.
TILE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}


def geglu_reference(x_N2F: Tensor) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs), in that dtype."""
    a, b = x_N2F.to(torch.promote_types(x_N2F.dtype, torch.float32)).chunk(2, -1)
    return F.gelu(a) * b


@triton.jit(do_not_specialize=("N",))
def _forward_kernel(
    x_ptr, out_ptr,  # (N, 2 F), (N, F), contiguous
    N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < N)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    a = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + F + at, mask=live, other=0.0).to(tl.float32)
    out_at = row[:, None] * F + column[None, :]
    tl.store(out_ptr + out_at, (gelu(a) * b).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("N",))
def _backward_kernel(
    dout_ptr, x_ptr, dx_ptr,  # (N, F), (N, 2 F) twice, contiguous
    N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < N)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    a = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + F + at, mask=live, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row[:, None] * F + column[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, (dout * b * gelu_derivative(a)).to(dx_ptr.dtype.element_ty), mask=live)
    tl.store(dx_ptr + F + at, (dout * gelu(a)).to(dx_ptr.dtype.element_ty), mask=live)


def forward(x_N2F: Tensor) -> Tensor:
    """`geglu` of contiguous rows, (N, F) and contiguous. No checks, no gradient."""
    N, width = x_N2F.shape[0], x_N2F.shape[1] // 2
    if x_N2F.device.type not in TRITON_DEVICES:
        a, b = x_N2F.chunk(2, -1)
        return F.gelu(a).mul_(b)
    out = x_N2F.new_empty(N, width)
    if out.numel() > 0:
        _forward_kernel[_grid(out)](x_N2F, out, N, width, **TILE, **LAUNCH_OPTIONS)
    return out


def backward(dout_NF: Tensor, x_N2F: Tensor) -> Tensor:
    """dx (N, 2 F) from what `forward` got. Both contiguous."""
    dx = torch.empty_like(x_N2F)
    if x_N2F.device.type not in TRITON_DEVICES:
        # PyTorch's own, into the halves of dx. By autograd it makes both apart and copies them: 4,096 x 1,152 in fp32
        # on two cores took 20 ms forward and backward, so 8; in bf16 7 either way.
        (a, b), (da, db) = x_N2F.chunk(2, -1), dx.chunk(2, -1)
        torch.mul(dout_NF, b, out=da)
        torch.ops.aten.gelu_backward.grad_input(da, a, grad_input=da)
        torch.ops.aten.gelu.out(a, out=db)
        db.mul_(dout_NF)
    elif dx.numel() > 0:
        _backward_kernel[_grid(dout_NF)](dout_NF, x_N2F, dx, *dout_NF.shape, **TILE, **LAUNCH_OPTIONS)
    return dx


def _grid(out: Tensor) -> tuple[int, int]:
    return triton.cdiv(out.shape[0], TILE["ROWS"]), triton.cdiv(out.shape[1], TILE["COLUMNS"])


@torch.library.custom_op("fastdistil::geglu", mutates_args=())
def _geglu(x: Tensor) -> Tensor:
    return forward(x.contiguous())


@_geglu.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("fastdistil::geglu_backward", mutates_args=())
def _geglu_backward(dout: Tensor, x: Tensor) -> Tensor:
    return backward(dout.contiguous(), x.contiguous())


@_geglu_backward.register_fake
def _(dout, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return None if dout is None else _geglu_backward(dout, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=_setup_context)


def geglu(x_N2F: Tensor) -> Tensor:
    """gelu(a) * b with [a, b] = x, (N, F) or (B, L, F) in the dtype of x; exact erf, not its tanh approximation.

    Args:
        x_N2F: a GEMM's output, (N, 2 F) or (B, L, 2 F); fp32, bf16 or fp16. Gets a gradient.

    Raises:
        ValueError: on a shape or dtype that does not fit.
    """
    if x_N2F.ndim < 2 or x_N2F.shape[-1] % 2:
        raise ValueError(f"geglu wants two halves of the same width, (N, 2 F) or (B, L, 2 F), got {tuple(x_N2F.shape)}")
    check_dtype("geglu", x_N2F)
    if x_N2F.ndim > 2:
        return _geglu(x_N2F.flatten(0, -2)).unflatten(0, x_N2F.shape[:-1])
    return _geglu(x_N2F)
