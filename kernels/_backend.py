"""Who serves an operator: Triton its CUDA tensors, one of three its CPU tensors. The dispatcher is the only switch.

CPU tensors run Triton's interpreter if TRITON_INTERPRET=1, else the C++ kernels of csrc/ in the build that this processor can
run, else plain PyTorch. An operator file registers its plain kernel itself: always, or only where csrc/ does not serve it.
"""

import importlib
import importlib.util
import logging
import os

import torch

# Triton's interpreter runs kernels on CPU tensors. It is how this project tests them without a GPU,
# and it has to be chosen before the first @triton.jit, so it is read once, here.
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Devices that a Triton launcher serves.
TRITON_DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRET else ("cuda",)

# For every launch: `a * b + c` in one rounding, said aloud because Triton 3.10 turns it off by default.
LAUNCH_OPTIONS: dict[str, bool] = {"enable_fp_fusion": True}


def _cpu_backend() -> str:
    """What serves CPU tensors; imports the C++ kernels where they do, which registers them."""
    if INTERPRET:
        return "triton-interpreter"
    # "AVX512", "AVX2", "DEFAULT", ...: what PyTorch's own kernels run with; ATEN_CPU_CAPABILITY lowers it.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    extension = f"fastdistil._C_{capability}"
    if importlib.util.find_spec(extension) is not None:
        # A broken build must raise, not fall through. The dispatcher keeps a kernel until its operator is defined.
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
