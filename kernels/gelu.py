"""GELU of a GEMM's output and its bias, exact erf, forward and backward; where it gains, in the GEMM itself.

    out  = z * Phi(z),  z = x + bias,  Phi(z) = (1 + erf(z / sqrt 2)) / 2        (Hendrycks and Gimpel 2016)
    dx   = dout * (Phi(z) + z * phi(z)),  phi(z) = exp(-z^2 / 2) / sqrt(2 pi);  dbias = sum over rows of dx

Only x is saved: the backward computes z again. fp32 arithmetic, one rounding.

Memory: the forward reads and writes (N, F) once, the backward reads it twice and writes it once. The bias gradient,
which would be one more read, is summed on the way: every program adds up a strip of 128 rows, then one reduction adds
the strips (no atomics; 1 % of the traffic in bf16).

In a GEMM of its own the forward spares both passes, but for the write of what the backward wants, and the backward
the write and the read of dout. `OWN_PRODUCT` says where that is expected to pay.

Shapes: N = rows (tokens), D = width, F = width of the feed-forward layer.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._backend import INTERPRET, LAUNCH_OPTIONS, TRITON_DEVICES, add_column_sums, check_dtype, check_parameter
from .linear import add_column_sum, linear, linear_dx, linear_forward

INTERPRETED = tl.constexpr(INTERPRET)
INV_SQRT_2PI, MINUS_HALF_LOG2_E = tl.constexpr(0.3989422804014327), tl.constexpr(-0.7213475204444817)
# 256 columns are a warp of 16-byte loads in bf16 and divide 768, 1,536 and 3,072; 16 rows make 32 elements a thread.
TILE = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
STRIP = 128  # rows that a program of the backward sums

# Of the product with GELU behind it: 96 KiB of operands and at most 128 registers a thread, so that an SM of sm_90
# holds two CTAs, and one's epilogue runs beside the other's tensor cores. 256 columns spilled and left room for one.
PRODUCT_TILE = {"GROUP": 8, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
# Which major compute capabilities take it; others take cuBLAS and the kernels of rows. Predicted from machine code,
# measured by nobody. On sm_90 a tile of depth 768 wants 6,144 cycles of tensor cores, 7,680 of shared memory and 5,100
# of issue (the backward 6,700). Were 70 to 100 % of that reached, 420 to 590 TFLOP/s, 16,384 x 768 x 3,072 would take
# 0.13 to 0.18 ms, and the backward 0.14 to 0.19, where cuBLAS at 620 TFLOP/s and rows at 2.2 to 2.8 TB/s take 0.20 to
# 0.22, and 0.24 to 0.26. An SM of sm_80 holds one CTA, and beside sm_100's tensor cores the epilogue is most of it.
OWN_PRODUCT: dict[str, tuple[int, ...]] = {"forward": (9,), "forward, z kept": (9,), "backward": ()}


def bias_gelu_reference(x_NF: Tensor, bias_F: Tensor) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs), in that dtype."""
    dtype = torch.promote_types(x_NF.dtype, torch.float32)
    return F.gelu(x_NF.to(dtype) + bias_F.to(dtype))


@triton.jit
def _tail(z):
    """(Phi(-|z|), exp(-z^2 / 2)) in fp32: one exponential, one square root and seven multiply-adds.

    Their quotient is a polynomial in 1 / (1 + 0.35 |z|), as in Abramowitz and Stegun 7.1.26, here of degree 7 and
    fitted for the least relative error, 3.1e-7 up to |z| = 13.5, where exp is 0 in fp32. So GELU is right to 8e-6 of
    itself however small it is, a 250th of what bf16 rounds by, and to 2.4e-7 absolutely, while 0.5 + 0.5 * erf, which
    cancels, is off by all of GELU below -5.4 and by up to 4.4e-7 (over 2 million z in fp32). tl.erf takes twice as many
    instructions.
    """
    root = tl.rsqrt(1.0 + 0.35 * tl.abs(z))  # a division would be eight instructions
    t = root * root
    quotient = 0.04894232749938965 * t - 0.20211882889270782
    quotient = quotient * t + 0.2406400740146637
    quotient = quotient * t - 0.017022790387272835
    quotient = quotient * t + 0.15596117079257965
    quotient = quotient * t + 0.13335518538951874
    quotient = quotient * t + 0.14027032256126404
    quotient = quotient * t - 2.7314665203448385e-05
    exponential = tl.exp2(z * z * MINUS_HALF_LOG2_E)
    return quotient * exponential, exponential


@triton.jit
def gelu(z):
    """z * Phi(z) in fp32."""
    tail, _ = _tail(z)
    return tl.maximum(z, 0.0) - tl.abs(z) * tail


@triton.jit
def _gelu_derivative(z):
    """Phi(z) + z * phi(z) in fp32."""
    tail, exponential = _tail(z)
    return tl.where(z < 0, tail, 1.0 - tail) + z * (INV_SQRT_2PI * exponential)


@triton.jit(do_not_specialize=("N",))
def _forward_kernel(x_ptr, bias_ptr, out_ptr, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < N)[:, None] & (column < F)[None, :]
    at = row[:, None] * F + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + at, gelu(z).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("N",))
def _backward_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr,  # (N, F), ..., (strips, F) fp32
    N, F, strip_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, strip_rows, ROWS):  # not a constant: it would be unrolled, and spill
        row = strip * strip_rows + begin + tl.arange(0, ROWS)
        live = (row < N)[:, None] & (column < F)[None, :]
        at = row[:, None] * F + column[None, :]
        z = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
        dout = tl.load(dout_ptr + at, mask=live, other=0.0).to(tl.float32)
        dx = dout * _gelu_derivative(z)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        dbias += dx
    tl.store(partial_ptr + strip * F + column, tl.sum(dbias, axis=0), mask=column < F)


@triton.jit
def _finish(product, bias_ptr, z_ptr, out_ptr, partial_ptr, tile_row, row, column, N, F, BACKWARD: tl.constexpr):
    """What follows a product, for these rows and columns of it."""
    bias = tl.load(bias_ptr + column).to(tl.float32)[None, :]
    at = row[:, None] * F + column[None, :]
    live = (row < N)[:, None]
    if BACKWARD:
        z = tl.load(z_ptr + at, mask=live, other=0.0).to(tl.float32) + bias
        out = tl.where(live, product * _gelu_derivative(z), 0.0)
        tl.store(partial_ptr + tile_row * F + column, tl.sum(out, axis=0))
    else:
        if z_ptr is not None:
            tl.store(z_ptr + at, product.to(z_ptr.dtype.element_ty), mask=live)
        out = gelu(product + bias)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("N",))
def _product_kernel(
    a_ptr, b_ptr, bias_ptr,         # (N, K); (F, K), in the backward (K, F); (F,)
    z_ptr, out_ptr, partial_ptr,    # (N, F) or None, written, in the backward read; (N, F); (rows of tiles, F) fp32
    N, F, K,
    BACKWARD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """gelu(a @ b.T + bias), in the backward (a @ b) * gelu'(z + bias). K and F are multiples of DEPTH and COLUMNS."""
    # Tiles are taken in groups of GROUP rows of them, column by column, so that those under way share operands in L2.
    in_group = GROUP * (F // COLUMNS)
    first = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(tl.cdiv(N, ROWS) - first, GROUP)
    tile_row = (first + tl.program_id(0) % in_group % height).to(tl.int64)
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % in_group // height * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    a_ptr += tl.minimum(row, N - 1)[:, None] * K + k[None, :]  # the last row again, rather than a mask
    if BACKWARD:
        b_ptr += k[:, None] * F + column[None, :]
    else:
        b_ptr += column[None, :] * K + k[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, K, DEPTH):
        a, b = tl.load(a_ptr), tl.load(b_ptr)
        if INTERPRETED:  # whose dot takes the bits of bf16 for integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product)
        a_ptr += DEPTH
        b_ptr += DEPTH * F if BACKWARD else DEPTH
    # Half of the columns at a time: the whole tile's z beside it would leave room for one CTA an SM.
    left, right = tl.split(product.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
    column = tl.program_id(0) % in_group // height * COLUMNS + tl.arange(0, COLUMNS // 2)
    _finish(left, bias_ptr, z_ptr, out_ptr, partial_ptr, tile_row, row, column, N, F, BACKWARD)
    _finish(right, bias_ptr, z_ptr, out_ptr, partial_ptr, tile_row, row, column + COLUMNS // 2, N, F, BACKWARD)


def _launch_forward(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x + bias), which may be x itself."""
    if x.numel() > 0:
        N, width = x.shape
        grid = (triton.cdiv(N, TILE["ROWS"]), triton.cdiv(width, TILE["COLUMNS"]))
        _forward_kernel[grid](x, bias, out, N, width, **TILE, **LAUNCH_OPTIONS)


def _launch_backward(dout: Tensor, x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor | None, accumulate: bool) -> None:
    """dx, which may be dout itself, and dbias."""
    N, width = x.shape
    strips = triton.cdiv(N, STRIP)
    partial = x.new_empty((strips, 1, width), dtype=torch.float32)
    if x.numel() > 0:
        _backward_kernel[(strips, triton.cdiv(width, TILE["COLUMNS"]))](
            dout, x, bias, dx, partial, N, width, STRIP, **TILE, **LAUNCH_OPTIONS
        )
    add_column_sums(partial, (dbias,), accumulate)


@functools.cache
def _capability(device: torch.device) -> int:
    """Major compute capability; an H100's for tensors elsewhere: in the interpreter and where nothing is launched."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _takes_own_product(use: str, a: Tensor, columns: int) -> bool:
    fits = a.shape[0] > 0 and a.shape[1] % PRODUCT_TILE["DEPTH"] == columns % PRODUCT_TILE["COLUMNS"] == 0
    return fits and a.dtype != torch.float32 and _capability(a.device) in OWN_PRODUCT[use]


def _launch_product(a: Tensor, b: Tensor, bias: Tensor, z: Tensor | None, out: Tensor, partial: Tensor | None) -> None:
    """The backward's, if it has partial sums."""
    N, width = out.shape
    grid = (triton.cdiv(N, PRODUCT_TILE["ROWS"]) * (width // PRODUCT_TILE["COLUMNS"]),)
    _product_kernel[grid](
        a, b, bias, z, out, partial, N, width, a.shape[1], partial is not None, **PRODUCT_TILE, **LAUNCH_OPTIONS
    )


def linear_gelu_forward(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(gelu(x @ weight.T + bias) (N, F), z (N, F) for the backward if `keep`). No checks, no gradient.

    z is x @ weight.T with the bias on the CPU, where a product adds it for nothing, and without it elsewhere. All
    contiguous.
    """
    if x_ND.device.type not in TRITON_DEVICES:
        z = linear_forward(x_ND, weight_FD, bias_F)
        return F.gelu(z), z if keep else None
    if _takes_own_product("forward, z kept" if keep else "forward", x_ND, weight_FD.shape[0]):
        out = x_ND.new_empty(x_ND.shape[0], weight_FD.shape[0])
        z = torch.empty_like(out) if keep else None
        _launch_product(x_ND, weight_FD, bias_F, z, out, None)
        return out, z
    z = x_ND @ weight_FD.t()
    out = torch.empty_like(z) if keep else z
    _launch_forward(z, bias_F, out)
    return out, z if keep else None


def gelu_backward_product(
    dy_ND: Tensor, weight_DF: Tensor, z_NF: Tensor, bias_F: Tensor, *, dbias: Tensor | None, accumulate: bool
) -> Tensor:
    """dz (N, F) = (dy @ weight) * gelu'(z), z from `linear_gelu_forward`.

    dbias is where the sum of dz over its rows goes, (F,) fp32 or in the dtype of bias; with `accumulate` it is added to
    what stands there. None: nowhere.
    """
    if dy_ND.device.type in TRITON_DEVICES and _takes_own_product("backward", dy_ND, weight_DF.shape[1]):
        dz = torch.empty_like(z_NF)
        partial = dz.new_empty((triton.cdiv(dz.shape[0], PRODUCT_TILE["ROWS"]), 1, dz.shape[1]), dtype=torch.float32)
        _launch_product(dy_ND, weight_DF, bias_F, z_NF, dz, partial)
        add_column_sums(partial, (dbias,), accumulate)
        return dz
    dout = linear_dx(dy_ND, weight_DF)
    return _backward_into(dout, dout, z_NF, bias_F, dbias, accumulate)


def gelu_backward_rows(
    dout_NF: Tensor, z_NF: Tensor, bias_F: Tensor, *, dbias: Tensor | None, accumulate: bool
) -> Tensor:
    """dz (N, F) = dout * gelu'(z); the rest as in `gelu_backward_product`."""
    return _backward_into(torch.empty_like(dout_NF), dout_NF, z_NF, bias_F, dbias, accumulate)


def _backward_into(dz: Tensor, dout: Tensor, z: Tensor, bias: Tensor, dbias: Tensor | None, accumulate: bool) -> Tensor:
    if dout.device.type in TRITON_DEVICES:
        _launch_backward(dout, z, bias, dz, dbias, accumulate)
        return dz
    torch.ops.aten.gelu_backward.grad_input(dout, z, grad_input=dz)
    if dbias is not None:
        add_column_sum(dbias, dz, accumulate)
    return dz


@torch.library.custom_op("fastdistil::bias_gelu", mutates_args=(), device_types=TRITON_DEVICES)
def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """(N, F) gelu(x + bias). Inputs contiguous."""
    out = torch.empty_like(x)
    _launch_forward(x, bias, out)
    return out


@gelu_forward.register_fake
def _(x, bias):
    return torch.empty_like(x)


@torch.library.custom_op("fastdistil::bias_gelu_backward", mutates_args=(), device_types=TRITON_DEVICES)
def gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dbias)."""
    dx, dbias = torch.empty_like(x), torch.empty_like(bias)
    _launch_backward(dout, x, bias, dx, dbias, False)
    return dx, dbias


@gelu_backward.register_fake
def _(dout, x, bias):
    return torch.empty_like(x), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    if dout is None:
        return None, None
    return gelu_backward(dout.contiguous(), *ctx.saved_tensors)


gelu_forward.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x_NF: Tensor, bias_F: Tensor) -> Tensor:
    """gelu(x + bias), (N, F) in the dtype of x; exact erf, not its tanh approximation.

    Args:
        x_NF: a GEMM's output without its bias; fp32, bf16 or fp16. Gets a gradient.
        bias_F: of the same dtype. Gets a gradient, summed in fp32.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    if x_NF.ndim != 2 or bias_F.shape != x_NF.shape[1:]:
        raise ValueError(f"bias_gelu wants (N, F) and (F,), got {tuple(x_NF.shape)} and {tuple(bias_F.shape)}")
    check_dtype("bias_gelu", x_NF)
    check_parameter("bias_gelu", "bias", bias_F, x_NF)
    if x_NF.device.type not in TRITON_DEVICES:
        return F.gelu(x_NF + bias_F)  # PyTorch's own, which also keeps the sum
    return gelu_forward(x_NF.contiguous(), bias_F.contiguous())


def linear_gelu(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """gelu(x @ weight.T + bias), (N, F). On the CPU, where a GEMM adds its bias for nothing, by PyTorch's own."""
    if x_ND.device.type not in TRITON_DEVICES:
        return F.gelu(linear(x_ND, weight_FD, bias_F))
    return bias_gelu(F.linear(x_ND, weight_FD), bias_F)
