"""dropout(LayerNorm(word[ids] + position[position_ids] + type)), forward and backward: the embeddings of an encoder.

    y    = word[ids] + position[position_ids] + type        (the last two may be missing)
    out  = dropout(xhat * weight + bias),  xhat = (y - mean) * rstd         (kernels/layernorm.py; the bias may be None)

With dout' = keep ? dout / (1 - p) : 0 in place of dout, the gradients of y, weight and bias are those of LayerNorm. Of
dy the rows that have one index are added up to the gradient of its table (`add_rows` in kernels/linear.py).

fp32 arithmetic, one rounding. Saved: ids, tables, mean and rstd. The backward looks the rows up again: that reads what
reading their sum would, and spares the forward its store.

Memory: the forward reads (N, D) once for each table and writes it once; the backward reads dout besides, and writes dy.
Sums over rows as in LayerNorm.

Shapes: N = rows (tokens), D = width, V = vocabulary, P = positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import TRITON_DEVICES, tl, triton
from .dropout import dropout, dropout_reference, threshold
from .layernorm import (
    RUNTIME,
    drop,
    dropout_add_layernorm_reference,
    first_keys,
    launch_backward,
    launch_forward,
    load_bias,
    next_rows,
    normalise,
    normalise_backward,
    normalise_cpu,
    normalise_cpu_backward,
)

STREAM = tl.constexpr(0)  # the first place of dropout in a model


def embedding_reference(
    ids_N: Tensor, position_ids_N: Tensor | None, word_VD: Tensor, position_PD: Tensor | None, type_D: Tensor | None,
    weight_D: Tensor, bias_D: Tensor | None, *, eps: float = 1e-12, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dropout(LayerNorm(word[ids] + position[position_ids] + type)) as `dropout_add_layernorm_reference` has it."""
    embedded = word_VD.to(torch.promote_types(word_VD.dtype, torch.float32))[ids_N]
    embedded = embedded if position_PD is None else embedded + position_PD[position_ids_N]
    embedded = embedded if type_D is None else embedded + type_D
    out = dropout_add_layernorm_reference(embedded, None, weight_D, bias_D, eps=eps)
    return dropout_reference(out, seed, STREAM.value, dropout_p)


@triton.jit
def _embedded(ids_ptr, position_ids_ptr, word_ptr, position_ptr, type_ptr, row, column, live, N, D):
    """word[ids] + position[position_ids] + type in fp32."""
    word = tl.load(ids_ptr + row, mask=row < N, other=0).to(tl.int64)
    position = word  # which nobody looks up without a table
    if position_ids_ptr is not None:
        position = tl.load(position_ids_ptr + row, mask=row < N, other=0).to(tl.int64)
    y = tl.load(word_ptr + word[:, None] * D + column[None, :], mask=live, other=0.0).to(tl.float32)
    if position_ptr is not None:
        y += tl.load(position_ptr + position[:, None] * D + column[None, :], mask=live, other=0.0).to(tl.float32)
    if type_ptr is not None:
        y += tl.load(type_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return y


# Not `_forward_kernel`: a profile has nothing of a kernel but its name, and this is not LayerNorm.
@triton.jit(do_not_specialize=RUNTIME)
def _embedding_forward_kernel(
    ids_ptr, position_ids_ptr, word_ptr, position_ptr, type_ptr,  # (N,) integers twice; (V, D), (P, D), (D,)
    weight_ptr, bias_ptr, seed_ptr,  # (D,) twice, (); None may be seed, bias, type and what is of positions
    out_ptr, mean_ptr, rstd_ptr,                                  # (N, D), (N,) fp32 twice
    N, D, eps, threshold, scale, rows_per_program,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    bias = load_bias(bias_ptr, column, in_row)
    seed, column_key, row_keys = first_keys(seed_ptr, STREAM, column)
    for begin in range(0, rows_per_program, ROWS):
        row, row_key, row_keys = next_rows(seed_ptr, seed, STREAM, row_keys, rows_per_program, begin, ROWS)
        live = (row < N)[:, None] & in_row[None, :]
        y = _embedded(ids_ptr, position_ids_ptr, word_ptr, position_ptr, type_ptr, row, column, live, N, D)
        out, mean, rstd = normalise(y, weight, bias, in_row, D, eps)
        out, _ = drop(out, live, seed_ptr, row_key, column_key, threshold, scale)
        tl.store(out_ptr + row[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=live)
        tl.store(mean_ptr + row, mean, mask=row < N)
        tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit(do_not_specialize=RUNTIME)
def _embedding_backward_kernel(
    dout_ptr, ids_ptr, position_ids_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dy_ptr, partial_ptr,  # (N, D); (programs, SUMS, D) fp32: dweight, dbias
    N, D, threshold, scale, rows_per_program,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    in_row = column < D
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    seed, column_key, row_keys = first_keys(seed_ptr, STREAM, column)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, rows_per_program, ROWS):
        row, row_key, row_keys = next_rows(seed_ptr, seed, STREAM, row_keys, rows_per_program, begin, ROWS)
        live = (row < N)[:, None] & in_row[None, :]
        at = row[:, None] * D + column[None, :]
        y = _embedded(ids_ptr, position_ids_ptr, word_ptr, position_ptr, type_ptr, row, column, live, N, D)
        mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        dout = tl.load(dout_ptr + at, mask=live, other=0.0).to(tl.float32)
        dout, _ = drop(dout, live, seed_ptr, row_key, column_key, threshold, scale)
        dy, xhat = normalise_backward(dout, y, mean, rstd, weight, live, D)
        dweight += tl.sum(dout * xhat, axis=0)
        if SUMS > 1:
            dbias += tl.sum(dout, axis=0)
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=live)
    partial_ptr += program * SUMS * D + column
    tl.store(partial_ptr, dweight, mask=in_row)
    if SUMS > 1:
        tl.store(partial_ptr + D, dbias, mask=in_row)


def forward(
    ids: Tensor, position_ids: Tensor | None, word_VD: Tensor, position_PD: Tensor | None, type_D: Tensor | None,
    weight: Tensor, bias: Tensor | None, eps: float, seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
    """(dropout(LayerNorm(word[ids] + position[position_ids] + type)) (N, D), what `backward` needs).

    ids and position_ids are (N,) int32 or int64, all else of one dtype and contiguous; a model without a table of
    positions has no position_ids either. No checks, no gradient.
    """
    seed = seed if dropout_p > 0 else None
    if word_VD.device.type not in TRITON_DEVICES:
        embedded = F.embedding(ids, word_VD)
        if position_ids is not None and position_PD is not None:
            embedded += F.embedding(position_ids, position_PD)
        if type_D is not None:
            embedded += type_D
        out, saved = normalise_cpu(embedded, weight, bias, eps)
        return dropout(out, seed, stream=STREAM.value, dropout_p=dropout_p), saved
    out, tables = word_VD.new_empty(ids.shape[0], word_VD.shape[1]), (ids, position_ids, word_VD, position_PD, type_D)
    numbers = (eps, threshold(dropout_p), 1 / (1 - dropout_p))
    pointers = (*tables, weight, bias, seed)
    mean, rstd = launch_forward(_embedding_forward_kernel, out, seed, pointers, numbers)
    return out, (*tables, mean, rstd)


def backward(
    dout: Tensor, saved: tuple[Any, ...], weight: Tensor, seed: Tensor | None, dropout_p: float, *,
    dweight: Tensor | None, dbias: Tensor | None, accumulate: bool,
) -> Tensor:  # fmt: skip
    """Gradient (N, D) of the sum of embeddings; dweight, dbias and `accumulate` as in `layernorm.backward`."""
    seed = seed if dropout_p > 0 else None
    if dout.device.type not in TRITON_DEVICES:
        dout = dropout(dout, seed, stream=STREAM.value, dropout_p=dropout_p)
        return normalise_cpu_backward(dout, saved, weight, dweight, dbias, accumulate)
    *tables, mean, rstd = saved
    sums = (dweight,) if dbias is None else (dweight, dbias)
    dy, numbers = torch.empty_like(dout), (threshold(dropout_p), 1 / (1 - dropout_p))
    pointers = (dout, *tables, weight, mean, rstd, seed, dy)
    launch_backward(_embedding_backward_kernel, dy, pointers, numbers, sums, accumulate)
    return dy
