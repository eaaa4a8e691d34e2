"""LayerNorm(residual + dropout(x)), forward and backward; without a residual, plain LayerNorm. A bias may be None.

    y    = residual + dropout(x)                            (kernels/dropout.py, head 0)
    out  = xhat * weight + bias,  xhat = (y - mean) * rstd,  rstd = 1 / sqrt(var + eps)     (Ba et al. 2016)

With g = dout * weight and means over a row:

    dy = rstd * (g - mean(g) - xhat * mean(g * xhat));  dresidual = dy;  dx = keep ? dy / (1 - p) : 0
    dweight = sum over rows of dout * xhat;  dbias = sum over rows of dout

fp32 arithmetic, one rounding. Saved: x, residual, mean and rstd. The backward adds y up and draws the mask again, which
is exact and costs no store in the forward. The bias gradient of the linear layer before, which is the sum of dx over
its rows, comes with it.

In the pre-norm form (Xiong et al. 2020) y is an output, too, and goes on as the next residual: `add_layernorm`. So its
gradient dsum arrives beside dout,

    dresidual = dsum + dy;  dx = keep ? dresidual / (1 - p) : 0

and out is made of y as it was rounded to be stored. Saved: y, mean and rstd, not x and residual.

Memory: the forward reads (N, D) twice and writes it once, the backward three times and twice (without dropout once, dx
being dresidual). The pre-norm forward reads (N, D) twice and writes it twice, its backward as above with dsum for the
residual. Every program sums dweight, dbias and dx of its rows into rows of its own, and one reduction adds the programs
up: no atomics, the same bits every time. That is 3 rows of fp32 for 32 of the input, 8 % of the backward's traffic in
bf16; without biases there is but the row of dweight.

Shapes: N = rows (tokens), D = width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import LAUNCH_OPTIONS, TRITON_DEVICES, add_column_sums, check_dtype, check_parameter, tl, triton
from .dropout import COLUMN_SIDE, ROW_SIDE, check_dropout, dropout, dropout_reference, keep, keys, threshold
from .linear import add_column_sum

MAX_WIDTH = 4096  # with 8,192 the backward spilled at 16 warps
# A program draws its column keys once for its rows, and a backward has sums to leave: 512 programs at 16,384 rows. A
# forward took 0.82 of the time with half of them (benchmarks/tiles.py, an H100 SXM, width 768 without dropout).
ROWS_PER_PROGRAM = 32
FORWARD_ROWS_PER_PROGRAM = 16  # a multiple of every tile's
MAX_PROGRAMS = 1024  # beyond, programs take more rows: the partial sums stay below 6 MB at width 768


def dropout_add_layernorm_reference(
    x_ND: Tensor,
    residual_ND: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs), in that dtype."""
    return add_layernorm_reference(
        x_ND, residual_ND, weight_D, bias_D, eps=eps, dropout_p=dropout_p, seed=seed, stream=stream
    )[1]


def add_layernorm_reference(
    x_ND: Tensor,
    residual_ND: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """(residual + dropout(x), its LayerNorm): the definition, as above."""
    x, weight = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x_ND, weight_D))
    x = dropout_reference(x, seed, stream, dropout_p)
    y = x if residual_ND is None else x + residual_ND
    return y, F.layer_norm(y, y.shape[1:], weight, None if bias_D is None else bias_D.to(weight.dtype), eps)


@triton.jit
def first_keys(seed_ptr, stream, column):
    """(seed, keys of the columns, room for those of 32 rows), which nobody looks at without dropout."""
    seed, column_key = 0, column
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        column_key = keys(seed, stream, COLUMN_SIDE, 0, column)
    return seed, column_key, tl.zeros((32,), tl.uint32)


@triton.jit
def next_rows(seed_ptr, seed, stream, row_keys, rows_per_program, begin, ROWS: tl.constexpr):
    """(ROWS rows from `begin` of a program's on, their keys, the keys of the 32 rows that they are among)."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program + begin
    row = first + tl.arange(0, ROWS)
    row_key = row  # which nobody looks at without dropout
    if seed_ptr is not None:
        # Philox is 50 instructions: each lane draws the key of one of 32 rows, and all get it by a shuffle.
        lane = begin & 31
        if lane == 0:
            row_keys = keys(seed, stream, ROW_SIDE, 0, first + tl.arange(0, 32))
        row_key = tl.gather(row_keys, lane + tl.arange(0, ROWS), 0)
    return row, row_key, row_keys


@triton.jit
def drop(x, live, seed_ptr, row_key, column_key, threshold, scale):
    """(dropout(x), mask of what is kept): without a seed nothing is dropped."""
    kept = live
    if seed_ptr is not None:
        kept = keep(row_key[:, None], column_key[None, :], threshold)
        x = tl.where(kept, x * scale, 0.0)
    return x, kept


@triton.jit
def _sum_of(x_ptr, residual_ptr, at, live, seed_ptr, row_key, column_key, threshold, scale):
    """(residual + dropout(x) in fp32, mask of what is kept); without x, the residual is that sum already."""
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        y, kept = drop(x, live, seed_ptr, row_key, column_key, threshold, scale)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
    else:
        y = tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        _, kept = drop(y, live, seed_ptr, row_key, column_key, threshold, scale)
    return y, kept


@triton.jit
def normalise(y, weight, bias, in_row, D, eps):
    """(out, mean, rstd) of a block of rows."""
    mean = tl.sum(y, axis=1) / D
    # Two passes over registers: the difference of mean square and squared mean would cancel.
    y = tl.where(in_row[None, :], y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / D + eps)
    out = y * rstd[:, None] * weight[None, :]
    if bias is not None:
        out += bias[None, :]
    return out, mean, rstd


@triton.jit
def load_bias(bias_ptr, column, in_row):
    """(BLOCK_D,) fp32, or None where there is none."""
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    return bias


@triton.jit
def normalise_backward(dout, y, mean, rstd, weight, live, D):
    """(dy, xhat) of a block of rows."""
    xhat = tl.where(live, (y - mean[:, None]) * rstd[:, None], 0.0)
    g = dout * weight[None, :]
    mean_g = tl.sum(g, axis=1) / D
    mean_gx = tl.sum(g * xhat, axis=1) / D
    return (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None], xhat


# Arguments that say nothing of alignment make no compilation of their own; D does, for wide loads.
RUNTIME = ("N", "stream", "threshold", "rows_per_program")


@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,  # (N, D) contiguous, the second or None; (D,), the second or
    sum_ptr, out_ptr, mean_ptr, rstd_ptr,                 # None; () or None; (N, D) or None, (N, D), (N,) fp32 twice
    N, D, eps, stream, threshold, scale, rows_per_program,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    bias = load_bias(bias_ptr, column, in_row)
    seed, column_key, row_keys = first_keys(seed_ptr, stream, column)
    for begin in range(0, rows_per_program, ROWS):
        row, row_key, row_keys = next_rows(seed_ptr, seed, stream, row_keys, rows_per_program, begin, ROWS)
        live = (row < N)[:, None] & in_row[None, :]
        at = row[:, None] * D + column[None, :]
        y, _ = _sum_of(x_ptr, residual_ptr, at, live, seed_ptr, row_key, column_key, threshold, scale)
        if sum_ptr is not None:
            rounded = y.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, rounded, mask=live)
            y = rounded.to(tl.float32)  # as the backward finds it
        out, mean, rstd = normalise(y, weight, bias, in_row, D, eps)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)
        tl.store(mean_ptr + row, mean, mask=row < N)
        tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_kernel(
    dout_ptr, dsum_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dy_ptr, dx_ptr, partial_ptr,  # (N, D); (N, D) or None; (programs, SUMS, D) fp32: dweight, dbias, sum of dx
    N, D, stream, threshold, scale, rows_per_program,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    seed, column_key, row_keys = first_keys(seed_ptr, stream, column)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dx_sum = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, rows_per_program, ROWS):
        row, row_key, row_keys = next_rows(seed_ptr, seed, stream, row_keys, rows_per_program, begin, ROWS)
        live = (row < N)[:, None] & in_row[None, :]
        at = row[:, None] * D + column[None, :]
        y, kept = _sum_of(x_ptr, residual_ptr, at, live, seed_ptr, row_key, column_key, threshold, scale)
        mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        dout = tl.load(dout_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy, xhat = normalise_backward(dout, y, mean, rstd, weight, live, D)
        dweight += tl.sum(dout * xhat, axis=0)
        if SUMS > 1:
            dbias += tl.sum(dout, axis=0)
        if dsum_ptr is not None:
            dy += tl.load(dsum_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=live)
        if dx_ptr is not None:
            dy = tl.where(kept, dy * scale, 0.0)
            tl.store(dx_ptr + at, dy.to(dx_ptr.dtype.element_ty), mask=live)
        if SUMS > 2:
            dx_sum += tl.sum(dy, axis=0)
    partial_ptr += program * SUMS * D + column
    tl.store(partial_ptr, dweight, mask=in_row)
    if SUMS > 1:
        tl.store(partial_ptr + D, dbias, mask=in_row)
    if SUMS > 2:
        tl.store(partial_ptr + 2 * D, dx_sum, mask=in_row)


def tile(width: int, itemsize: int) -> dict[str, int]:
    """Kernel settings for a width: 4 KiB of x in a block of rows, 16 elements of bf16 a thread.

    More spilled on sm_90 and sm_100, and so did 16 rows. At width 768 in bf16 that is two rows of 1,024 columns on four
    warps. The quarter of the columns behind the end costs predicated-off instructions, no memory. A warp holds 256
    columns of every row, so that sums of columns are sums within a thread, and the two sums of a row cross four warps.
    """
    block = triton.next_power_of_2(width)
    return {"ROWS": min(8, max(1, 4096 // (itemsize * block))), "BLOCK_D": block, "num_warps": max(4, block // 256)}


def forward_tile(width: int, itemsize: int, *, dropout: bool) -> dict[str, int]:
    """Of a forward: with dropout half the rows are faster, at width 768 0.037 against 0.055 ms on an H100 SXM."""
    settings = tile(width, itemsize)
    return settings | {"ROWS": max(1, settings["ROWS"] // 2)} if dropout else settings


def launch_forward(
    kernel, out: Tensor, seed: Tensor | None, pointers: tuple[Tensor | None, ...], numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """(mean, rstd), each (N,) fp32, of a kernel that fills out (N, D), row by row.

    It takes `pointers`, out, mean, rstd, N, D, `numbers`, the rows of a program and its tile.
    """
    N, D = out.shape
    mean = out.new_empty(N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    settings = forward_tile(D, out.element_size(), dropout=seed is not None)
    _launch(kernel, N, FORWARD_ROWS_PER_PROGRAM, settings, *pointers, out, mean, rstd, N, D, *numbers)
    return mean, rstd


def launch_backward(
    kernel, dy: Tensor, pointers: tuple[Tensor | None, ...], numbers: tuple[float, ...],
    sums: Sequence[Tensor | None], accumulate: bool,
) -> None:  # fmt: skip
    """Fills what of `pointers` a kernel writes, among them dy (N, D), and what is in `sums`, (D,) each.

    It takes `pointers`, partial sums, N, D, `numbers`, the rows of a program and its tile. Every program leaves its
    sums over rows in rows of its own, of which those of `sums` are made here, or added to them.
    """
    N, D = dy.shape
    settings = tile(D, dy.element_size())
    rows = _rows_per_program(N, settings["ROWS"])
    partial = dy.new_empty((triton.cdiv(N, rows), len(sums), D), dtype=torch.float32)
    _launch(kernel, N, rows, {"SUMS": len(sums)} | settings, *pointers, partial, N, D, *numbers)
    add_column_sums(partial, sums, accumulate)


def _launch(kernel, num_rows: int, rows_per_program: int, settings: dict[str, int], *arguments) -> None:
    if num_rows > 0:
        grid = (triton.cdiv(num_rows, rows_per_program),)
        kernel[grid](*arguments, rows_per_program, **settings, **LAUNCH_OPTIONS)


def _rows_per_program(num_rows: int, rows: int) -> int:
    """A multiple of `rows` that depends on the shape alone, so that a device changes no rounding."""
    wanted = max(ROWS_PER_PROGRAM, triton.cdiv(num_rows, MAX_PROGRAMS))
    return triton.cdiv(wanted, rows) * rows


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """(out, what `backward` needs), (N, D) and contiguous like the inputs. No checks, no gradient.

    Arguments as in `dropout_add_layernorm`.
    """
    seed = seed if dropout_p > 0 else None
    if x.device.type not in TRITON_DEVICES:
        y = dropout(x, seed, stream=stream, dropout_p=dropout_p)
        return normalise_cpu(y if residual is None else residual + y, weight, bias, eps)
    out, mean, rstd = _forward_rows(x, residual, None, weight, bias, eps, seed, stream, dropout_p)
    return out, (x, mean, rstd) if residual is None else (x, mean, rstd, residual)


def add_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """(residual + dropout(x), its LayerNorm, what `add_backward` needs); the rest as in `forward`.

    With neither residual nor dropout the sum is x itself, and is not written.
    """
    if x.device.type not in TRITON_DEVICES:
        out, saved = forward(x, residual, weight, bias, eps, seed, stream, dropout_p)
        return saved[0], out, saved
    seed = seed if dropout_p > 0 else None
    into = None if residual is None and seed is None else torch.empty_like(x)
    out, mean, rstd = _forward_rows(x, residual, into, weight, bias, eps, seed, stream, dropout_p)
    total = x if into is None else into
    return total, out, (total, mean, rstd)


def _forward_rows(
    x: Tensor, residual: Tensor | None, into: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, mean, rstd). `into` is where the sum goes, if anybody wants it."""
    out, pointers = torch.empty_like(x), (x, residual, weight, bias, seed, into)
    numbers = (eps, stream, threshold(dropout_p), 1 / (1 - dropout_p))
    mean, rstd = launch_forward(_forward_kernel, out, seed, pointers, numbers)
    return out, mean, rstd


def backward(
    dout: Tensor, saved: tuple[Tensor, ...], weight: Tensor, seed: Tensor | None, stream: int, dropout_p: float, *,
    dweight: Tensor | None, dbias: Tensor | None, dx_sum: Tensor | None, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dresidual, dx), one tensor without dropout. dout is contiguous.

    dweight, dbias and dx_sum are where the gradients of weight and bias and the sum of dx over its rows go, each (D,)
    fp32 or in the dtype of the weight; None: nowhere. The last is the gradient of the bias of a linear layer whose
    output x was. With `accumulate` they are added to what stands there.
    """
    seed = seed if dropout_p > 0 else None
    if dout.device.type not in TRITON_DEVICES:
        dy = normalise_cpu_backward(dout, saved, weight, dweight, dbias, accumulate)
        dx = dropout(dy, seed, stream=stream, dropout_p=dropout_p)
        if dx_sum is not None:
            add_column_sum(dx_sum, dx, accumulate)
        return dy, dx
    x, mean, rstd, residual = saved if len(saved) == 4 else (*saved, None)
    return _backward_rows(
        dout, None, x, residual, weight, mean, rstd, seed, stream, dropout_p, (dweight, dbias, dx_sum), accumulate
    )


def add_backward(
    dout: Tensor, dsum: Tensor | None, saved: tuple[Tensor, ...], weight: Tensor,
    seed: Tensor | None, stream: int, dropout_p: float, *,
    dweight: Tensor | None, dbias: Tensor | None, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dresidual, dx) of `add_forward`, one tensor without dropout; the rest as in `backward`.

    dsum is the gradient of the sum but for what comes through its LayerNorm; contiguous, or None.
    """
    seed = seed if dropout_p > 0 else None
    if dout.device.type not in TRITON_DEVICES:
        dy = normalise_cpu_backward(dout, saved, weight, dweight, dbias, accumulate)
        dy = dy if dsum is None else dy.add_(dsum)
        return dy, dropout(dy, seed, stream=stream, dropout_p=dropout_p)
    total, mean, rstd = saved
    return _backward_rows(
        dout, dsum, None, total, weight, mean, rstd, seed, stream, dropout_p, (dweight, dbias, None), accumulate
    )


def _backward_rows(
    dout: Tensor, dsum: Tensor | None, x: Tensor | None, residual: Tensor | None, weight: Tensor, mean: Tensor,
    rstd: Tensor, seed: Tensor | None, stream: int, dropout_p: float, sums: Sequence[Tensor | None], accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dresidual, dx). Without x the residual is the sum already. `sums`: dweight, dbias and dx_sum."""
    if sums[1] is None and sums[2] is None:  # layers without biases; with one it is all three, in one compilation
        sums = sums[:1]
    dy, dx = torch.empty_like(dout), None if seed is None else torch.empty_like(dout)
    pointers = (dout, dsum, x, residual, weight, mean, rstd, seed, dy, dx)
    numbers = (stream, threshold(dropout_p), 1 / (1 - dropout_p))
    launch_backward(_backward_kernel, dy, pointers, numbers, sums, accumulate)
    return dy, dy if dx is None else dx


def normalise_cpu(y: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """PyTorch's own, which keeps the sum: at 4,096 x 768 adding it up again cost more.

    Parameters in fp32 make it keep mean and rstd in fp32, too, and be no slower for it.
    """
    bias = None if bias is None else bias.float()
    out, mean, rstd = torch.native_layer_norm(y, y.shape[1:], weight.float(), bias, eps)
    return out, (y, mean, rstd)


def normalise_cpu_backward(
    dout: Tensor, saved: tuple[Tensor, ...], weight: Tensor,
    dweight: Tensor | None, dbias: Tensor | None, accumulate: bool,
) -> Tensor:  # fmt: skip
    y, mean, rstd = saved
    wide = weight.float()
    # PyTorch's sum of dbias in bf16 is 4 % off at 1,024 rows and slower than a sum of its own; in fp32 it is neither.
    apart = y.dtype != torch.float32
    wanted = [True, dweight is not None, dbias is not None and not apart]
    dy, *sums = torch.ops.aten.native_layer_norm_backward(dout, y, y.shape[1:], mean, rstd, wide, wide, wanted)
    for total, rows in zip((dweight, dbias), sums, strict=True):
        if total is not None and rows is not None:
            total.add_(rows) if accumulate else total.copy_(rows)
    if dbias is not None and apart:
        add_column_sum(dbias, dout, accumulate)
    return dy


@torch.library.custom_op("fastdistil::dropout_add_layernorm", mutates_args=(), device_types=TRITON_DEVICES)
def layernorm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(N, D) LayerNorm, and (N,) fp32 mean and 1 / standard deviation. Inputs contiguous."""
    out, (_, mean, rstd, *_) = forward(x, residual, weight, bias, eps, seed, stream, dropout_p)
    return out, mean, rstd


@layernorm_forward.register_fake
def _(x, residual, weight, bias, eps, seed, stream, dropout_p):
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("fastdistil::dropout_add_layernorm_backward", mutates_args=(), device_types=TRITON_DEVICES)
def layernorm_backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor | None, residual: Tensor | None, weight: Tensor, mean: Tensor,
    rstd: Tensor, seed: Tensor | None, stream: int, dropout_p: float, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dresidual, dx, dweight, dbias); dx is empty without a seed, where it is dresidual, dbias without a bias."""
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight) if has_bias else None
    dy, dx = _backward_rows(
        dout, dsum, x, residual, weight, mean, rstd, seed, stream, dropout_p, (dweight, dbias, None), False
    )
    return dy, dy.new_empty(0) if seed is None else dx, dweight, weight.new_empty(0) if dbias is None else dbias


@layernorm_backward.register_fake
def _(dout, dsum, x, residual, weight, mean, rstd, seed, stream, dropout_p, has_bias):
    dx = dout.new_empty(0) if seed is None else torch.empty_like(dout)
    return torch.empty_like(dout), dx, torch.empty_like(weight), weight.new_empty(len(weight) if has_bias else 0)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, seed, ctx.stream, ctx.dropout_p = inputs
    _, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, mean, rstd, seed)


def _backward(ctx, dout, _dmean, _drstd):
    if dout is None:
        return (None,) * 8
    x, residual, weight, mean, rstd, seed = ctx.saved_tensors
    dy, dx, dweight, dbias = layernorm_backward(
        dout.contiguous(), None, x, residual, weight, mean, rstd, seed, ctx.stream, ctx.dropout_p, ctx.has_bias
    )
    dx, dresidual = dy if seed is None else dx, None if residual is None else dy
    return dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None, None, None


layernorm_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastdistil::add_layernorm", mutates_args=(), device_types=TRITON_DEVICES)
def add_layernorm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(N, D) sum and its LayerNorm, and (N,) fp32 mean and 1 / standard deviation. Inputs contiguous."""
    total, out, (_, mean, rstd) = add_forward(x, residual, weight, bias, eps, seed, stream, dropout_p)
    return total, out, mean, rstd


@add_layernorm_forward.register_fake
def _(x, residual, weight, bias, eps, seed, stream, dropout_p):
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), mean, torch.empty_like(mean)


def _setup_add_context(ctx, inputs, output):
    _, _, weight, bias, _, seed, ctx.stream, ctx.dropout_p = inputs
    total, _, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd, seed)


def _add_backward(ctx, dsum, dout, _dmean, _drstd):
    total, weight, mean, rstd, seed = ctx.saved_tensors
    if dout is None:  # nobody wanted more than the sum
        dx = None if dsum is None else dropout(dsum, seed, stream=ctx.stream, dropout_p=ctx.dropout_p)
        return dx, dsum, *(None,) * 6
    dsum = None if dsum is None else dsum.contiguous()
    dy, dx, dweight, dbias = layernorm_backward(
        dout.contiguous(), dsum, None, total, weight, mean, rstd, seed, ctx.stream, ctx.dropout_p, ctx.has_bias
    )
    return dy if seed is None else dx, dy, dweight, dbias if ctx.has_bias else None, None, None, None, None


add_layernorm_forward.register_autograd(_add_backward, setup_context=_setup_add_context)


def dropout_add_layernorm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension, of the shape and dtype of x.

    Args:
        x_ND: output of a sublayer, (N, D) or (B, L, D); fp32, bf16 or fp16, D up to 4,096. Gets a gradient.
        residual_ND: input of that sublayer, of the same shape and dtype. Gets a gradient.
        weight_D, bias_D: of the same dtype; the bias may be None. Get gradients, summed in fp32; but on the CPU as
            PyTorch sums them, in the dtype of x: in bf16 they are 3 % off at 1,024 rows and 5 % at 4,096.
        eps: added to the variance.
        dropout_p: probability in [0, 1) that an element of x is dropped.
        seed: of `new_dropout_seed`, on the same device; without one nothing is dropped.
        stream: this place of dropout in the model, 0 or more.

    Raises:
        ValueError: on shapes, dtypes or dropout that do not fit.
    """
    check_dropout("dropout_add_layernorm", x_ND, seed, stream, dropout_p)
    rows = _fitting("dropout_add_layernorm", x_ND, residual_ND, weight_D, bias_D)
    return _layernorm(*rows, eps, seed if dropout_p > 0 else None, stream, dropout_p).view(x_ND.shape)


def add_layernorm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """(residual + dropout(x), LayerNorm of that sum), which a pre-norm layer adds to and reads; both get a gradient.

    Arguments and errors as in `dropout_add_layernorm`; eps is ModernBERT's.
    """
    check_dropout("add_layernorm", x_ND, seed, stream, dropout_p)
    x, residual, weight, bias = _fitting("add_layernorm", x_ND, residual_ND, weight_D, bias_D)
    seed = seed if dropout_p > 0 else None
    if x.device.type not in TRITON_DEVICES:
        total = residual + dropout(x, seed, stream=stream, dropout_p=dropout_p)
        out = F.layer_norm(total, total.shape[1:], weight, bias, eps)
    else:
        total, out, _, _ = add_layernorm_forward(x, residual, weight, bias, eps, seed, stream, dropout_p)
    return total.view(x_ND.shape), out.view(x_ND.shape)


def layernorm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float = 1e-12) -> Tensor:
    """LayerNorm(x), by the same kernels; arguments and errors as there."""
    rows = _fitting("layernorm", x_ND, None, weight_D, bias_D)
    return _layernorm(*rows, eps, None, 0, 0.0).view(x_ND.shape)


def _layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    if x.device.type not in TRITON_DEVICES:
        # On the CPU PyTorch's own is the faster one: at 4,096 x 768 adding the sum again cost more than keeping it.
        y = dropout(x, seed, stream=stream, dropout_p=dropout_p)
        return F.layer_norm(y if residual is None else residual + y, x.shape[1:], weight, bias, eps)
    return layernorm_forward(x, residual, weight, bias, eps, seed, stream, dropout_p)[0]


def _fitting(
    operator: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    """x and residual as (N, D), weight and bias; contiguous. Raises ValueError unless they fit each other."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{operator} wants a residual like x, {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
    if x.ndim < 2 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{operator} wants (N, D) or (B, L, D) with D of 1 to {MAX_WIDTH}, got {tuple(x.shape)}")
    check_dtype(operator, x)
    x, residual = x.flatten(0, -2), None if residual is None else residual.flatten(0, -2)
    check_parameter(operator, "weight", weight, x)
    if bias is not None:
        check_parameter(operator, "bias", bias, x)
    residual, bias = (None if t is None else t.contiguous() for t in (residual, bias))
    return x.contiguous(), residual, weight.contiguous(), bias
