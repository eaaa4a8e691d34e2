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
    TILE_ROWS,
    AttentionBackend,
    SequenceLayout,
    attention,
    attention_backward_torch,
    attention_forward_torch,
    attention_reference,
    resolve_backend,
    sequence_layout,
)
from fastdistil.kernels.cosine import cosine_loss, cosine_loss_reference, cosine_rows, cosine_rows_torch
from fastdistil.kernels.distill import (
    DistillLoss,
    distill_loss,
    distill_loss_reference,
    distill_rows,
    distill_rows_torch,
)
from fastdistil.kernels.dropout import dropout, dropout_, dropout_seed, dropout_torch_
from fastdistil.kernels.flash import attention_backward, attention_forward
from fastdistil.kernels.fp8_rows import quantise_rows, quantise_rows_reference
from fastdistil.kernels.gelu import bias_gelu, bias_gelu_reference, linear_gelu
from fastdistil.kernels.layernorm import dropout_add_layernorm, dropout_add_layernorm_reference, layernorm
from fastdistil.kernels.linear import linear
from fastdistil.kernels.linear_distill import (
    LinearDistillLoss,
    default_chunk_tokens,
    linear_distill_loss,
    linear_distill_loss_reference,
)

__all__ = [
    "CPU_BACKEND",
    "TILE_ROWS",
    "AttentionBackend",
    "DistillLoss",
    "LinearDistillLoss",
    "SequenceLayout",
    "attention",
    "attention_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "cosine_loss",
    "cosine_loss_reference",
    "default_chunk_tokens",
    "distill_loss",
    "distill_loss_reference",
    "dropout",
    "dropout_add_layernorm",
    "dropout_add_layernorm_reference",
    "dropout_seed",
    "layernorm",
    "linear",
    "linear_distill_loss",
    "linear_distill_loss_reference",
    "linear_gelu",
    "quantise_rows",
    "quantise_rows_reference",
    "resolve_backend",
    "sequence_layout",
]


def _register_cpu_kernels() -> str:
    """Gives every operator its CPU kernel and returns the backend's name."""
    if INTERPRET:
        return "triton-interpreter"
    # Put together from PyTorch's own; only its dropout is in csrc/.
    attention_forward.register_kernel("cpu")(attention_forward_torch)
    attention_backward.register_kernel("cpu")(attention_backward_torch)
    # "AVX512", "AVX2", "DEFAULT", ...: what PyTorch's own kernels run with; ATEN_CPU_CAPABILITY lowers it.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    extension = f"fastdistil._C_{capability}"
    if importlib.util.find_spec(extension) is not None:
        importlib.import_module(extension)  # a broken build must raise, not fall through
        return f"cpp-{capability}"
    distill_rows.register_kernel("cpu")(distill_rows_torch)
    cosine_rows.register_kernel("cpu")(cosine_rows_torch)
    dropout_.register_kernel("cpu")(dropout_torch_)
    if not torch.cuda.is_available():
        logging.getLogger(__name__).warning(
            "The CPU kernels of csrc/ are not built for %s: the losses run in plain PyTorch, many times slower. "
            "Build them with: pip install --no-build-isolation -e .",
            capability,
        )
    return "torch"


CPU_BACKEND: str = _register_cpu_kernels()
