"""The one door to every fused operator: `from fastdistil import ops; ops.linear_distill_loss(...)`.

CUDA tensors always run the Triton kernels. CPU tensors run, in this order: Triton's interpreter if
TRITON_INTERPRET=1, the C++ kernels of csrc/ in the build that this processor can run, else plain
PyTorch. CPU_BACKEND says which; the dispatcher is the only switch.
"""

import importlib
import importlib.util
import logging

import torch

from fastdistil.kernels._triton import INTERPRET
from fastdistil.kernels.attention import (
    SequenceLayout,
    attention,
    attention_reference,
    sequence_layout,
)
from fastdistil.kernels.cosine import (
    cosine_loss,
    cosine_loss_reference,
    cosine_rows,
    cosine_rows_torch,
)
from fastdistil.kernels.distill import (
    DistillLoss,
    distill_loss,
    distill_loss_reference,
    distill_rows,
    distill_rows_torch,
)
from fastdistil.kernels.linear_distill import (
    LinearDistillLoss,
    linear_distill_loss,
    linear_distill_loss_reference,
)

__all__ = [
    "CPU_BACKEND",
    "DistillLoss",
    "LinearDistillLoss",
    "SequenceLayout",
    "attention",
    "attention_reference",
    "cosine_loss",
    "cosine_loss_reference",
    "distill_loss",
    "distill_loss_reference",
    "linear_distill_loss",
    "linear_distill_loss_reference",
    "sequence_layout",
]


def _register_cpu_kernels() -> str:
    """Gives every operator its CPU kernel and returns the backend's name."""
    if INTERPRET:
        return "triton-interpreter"
    # "AVX512", "AVX2", "DEFAULT", ...: what PyTorch's own kernels run with; ATEN_CPU_CAPABILITY lowers it.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    extension = f"fastdistil._C_{capability}"
    if importlib.util.find_spec(extension) is not None:
        importlib.import_module(extension)  # a broken build must raise, not fall through
        return f"cpp-{capability}"
    distill_rows.register_kernel("cpu")(distill_rows_torch)
    cosine_rows.register_kernel("cpu")(cosine_rows_torch)
    if not torch.cuda.is_available():
        logging.getLogger(__name__).warning(
            "The CPU kernels of csrc/ are not built for %s: the losses run in plain PyTorch, many times slower. "
            "Build them with: pip install --no-build-isolation -e .",
            capability,
        )
    return "torch"


CPU_BACKEND: str = _register_cpu_kernels()
