"""Who serves an operator: Triton on CUDA, one of three on the CPU. And the checks that all operators share.

CPU tensors run in Triton's interpreter if TRITON_INTERPRET=1, else in the C++ kernels of csrc/ where a build for this
processor exists, else in plain PyTorch. Each operator file registers its PyTorch kernel itself, unless csrc/ serves
that operator: the dispatcher is the only switch.

Triton is for Linux. Elsewhere every file imports all the same, since all take it from here, and CPU tensors never ask
for it.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class _WithoutTriton:
    """Stands for all of Triton where it is not installed: kernels can be defined with it, and not launched."""

    def __init__(self, value: Any = None) -> None:
        self.value = value  # of a constexpr

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **_: Any) -> Any:
        return _WithoutTriton(*args[:1])

    def __getitem__(self, _grid: Any) -> Any:
        raise ModuleNotFoundError(f"these tensors are served by Triton, which is not installed: {TRITON_FIX}")


HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
else:
    triton = tl = gluon = gl = hopper = TensorDescriptor = _WithoutTriton()
BUILD_FIX = "build them by `pip install --no-build-isolation --force-reinstall --no-deps SOURCE_FOLDER`"
TRITON_FIX = "`pip install triton` on Linux, `pip install triton-windows` on Windows, or use the CPU"

# Triton's interpreter runs kernels on CPU tensors. It is how this project tests them without a GPU. It has to be chosen
# before the first @triton.jit, so it is read once, here.
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Devices that a Triton launcher serves.
TRITON_DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRET else ("cuda",)

# For every launch: `a * b + c` in one rounding, said aloud because Triton 3.10 turns it off by default.
LAUNCH_OPTIONS: dict[str, bool] = {"enable_fp_fusion": True}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# 16 columns of fp32 are two sectors of memory: the 2,304 columns of a LayerNorm's three sums make 144 programs.
SUM_TILE = {"ROWS": 128, "COLUMNS": 16, "num_warps": 4}


@triton.jit
def _store_sum(out_ptr, column, live, rows, accumulate):
    if out_ptr is not None:
        # A block, whatever the interpreter makes of a scalar; the same for all columns, so that loads stay wide.
        rows += tl.load(out_ptr + column, mask=live & (column * 0 < accumulate), other=0.0).to(tl.float32)
        tl.store(out_ptr + column, rows.to(out_ptr.dtype.element_ty), mask=live)


# `accumulate` is 0 or 1: the interpreter of Triton 3.6 takes no bool.
@triton.jit(do_not_specialize=("P", "accumulate"))
def _column_sums_kernel(
    partial_ptr, out0_ptr, out1_ptr, out2_ptr,  # (P, M, K) fp32 contiguous; (K,) or None, of any dtype each
    P, K, accumulate, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < K
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, P, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = (row[:, None] * M + m) * K + column[None, :]
        total += tl.load(partial_ptr + at, mask=(row < P)[:, None] & live[None, :], other=0.0)
    rows = tl.sum(total, axis=0)
    if m == 0:
        _store_sum(out0_ptr, column, live, rows, accumulate)
    elif m == 1:
        _store_sum(out1_ptr, column, live, rows, accumulate)
    else:
        _store_sum(out2_ptr, column, live, rows, accumulate)


def add_column_sums(partial_PMK: Tensor, outs: Sequence[Tensor | None], accumulate: bool) -> None:
    """The end of every sum over rows: outs[m] (K,) = or += partial[:, m].sum(0), in one launch for up to three m.

    Partial sums are fp32 and contiguous, P of them, one of each program, so that no atomics are needed and the same
    bits come out every time. They are added in fp32 and stored in the dtype of outs[m]; None is for a sum that nobody
    wants.
    """
    P, M, K = partial_PMK.shape
    if partial_PMK.device.type in TRITON_DEVICES:
        if any(out is not None for out in outs):
            first, second, third = (*outs, None, None)[:3]
            _column_sums_kernel[(triton.cdiv(K, SUM_TILE["COLUMNS"]), M)](
                partial_PMK, first, second, third, P, K, int(accumulate), M, **SUM_TILE, **LAUNCH_OPTIONS
            )
        return
    for out, rows in zip(outs, partial_PMK.sum(0), strict=True):
        if out is not None:
            out.add_(rows) if accumulate else out.copy_(rows)


def _cpu_backend() -> str:
    """The name of what serves CPU tensors. Importing the C++ kernels, where they are built, registers them."""
    if INTERPRET:
        return "triton-interpreter"
    # "AVX512", "AVX2", "DEFAULT", ...: what PyTorch's own kernels are compiled for here; ATEN_CPU_CAPABILITY lowers it.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    extension = f"fastdistil._C_{capability}"
    if importlib.util.find_spec(extension) is not None:
        # A broken build must raise, not fall through. Kernels may come before the operators that Python defines.
        try:
            importlib.import_module(extension)
        except ImportError as error:
            raise ImportError(
                f"{extension} was built for another torch than this one, {torch.__version__} ({error}): {BUILD_FIX}"
            ) from error
        return f"cpp-{capability}"
    if not torch.cuda.is_available():
        logging.getLogger(__name__).warning(
            "The CPU kernels of csrc/ are not built for %s: the losses run in plain PyTorch, many times slower. On "
            "x86-64 Linux with a C++ compiler, %s",
            capability,
            BUILD_FIX,
        )
    return "torch"


CPU_BACKEND: str = _cpu_backend()
"""triton-interpreter, cpp-avx512, cpp-avx2 or torch."""


def check_dtype(operator: str, x: Tensor, fix: str = "") -> None:
    """Raises ValueError, ending in `fix`, unless the fused kernels compute in the dtype of x."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{operator} wants fp32, bf16 or fp16, got {x.dtype}{fix}")


def check_parameter(operator: str, name: str, parameter: Tensor, x: Tensor) -> None:
    """Raises ValueError unless a weight or bias has one number for each column of x, in its dtype."""
    if parameter.shape != x.shape[1:] or parameter.dtype != x.dtype:
        raise ValueError(
            f"{operator} wants a {name} of shape {tuple(x.shape[1:])} and dtype {x.dtype}, got "
            f"{tuple(parameter.shape)} {parameter.dtype}: convert the module to the dtype of its input"
        )


def check_num_rows(operator: str, num_rows: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless the number of rows that count, where it is given, is an integer beside x."""
    if num_rows is None:
        return
    if num_rows.ndim or num_rows.dtype not in (torch.int32, torch.int64) or num_rows.device != x.device:
        raise ValueError(
            f"{operator} wants num_rows as a 0-dim int32 or int64 tensor on {x.device}, got {num_rows.dtype} of shape "
            f"{tuple(num_rows.shape)} on {num_rows.device}"
        )


def device_scalar(operator: str, name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """0-dim fp32 of a factor on the device of x, without gradient and without a host sync.

    Raises ValueError for a tensor that is not one number on that device.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=x.device)  # torch.tensor would copy, and wait
    if value.ndim or value.device != x.device:
        raise ValueError(
            f"{operator} wants {name} as a float or a 0-dim tensor on {x.device}, got one of shape "
            f"{tuple(value.shape)} on {value.device}"
        )
    return value.detach().float()


def host_number(operator: str, name: str, value: float | Tensor) -> tuple[Tensor | None, float]:
    """A number above 0 that the host reads: as a tensor, if it is one, else as it is; for `read_number`.

    A float stays one: as a tensor Inductor would build a C++ kernel on a GPU's host to make it. Raises ValueError for
    what is none.
    """
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{operator} wants {name} as a float or a 0-dim tensor, got shape {tuple(value.shape)}")
        return value.detach(), 0.0
    return None, read_number(operator, name, None, float(value))


def read_number(operator: str, name: str, tensor: Tensor | None, value: float) -> float:
    """What `host_number` took apart; a tensor on a GPU costs a sync.

    Raises ValueError unless it is above 0, which of a tensor is only known here.
    """
    found = value if tensor is None else tensor.item()
    if not found > 0:
        raise ValueError(f"{operator}: {name} must be > 0, got {found}")
    return found


def times_gradient(grad_loss: Tensor, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients that the forward made, times that of the loss, 0-dim fp32: in one pass each, rounded once."""
    # A loss that ends its graph has gradient 1. On the CPU reading it costs nothing, and nothing is multiplied by 1.
    # What stands for a tensor while a graph is traced has another type.
    if type(grad_loss) is Tensor and grad_loss.is_cpu:
        factor = grad_loss.item()
        return gradients if factor == 1 else [factor * x for x in gradients]
    # Of one dimension: one of none is rounded to bf16 before it multiplies a bf16 gradient. `out`: or there is a copy
    # in fp32 in between.
    return [torch.mul(grad_loss.view(1), x, out=torch.empty_like(x)) for x in gradients]
