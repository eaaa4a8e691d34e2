"""Bytes that every ZeRO stage puts into collectives, counted on every rank (forked.call)."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistil.data.batches import one_token
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run.config import Config, EngineConfig, LossConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training.engine import DeepSpeedEngine, PlainEngine
from fastdistil.training.objective import Objective
from tests.support import toy


class Sent(TorchDispatchMode):
    """Adds up, by the collective's name, the bytes of its largest side: the whole gradient, the whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [_num_bytes(a) for a in args]
            self.num_bytes[func._schema.name.removeprefix("c10d::")] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


def sent(ranks: Ranks, dtype: torch.dtype) -> dict[int, dict[str, Any]]:
    """{stage: {phase: {collective: bytes}}} of an update of two micro-batches, and the number of parameters.

    "inner" is the micro-batch before the last one, "boundary" the last one with the optimiser's step.
    """
    config = replace(Config(), engine=EngineConfig(bucket_elements=10_000), loss=LossConfig(kd=0, mlm=1, cosine=0))
    found: dict[int, dict[str, Any]] = {}
    for stage in (0, 1, 2, 3):
        student = MaskedLM(toy.architecture(model_type="distilbert", num_layers=2, token_types=0))
        objective = Objective(student, config.loss)
        found[stage] = {"num_parameters": sum(p.numel() for p in objective.parameters())}
        if stage == 0:
            engine = PlainEngine(objective, config, ranks, dtype)
        else:
            engine = DeepSpeedEngine(objective, config, ranks, dtype, stage=stage, accumulation=2)
        for _ in range(2):  # in the first update DeepSpeed makes its buffers
            for phase in ("inner", "boundary"):
                with Sent() as counted:
                    engine.forward_backward(one_token(ranks.device), None)
                    if phase == "boundary":
                        engine.step(1e-4)
                found[stage][phase] = dict(counted.num_bytes)
    return found
