"""Bidirectional attention inside each sequence of a packed micro-batch: flash attention in Triton, with dropout.

For the rows a..b-1 of one sequence and one head (Vaswani et al. 2017, eq. 1):

    out[a:b] = dropout(softmax(q[a:b] @ k[a:b].T / sqrt(D))) @ v[a:b]

No row sees another sequence, so the trailing pad sequence needs no mask: it attends to itself, and since no loss counts
its rows, nothing flows back from it.

For one sequence of L rows, with c = log2(e) / sqrt(D) and Z[r, j] = keep[r, j] / (1 - p) (Dao 2023, alg. 1 and 2):

    s = q k.T      lse[r] = log2 sum_j 2^(c s[r, j])      P = 2^(c s - lse)      out = (Z P) v

    dv = (Z P).T dout      dP = Z (dout v.T)      ds = P (dP - delta)      delta[r] = sum_d dout[r, d] out[r, d]
    dq = ds k / sqrt(D)    dk = ds.T q / sqrt(D)

The linear layer that made qkv has a bias, whose gradient is the sum of dqkv over all rows. Each backward kernel leaves
its block's sums of dq and of dv, in fp32 and before they are rounded; then one launch adds the blocks. The keys' part
is 0: a bias of the keys adds one number to all scores of a row, which softmax does not see (sum_j ds[r, j] = 0). On the
CPU, and by other backends, all three are sums of dqkv, in which the keys' part is what rounding left of that 0.

delta is the softmax's own term, sum_j P dP: out holds the same sum with v applied. The kernels leave 1 / (1 - p) out of
ds, multiply delta by 1 - p instead, and scale whole rows at the end. Statistics and sums are fp32. P and ds are rounded
to the input's dtype before they meet a tensor core, as in the paper.

With a window of w (Beltagy et al. 2020, sec. 3.1; w = 64 in ModernBERT's local layers, Warner et al. 2024) s[r, j] is
-inf where r and j are more than w apart. The loops begin w before a block of rows and end w behind it, or with the step
that holds that row: nothing else of the sequence is read. Every step has the mask, in the compiled forward of sm_80
three instructions a score, by which 128 x 64 scores and the kernel around them have 2,472 where they had 2,072. Of the
steps at w = 64 one in three would need none with 64 rows of queries and 64 of keys, and none with 128 of queries: not
worth a third copy of the loop's body.

Saved: qkv, out, lse; by the raw functions also the keys of the masks. The masks are those of dropout.py, where a
token's index is its row in the micro-batch, so that they depend neither on tiles nor on the device. They are drawn
again from one key for each head and row and one for each head and column, which a small kernel draws beforehand: 8 H N
bytes.

The backward is two kernels, dq by rows and dk with dv by columns. Each computes s and dP, so there are 7 products of
2 L^2 D FLOP where 5 would do if tiles added to one dq. That is the price of a sum in one order, without atomics: a step
is the same to the last bit each time. FLOP a head and sequence: 4 L^2 D forward, 14 L^2 D backward
(benchmarks count 10). With a window shorter than the sequence L (2 w + 1) - w (w + 1) pairs stand for L^2, of which a
block of R rows computes R + 2 w for each row, in whole blocks.

Bytes: the forward reads qkv and writes out; the backward reads qkv and dout twice and out once, and writes dqkv, and
12 H D of partial sums for every 64 rows or so, which are read again. A sequence's rows are read again by each of its
tiles, from L2: that is why a tile has 128 rows where registers allow.

One program has one tile and one head, and heads run fastest: programs that run together read the same rows of qkv, and
long sequences start first for all heads.

Shapes: N tokens, H heads, D width of a head, T tiles, M and N in BLOCK_M and BLOCK_N rows of queries and of keys.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._backend import INTERPRET, LAUNCH_OPTIONS, TRITON_DEVICES, add_column_sums, check_dtype, tl, triton
from .attention_backends import (
    LOG2_E,
    OTHERS,
    AttentionBackend,
    ResolvedBackend,
    attention_backward_torch,
    attention_forward_torch,
    resolve_backend,
)
from .attention_tiles import MAX_HEAD_DIM, Tile, block_d, tiles_for
from .dropout import check_dropout, keep, keep_reference, row_and_column_keys, threshold
from .layout import TILE_ROWS, SequenceLayout, sequence_layout
from .linear import add_column_sum

INTERPRETED = tl.constexpr(INTERPRET)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def attention_reference(
    qkv_N3HD: Tensor,
    layout: SequenceLayout,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    window: int = 0,
) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs): (N, H, D) in that dtype."""
    qkv = qkv_N3HD.to(torch.promote_types(qkv_N3HD.dtype, torch.float32))
    heads = torch.arange(qkv.shape[2], device=qkv.device)
    outputs = []
    for start, end in pairwise(layout.cu_seqlens.tolist()):
        q_HLD, k_HLD, v_HLD = qkv[start:end].permute(1, 2, 0, 3)
        score_HLL = q_HLD @ k_HLD.mT * q_HLD.shape[-1] ** -0.5
        row = torch.arange(start, end, device=qkv.device)
        if window:
            score_HLL = score_HLL.masked_fill((row[:, None] - row).abs() > window, -math.inf)
        weight_HLL = torch.softmax(score_HLL, dim=-1)
        if seed is not None and dropout_p > 0:
            kept_HLL = keep_reference(seed, stream, dropout_p, heads, row, row)
            weight_HLL = torch.where(kept_HLL, weight_HLL / (1 - dropout_p), 0.0)
        outputs.append((weight_HLL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b + acc in fp32: on tensor cores for bf16 and fp16, in full fp32 for fp32."""
    if INTERPRETED:  # whose dot takes the bits of bf16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _rows(ptr, at, num_left, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows at ptr + at, zero from row num_left and from column D on; no mask where neither can be."""
    R: tl.constexpr = at.shape[0]
    C: tl.constexpr = at.shape[1]
    if MASKED:
        live = (tl.arange(0, R) < num_left)[:, None]
        if D < C:
            live = live & (tl.arange(0, C) < D)[None, :]
        x = tl.load(ptr + at, mask=live, other=0.0)
    elif D < C:
        x = tl.load(ptr + at, mask=(tl.arange(0, C) < D)[None, :], other=0.0)
    else:
        x = tl.load(ptr + at)
    return x


@triton.jit
def _store_rows(ptr, at, x, num_left, D: tl.constexpr):
    live = (tl.arange(0, x.shape[0]) < num_left)[:, None]
    if x.shape[1] > D:
        live = live & (tl.arange(0, x.shape[1]) < D)[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def _numbers(ptr, index, num_left, other, MASKED: tl.constexpr):
    return tl.load(ptr + index, mask=index < num_left, other=other) if MASKED else tl.load(ptr + index)


@triton.jit
def _keys(ptr, index, num_left, MASKED: tl.constexpr):
    return _numbers(ptr, index, num_left, 0, MASKED).to(tl.uint32, bitcast=True)


@triton.jit
def _tile(tile_ptr, H: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Head, sequence start, sequence end and first row of this program; a block may lie past the end."""
    program, block = tl.program_id(0), tl.program_id(0) // H
    tile = tile_ptr + (block // (TILE // BLOCK)) * 3
    first = tl.load(tile + 2) + block % (TILE // BLOCK) * BLOCK
    return program % H, tl.load(tile), tl.load(tile + 1), first


@triton.jit
def _span(first, start, end, ROWS: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr):
    """Start and end of what ROWS rows from `first` on see of their sequence: whole steps, or up to its end."""
    if WINDOW:
        start = tl.maximum(first - WINDOW, start)
        end = tl.minimum(start + tl.cdiv(first + ROWS + WINDOW - start, STEP) * STEP, end)
    return start, end


@triton.jit
def _in_window(s, ahead, WINDOW: tl.constexpr):
    """Scores, -inf where row and column are more than WINDOW apart; the first column is `ahead` of the first row."""
    # As one number without a sign: two instructions a score and a choice, where |distance| <= WINDOW compiles to more.
    since = ahead + WINDOW - tl.arange(0, s.shape[0])
    distance = (since[:, None] + tl.arange(0, s.shape[1])[None, :]).to(tl.uint32, bitcast=True)
    return tl.where(distance <= 2 * WINDOW, s, -float("inf"))


@triton.jit
def _store_partial(partial_ptr, sums, part, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """This program's row of partial sums for queries, keys or values (part 0, 1, 2), and zeros in ROWS - 1 below."""
    row = (tl.program_id(0) // H).to(tl.int64) * ROWS
    column = tl.arange(0, sums.shape[0])
    at = partial_ptr + (row * 3 + part) * (H * D) + tl.program_id(0) % H * D + column
    tl.store(at, sums, mask=column < D)
    for below in tl.static_range(1, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(at + below * (3 * H * D), tl.zeros_like(sums), mask=column < D)


@triton.jit
def _forward_step(
    acc, total, top, q, k_ptr, v_ptr, at, row_key, key_ptr, num_left, ahead, scale2, threshold,
    D: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, at.shape[0])
    k = _rows(k_ptr, at, num_left, D, MASKED)
    s = _dot(q, tl.trans(k))
    if MASKED:
        s = tl.where((column < num_left)[None, :], s, -float("inf"))
    if WINDOW:
        s = _in_window(s, ahead, WINDOW)
    new_top = tl.maximum(top, tl.max(s, 1) * scale2)
    p = tl.exp2(s * scale2 - new_top[:, None])
    alpha = tl.exp2(top - new_top)
    total = total * alpha + tl.sum(p, 1)
    if DROPOUT:
        column_key = _keys(key_ptr, column, num_left, MASKED)
        # A zero that the compiler does not know. It would move a constant one behind the rounding of p, and unpack and
        # pack pairs of bf16 for it: two instructions a score.
        p = tl.where(keep(row_key[:, None], column_key[None, :], threshold), p, scale2 * 0.0)
    v = _rows(v_ptr, at, num_left, D, MASKED)
    acc = _dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, total, new_top


@triton.jit(do_not_specialize=["N", "threshold"])
def _forward_kernel(
    qkv_ptr, tile_ptr, key_ptr,  # (N, 3, H, D) contiguous, (T, 3) int32, (2, H, N) int32 or None
    out_ptr, lse_ptr,            # (N, H, D), (H, N) fp32
    N, scale2, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, start, end, first = _tile(tile_ptr, H, TILE, BLOCK_M)
    if first >= end:
        return
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    DROPOUT: tl.constexpr = key_ptr is not None  # pyright: ignore[reportAssignmentType]
    STRIDE: tl.constexpr = 3 * H * D
    # Scalars carry what may pass 2^31, blocks hold int32: half the registers.
    q_ptr = qkv_ptr + first.to(tl.int64) * STRIDE + head * D
    low, high = _span(first, start, end, BLOCK_M, BLOCK_N, WINDOW)
    k_ptr = qkv_ptr + low.to(tl.int64) * STRIDE + (H + head) * D
    v_ptr = k_ptr + H * D
    number = head.to(tl.int64) * N
    q = _rows(q_ptr, row[:, None] * STRIDE + column[None, :], end - first, D, True)
    row_key, column_key_ptr = row, key_ptr
    if DROPOUT:
        row_key = _keys(key_ptr + number + first, row, end - first, True)
        column_key_ptr = key_ptr + H * N.to(tl.int64) + number + low
    at = tl.arange(0, BLOCK_N)[:, None] * STRIDE + column[None, :]
    length = high - low
    full = length // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # With a window a row may see nothing of a block: -inf less -inf would be NaN.
    top = tl.full((BLOCK_M,), LOWEST if WINDOW else -float("inf"), tl.float32)
    for done in range(0, full, BLOCK_N):
        acc, total, top = _forward_step(
            acc, total, top, q, k_ptr, v_ptr, at, row_key, column_key_ptr, 0, low - first + done,
            scale2, threshold, D, DROPOUT, False, WINDOW,
        )  # fmt: skip
        k_ptr, v_ptr = k_ptr + BLOCK_N * STRIDE, v_ptr + BLOCK_N * STRIDE
        if DROPOUT:
            column_key_ptr += BLOCK_N
    if full < length:
        acc, total, top = _forward_step(
            acc, total, top, q, k_ptr, v_ptr, at, row_key, column_key_ptr, length - full, low - first + full,
            scale2, threshold, D, DROPOUT, True, WINDOW,
        )  # fmt: skip
    tl.store(lse_ptr + number + first + row, top + tl.log2(total), mask=row < end - first)
    out_ptr += first.to(tl.int64) * (H * D) + head * D
    acc *= (keep_scale / total)[:, None]
    _store_rows(out_ptr, row[:, None] * (H * D) + column[None, :], acc, end - first, D)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, at, row_key, key_ptr, num_left, ahead, scale2, threshold,
    D: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, at.shape[0])
    k = _rows(k_ptr, at, num_left, D, MASKED)
    s = _dot(q, tl.trans(k))
    if MASKED:
        s = tl.where((column < num_left)[None, :], s, -float("inf"))
    if WINDOW:
        s = _in_window(s, ahead, WINDOW)
    p = tl.exp2(s * scale2 - lse[:, None])
    v = _rows(v_ptr, at, num_left, D, MASKED)
    dp = _dot(dout, tl.trans(v))
    if DROPOUT:
        column_key = _keys(key_ptr, column, num_left, MASKED)
        dp = tl.where(keep(row_key[:, None], column_key[None, :], threshold), dp, 0.0)
    ds = p * (dp - delta[:, None])
    return _dot(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["N", "threshold"])
def _dq_kernel(
    qkv_ptr, tile_ptr, key_ptr, out_ptr, dout_ptr, lse_ptr,
    dqkv_ptr, delta_ptr,  # the queries' part; (H, N) fp32, times 1 - p: read by _dkdv_kernel
    partial_ptr,  # (programs a head * ROWS, 3, H, D) fp32 or None: the queries' part
    N, scale2, threshold, keep_p, dq_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, start, end, first = _tile(tile_ptr, H, TILE, BLOCK_M)
    STRIDE: tl.constexpr = 3 * H * D
    SUMS: tl.constexpr = partial_ptr is not None  # pyright: ignore[reportAssignmentType]
    if first >= end:
        if SUMS:
            _store_partial(partial_ptr, tl.zeros((BLOCK_D,), tl.float32), 0, H, D, ROWS)
        return
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    DROPOUT: tl.constexpr = key_ptr is not None  # pyright: ignore[reportAssignmentType]
    q_ptr = qkv_ptr + first.to(tl.int64) * STRIDE + head * D
    low, high = _span(first, start, end, BLOCK_M, BLOCK_N, WINDOW)
    k_ptr = qkv_ptr + low.to(tl.int64) * STRIDE + (H + head) * D
    v_ptr = k_ptr + H * D
    number = head.to(tl.int64) * N
    at_q = row[:, None] * STRIDE + column[None, :]
    at_out = row[:, None] * (H * D) + column[None, :]
    out_offset = first.to(tl.int64) * (H * D) + head * D
    left = end - first
    out = _rows(out_ptr + out_offset, at_out, left, D, True).to(tl.float32)
    dout = _rows(dout_ptr + out_offset, at_out, left, D, True)
    delta = tl.sum(out * dout.to(tl.float32), 1) * keep_p
    tl.store(delta_ptr + number + first + row, delta, mask=row < left)
    q = _rows(q_ptr, at_q, left, D, True)
    lse = _numbers(lse_ptr + number + first, row, left, 0.0, True)
    row_key, column_key_ptr = row, key_ptr
    if DROPOUT:
        row_key = _keys(key_ptr + number + first, row, left, True)
        column_key_ptr = key_ptr + H * N.to(tl.int64) + number + low
    at = tl.arange(0, BLOCK_N)[:, None] * STRIDE + column[None, :]
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    length = high - low
    full = length // BLOCK_N * BLOCK_N
    for done in range(0, full, BLOCK_N):
        dq = _dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, at, row_key, column_key_ptr, 0, low - first + done,
            scale2, threshold, D, DROPOUT, False, WINDOW,
        )  # fmt: skip
        k_ptr, v_ptr = k_ptr + BLOCK_N * STRIDE, v_ptr + BLOCK_N * STRIDE
        if DROPOUT:
            column_key_ptr += BLOCK_N
    if full < length:
        dq = _dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, at, row_key, column_key_ptr, length - full, low - first + full,
            scale2, threshold, D, DROPOUT, True, WINDOW,
        )  # fmt: skip
    dq_ptr = dqkv_ptr + first.to(tl.int64) * STRIDE + head * D
    dq *= dq_scale
    if SUMS:  # before dq is stored: the other order spills. Rows past the end are 0: their dout is.
        _store_partial(partial_ptr, tl.sum(dq, 0), 0, H, D, ROWS)
    _store_rows(dq_ptr, at_q, dq, left, D)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_ptr, dout_ptr, at_q, at_out, lse_ptr, delta_ptr, column_key, key_ptr,
    num_left, ahead, scale2, threshold,
    D: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, at_q.shape[0])
    q = _rows(q_ptr, at_q, num_left, D, MASKED)
    # Rows past the end have an infinite lse, hence probability 0: the scores need no mask.
    lse = _numbers(lse_ptr, row, num_left, float("inf"), MASKED)
    s = _dot(k, tl.trans(q))
    if WINDOW:
        s = _in_window(s, ahead, WINDOW)
    p = tl.exp2(s * scale2 - lse[None, :])
    dout = _rows(dout_ptr, at_out, num_left, D, MASKED)
    dp = _dot(v, tl.trans(dout))
    kept_p = p
    if DROPOUT:
        row_key = _keys(key_ptr, row, num_left, MASKED)
        kept = keep(row_key[None, :], column_key[:, None], threshold)
        kept_p = tl.where(kept, p, 0.0)
    dv = _dot(kept_p.to(dout.dtype), dout, dv)
    delta = _numbers(delta_ptr, row, num_left, 0.0, MASKED)
    ds = kept_p * dp - p * delta[None, :]
    dk = _dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["N", "threshold"])
def _dkdv_kernel(
    qkv_ptr, tile_ptr, key_ptr, dout_ptr, lse_ptr, delta_ptr,
    dqkv_ptr, partial_ptr,  # as in _dq_kernel, the keys' and the values' part
    N, scale2, threshold, dk_scale, dv_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, start, end, first = _tile(tile_ptr, H, TILE, BLOCK_N)
    STRIDE: tl.constexpr = 3 * H * D
    SUMS: tl.constexpr = partial_ptr is not None  # pyright: ignore[reportAssignmentType]
    if first >= end:
        if SUMS:
            none = tl.zeros((BLOCK_D,), tl.float32)
            _store_partial(partial_ptr, none, 1, H, D, ROWS)
            _store_partial(partial_ptr, none, 2, H, D, ROWS)
        return
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    DROPOUT: tl.constexpr = key_ptr is not None  # pyright: ignore[reportAssignmentType]
    offset = first.to(tl.int64) * STRIDE + (H + head) * D
    at = row[:, None] * STRIDE + column[None, :]
    left = end - first
    k = _rows(qkv_ptr + offset, at, left, D, True)
    v = _rows(qkv_ptr + offset + H * D, at, left, D, True)
    number = head.to(tl.int64) * N
    low, high = _span(first, start, end, BLOCK_N, BLOCK_M, WINDOW)
    column_key, row_key_ptr = row, key_ptr
    if DROPOUT:
        column_key_ptr = key_ptr + H * N.to(tl.int64) + number + first
        column_key = _keys(column_key_ptr, row, left, True)
        row_key_ptr = key_ptr + number + low
    q_ptr = qkv_ptr + low.to(tl.int64) * STRIDE + head * D
    dout_ptr += low.to(tl.int64) * (H * D) + head * D
    lse_ptr, delta_ptr = lse_ptr + number + low, delta_ptr + number + low
    at_q = tl.arange(0, BLOCK_M)[:, None] * STRIDE + column[None, :]
    at_out = tl.arange(0, BLOCK_M)[:, None] * (H * D) + column[None, :]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    length = high - low
    full = length // BLOCK_M * BLOCK_M
    for done in range(0, full, BLOCK_M):
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_ptr, dout_ptr, at_q, at_out, lse_ptr, delta_ptr, column_key,
            row_key_ptr, 0, low - first + done, scale2, threshold, D, DROPOUT, False, WINDOW,
        )  # fmt: skip
        q_ptr, dout_ptr = q_ptr + BLOCK_M * STRIDE, dout_ptr + BLOCK_M * H * D
        lse_ptr, delta_ptr = lse_ptr + BLOCK_M, delta_ptr + BLOCK_M
        if DROPOUT:
            row_key_ptr += BLOCK_M
    if full < length:
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_ptr, dout_ptr, at_q, at_out, lse_ptr, delta_ptr, column_key,
            row_key_ptr, length - full, low - first + full, scale2, threshold, D, DROPOUT, True, WINDOW,
        )  # fmt: skip
    # In this order: the others tried spill on one GPU or another.
    dv *= dv_scale
    _store_rows(dqkv_ptr + offset + H * D, at, dv, left, D)
    if SUMS:
        _store_partial(partial_ptr, tl.zeros((BLOCK_D,), tl.float32), 1, H, D, ROWS)
        # Rows past the end hold what 2^(0 - lse) makes of them. Compared anew: as _rows does, one mask
        # for both would live in registers from the top of the kernel to its end, and spill.
        dv = tl.where((first + row < end)[:, None], dv, 0.0)
        _store_partial(partial_ptr, tl.sum(dv, 0), 2, H, D, ROWS)
    _store_rows(dqkv_ptr + offset, at, dk * dk_scale, left, D)


def _launch(kernel: Any, tile: Tile, block_rows: int, tiles: Tensor, qkv: Tensor, *arguments: Any, **constants: int):
    H, D = qkv.shape[2:]
    kernel[(tiles.shape[0] * (TILE_ROWS // block_rows) * H,)](
        qkv, tiles, *arguments, H=H, D=D, BLOCK_D=block_d(D), TILE=TILE_ROWS, **constants,
        **tile._asdict(), **LAUNCH_OPTIONS,
    )  # fmt: skip


def _launch_forward(
    qkv: Tensor, tiles: Tensor, seed: Tensor | None, stream: int, dropout_p: float, window: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and the keys of the mask."""
    N, _, H, D = qkv.shape
    out, lse = qkv.new_empty((N, H, D)), qkv.new_empty((H, N), dtype=torch.float32)
    keys = None if seed is None else row_and_column_keys(seed, stream, H, N)
    without, with_dropout, *_ = tiles_for(qkv, window)
    tile = without if seed is None else with_dropout
    scale2, keep_scale = D**-0.5 * LOG2_E, 1 / (1 - dropout_p)
    _launch(
        _forward_kernel, tile, tile.BLOCK_M, tiles, qkv,
        keys, out, lse, N, scale2, threshold(dropout_p), keep_scale, WINDOW=window,
    )  # fmt: skip
    return out, lse, keys


def _launch_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, keys: Tensor | None, tiles: Tensor, dropout_p: float,
    window: int = 0, *, sums: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dqkv; with `sums` (P, 1, 3 H D) fp32 partial sums of its columns."""
    N, _, H, D = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    scale, keep_p, limit = D**-0.5, 1 - dropout_p, threshold(dropout_p)
    _, _, dq, dkdv = tiles_for(qkv, window)
    least = min(dq.BLOCK_M, dkdv.BLOCK_N)
    num_partial = tiles.shape[0] * (TILE_ROWS // least)
    partial = lse.new_empty((num_partial, 1, 3 * H * D)) if sums else None
    _launch(
        _dq_kernel, dq, dq.BLOCK_M, tiles, qkv,
        keys, out, dout, lse, dqkv, delta, partial, N, scale * LOG2_E, limit, keep_p, scale / keep_p,
        ROWS=dq.BLOCK_M // least, WINDOW=window,
    )  # fmt: skip
    _launch(
        _dkdv_kernel, dkdv, dkdv.BLOCK_N, tiles, qkv,
        keys, dout, lse, delta, dqkv, partial, N, scale * LOG2_E, limit, scale / keep_p, 1 / keep_p,
        ROWS=dkdv.BLOCK_N // least, WINDOW=window,
    )  # fmt: skip
    return dqkv, partial


def forward(
    qkv_N3HD: Tensor,
    layout: SequenceLayout,
    seed: Tensor | None,
    stream: int,
    dropout_p: float,
    backend: ResolvedBackend,
    keep: bool = True,
    *,
    window: int = 0,
) -> tuple[Tensor, tuple[Any, ...]]:
    """`attention` without checks and without autograd: (N, H, D), and what `backward` needs.

    Args:
        qkv_N3HD: contiguous.
        seed, dropout_p: nothing is dropped without a seed, nor at 0.
        backend: what `resolve_backend` returns.
        keep: whether a backward follows. Without one nothing is kept, and `saved` is no use.
        window: as in `attention`.
    """
    if seed is None or dropout_p == 0:
        seed, dropout_p = None, 0.0
    if backend != "fused":
        # The graph of this one call, which PyTorch or the package knows how to go back.
        with torch.set_grad_enabled(keep):
            leaf = qkv_N3HD.detach().requires_grad_(keep)
            out = OTHERS[backend](leaf, layout, dropout_p, window)
        return out.detach(), (leaf, out) if keep else ()
    if qkv_N3HD.device.type not in TRITON_DEVICES:
        out, lse = attention_forward_torch(qkv_N3HD, layout.tiles, seed, stream, dropout_p, window)
        return out, (lse, None)
    out, lse, keys = _launch_forward(qkv_N3HD, layout.tiles, seed, stream, dropout_p, window)
    return out, (lse, keys)


def backward(
    dout_NHD: Tensor,
    qkv_N3HD: Tensor,
    out_NHD: Tensor,
    saved: tuple[Any, ...],
    layout: SequenceLayout,
    seed: Tensor | None,
    stream: int,
    dropout_p: float,
    backend: ResolvedBackend,
    *,
    dbias: Tensor | None,
    accumulate: bool,
    window: int = 0,
) -> Tensor:
    """dqkv (N, 3, H, D), of what `forward` got and returned. Once for each forward.

    Args:
        dout_NHD: contiguous.
        dbias: (3 H D,) fp32 or the dtype of qkv. Gets the gradient of the bias of the linear layer that made qkv.
        accumulate: whether it is added to what dbias holds.
    """
    if seed is None or dropout_p == 0:
        seed, dropout_p = None, 0.0
    if backend == "fused" and qkv_N3HD.device.type in TRITON_DEVICES:
        lse, keys = saved
        dqkv, partial = _launch_backward(
            dout_NHD, qkv_N3HD, out_NHD, lse, keys, layout.tiles, dropout_p, window, sums=dbias is not None
        )
        if partial is not None:
            add_column_sums(partial, [dbias], accumulate)
        return dqkv
    if backend != "fused":
        (dqkv,) = torch.autograd.grad(saved[1], saved[0], dout_NHD)
    else:
        dqkv = attention_backward_torch(
            dout_NHD, qkv_N3HD, out_NHD, saved[0], layout.tiles, seed, stream, dropout_p, window
        )
    if dbias is not None:
        add_column_sum(dbias, dqkv.flatten(1), accumulate)
    return dqkv


@torch.library.custom_op("fastdistil::attention_forward", mutates_args=(), device_types=TRITON_DEVICES)
def attention_forward(
    qkv: Tensor, tiles: Tensor, seed: Tensor | None, stream: int, dropout_p: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    """(N, H, D) attention and (H, N) fp32 log-sum-exp of the scores, to base 2. qkv (N, 3, H, D) contiguous."""
    out, lse, _ = _launch_forward(qkv, tiles, seed, stream, dropout_p, window)
    return out, lse


@attention_forward.register_fake
def _(qkv, tiles, seed, stream, dropout_p, window=0):
    N, _, H, D = qkv.shape
    return qkv.new_empty((N, H, D)), qkv.new_empty((H, N), dtype=torch.float32)


@torch.library.custom_op("fastdistil::attention_backward", mutates_args=(), device_types=TRITON_DEVICES)
def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    seed: Tensor | None, stream: int, dropout_p: float, window: int = 0,
) -> Tensor:  # fmt: skip
    """dqkv (N, 3, H, D). All contiguous."""
    N, _, H, _ = qkv.shape
    keys = None if seed is None else row_and_column_keys(seed, stream, H, N)
    return _launch_backward(dout, qkv, out, lse, keys, tiles, dropout_p, window)[0]


@attention_backward.register_fake
def _(dout, qkv, out, lse, tiles, seed, stream, dropout_p, window=0):
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output):
    qkv, tiles, seed, ctx.stream, ctx.dropout_p, ctx.window = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, tiles, seed)


def _backward(ctx, dout, _dlse):
    if dout is None:
        return (None,) * 6
    qkv, out, lse, tiles, seed = ctx.saved_tensors
    dqkv = attention_backward(dout.contiguous(), qkv, out, lse, tiles, seed, ctx.stream, ctx.dropout_p, ctx.window)
    return dqkv, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)

if not INTERPRET:
    attention_forward.register_kernel("cpu")(attention_forward_torch)
    attention_backward.register_kernel("cpu")(attention_backward_torch)


def check_heads(backend: ResolvedBackend, head_dim: int, device: torch.device) -> None:
    """Raises ValueError where a backend does not take heads of this width on this device."""
    if backend in ("torch-flash", "cudnn") and head_dim % 8:
        raise ValueError(
            f"attention backend {backend} wants heads of a multiple of 8, got {head_dim}: use backend fused"
        )
    if backend == "fused" and device.type in TRITON_DEVICES and head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"attention backend fused wants heads of at most {MAX_HEAD_DIM}, got {head_dim}: use backend sdpa"
        )


def attention(
    qkv_N3HD: Tensor,
    layout: SequenceLayout | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: AttentionBackend = "auto",
    window: int = 0,
) -> Tensor:
    """Attention of every token to tokens of its own sequence, scaled by 1 / sqrt(D).

    Args:
        qkv_N3HD: queries, keys and values of all heads, (N, 3, H, D) or (B, L, 3, H, D). fp32, bf16 or fp16. Gets a
            gradient.
        layout: of the N or B * L tokens: `sequence_layout` of lengths, or `padded_layout` of an attention mask. None:
            every one of B texts is L tokens long.
        dropout_p: probability in [0, 1) that an attention weight is dropped.
        seed: of `new_dropout_seed`, on the same device; without one nothing is dropped, whatever dropout_p. With one,
            backends other than fused draw from torch's default generator of the device instead.
        stream: this place of dropout in the model, 0 or more; other numbers draw other masks.
        backend: see `resolve_backend`.
        window: a token sees itself and those at most so many places before or behind it; 0: all of its sequence.

    Returns:
        (N, H, D) or (B, L, H, D) in the dtype of the input.

    Raises:
        ValueError: where shapes, dropout, the window or the backend do not fit.
    """
    if qkv_N3HD.ndim not in (4, 5) or qkv_N3HD.shape[-3] != 3:
        raise ValueError(
            "attention wants queries, keys and values as one (N, 3, heads, head width) tensor, or (B, L, 3, heads, "
            f"head width), got {tuple(qkv_N3HD.shape)}"
        )
    if qkv_N3HD.ndim == 5:
        B, L, *_ = qkv_N3HD.shape
        layout = sequence_layout([L] * B, qkv_N3HD.device) if layout is None else layout
        options: Any = {"dropout_p": dropout_p, "seed": seed, "stream": stream, "backend": backend, "window": window}
        return attention(qkv_N3HD.flatten(0, 1), layout, **options).unflatten(0, (B, L))
    if layout is None:
        raise ValueError(
            "attention of (N, 3, heads, head width) wants the layout of its tokens: sequence_layout([...])"
        )
    if qkv_N3HD.shape[0] != layout.num_tokens:
        raise ValueError(
            f"attention: the layout holds {layout.num_tokens} tokens, the tensor {qkv_N3HD.shape[0]}: "
            "count the trailing pad sequence in the layout's lengths"
        )
    if not isinstance(window, int) or not 0 <= window < 2**30:  # twice as much, and a row's place, are int32
        raise ValueError(f"attention wants window as a whole number from 0, which is none, to 2^30, got {window!r}")
    check_dropout("attention", qkv_N3HD, seed, stream, dropout_p)
    if seed is None or dropout_p == 0:
        seed, dropout_p = None, 0.0
    dtype, device = qkv_N3HD.dtype, qkv_N3HD.device
    training = torch.is_grad_enabled() and qkv_N3HD.requires_grad
    chosen = resolve_backend(backend, device, dropout_p=dropout_p, training=training, dtype=dtype, window=window)
    check_heads(chosen, qkv_N3HD.shape[3], device)
    if chosen != "fused":
        return OTHERS[chosen](qkv_N3HD, layout, dropout_p, window)
    check_dtype("attention", qkv_N3HD, ": convert it, or use backend sdpa")
    return attention_forward(qkv_N3HD.contiguous(), layout.tiles, seed, stream, dropout_p, window)[0]
