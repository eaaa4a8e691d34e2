"""Who serves an operator: Triton on CUDA, one of three on the CPU. And the checks that all operators share.

CPU tensors run in Triton's interpreter if TRITON_INTERPRET=1, else in the C++ kernels of csrc/ where a build for this
processor exists, else in plain PyTorch. Each operator file registers its PyTorch kernel itself, unless csrc/ serves
that operator: the dispatcher is the only switch.
"""

import importlib.util
import logging
import os

import torch
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors. It is how this project tests them without a GPU. It has to be chosen
# before the first @triton.jit, so it is read once, here.
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Devices that a Triton launcher serves.
TRITON_DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRET else ("cuda",)

# For every launch: `a * b + c` in one rounding, said aloud because Triton 3.10 turns it off by default.
LAUNCH_OPTIONS: dict[str, bool] = {"enable_fp_fusion": True}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_backend() -> str:
    """The name of what serves CPU tensors. Importing the C++ kernels, where they are built, registers them."""
    if INTERPRET:
        return "triton-interpreter"
    # "AVX512", "AVX2", "DEFAULT", ...: what PyTorch's own kernels are compiled for here; ATEN_CPU_CAPABILITY lowers it.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    extension = f"fastdistil._C_{capability}"
    if importlib.util.find_spec(extension) is not None:
        # A broken build must raise, not fall through. Kernels may come before the operators that Python defines.
        importlib.import_module(extension)
        return f"cpp-{capability}"
    if not torch.cuda.is_available():
        logging.getLogger(__name__).warning(
            "The CPU kernels of csrc/ are not built for %s: the losses run in plain PyTorch, many times slower. "
            "Build them with: pip install --no-build-isolation -e .",
            capability,
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
