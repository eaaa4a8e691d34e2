"""Linear layer whose products on the CPU are oneDNN's; its products and sums as raw functions, on every device.

    out = x @ weight.T + bias,   dx = dout @ weight,   dweight = dout.T @ x,   dbias = dout.sum(0)

PyTorch takes MKL for fp32 and copies the bias over the output before the product. oneDNN adds it in the product, and
its fp32 kernels are faster where MKL does not know the processor: on two cores of an AMD EPYC (Zen 4), 1,024 rows, 384
to 1,536 and 30,528 columns, the forward reached 1.2 to 1.6 and dx 1.1 to 1.2 times the speed of PyTorch's; in bf16,
where PyTorch's products are oneDNN's too, the forward 1.05 to 1.1 times. Without a bias, 1,024 and 4,096 rows of 384
and 768 columns, the forward in fp32 reached 1.4 times the speed of PyTorch's or more, in bf16 the same but for noise.
dweight is not among them: oneDNN has it faster as its transpose only, and putting that right costs what was gained.

Other devices and dtypes, and autocast, get PyTorch's own. Gradients of weights and biases are written, or added, to
where the caller keeps them: on CUDA in fp32 from operands in bf16, unrounded.

An embedding is a linear layer of one-hot rows, whose dweight is a sum of the rows of dout that have one index. Rows
sorted by index are cut in blocks of RUN_ROWS; a block adds up its runs of one index as a product of 0s and 1s with its
rows, and adds a run that lies within it to the table. What crosses a border is left to a second launch, one program for
each run, from its first block on. So there are no atomics, and the same bits come out every time: PyTorch adds the rows
of tables that are short for the number of tokens, as that of positions is, in any order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import INTERPRET, LAUNCH_OPTIONS, TRITON_DEVICES, add_column_sums, tl, triton

INTERPRETED = tl.constexpr(INTERPRET)

# Of a sum of columns: 16 rows of 256 columns are four loads of 16 bytes in flight a thread. At most 64 strips of rows,
# of a vocabulary's columns 16, which are programs enough: on an H100 SXM 0.102 against 0.133 ms of 4,096 rows, 0.343
# against 0.375 of 16,384. As many on every device, so that the bits are the same.
STRIP_TILE = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
STRIPS, STRIP_PROGRAMS = (16, 64), 2048
# Of a sum of the rows of an index: 32 sorted rows a block, and as many blocks at once where a run crosses borders.
RUN_TILE = {"RUN_ROWS": 32, "COLUMNS": 128, "num_warps": 4}

ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if torch.backends.mkldnn.is_available() else ()


def runs_on_onednn(x: Tensor) -> bool:
    """Whether `linear_product` serves this tensor."""
    return x.device.type == "cpu" and x.dtype in ONEDNN_DTYPES and not torch.is_autocast_enabled("cpu")


def linear_product(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """(N, F) x @ weight.T + bias by oneDNN, in one pass; no gradient. Any strides."""
    return torch.ops.mkldnn._linear_pointwise(x_ND, weight_FD, bias_F, "none", [], "")


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` without checks and gradient."""
    return linear_product(x, weight, bias) if runs_on_onednn(x) else F.linear(x, weight, bias)


def linear_dx(dout: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """(N, D) dout @ weight, added to `into`, where there is one, and then in its place."""
    if runs_on_onednn(dout):
        product = linear_product(dout, weight.t(), None)
        return product if into is None else into.add_(product)
    return dout @ weight if into is None else into.addmm_(dout, weight)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, keep: bool) -> Tensor:
    """(N, F) residual + x @ weight.T, the same bits whether the residual is kept or the sum takes its place."""
    if runs_on_onednn(x):
        return linear_product(x, weight, None).add_(residual)
    return torch.addmm(residual, x, weight.t()) if keep else residual.addmm_(x, weight.t())


def add_product(total_FD: Tensor, a_FN: Tensor, b_ND: Tensor, accumulate: bool) -> None:
    """total = a @ b or, to `accumulate`, total += a @ b. The total is fp32 or of the operands' dtype."""
    if a_FN.dtype == total_FD.dtype:
        total_FD.addmm_(a_FN, b_ND) if accumulate else torch.mm(a_FN, b_ND, out=total_FD)
    elif a_FN.is_cuda and accumulate:
        torch.addmm(total_FD, a_FN, b_ND, out_dtype=torch.float32, out=total_FD)
    elif a_FN.is_cuda:
        torch.mm(a_FN, b_ND, out_dtype=torch.float32, out=total_FD)
    else:  # PyTorch has no bf16 x bf16 -> fp32 product on the CPU: each product is rounded once
        product = a_FN @ b_ND
        total_FD.add_(product) if accumulate else total_FD.copy_(product)


@triton.jit(do_not_specialize=["N", "strip_rows"])
def _strip_sums_kernel(
    x_ptr, partial_ptr,  # (N, F) of any dtype, (strips, F) fp32
    N, F, stride, strip_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(1).to(tl.int64)  # int64: N * F passes 2^31 at 70k tokens of BERT's vocabulary
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = (column < F)[None, :]
    end = tl.minimum((strip + 1) * strip_rows, N)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(strip * strip_rows, end, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        total += tl.load(x_ptr + row * stride + column[None, :], mask=(row < end) & live, other=0.0).to(tl.float32)
    tl.store(partial_ptr + strip * F + column, tl.sum(total, axis=0), mask=column < F)


def add_column_sum(total_F: Tensor, x_NF: Tensor, accumulate: bool) -> None:
    """total = x.sum(0) or, to `accumulate`, total += x.sum(0). Where Triton serves, summed in fp32; rows contiguous."""
    if x_NF.device.type in TRITON_DEVICES:
        N, width = x_NF.shape
        rows, blocks = STRIP_TILE["ROWS"], triton.cdiv(width, STRIP_TILE["COLUMNS"])
        strips = min(max(STRIPS[0], STRIP_PROGRAMS // blocks), STRIPS[1])
        strip_rows = triton.cdiv(max(1, triton.cdiv(N, strips)), rows) * rows  # of no rows there is no strip
        grid = (blocks, triton.cdiv(N, strip_rows))
        partial = x_NF.new_empty((grid[1], 1, width), dtype=torch.float32)
        _strip_sums_kernel[grid](x_NF, partial, N, width, x_NF.stride(0), strip_rows, **STRIP_TILE, **LAUNCH_OPTIONS)
        add_column_sums(partial, [total_F], accumulate)
        return
    # A sum to another dtype first converts all of x here: sum within the dtype, rounded once.
    rows = x_NF.sum(0)
    total_F.add_(rows) if accumulate else total_F.copy_(rows)


@triton.jit(do_not_specialize=["N", "padding"])
def _run_sums_kernel(
    rows_ptr, index_ptr, order_ptr,  # (N, D); (N,) int32, sorted; (N,) int64, where the sorted rows stand
    total_ptr, partial_ptr,          # (V, D); (blocks, 2, D) fp32: what came from the block before, what goes on
    N, D, padding, RUN_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first, end = block * RUN_ROWS, tl.minimum((block + 1) * RUN_ROWS, N)
    at = first + tl.arange(0, RUN_ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (column < D)[None, :]
    index = tl.load(index_ptr + at, mask=at < N, other=-1)
    before = tl.load(index_ptr + at - 1, mask=(at > 0) & (at < N), other=-1)
    order = tl.load(order_ptr + at, mask=at < N, other=0)
    rows = tl.load(rows_ptr + order[:, None] * D + column[None, :], mask=(at < N)[:, None] & live, other=0.0)
    same = index[:, None] == index[None, :]
    if INTERPRETED:  # whose dot takes the bits of bf16 for integers
        rows = rows.to(tl.float32)
    sums = tl.dot(same.to(rows.dtype), rows, input_precision="ieee")  # in each row that of its run

    came = index == tl.load(index_ptr + first - 1, mask=first > 0, other=-1)
    goes_on = index == tl.load(index_ptr + end, mask=end < N, other=-1)
    begins = ((index != before) | (at == first)) & (at < N)
    target = total_ptr + index.to(tl.int64)[:, None] * D + column[None, :]
    whole = (begins & ~came & ~goes_on & (index != padding))[:, None] & live
    old = tl.load(target, mask=whole, other=0.0).to(tl.float32)
    tl.store(target, (old + sums).to(total_ptr.dtype.element_ty), mask=whole)
    partial = partial_ptr + (block * 2 + tl.where(came, 0, 1))[:, None] * D + column[None, :]
    tl.store(partial, sums, mask=(begins & (came | goes_on))[:, None] & live)


@triton.jit(do_not_specialize=["N", "padding"])
def _crossing_runs_kernel(
    index_ptr, total_ptr, partial_ptr, N, D, padding, RUN_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The run that begins in a block and goes on in the next ones, if there is one."""
    block = tl.program_id(0).to(tl.int64)
    after = (block + 1) * RUN_ROWS  # the first row of the next block
    index = tl.load(index_ptr + after - 1, mask=after < N, other=-1)
    goes_on = index == tl.load(index_ptr + after, mask=after < N, other=-2)
    came = tl.load(index_ptr + block * RUN_ROWS - 1, mask=block > 0, other=-1) == index
    if goes_on & (came == 0) & (index != padding):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        live = column < D
        total = tl.load(partial_ptr + (block * 2 + 1) * D + column, mask=live, other=0.0)
        while after < N:  # a condition of its own made Triton 3.6 fail
            row = after + tl.arange(0, RUN_ROWS) * RUN_ROWS  # of each of the blocks its first
            ours = tl.load(index_ptr + row, mask=row < N, other=-1) == index
            at = (row // RUN_ROWS * 2 * D)[:, None] + column[None, :]
            total += tl.sum(tl.load(partial_ptr + at, mask=ours[:, None] & live[None, :], other=0.0), axis=0)
            after += RUN_ROWS * RUN_ROWS
            after = tl.where(tl.load(index_ptr + after, mask=after < N, other=-1) == index, after, N)
        target = total_ptr + index.to(tl.int64) * D + column
        total += tl.load(target, mask=live, other=0.0).to(tl.float32)
        tl.store(target, total.to(total_ptr.dtype.element_ty), mask=live)


def add_rows(total_VD: Tensor, rows_ND: Tensor, index_N: Tensor, padding: int | None, accumulate: bool) -> None:
    """total[v] = or, to `accumulate`, += the sum of the rows n of index[n] = v: the gradient of an embedding table.

    Args:
        total_VD: fp32, or of the dtype of the rows. Where Triton serves, summed in fp32 and in one order.
        rows_ND: contiguous.
        index_N: integers, 0 to V - 1; unchecked.
        padding: an index whose rows count for nothing.
    """
    padding = -1 if padding is None else padding
    if rows_ND.device.type not in TRITON_DEVICES:
        found = torch.ops.aten.embedding_dense_backward(rows_ND, index_N, total_VD.shape[0], padding, False)
        total_VD.add_(found) if accumulate else total_VD.copy_(found)
        return
    if not accumulate:
        total_VD.zero_()
    (N, D), (run_rows, columns) = rows_ND.shape, (RUN_TILE["RUN_ROWS"], RUN_TILE["COLUMNS"])
    index, order = torch.sort(index_N.to(torch.int32), stable=True)
    grid = (triton.cdiv(N, run_rows), triton.cdiv(D, columns))
    partial = rows_ND.new_empty((grid[0], 2, D), dtype=torch.float32)
    _run_sums_kernel[grid](rows_ND, index, order, total_VD, partial, N, D, padding, **RUN_TILE, **LAUNCH_OPTIONS)
    _crossing_runs_kernel[grid](index, total_VD, partial, N, D, padding, **RUN_TILE, **LAUNCH_OPTIONS)


@torch.library.custom_op("fastdistil::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_product(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("fastdistil::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(dout: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), the last empty without a bias."""
    dbias = dout.sum(0) if has_bias else dout.new_empty(0)
    return linear_product(dout, weight.t(), None), dout.t() @ x, dbias


@_linear_backward.register_fake
def _(dout, x, weight, has_bias):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout):
    if dout is None:
        return None, None, None
    dx, dweight, dbias = _linear_backward(dout, *ctx.saved_tensors, ctx.has_bias)
    return dx, dweight, dbias if ctx.has_bias else None


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias, (N, F) or (B, L, F) in the dtype of x, as torch.nn.functional.linear; all get gradients.

    Raises ValueError where oneDNN would see shapes or dtypes that do not fit.
    """
    if runs_on_onednn(x_ND):
        given = [t for t in (x_ND, weight_FD, bias_F) if t is not None]
        fits = bias_F is None or bias_F.shape == weight_FD.shape[:1]
        if x_ND.ndim < 2 or x_ND.shape[-1:] != weight_FD.shape[1:] or not fits:
            raise ValueError(
                f"linear wants (N, D) or (B, L, D), (F, D) and (F,), got {[tuple(t.shape) for t in given]}"
            )
        if any(t.dtype != x_ND.dtype for t in given):
            dtypes = " and ".join(str(t.dtype) for t in given)
            raise ValueError(f"linear wants one dtype, got {dtypes}: convert the module to the dtype of its input")
        if x_ND.ndim > 2:
            return _linear(x_ND.flatten(0, -2), weight_FD, bias_F).unflatten(0, x_ND.shape[:-1])
        return _linear(x_ND, weight_FD, bias_F)
    return F.linear(x_ND, weight_FD, bias_F)
