"""Variants of the distillation row kernel, beside the one of kernels/distill.py: right first, then milliseconds.

    python -m benchmarks.row_variants                on a GPU: a line a variant
    python -m benchmarks.row_variants --compile      without one: registers, spills, CTAs an SM, instructions (sm_90)
    TRITON_INTERPRET=1 python -m benchmarks.row_variants --interpret       on the CPU: the arithmetic on 24 short rows

All take bf16 rows as words of two columns, which take one instruction a column to widen, and need no maximum before
the first exponential: a row's sum of 2^(c z) is finite and not lost unless its largest |c z| is 100 or more, and only
such a row is summed again, from its largest logit. The loss of a row is ln 2 * sum p (log2 p - log2 q) + sum (q - p),
not below 0: one multiply-add and one addition a column, where clamped terms take five instructions.

`_streamed_kernel` reads rows twice, as today's; AHEAD issues a step's loads before the arithmetic of the one before,
PREFETCH asks L2 for a share of the row that this SM has next.
`_held_kernel` is one CTA an SM, which goes from row to row and keeps both rows in registers: 16 warps of 64 words a
thread, or 32 warps of 32. As the second pass is done with some columns, it loads those of the next row, so that memory
never waits for arithmetic; nothing is read twice and L2 does not matter.
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels import distill
from fastdistil.kernels._backend import INTERPRET, LAUNCH_OPTIONS
from fastdistil.kernels.distill import LN2, LOG2E, _store_row

INTERPRETED = tl.constexpr(INTERPRET)
V, VOCAB, TEMPERATURE = (8256, 8250, 2.0) if INTERPRET else (30528, 30522, 2.0)
WORDS = tl.constexpr(4)  # of 4 bytes, a thread's load
NO_LOGITS = tl.constexpr(-8323200)  # a word of twice -inf
# Of c * top. Sums of 2^15 powers up to 2^100 are finite, and a largest of 2^-100 keeps what is 2^-26 of it.
SAFE_POWER = tl.constexpr(100.0)


@triton.jit
def _low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _power(x):
    """2^x, an instruction that stays where it stands: nothing of it is done before a branch is decided."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)


@triton.jit
def _halves(word, zero, AGAIN: tl.constexpr):
    """Both columns of a word in fp32. AGAIN: of a word that was widened before, which the compiler must not see.

    It would keep what it has, and spill. `zero` is 0, which it does not know either.
    """
    if INTERPRETED or not AGAIN:
        return _low(word), _high(word)
    low = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x1044;", "=r,r,r", [word, zero], tl.int32, False, 1)
    high = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x3244;", "=r,r,r", [word, zero], tl.int32, False, 1)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _pack(low, high):
    if INTERPRETED:
        high = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
        return high << 16 | low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)


@triton.jit
def _larger(a, b):
    """Of two words, the larger of each half."""
    if INTERPRETED:
        low, high = tl.maximum(_low(a), _low(b)), tl.maximum(_high(a), _high(b))
        return high.to(tl.int32, bitcast=True) | (low.to(tl.int32, bitcast=True) >> 16 & 65535)
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _count_shared(count, z, s_top, y, t_top):
    """`count`, a word of two bf16, with the columns that are the top of both models; never 0 again."""
    if INTERPRETED:
        low = (_low(z) == _low(s_top)) & (_low(y) == _low(t_top))
        high = (_high(z) == _high(s_top)) & (_high(y) == _high(t_top))
        return count + tl.where(low | high, 0x3F80, 0)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b; set.eq.bf16x2.bf16x2 a, $2, $3; set.eq.bf16x2.bf16x2 b, $4, $5; "
        "fma.rn.bf16x2 $0, a, b, $1; }",
        "=r,r,r,r,r,r", [count, z, s_top, y, t_top], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def _add_product(total, p, difference):
    """total + p * difference, and total where p is 0: 0 * log 0 = 0."""
    if INTERPRETED:
        return tl.where(p == 0.0, total, total + p * difference)
    return tl.inline_asm_elementwise(
        "{ .reg .pred some; .reg .f32 sum; setp.neu.f32 some, $2, 0f00000000; mov.f32 sum, $1; "
        "@some fma.rn.ftz.f32 sum, $2, $3, sum; mov.f32 $0, sum; }",
        "=f,f,f,f", [total, p, difference], tl.float32, True, 1,
    )  # fmt: skip


@triton.jit
def _prefetch(address, num_bytes, wanted):
    """One thread of the CTA asks for `num_bytes`, a multiple of 16, to be brought to L2."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .b32 id; mov.u32 id, %tid.x; setp.lt.s32 first, id, $3; "
            "@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r,r", [address.to(tl.int64), num_bytes, wanted.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def _sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sums_and_largest(a, b, c, d, e, f, g, h):
    return a + e, b + f, tl.maximum(c, g), tl.maximum(d, h)


@triton.jit
def _only_vocabulary(word, columns, vocab_size):
    """-inf for columns outside it, `columns` being those of the low halves."""
    word = tl.where(columns + 1 < vocab_size, word, word & 65535 | -8388608)
    return tl.where(columns < vocab_size, word, NO_LOGITS)


@triton.jit
def _power_sum(word, c, shift, zero, AGAIN: tl.constexpr):
    """In each lane the sum of 2^(c z - shift)."""
    low, high = _halves(word, zero, AGAIN)
    return tl.sum(_power(low * c - shift) + _power(high * c - shift), axis=1)


@triton.jit
def _largest(word):
    if INTERPRETED:  # whose own reductions alone are fast
        return _pack(tl.max(_low(word), axis=1), tl.max(_high(word), axis=1))
    return tl.reduce(word, 1, _larger)


@triton.jit
def _include(word, total, largest, c):
    return total + _power_sum(word, c, 0.0, 0, False), _larger(largest, _largest(word))


@triton.jit
def _finish_normalisers(s_total, s_largest, t_total, t_largest):
    s_largest = tl.maximum(_low(s_largest), _high(s_largest))
    t_largest = tl.maximum(_low(t_largest), _high(t_largest))
    if INTERPRETED:
        return tl.sum(s_total, 0), tl.sum(t_total, 0), tl.max(s_largest, 0), tl.max(t_largest, 0)
    return tl.reduce((s_total, t_total, s_largest, t_largest), 0, _sums_and_largest)


@triton.jit
def _is_safe(s_top, t_top, c):
    return tl.maximum(tl.abs(s_top), tl.abs(t_top)) * c < SAFE_POWER  # of NaN and inf, no


@triton.jit
def _twice(top):
    """A word of twice the bf16 that `top` is."""
    bits = top.to(tl.int32, bitcast=True)
    return bits | (bits >> 16 & 65535)


@triton.jit
def _loss_and_gradient(
    z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, state, labelled, zero, AGAIN: tl.constexpr
):
    """dz of some columns as words, without the label's -1, and the lanes' sums with them."""
    cross, rest, shared = state
    s_top, t_top = tops
    none = tl.zeros(z.shape, tl.int32)
    shared = _larger(shared, _largest(_count_shared(none, z, s_top, y, t_top)))
    z0, z1 = _halves(z, zero, AGAIN)
    y0, y1 = _halves(y, zero, AGAIN)
    q0_log2, q1_log2 = z0 * c - s_log2, z1 * c - s_log2
    p0_log2, p1_log2 = y0 * c - t_log2, y1 * c - t_log2
    p0, p1 = _power(p0_log2), _power(p1_log2)
    products = _add_product(_add_product(none.to(tl.float32), p0, p0_log2 - q0_log2), p1, p1_log2 - q1_log2)
    cross += tl.sum(products, axis=1)
    d0, d1 = _power(q0_log2) - p0, _power(q1_log2) - p1
    rest += tl.sum(d0 + d1, axis=1)
    d0, d1 = slope * d0, slope * d1
    if labelled:
        z0, z1 = _halves(z, zero, AGAIN)  # again: held over the branch, they would take 8 registers
        d0 += mlm_scale * _power(z0 * LOG2E - s1_log2)
        d1 += mlm_scale * _power(z1 * LOG2E - s1_log2)
    return _pack(d0, d1), (cross, rest, shared)


@triton.jit
def _logit(row_ptr, label, vocab_size):
    inside = (label >= 0) & (label < vocab_size)
    return tl.load(row_ptr.to(tl.pointer_type(tl.bfloat16)) + label, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _store_label(ds_row, label, z, y, c, s_log2, t_log2, s1_log2, slope, mlm_scale, vocab_size):
    """dz of the label, over what stands there, once all threads have stored theirs."""
    dz = slope * (tl.exp2(z * c - s_log2) - tl.exp2(y * c - t_log2)) + mlm_scale * (tl.exp2(z * LOG2E - s1_log2) - 1.0)
    tl.debug_barrier()
    tl.store(ds_row.to(tl.pointer_type(tl.bfloat16)) + label, dz.to(tl.bfloat16), mask=label < vocab_size)


@triton.jit
def _finish_row(out_ptr, N, row, sums, s_total, mlm, temperature):
    cross, rest, shared = sums
    # Both halves of `shared` count, neither below 0, so as an integer it is 0 where both are.
    shared = tl.where(shared > 0, 1.0, 0.0)
    if INTERPRETED:
        cross, rest, shared = tl.sum(cross, 0), tl.sum(rest, 0), tl.sum(shared, 0)
    else:
        cross, rest, shared = tl.reduce((cross, rest, shared), 0, _sums)
    kd = tl.maximum(cross * LN2 + rest, 0.0, tl.PropagateNan.ALL)
    _store_row(out_ptr, N, row, temperature * temperature * kd, mlm, tl.where((shared > 0) & (s_total > 0), 1.0, 0.0))


@triton.jit
def _no_sums(LANES: tl.constexpr):
    return tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.int32)


# ---------------------------------------------------------------------------------------------------- rows from L2


@triton.jit
def _word(row_ptr, at, width, vocab_size, MASKED: tl.constexpr, eviction: tl.constexpr):
    if MASKED:
        word = tl.load(row_ptr + at, mask=at < width // 2, other=NO_LOGITS, eviction_policy=eviction)
        return _only_vocabulary(word, 2 * at, vocab_size)
    return tl.load(row_ptr + at, eviction_policy=eviction)


@triton.jit
def _streamed_sum(row_ptr, lanes, top, c, width, vocab_size, step: tl.constexpr):
    """log2 of the sum of 2^(c z), added up from the largest."""
    total = tl.sum(tl.zeros(lanes.shape, tl.float32), axis=1)
    for start in range(0, width // 2, step):
        total += _power_sum(_word(row_ptr, start + lanes, width, vocab_size, True, "evict_last"), c, top * c, 0, False)
    return tl.log2(tl.sum(total, axis=0)) + top * c


@triton.jit
def _streamed_second(
    first_z, first_y, s_row, t_row, ds_row, lanes, width, vocab_size, c, s_log2, t_log2, tops, s1_log2, slope,
    mlm_scale, step: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
    LABELLED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        return _second_ahead(
            first_z, first_y, s_row, t_row, ds_row, lanes, width, vocab_size, c, s_log2, t_log2, tops, s1_log2, slope,
            mlm_scale, step, STORE, LABELLED,
        )  # fmt: skip
    sums = _no_sums(lanes.shape[0])
    whole = vocab_size // (2 * step) * step
    if LABELLED:
        whole = 0
    for start in tl.range(0, whole, step, loop_unroll_factor=UNROLL, num_stages=STAGES):
        at = start + lanes
        z = _word(s_row, at, width, vocab_size, False, "evict_first")
        y = _word(t_row, at, width, vocab_size, False, "evict_first")
        dz, sums = _loss_and_gradient(
            z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, sums, LABELLED, 0, False
        )
        if ds_row is not None:
            tl.store(ds_row + at, dz, cache_modifier=STORE)
    for start in range(whole, width // 2, step):
        at = start + lanes
        z = _word(s_row, at, width, vocab_size, True, "evict_first")
        y = _word(t_row, at, width, vocab_size, True, "evict_first")
        dz, sums = _loss_and_gradient(
            z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, sums, LABELLED, 0, False
        )
        if ds_row is not None:
            tl.store(ds_row + at, dz, mask=at < width // 2, cache_modifier=STORE)
    return sums


@triton.jit
def _ahead(row_ptr, at, width, eviction: tl.constexpr):
    """Words for the next step, the last of which is told apart from the padding when it is used."""
    return tl.load(row_ptr + at, mask=at < width // 2, eviction_policy=eviction)


@triton.jit
def _first_ahead(z, y, s_row, t_row, lanes, width, vocab_size, c, state, step: tl.constexpr):
    """The first pass, each step's loads issued before the arithmetic of the one before; z and y are the first's."""
    s_total, s_largest, t_total, t_largest = state
    whole = vocab_size // (2 * step) * step
    for start in range(0, whole, step):
        at = start + step + lanes
        next_z, next_y = _ahead(s_row, at, width, "evict_last"), _ahead(t_row, at, width, "evict_last")
        s_total, s_largest = _include(z, s_total, s_largest, c)
        t_total, t_largest = _include(y, t_total, t_largest, c)
        z, y = next_z, next_y
    z, y = _only_vocabulary(z, 2 * (whole + lanes), vocab_size), _only_vocabulary(y, 2 * (whole + lanes), vocab_size)
    s_total, s_largest = _include(z, s_total, s_largest, c)
    t_total, t_largest = _include(y, t_total, t_largest, c)
    return s_total, s_largest, t_total, t_largest


@triton.jit
def _second_ahead(
    z, y, s_row, t_row, ds_row, lanes, width, vocab_size, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale,
    step: tl.constexpr, STORE: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    """The second pass likewise; z and y are the words of its first step."""
    sums = _no_sums(lanes.shape[0])
    whole = vocab_size // (2 * step) * step
    for start in range(0, whole, step):
        at = start + lanes
        next_z = _ahead(s_row, at + step, width, "evict_first")
        next_y = _ahead(t_row, at + step, width, "evict_first")
        dz, sums = _loss_and_gradient(
            z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, sums, LABELLED, 0, False
        )
        if ds_row is not None:
            tl.store(ds_row + at, dz, cache_modifier=STORE)
        z, y = next_z, next_y
    at = whole + lanes
    z, y = _only_vocabulary(z, 2 * at, vocab_size), _only_vocabulary(y, 2 * at, vocab_size)
    dz, sums = _loss_and_gradient(z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, sums, LABELLED, 0, False)
    if ds_row is not None:
        tl.store(ds_row + at, dz, mask=at < width // 2, cache_modifier=STORE)
    return sums


@triton.jit(do_not_specialize=["N", "first_row", "vocab_size"])
def _streamed_kernel(
    s_ptr, t_ptr, label_ptr, num_rows_ptr, scales_ptr, ds_ptr, out_ptr,  # as _distill_kernel; bf16 as words of 32 bits
    s_stride, t_stride, ds_stride,                                       # in words
    N, first_row, width, vocab_size, temperature, ahead,                 # ahead: rows that the GPU has at a time
    LANES: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr, PREFETCH: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    ds_row = None if ds_ptr is None else ds_ptr + row * ds_stride
    step: tl.constexpr = LANES * WORDS
    lanes = tl.arange(0, LANES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]

    # All loads that something waits for, before anything waits.
    end = N
    if num_rows_ptr is not None:
        end = tl.load(num_rows_ptr).to(tl.int32) - first_row
    label = tl.load(label_ptr + row)
    slope, mlm_scale = tl.load(scales_ptr) * temperature, tl.load(scales_ptr + 1)
    first_z, first_y = 0, 0
    if AHEAD:
        first_z, first_y = _ahead(s_row, lanes, width, "evict_last"), _ahead(t_row, lanes, width, "evict_last")
    if row >= end:
        if ds_row is not None:
            for start in range(0, width // 2, step):
                tl.store(ds_row + start + lanes, tl.zeros(lanes.shape, tl.int32), mask=start + lanes < width // 2)
        _store_row(out_ptr, N, row, 0.0, 0.0, 0.0)
        return

    c = LOG2E / temperature
    s_total, t_total = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    s_largest, t_largest = tl.full((LANES,), NO_LOGITS, tl.int32), tl.full((LANES,), NO_LOGITS, tl.int32)
    if AHEAD:
        s_total, s_largest, t_total, t_largest = _first_ahead(
            first_z, first_y, s_row, t_row, lanes, width, vocab_size, c, (s_total, s_largest, t_total, t_largest), step
        )
        first_z, first_y = _ahead(s_row, lanes, width, "evict_first"), _ahead(t_row, lanes, width, "evict_first")
    else:
        whole = vocab_size // (2 * step) * step
        for start in tl.range(0, whole, step, loop_unroll_factor=UNROLL, num_stages=STAGES):  # from memory
            z = _word(s_row, start + lanes, width, vocab_size, False, "evict_last")
            y = _word(t_row, start + lanes, width, vocab_size, False, "evict_last")
            s_total, s_largest = _include(z, s_total, s_largest, c)
            t_total, t_largest = _include(y, t_total, t_largest, c)
        for start in range(whole, width // 2, step):
            z = _word(s_row, start + lanes, width, vocab_size, True, "evict_last")
            y = _word(t_row, start + lanes, width, vocab_size, True, "evict_last")
            s_total, s_largest = _include(z, s_total, s_largest, c)
            t_total, t_largest = _include(y, t_total, t_largest, c)
    # Read before any thread of this CTA writes a gradient over it.
    labelled = label >= 0
    z_label, y_label = _logit(s_row, label, vocab_size), _logit(t_row, label, vocab_size)
    if PREFETCH > 0:
        num_bytes = (width * 2 // 16 * PREFETCH // 100) * 16
        _prefetch(s_row + ahead.to(tl.int64) * s_stride, num_bytes, row + ahead < end)
        _prefetch(t_row + ahead.to(tl.int64) * t_stride, num_bytes, row + ahead < end)
    s_total, t_total, s_top, t_top = _finish_normalisers(s_total, s_largest, t_total, t_largest)
    s_log2, t_log2 = tl.log2(s_total), tl.log2(t_total)
    if not _is_safe(s_top, t_top, c):
        s_log2 = _streamed_sum(s_row, lanes, s_top, c, width, vocab_size, step)
        t_log2 = _streamed_sum(t_row, lanes, t_top, c, width, vocab_size, step)
    tops = _twice(s_top), _twice(t_top)

    mlm, s1_log2 = 0.0, 0.0
    if labelled:
        s1_log2 = _streamed_sum(s_row, lanes, s_top, LOG2E, width, vocab_size, step)
        mlm = (s1_log2 - z_label * LOG2E) * LN2
        sums = _streamed_second(
            first_z, first_y, s_row, t_row, ds_row, lanes, width, vocab_size, c, s_log2, t_log2, tops, s1_log2, slope,
            mlm_scale, step, UNROLL, STAGES, STORE, True, AHEAD,
        )  # fmt: skip
        if ds_row is not None:
            _store_label(ds_row, label, z_label, y_label, c, s_log2, t_log2, s1_log2, slope, mlm_scale, vocab_size)
    else:
        sums = _streamed_second(
            first_z, first_y, s_row, t_row, ds_row, lanes, width, vocab_size, c, s_log2, t_log2, tops, s1_log2, slope,
            mlm_scale, step, UNROLL, STAGES, STORE, False, AHEAD,
        )  # fmt: skip
    _finish_row(out_ptr, N, row, sums, s_total, mlm, temperature)


# -------------------------------------------------------------------------------------------------- rows in registers


@triton.jit
def _held_load(row_ptr, at, slice: tl.constexpr, width: tl.constexpr, step: tl.constexpr, wanted):
    """A slice of a row, padding included: to tell that apart here would wait for the load."""
    at += slice * step
    if (slice + 1) * step * 2 <= width:
        return tl.load(row_ptr + at, mask=wanted)
    return tl.load(row_ptr + at, mask=(at < width // 2) & wanted, other=NO_LOGITS)


@triton.jit
def _held_sum(words, top, c, zero, LANES: tl.constexpr, SLICES: tl.constexpr):
    total = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(SLICES):
        total += _power_sum(words[i], c, top * c, zero, True)
    return tl.log2(tl.sum(total, axis=0)) + top * c


@triton.jit
def _without_padding(words, lanes, vocab_size: tl.constexpr, step: tl.constexpr, SLICES: tl.constexpr):
    """Words of a row, in the last slice of which columns outside the vocabulary are -inf."""
    all = ()
    for i in tl.static_range(SLICES):
        if (i + 1) * step * 2 > vocab_size:
            all += (_only_vocabulary(words[i], 2 * (lanes + i * step), vocab_size),)
        else:
            all += (words[i],)
    return all


@triton.jit(do_not_specialize=["N", "first_row", "zero"])
def _held_kernel(
    s_ptr, t_ptr, label_ptr, num_rows_ptr, scales_ptr, ds_ptr, out_ptr,  # as _streamed_kernel
    s_stride, t_stride, ds_stride,
    N, first_row, temperature, zero,                                     # zero: 0, see _halves
    width: tl.constexpr, vocab_size: tl.constexpr, LANES: tl.constexpr, SLICES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    first, programs = tl.program_id(0), tl.num_programs(0)
    s_stride, t_stride, ds_stride = s_stride.to(tl.int64), t_stride.to(tl.int64), ds_stride.to(tl.int64)
    step: tl.constexpr = LANES * WORDS
    lanes = tl.arange(0, LANES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    end = N
    if num_rows_ptr is not None:
        end = tl.maximum(0, tl.minimum(N, tl.load(num_rows_ptr).to(tl.int32) - first_row))
    c = LOG2E / temperature
    slope, mlm_scale = tl.load(scales_ptr) * temperature, tl.load(scales_ptr + 1)

    zs, ys = (), ()
    for i in tl.static_range(SLICES):
        zs += (_held_load(s_ptr + first * s_stride, lanes, i, width, step, first < end),)
        ys += (_held_load(t_ptr + first * t_stride, lanes, i, width, step, first < end),)
    next_label = tl.load(label_ptr + first, mask=first < end, other=-1)
    for row in range(first, end, programs):
        label, following = next_label, row + programs
        next_label = tl.load(label_ptr + following, mask=following < end, other=-1)
        labelled = label >= 0
        z_label = _logit(s_ptr + row * s_stride, label, vocab_size)
        y_label = _logit(t_ptr + row * t_stride, label, vocab_size)

        zs = _without_padding(zs, lanes, vocab_size, step, SLICES)
        ys = _without_padding(ys, lanes, vocab_size, step, SLICES)
        s_total, t_total = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
        s_largest, t_largest = tl.full((LANES,), NO_LOGITS, tl.int32), tl.full((LANES,), NO_LOGITS, tl.int32)
        for i in tl.static_range(SLICES):
            s_total, s_largest = _include(zs[i], s_total, s_largest, c)
            t_total, t_largest = _include(ys[i], t_total, t_largest, c)
        s_total, t_total, s_top, t_top = _finish_normalisers(s_total, s_largest, t_total, t_largest)
        s_log2, t_log2 = tl.log2(s_total), tl.log2(t_total)
        if not _is_safe(s_top, t_top, c):
            s_log2 = _held_sum(zs, s_top, c, zero, LANES, SLICES)
            t_log2 = _held_sum(ys, t_top, c, zero, LANES, SLICES)
        tops = _twice(s_top), _twice(t_top)
        mlm, s1_log2 = 0.0, 0.0
        if labelled:
            s1_log2 = _held_sum(zs, s_top, LOG2E, zero, LANES, SLICES)
            mlm = (s1_log2 - z_label * LOG2E) * LN2

        sums = _no_sums(LANES)
        s_next, t_next = s_ptr + following * s_stride, t_ptr + following * t_stride
        next_zs, next_ys = (), ()
        for i in tl.static_range(SLICES):
            z, y = zs[i], ys[i]
            at = lanes + i * step
            if labelled:  # one body with a branch in it would hold more over the branch than there are registers
                dz, sums = _loss_and_gradient(
                    z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, sums, True, zero, True
                )
            else:
                dz, sums = _loss_and_gradient(
                    z, y, c, s_log2, t_log2, tops, s1_log2, slope, mlm_scale, sums, False, zero, True
                )
            if ds_ptr is not None:
                ds_row = ds_ptr + row * ds_stride
                if (i + 1) * step * 2 <= width:
                    tl.store(ds_row + at, dz, cache_modifier=STORE)
                else:
                    tl.store(ds_row + at, dz, mask=at < width // 2, cache_modifier=STORE)
            next_zs += (_held_load(s_next, lanes, i, width, step, following < end),)
            next_ys += (_held_load(t_next, lanes, i, width, step, following < end),)
        if ds_ptr is not None:  # noqa: SIM102 (decided while compiling)
            if labelled:
                _store_label(
                    ds_ptr + row * ds_stride, label, z_label, y_label, c, s_log2, t_log2, s1_log2, slope,
                    mlm_scale, vocab_size,
                )  # fmt: skip
        _finish_row(out_ptr, N, row, sums, s_total, mlm, temperature)
        zs, ys = next_zs, next_ys

    for row in range(end + (first - end % programs + programs) % programs, N, programs):
        if ds_ptr is not None:
            for i in tl.static_range(SLICES):
                at = lanes + i * step
                ds_row = ds_ptr + row * ds_stride
                tl.store(ds_row + at, tl.zeros(lanes.shape, tl.int32), mask=at < width // 2)
        _store_row(out_ptr, N, row, 0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------------- launchers


def _as_words(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.view(torch.int32) for x in tensors]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def streamed(
    student: Tensor, teacher: Tensor, labels: Tensor, num_rows: Tensor | None, dstudent: Tensor | None,
    first_row: int, temperature: float, scales: Tensor, vocab_size: int,
    *, num_warps: int = 16, unroll: int = 1, stages: int = 1, store: str = "", prefetch: int = 0, ahead: bool = False,
    **options: Any,
) -> Tensor:  # fmt: skip
    N, width = student.shape
    rows = student.new_empty((3, N), dtype=torch.float32)
    z, y, dz = _as_words(student, teacher, dstudent)
    step = 64 * num_warps * WORDS.value  # columns
    assert not ahead or width - vocab_size // step * step <= step, "more than one step with padding"
    _streamed_kernel[(N,)](
        z, y, labels, num_rows, scales, dz, rows, z.stride(0), y.stride(0), 0 if dz is None else dz.stride(0),
        N, first_row, width, vocab_size, temperature, _processors(student.device) * (32 // num_warps),
        LANES=32 * num_warps, UNROLL=unroll, STAGES=stages, STORE=store, PREFETCH=prefetch, AHEAD=ahead,
        num_warps=num_warps, **options, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return rows


def held(
    student: Tensor, teacher: Tensor, labels: Tensor, num_rows: Tensor | None, dstudent: Tensor | None,
    first_row: int, temperature: float, scales: Tensor, vocab_size: int,
    *, num_warps: int = 16, store: str = "", **options: Any,
) -> Tensor:  # fmt: skip
    N, width = student.shape
    rows = student.new_empty((3, N), dtype=torch.float32)
    z, y, dz = _as_words(student, teacher, dstudent)
    slices = triton.cdiv(width, 2 * 32 * num_warps * WORDS.value)
    assert (slices - 1) * 64 * num_warps * WORDS.value < vocab_size
    _held_kernel[(min(N, _processors(student.device)),)](
        z, y, labels, num_rows, scales, dz, rows, z.stride(0), y.stride(0), 0 if dz is None else dz.stride(0),
        N, first_row, temperature, 0, width, vocab_size, LANES=32 * num_warps, SLICES=slices, STORE=store,
        num_warps=num_warps, maxnreg=65536 // (32 * num_warps), **options, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return rows


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "today's": distill.forward,
    "streamed": streamed,
    "streamed, stores .cs": functools.partial(streamed, store=".cs"),
    "streamed, unrolled by 2": functools.partial(streamed, unroll=2),
    "streamed, 3 stages": functools.partial(streamed, stages=3),
    "streamed, 30 % to L2": functools.partial(streamed, prefetch=30),
    "ahead": functools.partial(streamed, ahead=True),
    "ahead, 30 % to L2": functools.partial(streamed, ahead=True, prefetch=30),
    "held, 16 warps": functools.partial(held, num_warps=16),
    "held, 32 warps": functools.partial(held, num_warps=32),
    "held, 32 warps, stores .cs": functools.partial(held, num_warps=32, store=".cs"),
}


def _inputs(rows: int, device: str, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of both models, labels of 15 % of the rows and both scales."""
    generator = torch.Generator(device).manual_seed(5)
    z, y = torch.empty(2, rows, V, device=device, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)
    y[::3, 100] = z[::3, 100] = 14.0  # some rows agree
    chosen = torch.rand(rows, device=device, generator=generator) < 0.15
    labels = torch.randint(VOCAB, (rows,), device=device, generator=generator)
    return z, y, torch.where(chosen, labels, -100), torch.tensor([2.0**-12, 2.0**-10], device=device)


def _errors(call: Callable[..., Tensor], rows: int, device: str) -> list[str]:
    """What is wrong with a variant: against fp32 PyTorch, and against today's kernel."""
    wrong = []
    z, y, labels, scales = _inputs(rows, device)
    labels[:2] = torch.tensor([7, VOCAB - 1])
    real = rows - rows // 8
    num_rows = torch.tensor(100 + real, device=device)
    z[1::16] *= 40  # of which the sum of powers is not safe
    y[5::16] = z[5::16]  # which cost nothing
    y[3, 10:20], z[3, 15:25] = float("-inf"), float("-inf")  # the KL is inf
    y[4, 10:20], z[4, 10:20] = float("-inf"), float("-inf")
    y[:, VOCAB:], z[:, VOCAB:] = 99.0, float("nan")  # padding
    reference = distill.distill_rows_torch
    kinds = {"today's": distill.forward} if device == "cuda" else {"PyTorch": reference}
    for against, other in ({"PyTorch": reference} | kinds).items():
        mine, theirs = z.clone(), z.clone() if against != "PyTorch" else torch.empty(z.shape, device=device)
        source = theirs if against != "PyTorch" else z
        expected = other(source, y, labels, num_rows, theirs, 100, TEMPERATURE, scales, VOCAB)
        got = call(mine, y, labels, num_rows, mine, 100, TEMPERATURE, scales, VOCAB)
        alone = call(z, y, labels, num_rows, None, 100, TEMPERATURE, scales, VOCAB)
        if not torch.allclose(got, alone, rtol=1e-6, equal_nan=True):
            wrong.append("values without gradient differ")
        for name, a, b in zip(("kd", "mlm"), got[:2], expected[:2], strict=True):
            infinite = ~(a.isfinite() & b.isfinite())
            if not torch.equal(a[infinite], b[infinite]):
                wrong.append(f"{name} infinite in other rows than {against}'s")
            off = ((a - b).abs()[~infinite].sum() / b[~infinite].sum()).item()
            worst = ((a - b).abs() / b.clamp(min=1e-3))[~infinite].max().item()
            if not (off < 1e-5 and worst < 1e-4):
                wrong.append(f"{name} off {against}'s by {off:.1e}, a row by {worst:.1e}")
        if not torch.equal(got[2], expected[2]):
            wrong.append(f"agreement differs from {against}'s in {(got[2] != expected[2]).sum().item()} rows")
        gradient, theirs = mine.float(), theirs.float()
        rows_off = (gradient - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-30)
        off = ((gradient - theirs).norm() / theirs.norm()).item()
        limit = 3e-3 if INTERPRET else 2e-3  # the interpreter rounds bf16 towards 0
        if not (off < limit and rows_off[~(got[0] == 0)].max().item() < 5e-3):
            wrong.append(f"gradient off {against}'s by {off:.1e}, a row by {rows_off.max().item():.1e}")
        if (got[:, real:] != 0).any() or (mine[real:] != 0).any() or (mine[:, VOCAB:] != 0).any():
            wrong.append("not 0 where there are no tokens or columns")
        if (got[0, 5:real:16] != 0).any():
            wrong.append("equal rows cost something")
    return wrong


def _compiled(only: str) -> Iterator[str]:
    """What the machine code of variants for sm_90 says; nothing is launched."""
    from benchmarks.aot import report
    from benchmarks.no_gpu import pretend

    driver = pretend()
    z, y = torch.empty(2, 4096, V, dtype=torch.bfloat16, device="meta")
    labels, num_rows = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in (4096, ()))
    scales = torch.empty(2, device="meta")
    for name, call in VARIANTS.items():
        if only not in ("", name):
            continue
        figures = []
        for gradient in (z, None):
            call(z, y, labels, num_rows, gradient, 0, TEMPERATURE, scales, VOCAB)
            kernel = driver.kernels[-1]
            r = report(kernel.cubin, kernel.metadata)
            figures.append(
                f"{r.registers:>4} registers {r.num_spills:>3} spills {r.ctas} CTAs {r.mix['all']:>5} instructions"
            )
        yield f"{name:<28}{figures[0]}    without gradient{figures[1]}"


def _compile_at_once() -> None:
    """All variants into Triton's cache, a process each: one after the other they would take a minute."""
    command = [sys.executable, "-m", "benchmarks.row_variants", "--compile", "--only"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for process in [subprocess.Popen([*command, name], **quiet) for name in VARIANTS]:
        process.wait(timeout=120)


def _measured() -> Iterator[str]:
    """Right or wrong, then milliseconds, a line a variant. The gradient is written over the student's logits."""
    from triton.testing import do_bench_cudagraph

    z, y, labels, scales = _inputs(16384, "cuda")
    num_rows = torch.tensor(1 << 20, device="cuda")
    ms: Callable[..., float] = functools.partial(do_bench_cudagraph, rep=20, return_mode="median")
    yield f"{'ms':<28}{'4096':>9}{'no gradient':>13}{'16384':>9}"
    for name, call in VARIANTS.items():
        try:
            wrong = _errors(call, 512, "cuda")
            took = []
            for rows, gradient in ((4096, True), (4096, False), (16384, True)):
                student = z[:rows].clone()
                out = student if gradient else None
                given = (student, y[:rows], labels[:rows], num_rows, out, 0, TEMPERATURE, scales, VOCAB)
                took.append(ms(functools.partial(call, *given)))
            yield f"{name:<28}{took[0]:>9.4f}{took[1]:>13.4f}{took[2]:>9.4f}  {'; '.join(wrong) or 'right'}"
        except Exception as error:
            yield f"{name:<28}{type(error).__name__}: {str(error)[:80]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="without a GPU, for sm_90")
    parser.add_argument("--only", default="", help="compile this variant alone")
    parser.add_argument("--interpret", action="store_true", help="on the CPU, in Triton's interpreter")
    args = parser.parse_args()
    if args.interpret:
        for name, call in {"streamed": streamed, "ahead": VARIANTS["ahead"], "held": held}.items():
            print(name, "; ".join(_errors(call, 24, "cpu")) or "right", flush=True)
        return
    if not args.compile:
        _compile_at_once()
    for line in _compiled(args.only) if args.compile else _measured():
        print(line, flush=True)


if __name__ == "__main__":
    main()
