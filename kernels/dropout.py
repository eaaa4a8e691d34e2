"""Dropout whose mask is a function of (seed, stream, head, row, column), not of launch or device.

    keep[h, r, c] = row_key[h, r] * column_key[h, c] mod 2^32 >= p * 2^32        out = keep ? x / (1 - p) : 0
    row_key[h, r] = Philox4x32-10(counter (r, h, stream, 0), key seed)[0] | 1;  column_key: (c, h, stream, 1)

Philox: Salmon et al. 2011. So a backward draws its mask again instead of reading it, in any order of tiles, also
transposed, where a generator that gives one thread four neighbours would have to move them. It costs a multiplication
and a comparison an element, against about 60 instructions with a Philox call for each.

Keys are odd, and an odd number times all odd numbers is all of them again. So whatever the key of a row, each of its
elements is kept with probability 1 - p, to 2^-31, and they are independent; so are any elements among which no path
from row to column to row comes back to its start. Two rows and two columns are the least that are not. Over all keys
the squared correlation of two rows has a mean of 6.0 / 2^31 at p = 0.5, 1.9 / 2^31 at 0.1, 2.5 / 2^31 at 0.01: the sum
of |f|^4 over the Fourier transform f of a row on the group of odd numbers, computed for keys of up to 26 bits, where it
is in proportion to 1 / their number.

It is made of rare pairs. Rows whose keys a and b have m a = n b or -n b mod 2^31, m and n odd and without a common
factor, correlate by 1 / (m n) or -1 / (m n) at p = 0.5, in any number of columns: sum 4 / (m n)^2 = 6. Of 1,000 sets of
4,096 keys 137 held such a pair with m n at most 9; independent bits hold none. At p = 0.1 three keys of 2^31 correlate
by 0.26 or more with a given one, and some 47 by 0.1 or more (counted at 11 to 14 bits).

`row ^ column` and `row + column` show as correlated rows in a mask of 512 x 512 (tests/kernels/test_dropout.py).

A stream is one place of dropout in the model. Layers and places differ in the stream, steps and ranks in the seed.

Shapes: H heads, R rows, C columns, B blocks that follow one another in the index of rows and of columns.
"""

import torch
from torch import Tensor

from ._backend import CPU_BACKEND, INTERPRET, LAUNCH_OPTIONS, TRITON_DEVICES, check_dtype, tl, triton

INTERPRETED = tl.constexpr(INTERPRET)
ROW_SIDE, COLUMN_SIDE = tl.constexpr(0), tl.constexpr(1)


def new_dropout_seed(device: torch.device | str) -> Tensor:
    """0-dim int64 on the device, from torch's default generator there: one for each micro-batch. No sync."""
    return torch.randint(2**63 - 1, (), device=device)


def threshold(dropout_p: float) -> int:
    """An element is kept if its product of keys is not below this number, which is itself at most 2^32 - 1."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def keys_reference(seed: Tensor, stream: int, side: int, heads: Tensor, index: Tensor) -> Tensor:
    """The definition of the keys: (H, R) int64, an odd 32-bit number for each head and row (side 0) or column (1)."""
    low = 0xFFFFFFFF
    c0, c1 = torch.broadcast_tensors(index.to(torch.int64)[None, :], heads.to(torch.int64)[:, None])
    c2, c3 = torch.full_like(c0, stream), torch.full_like(c0, side)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap modulo 2^64, which keeps both halves right
        c0, c1 = ((b >> 32) & low) ^ c1 ^ k0, b & low
        c2, c3 = ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0 | 1


def keep_reference(seed: Tensor, stream: int, dropout_p: float, heads: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The definition of the mask: (H, R, C) bool, True where an element is kept, for these indices."""
    row_HR = keys_reference(seed, stream, 0, heads, rows)
    column_HC = keys_reference(seed, stream, 1, heads, columns)
    product = row_HR[:, :, None] * column_HC[:, None, :]  # wraps modulo 2^64, which keeps the low half right
    return (product & 0xFFFFFFFF) >= threshold(dropout_p)


def dropout_reference(x_ND: Tensor, seed: Tensor | None, stream: int, dropout_p: float) -> Tensor:
    """The definition, in the dtype of x."""
    if seed is None or dropout_p == 0:
        return x_ND
    rows, columns = (torch.arange(n, device=x_ND.device) for n in x_ND.shape)
    kept = keep_reference(seed, stream, dropout_p, torch.zeros_like(rows[:1]), rows, columns)
    return torch.where(kept[0], x_ND / (1 - dropout_p), 0.0)


@triton.jit
def keys(seed, stream, side: tl.constexpr, head, index):
    """uint32 keys of a block of row or column indices; `seed` is the value, not the pointer."""
    c0 = index.to(tl.uint32)
    zero = c0 * 0
    # tl.philox's own default of ten rounds
    key, _, _, _ = tl.philox(seed, c0, zero + head, zero + stream, zero + side)
    return key | 1


@triton.jit
def keep(row_key, column_key, threshold):
    """Mask of broadcastable keys: the callers shape them, [:, None] and [None, :] or transposed."""
    if INTERPRETED:  # which knows no assembly
        product = row_key * column_key
    else:
        # LLVM would vectorise what it knows to be a product, compare all elements of a thread at once, and leave more
        # masks than there are predicate registers: packed into bits, two or three instructions a score in attention.
        product = tl.inline_asm_elementwise(
            "mul.lo.u32 $0, $1, $2;", "=r,r,r", [row_key, column_key], tl.uint32, is_pure=True, pack=1
        )
    return product >= tl.cast(threshold, tl.uint32)


# A constant of its own code for every stream, head and place in the model would be compiled for each of them.
@triton.jit(do_not_specialize=["N", "stream"])
def _keys_kernel(seed_ptr, out_ptr, N, stream, H: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    seed = tl.load(seed_ptr)
    at = out_ptr + head.to(tl.int64) * N + index
    tl.store(at, keys(seed, stream, ROW_SIDE, head, index).to(tl.int32, bitcast=True), mask=index < N)
    at += H * tl.cast(N, tl.int64)
    tl.store(at, keys(seed, stream, COLUMN_SIDE, head, index).to(tl.int32, bitcast=True), mask=index < N)


def row_and_column_keys(seed: Tensor, stream: int, num_heads: int, num_tokens: int) -> Tensor:
    """(2, H, N) int32 keys, of rows and then of columns, for attention: each of its tiles would draw them anew."""
    out = seed.new_empty((2, num_heads, num_tokens), dtype=torch.int32)
    _keys_kernel[(triton.cdiv(num_tokens, 256), num_heads)](
        seed, out, num_tokens, stream, H=num_heads, BLOCK=256, **LAUNCH_OPTIONS
    )
    return out


@triton.jit(do_not_specialize=["H", "R", "first", "stream", "threshold"])  # C says how wide loads can be
def _dropout_kernel(
    x_ptr, out_ptr, seed_ptr,  # (B, H, R, C) contiguous; out_ptr may be x_ptr
    H, R, C, first, stream,
    threshold: tl.uint32,  # pyright: ignore[reportInvalidTypeForm] # Triton would type it by its size
    scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)  # of B * H matrices
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    b, head = block // H, block % H
    seed = tl.load(seed_ptr)
    column_key = keys(seed, stream, COLUMN_SIDE, head, first + b * C + column)
    first_row = tl.program_id(0) * ROWS_PER_PROGRAM
    for begin in range(first_row, tl.minimum(first_row + ROWS_PER_PROGRAM, R), ROWS):
        row = begin + tl.arange(0, ROWS)
        row_key = keys(seed, stream, ROW_SIDE, head, first + b * R + row)
        at = (block.to(tl.int64) * R + row[:, None]) * C + column[None, :]
        live = (row < R)[:, None] & (column < C)[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        kept = keep(row_key[:, None], column_key[None, :], threshold)
        tl.store(out_ptr + at, tl.where(kept, x * scale, 0.0).to(out_ptr.dtype.element_ty), mask=live)


def tile(num_columns: int) -> dict[str, int]:
    """Settings of the plain dropout kernel: 16 elements a thread at a time, 64 rows for which column keys are drawn."""
    columns = min(256, max(32, triton.next_power_of_2(num_columns)))
    return {"ROWS": 2048 // columns, "COLUMNS": columns, "ROWS_PER_PROGRAM": 64}


@torch.library.custom_op("fastdistil::dropout_into", mutates_args=("out",), device_types=TRITON_DEVICES)
def dropout_into(x: Tensor, out: Tensor, seed: Tensor, stream: int, first: int, dropout_p: float) -> None:
    """out = x with elements dropped: both (B, H, R, C), contiguous, and maybe the same.

    Their first row and first column have index `first`.
    """
    B, H, R, C = x.shape
    if x.numel() > 0:
        settings = tile(C)
        grid = (triton.cdiv(R, settings["ROWS_PER_PROGRAM"]), B * H, triton.cdiv(C, settings["COLUMNS"]))
        _dropout_kernel[grid](
            x, out, seed, H, R, C, first, stream, threshold(dropout_p), 1 / (1 - dropout_p),
            **settings, **LAUNCH_OPTIONS,
        )  # fmt: skip


def dropout_into_torch(x: Tensor, out: Tensor, seed: Tensor, stream: int, first: int, dropout_p: float) -> None:
    """`dropout_into` in plain PyTorch, which serves CPU tensors where csrc/ is not built."""
    B, H, R, C = x.shape
    heads = torch.arange(H, device=x.device)
    for b in range(B):
        rows = first + b * R + torch.arange(R, device=x.device)
        columns = first + b * C + torch.arange(C, device=x.device)
        kept = keep_reference(seed, stream, dropout_p, heads, rows, columns)
        torch.mul(x[b], 1 / (1 - dropout_p), out=out[b]).masked_fill_(~kept, 0)


if CPU_BACKEND == "torch":
    dropout_into.register_kernel("cpu")(dropout_into_torch)


@torch.library.custom_op("fastdistil::dropout", mutates_args=())
def _dropout(x: Tensor, seed: Tensor, stream: int, dropout_p: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dropout_into(x.contiguous()[None, None], out[None, None], seed, stream, 0, dropout_p)
    return out


@_dropout.register_fake
def _(x, seed, stream, dropout_p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, seed, ctx.stream, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(seed)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None, None
    (seed,) = ctx.saved_tensors
    return _dropout(grad, seed, ctx.stream, ctx.dropout_p), None, None, None


_dropout.register_autograd(_backward, setup_context=_setup_context)


def dropout(x_ND: Tensor, seed: Tensor | None, *, stream: int, dropout_p: float) -> Tensor:
    """x with elements dropped at rate dropout_p and the others scaled by 1 / (1 - dropout_p), in its own dtype.

    Args:
        x_ND: (N, D) or (B, L, D), fp32, bf16 or fp16. Gets a gradient, through the same mask.
        seed: of `new_dropout_seed`, on the same device. Without one, or at dropout_p = 0, x itself comes back.
        stream: this place of dropout in the model, 0 or more; other numbers draw other masks.
        dropout_p: probability in [0, 1).

    Raises:
        ValueError: on a shape, a seed or a probability that does not fit.
    """
    if x_ND.ndim < 2:
        raise ValueError(f"dropout wants an (N, D) or (B, L, D) tensor, got {tuple(x_ND.shape)}")
    check_dtype("dropout", x_ND)
    check_dropout("dropout", x_ND, seed, stream, dropout_p)
    if seed is None or dropout_p == 0:
        return x_ND
    if x_ND.ndim > 2:
        return _dropout(x_ND.flatten(0, -2), seed, stream, dropout_p).view(x_ND.shape)
    return _dropout(x_ND, seed, stream, dropout_p)


def check_dropout(operator: str, x: Tensor, seed: Tensor | None, stream: int, dropout_p: float) -> None:
    """Raises ValueError if the arguments of an operator with dropout do not fit."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{operator}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"{operator}: stream must be in [0, 2^31), got {stream}")
    if seed is not None and (seed.ndim or seed.dtype != torch.int64 or seed.device != x.device):
        raise ValueError(
            f"{operator} wants seed as a 0-dim int64 tensor on {x.device}, got {seed.dtype} of shape "
            f"{tuple(seed.shape)} on {seed.device}: use new_dropout_seed(device)"
        )
