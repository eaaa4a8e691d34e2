"""Linear layer whose products on the CPU are oneDNN's; its products and sums as raw functions, on every device.

    out = x @ weight.T + bias,   dx = dout @ weight,   dweight = dout.T @ x,   dbias = dout.sum(0)

PyTorch takes MKL for fp32 and copies the bias over the output before the product. oneDNN adds it in the product, and
its fp32 kernels are faster where MKL does not know the processor: on two cores of an AMD EPYC (Zen 4), 1,024 rows, 384
to 1,536 and 30,528 columns, the forward reached 1.2 to 1.6 and dx 1.1 to 1.2 times the speed of PyTorch's; in bf16,
where PyTorch's products are oneDNN's too, the forward 1.05 to 1.1 times. dweight is not among them: oneDNN has it
faster as its transpose only, and putting that right costs what was gained.

Other devices and dtypes, and autocast, get PyTorch's own. Gradients of weights and biases are written, or added, to
where the caller keeps them: on CUDA in fp32 from operands in bf16, unrounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._backend import LAUNCH_OPTIONS, TRITON_DEVICES, add_column_sums

# Of a sum of columns: 16 rows of 256 columns are four loads of 16 bytes in flight a thread. At most 64 strips of rows,
# whose sums are 1 % of what is read at 16,384 rows of bf16: as many on every device, so that the bits are the same.
STRIP_TILE = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
NUM_STRIPS = 64

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
        rows = STRIP_TILE["ROWS"]
        strip_rows = triton.cdiv(triton.cdiv(N, NUM_STRIPS), rows) * rows
        strips = triton.cdiv(N, strip_rows)
        partial = x_NF.new_empty((strips, 1, width), dtype=torch.float32)
        _strip_sums_kernel[(triton.cdiv(width, STRIP_TILE["COLUMNS"]), strips)](
            x_NF, partial, N, width, x_NF.stride(0), strip_rows, **STRIP_TILE, **LAUNCH_OPTIONS
        )
        add_column_sums(partial, [total_F], accumulate)
        return
    # A sum to another dtype first converts all of x here: sum within the dtype, rounded once.
    rows = x_NF.sum(0)
    total_F.add_(rows) if accumulate else total_F.copy_(rows)


@torch.library.custom_op("fastdistil::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_product(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("fastdistil::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return linear_product(dout, weight.t(), None), dout.t() @ x, dout.sum(0)


@_linear_backward.register_fake
def _(dout, x, weight):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout):
    if dout is None:
        return None, None, None
    return _linear_backward(dout, *ctx.saved_tensors)


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """(N, F) x @ weight.T + bias in the dtype of x, as torch.nn.functional.linear; all three get gradients.

    Raises ValueError where oneDNN would see shapes or dtypes that do not fit.
    """
    if runs_on_onednn(x_ND):
        if x_ND.shape[1:] != weight_FD.shape[1:] or bias_F.shape != weight_FD.shape[:1]:
            shapes = [tuple(t.shape) for t in (x_ND, weight_FD, bias_F)]
            raise ValueError(f"linear wants (N, D), (F, D) and (F,), got {shapes}")
        if not x_ND.dtype == weight_FD.dtype == bias_F.dtype:
            raise ValueError(
                f"linear wants one dtype, got {x_ND.dtype}, {weight_FD.dtype} and {bias_F.dtype}: "
                "convert the module to the dtype of its input"
            )
        return _linear(x_ND, weight_FD, bias_F)
    return F.linear(x_ND, weight_FD, bias_F)
