"""fastdistil: DistilBERT-style distillation of BERT-like encoders during pre-training.

`fastdistil.distil` does it from Python, and the operators of kernels/ are here by their names. Importing the package
imports nothing heavy, each of them comes when it is asked for: `--help` and configuration errors must come before torch
does.
"""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdistil.api import Distilled, distil
    from fastdistil.evaluation.trainer import DistilTrainer
    from fastdistil.kernels.attention import attention
    from fastdistil.kernels.cosine import CosineLoss, cosine_loss
    from fastdistil.kernels.distill import DistillLoss, distill_loss
    from fastdistil.kernels.dropout import dropout, new_dropout_seed
    from fastdistil.kernels.geglu import geglu
    from fastdistil.kernels.gelu import bias_gelu, linear_gelu
    from fastdistil.kernels.layernorm import add_layernorm, dropout_add_layernorm, layernorm
    from fastdistil.kernels.layout import SequenceLayout, padded_layout, sequence_layout
    from fastdistil.kernels.linear import linear
    from fastdistil.kernels.linear_distill import linear_distill_loss
    from fastdistil.kernels.rope import rope, rotations

__all__ = [
    "CosineLoss",
    "DistilTrainer",
    "DistillLoss",
    "Distilled",
    "SequenceLayout",
    "add_layernorm",
    "attention",
    "bias_gelu",
    "cosine_loss",
    "distil",
    "distill_loss",
    "dropout",
    "dropout_add_layernorm",
    "geglu",
    "layernorm",
    "linear",
    "linear_distill_loss",
    "linear_gelu",
    "new_dropout_seed",
    "padded_layout",
    "rope",
    "rotations",
    "sequence_layout",
]
_HOMES = {
    "api": "Distilled distil",
    "evaluation.trainer": "DistilTrainer",
    "kernels.attention": "attention",
    "kernels.cosine": "CosineLoss cosine_loss",
    "kernels.distill": "DistillLoss distill_loss",
    "kernels.dropout": "dropout new_dropout_seed",
    "kernels.geglu": "geglu",
    "kernels.gelu": "bias_gelu linear_gelu",
    "kernels.layernorm": "add_layernorm dropout_add_layernorm layernorm",
    "kernels.layout": "SequenceLayout padded_layout sequence_layout",
    "kernels.linear": "linear",
    "kernels.linear_distill": "linear_distill_loss",
    "kernels.rope": "rope rotations",
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}

__version__ = "0.1.0"
INTERRUPTED = "interrupted by {}: what was finished is kept, and the same command does the rest"


def __getattr__(name: str) -> object:
    """One of `__all__`, from where it is at home."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def end_at_once(number: int, _frame: object) -> None:
    """End this process by the handler of a signal, with a line and the exit status of shells."""
    os.write(2, f"{INTERRUPTED.format(signal.Signals(number).name)}\n".encode())
    os._exit(128 + number)


_script = os.path.basename("".join(sys.orig_argv[1:2]))
# `python -m fastdistil.COMMAND` or `fastdistil COMMAND` begins: until `main` runs nothing is to be cleaned up.
if sys.argv[:1] == ["-m"] or _script in ("fastdistil", "fastdistil.exe"):
    for _number in (signal.SIGINT, signal.SIGTERM):  # An import elsewhere changes no handler.
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, end_at_once)
