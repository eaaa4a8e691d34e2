"""Rows in FP8 (e4m3) with one scale each, as torch._scaled_mm wants its operands; with a bias, rows of gelu(x + bias).

    q = e4m3(y * 448 / amax),  scale = amax / 448,  amax = max |y| over the row;  y = x, or z * Phi(z) with z = x + bias

448 is the largest e4m3 number (Micikevicius et al. 2022, arXiv 2209.05433, table 1). The arithmetic is fp32, with one
rounding to e4m3.

Memory: one read of (N, D) and one write of bytes, 3 bytes an element from bf16, where three passes of PyTorch's own
take 9. GELU is done here because nothing but the next product reads its output: that spares a pass of 4 bytes an
element in bf16. A layer of width D and a feed-forward layer of 4 D then moves 5 N D bytes more than in bf16, instead of
21 N D.

A row of zeros gets the scale 1e-12 / 448. NaN stays NaN. No gradient: it serves a frozen model.

Shapes: N = rows (tokens, or a weight's outputs), D = width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import LAUNCH_OPTIONS, TRITON_DEVICES, check_dtype, check_parameter, tl, triton
from .gelu import gelu

E4M3_MAX, LEAST_AMAX = tl.constexpr(448.0), tl.constexpr(1e-12)


def quantise_rows_reference(x_ND: Tensor, gelu_bias_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, in fp32 PyTorch."""
    y = x_ND.float()
    if gelu_bias_D is not None:
        y = F.gelu(y + gelu_bias_D.float())
    amax = y.abs().amax(1, keepdim=True).clamp_min(LEAST_AMAX.value)
    return (y * (E4M3_MAX.value / amax)).to(torch.float8_e4m3fn), amax / E4M3_MAX.value


@triton.jit
def _quantise_kernel(
    x_ptr, bias_ptr, q_ptr, scale_ptr,  # (N, D) contiguous; (D,) or None; (N, D) e4m3; (N,) fp32
    D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < D
    y = tl.load(x_ptr + row * D + column, mask=live, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = gelu(y + tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32))
    amax = tl.maximum(tl.max(tl.abs(y), axis=0), LEAST_AMAX)
    q = y * (E4M3_MAX / amax)
    tl.store(q_ptr + row * D + column, q.to(q_ptr.dtype.element_ty), mask=live)
    tl.store(scale_ptr + row, amax / E4M3_MAX)


def tile(width: int) -> dict[str, int]:
    """A program a row, 8 to 16 elements a thread: one or two 16-byte loads in bf16."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 1), 16)}


@torch.library.custom_op("fastdistil::quantise_rows", mutates_args=(), device_types=TRITON_DEVICES)
def _quantise_rows(x: Tensor, gelu_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((N, 1), dtype=torch.float32)
    if N > 0:
        _quantise_kernel[(N,)](x, gelu_bias, q, scale, D, **tile(D), **LAUNCH_OPTIONS)
    return q, scale


@_quantise_rows.register_fake
def _(x, gelu_bias):
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scale


def quantise_rows(x_ND: Tensor, gelu_bias_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """((N, D) e4m3, (N, 1) fp32 scales) whose product is x, or gelu(x + bias), but for the rounding to 3 bits.

    Args:
        x_ND: fp32, bf16 or fp16.
        gelu_bias_D: of the same dtype.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    if x_ND.ndim != 2 or x_ND.shape[1] < 1:
        raise ValueError(f"quantise_rows wants (N, D) with D of 1 or more, got {tuple(x_ND.shape)}")
    check_dtype("quantise_rows", x_ND)
    if gelu_bias_D is not None:
        check_parameter("quantise_rows", "bias", gelu_bias_D, x_ND)
    if x_ND.device.type not in TRITON_DEVICES:
        return quantise_rows_reference(x_ND, gelu_bias_D)
    bias = None if gelu_bias_D is None else gelu_bias_D.contiguous()
    return _quantise_rows(x_ND.contiguous(), bias)
