"""Counts what one micro-batch of the trainer launches, moves and computes, on a GPU that is not here.

The trainer's own teacher, student, loss and engine run on meta tensors. Triton's launches are seen by the driver of
no_gpu.py, PyTorch's operators by a TorchDispatchMode; what an operator launches on CUDA and which bytes it moves are
the rules below. It is the second micro-batch that counts: the first one has no gradients to add to.

Bytes: every tensor argument read once, every result written once; a tensor that is read and overwritten twice. That is
the least that memory must move if nothing stays in L2 from one kernel to the next, not what caches make of it.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.no_gpu import Launch
from benchmarks.workload import architectures, synthetic_batch
from fastdistil.data.batches import MicroBatch
from fastdistil.kernels import linear_distill
from fastdistil.model.architecture import attended
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run import profile, recipes
from fastdistil.run.ranks import Ranks
from fastdistil.training.engine import PlainEngine
from fastdistil.training.objective import Objective
from fastdistil.training.precision import kl_sum, quantise_encoder
from fastdistil.training.teacher import Teacher

aten = torch.ops.aten

# What CUDA launches for an operator of PyTorch's. Views launch nothing; what is not here launches one kernel.
NOTHING = {
    aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten._unsafe_view,
    aten.lift_fresh, aten.is_same_size, aten.resolve_conj, aten.resolve_neg,
}  # fmt: skip
SEVERAL = {aten.sort: 8}  # of int32 by radix: a histogram, sums, four passes, and the indices before and after
ZEROS = {aten.zeros, aten.new_zeros, aten.zeros_like, aten.zero_}
FILLS = {aten.fill_, aten.full, aten.full_like, aten.new_full}  # zeros, too, if the value is 0
# Matrix products, and where their operands are: 2 x elements of the first x columns of the second FLOP.
PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2), aten.bmm: (0, 1), aten._scaled_mm: (0, 1)}
# Gathers read the rows that they return, or their table where that is smaller.
GATHERS = {aten.embedding, aten.index_select}
# These read nothing of their first argument, where it is a tensor.
OVERWRITES = {aten.copy_, *ZEROS, *FILLS}

# Triton's kernels, by file and name. Products of 2 D FLOP for each head and pair of tokens that attend to each other:
ATTENTION_PRODUCTS = {"attention._forward_kernel": 2, "attention._dq_kernel": 3, "attention._dkdv_kernel": 4}
TABLES = {"word_ptr", "position_ptr"}
# The share of an argument that a kernel touches, where it is not all of it; RoPE leaves values alone where it is in
# place.
SHARES = {
    ("attention._dq_kernel", "dqkv_ptr"): 1 / 3, ("attention._dkdv_kernel", "dqkv_ptr"): 2 / 3,
    ("rope._rope_kernel in place", "qkv_ptr"): 2 / 3, ("rope._rope_kernel in place", "out_ptr"): 2 / 3,
}  # fmt: skip
PRODUCT_KINDS = ("GEMM", "GEMM + GELU")  # cuBLAS' products, and our own with GELU behind them
KINDS = {
    "attention": "attention", "layernorm": "LayerNorm", "gelu": "GELU", "distill": "row kernel", "fp8_rows": "FP8 rows",
    "mixture": "mixture", "dropout": "dropout", "cosine": "cosine", "_backend": "column sums",
    "linear": "column sums", "rope": "RoPE", "geglu": "GEGLU",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Event:
    """One operator or one launch of Triton's."""

    part: str
    """The span of run/profile.py that it is in."""
    kind: str
    name: str
    launches: int = 1
    num_bytes: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    """Of a product's operands."""
    is_zeros: bool = False
    """Whether it does nothing but write zeros."""
    is_cast_of_weights: bool = False
    """Whether a tensor of a parameter's shape is converted to another dtype."""
    is_sum_of_weights: bool = False
    """Whether a tensor of a parameter's shape is added to another one: a gradient that is accumulated."""


class Recorder(TorchDispatchMode):
    """Events of everything that runs inside, on meta tensors.

    Args:
        weights: shapes of the trained parameters.
        attended: window -> pairs of tokens that attend to each other, the squares of all lengths where it is 0.
    """

    def __init__(self, weights: set[torch.Size], attended: Callable[[int], float]) -> None:
        super().__init__()
        self.weights, self.attended = weights, attended
        self.events: list[Event] = []
        self.part = "other"

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Stands for run/profile.py's recorder of spans."""
        before, self.part = self.part, part
        yield
        self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastdistil":
            with self:  # what is inside counts
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        operator = func.overloadpacket
        if not (func.is_view or operator in NOTHING):
            self.events.append(self._operator(operator, args, kwargs, result))
        return result

    def _operator(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Event:
        inputs = [x for x in tree_leaves((args, {**kwargs, "out": None})) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        read = sum(map(num_bytes, inputs))
        if operator in GATHERS:
            rows = num_bytes(results[0])
            read = min(num_bytes(args[0]), rows) + num_bytes(args[1 if operator is aten.embedding else 2])
        elif operator in OVERWRITES and inputs:
            read -= num_bytes(inputs[0])
        kind, flops, dtype = "rest", 0.0, torch.bfloat16
        if operator in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[operator])
            kind, flops, dtype = "GEMM", 2.0 * a.numel() * b.shape[-1], a.dtype
        of_weights = bool(results) and results[0].shape in self.weights
        return Event(
            part=self.part,
            kind=kind,
            name=operator.__name__,
            launches=SEVERAL.get(operator, 1),
            num_bytes=read + sum(map(num_bytes, results)),
            flops=flops,
            dtype=dtype,
            is_zeros=operator in ZEROS or (operator in FILLS and args[-1] == 0),
            is_cast_of_weights=operator is aten._to_copy and of_weights,
            is_sum_of_weights=operator in (aten.add, aten.add_) and of_weights,
        )

    def launch(self, launch: Launch) -> None:
        """The driver's `on_launch`."""
        name, arguments = launch.kernel.name, launch.arguments
        what = f"{name} in place" if arguments.get("out_ptr") is arguments.get("qkv_ptr", name) else name
        moved = 0.0
        for key, x in arguments.items():
            x = x.base if isinstance(x, TensorDescriptor) else x
            if isinstance(x, Tensor):
                whole = num_bytes(x) * SHARES.get((what, key), 1.0)
                rows = arguments["N"] * arguments["D"] * x.element_size() if key in TABLES else whole
                moved += min(whole, rows)
        flops = 0.0
        if name in ATTENTION_PRODUCTS:
            pairs = self.attended(arguments["WINDOW"])
            flops = ATTENTION_PRODUCTS[name] * 2.0 * pairs * arguments["H"] * arguments["D"]
        kind = "embeddings" if "embedding" in name else KINDS.get(name.partition(".")[0], "rest")
        if name == "gelu._product_kernel":
            kind, flops = "GEMM + GELU", 2.0 * math.prod(arguments["a_desc"].base.shape) * arguments["F"]
        self.events.append(Event(part=self.part, kind=kind, name=name, num_bytes=moved, flops=flops))


def num_bytes(x: Tensor) -> float:
    """Of the elements of x that are not the same one again."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


@dataclass(frozen=True)
class Trainer:
    """What a run sets up, ready for one micro-batch at a time."""

    micro_batch: Callable[[], object]
    """Teacher, student, loss and backward."""
    evaluate: Callable[[], object]
    drift: Callable[[], object]
    """The teacher beside itself in fp32, as before a run."""
    weights: set[torch.Size]
    attended: Callable[[int], float]


def trainer(device: torch.device, teacher: Any, student: Any, batch: MicroBatch, *, fp8: bool) -> Trainer:
    """The trainer in bf16, as training/inputs.py and loop.py put it together. To be kept like them."""
    config = recipes.named("distilbert")
    exact = Teacher(copy.deepcopy(teacher), device=device, dtype=torch.float32)
    frozen = Teacher(teacher, device=device, dtype=torch.bfloat16)
    if fp8:
        quantise_encoder(frozen.model.encoder)
    engine = PlainEngine(Objective(student, config.loss), config, Ranks(0, 1, device), torch.bfloat16)
    engine.objective.train()
    here = batch.to(device)
    return Trainer(
        lambda: engine.forward_backward(here, frozen(here)),
        lambda: engine.evaluate(here, frozen(here)),
        lambda: kl_sum(exact(here), frozen(here), here, vocab_size=student.architecture.vocab_size),
        {p.shape for p in student.parameters()},
        lambda window: attended(np.array(batch.lengths), window) * sum(batch.lengths),
    )


def meta_trainer(*, size: str = "bert-base", tokens: int = 16384, length: int = 512, fp8: bool = False) -> Trainer:
    """`trainer` on meta tensors, after `pretend()`: sequences of one length."""
    device = torch.device("meta")
    memory = 80 * 2**30
    linear_distill.default_chunk_tokens = lambda columns, dtype, _, **options: CHUNK(
        columns, dtype, torch.device("cuda"), total_memory=memory, **options
    )
    with device:
        teacher, student = map(MaskedLM, architectures(size))
    return trainer(device, teacher, student, synthetic_batch(tokens, length, 0), fp8=fp8)


CHUNK = linear_distill.default_chunk_tokens


def record(trainer: Trainer, driver: Any, work: Callable[[], object]) -> list[Event]:
    """The events of `work`."""
    recorder = Recorder(trainer.weights, trainer.attended)
    driver.on_launch, profile._recorder = recorder.launch, recorder  # type: ignore[assignment]
    try:
        # in this thread, where the mode is
        with torch.autograd.set_multithreading_enabled(False), recorder:
            work()
    finally:
        driver.on_launch = profile._recorder = None
    return recorder.events


def totals(events: list[Event]) -> dict[str, float]:
    """What the tests hold: see `Event`."""
    return {
        "launches": sum(e.launches for e in events),
        "zeros": sum(e.is_zeros for e in events),
        "casts of weights": sum(e.is_cast_of_weights for e in events),
        "sums of weights": sum(e.is_sum_of_weights for e in events),
        "GB outside GEMMs": sum(e.num_bytes for e in events if e.kind not in PRODUCT_KINDS) / 1e9,
        "GFLOP": sum(e.flops for e in events) / 1e9,
    }
