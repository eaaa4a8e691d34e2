"""Logits of a mixture of distributions: what a student of several teachers is taught by.

With the logits y_1 ... y_K of K teachers, their weights w, whose sum is 1, and the temperature T of the distillation:

    p = sum_k w_k softmax(y_k / T)                                  the teachers' distributions, averaged
    y = T log p,  so that softmax(y / T) = p                        what kernels/distill.py takes for a teacher's logits

Averaged are probabilities, as of an ensemble (Hinton et al. 2015, sec. 1), at the temperature at which they are
imitated; logits of several models have no common zero. The KL of distill.py against y is the KL against p, and the top
column of p is what a student agrees with. Teachers are frozen: no gradient.

One operator mixes two, in place, and is called once for every teacher beyond the first:

    y <- T log((1 - a_k) softmax(y / T) + a_k softmax(y_k / T)),    a_k = w_k / (w_1 + ... + w_k)

which after the last is the mixture of all. So no more than two chunks of teachers' logits exist, whatever K is, and one
kernel serves every K. All K at once would read and write 2 (K + 1) bytes a column in bf16 for 6 (K - 1) here: the same
for two teachers, for K chunks in place of two. It would also round once; here the logarithms are rounded K - 1 times to
the logits' dtype, in which those of the likely columns, which lie near 0, are finer than logits are.

Each row is read twice, as in distill.py, from whose first pass the normalisers come: from memory, then from L2. 6 bytes
a column in bf16. Everything is computed in fp32. A probability below 2^-126 is 0 and its logit -inf, as is that of a
column that no teacher says: distill.py gives both no weight. A teacher that says no column at all makes the row NaN.

Shapes: N = rows (tokens), V = columns, of which the first `vocab_size` are the vocabulary; what becomes of the others
nobody reads.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ._backend import LAUNCH_OPTIONS, TRITON_DEVICES, check_dtype, host_number, read_number, tl, triton
from .distill import (
    COLUMNS_PER_LOAD,
    LN2,
    LOG2E,
    NUM_WARPS,
    SAFE_POWER,
    _first_pass,
    _in_vocabulary,
    _load_both,
    _log2_sum,
)

# On two CPU cores 512 rows of BERT's vocabulary took 18 ms in fp32 and 20 in bf16 in blocks of 16 rows, whose
# temporaries (2 MB each) stay in the caches, and 81 and 112 ms all at once; 32 rows: 33 and 18 ms.
CPU_ROWS = 16


def mix_logits_reference(
    teachers_KNV: Sequence[Tensor], weights_K: Sequence[float], *, temperature: float, vocab_size: int | None = None
) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs): (N, vocab_size) logits, rounded once to their dtype."""
    logits = [y[:, :vocab_size].to(torch.promote_types(y.dtype, torch.float32)) for y in teachers_KNV]
    parts = [w * torch.softmax(y / temperature, dim=-1) for w, y in zip(weights_K, logits, strict=True)]
    p = torch.stack(parts).sum(0) / sum(weights_K)
    return (temperature * p.log()).to(teachers_KNV[0].dtype)


@triton.jit(do_not_specialize=["vocab_size"])
def _mixture_kernel(
    y_ptr, x_ptr,        # (N, V) logits; those of the mixture take the place of y
    y_stride, x_stride,  # elements between rows
    width, vocab_size, temperature,
    share,               # of x in the mixture
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64, as in distill.py
    y_row, x_row = y_ptr + row * y_stride, x_ptr + row * x_stride
    step: tl.constexpr = LANES * VECTOR
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    c = LOG2E / temperature
    y, x = _load_both(y_row, x_row, lanes, width, "evict_last")
    y_top, y_total, x_top, x_total = _first_pass(y, x, y_row, x_row, lanes, width, vocab_size, c, step)
    y, x = _load_both(y_row, x_row, lanes, width, "evict_first")
    y_log2, x_log2 = tl.log2(y_total * tl.exp2(0.0 - y_top * c)), tl.log2(x_total * tl.exp2(0.0 - x_top * c))
    if tl.maximum(tl.abs(y_top), tl.abs(x_top)) * c >= SAFE_POWER:
        y_log2 = _log2_sum(y_row, lanes, y_top, width, vocab_size, c, step)
        x_log2 = _log2_sum(x_row, lanes, x_top, width, vocab_size, c, step)
    for start in range(0, width, step):
        columns = start + lanes
        next_y, next_x = _load_both(y_row, x_row, columns + step, width, "evict_first")
        y, x = _in_vocabulary(y, x, start, lanes, vocab_size, step)
        p = (1.0 - share) * tl.exp2((y - y_top) * c - y_log2) + share * tl.exp2((x - x_top) * c - x_log2)
        # A thread writes the columns that it alone has read, in every pass.
        mixed = temperature * LN2 * tl.log2(p)
        tl.store(y_row + columns, mixed.to(y_ptr.dtype.element_ty), mask=columns < width)
        y, x = next_y, next_x


def _launch(first: Tensor, second: Tensor, temperature: float, share: float, vocab_size: int) -> None:
    N, width = first.shape
    _mixture_kernel[(N,)](
        first, second, first.stride(0), second.stride(0), width, vocab_size, temperature, share,
        LANES=32 * NUM_WARPS, VECTOR=COLUMNS_PER_LOAD[first.element_size()],
        **{"num_warps": NUM_WARPS}, **LAUNCH_OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("fastdistil::mix_rows", mutates_args=("first",), device_types=TRITON_DEVICES)
def mix_rows(first: Tensor, second: Tensor, temperature: float, share: float, vocab_size: int) -> None:
    """The logits of (1 - share) softmax(first / T) + share softmax(second / T) take the place of `first`.

    The inner operator. Two (N, V) tensors of one dtype, whose rows are contiguous. `share` is in (0, 1).
    """
    _launch(first, second, temperature, share, vocab_size)


@mix_rows.register_fake
def _(first, second, temperature, share, vocab_size):
    return None


def mix_rows_torch(first: Tensor, second: Tensor, temperature: float, share: float, vocab_size: int) -> None:
    """`mix_rows` in plain PyTorch, which serves CPU tensors."""
    for y, x in zip(first[:, :vocab_size].split(CPU_ROWS), second[:, :vocab_size].split(CPU_ROWS), strict=True):
        p, q = (torch.softmax(logits.float() / temperature, dim=-1) for logits in (y, x))
        y.copy_(p.lerp_(q, share).log_().mul_(temperature))


if "cpu" not in TRITON_DEVICES:
    mix_rows.register_kernel("cpu")(mix_rows_torch)


def forward(first: Tensor, *others: Any) -> None:
    """`mix_rows` without the operator around it where Triton serves the device: what the host pays is a launch."""
    (_launch if first.device.type in TRITON_DEVICES else mix_rows)(first, *others)


def running_shares(weights_K: Sequence[float]) -> list[float]:
    """Of every teacher but the first its share of the mixture of it and those before: a_k, as `mix_rows` takes it."""
    return [w / total for w, total in zip(weights_K, accumulate(weights_K), strict=True)][1:]


def mix_logits(
    teachers_KNV: Sequence[Tensor],
    weights_K: Sequence[float],
    *,
    temperature: float | Tensor,
    vocab_size: int | None = None,
) -> Tensor:
    """(N, V) logits whose softmax at this temperature is the weighted mean of the teachers' distributions at it.

    They take the place of one teacher's in `distill_loss` with the same temperature.

    Args:
        teachers_KNV: the teachers' logits (N, V) of one vocabulary, of one dtype, fp32, bf16 or fp16. None gets a
            gradient, and they are left as they are.
        weights_K: a number above 0 a teacher; divided by their sum.
        temperature: > 0. A number, or a 0-dim tensor, which the host reads.
        vocab_size: columns that exist, the others being padding, of which nothing is said; all of them by default.

    Raises:
        ValueError: on shapes, dtypes, devices, weights or a temperature that do not fit.
    """
    op, first = "mix_logits", teachers_KNV[0] if len(teachers_KNV) else torch.empty(0)
    if first.ndim != 2 or not first.numel() or any(y.shape != first.shape for y in teachers_KNV):
        raise ValueError(f"{op} wants (N, V) logits of one shape, got {[tuple(y.shape) for y in teachers_KNV]}")
    check_dtype(op, first)
    if any((y.dtype, y.device) != (first.dtype, first.device) for y in teachers_KNV):
        found = [f"{y.dtype} on {y.device}" for y in teachers_KNV]
        raise ValueError(f"{op} wants logits of one dtype on one device, got {found}: convert some of them")
    if len(weights_K) != len(teachers_KNV) or not all(0 < w < float("inf") for w in weights_K):
        raise ValueError(f"{op} wants a weight above 0 for each of {len(teachers_KNV)} teachers, got {[*weights_K]}")
    vocab_size = first.shape[1] if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= first.shape[1]:
        raise ValueError(f"{op}: vocab_size must be in [1, {first.shape[1]}], the columns there are, got {vocab_size}")
    number = read_number(op, "temperature", *host_number(op, "temperature", temperature))
    mixed = first.detach().clone(memory_format=torch.contiguous_format)
    for y, share in zip(teachers_KNV[1:], running_shares(weights_K), strict=True):
        mix_rows(mixed, y.detach() if y.stride(1) == 1 else y.detach().contiguous(), number, share, vocab_size)
    return mixed
