"""Run under torchrun by test_scaling.py: bytes that every ZeRO stage puts into collectives, as JSON on rank 0.

    torchrun ... tests/workers/communication_worker.py fp32|bf16

Phases: "inner" is a micro-batch before the last one of an update, "boundary" the last one with the optimiser's step.
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistil.data.batches import one_token
from fastdistil.model.encoder import MaskedLM
from fastdistil.run import ranks
from fastdistil.run.command import leave
from fastdistil.run.config import Config, EngineConfig, LossConfig
from fastdistil.training.engine import DeepSpeedEngine
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


def main(precision: str) -> None:
    place = ranks.init("cpu", timeout_s=60, threads=1)
    settings = EngineConfig(precision=precision, bucket_elements=10_000)  # type: ignore[arg-type]
    config = replace(Config(), engine=settings, loss=LossConfig(kd=0, mlm=1, cosine=0))
    found = {}
    for stage in (0, 1, 2, 3):
        student = MaskedLM(toy.architecture(model_type="distilbert", num_layers=2, token_types=0))
        objective = Objective(student, config.loss)
        num_parameters = sum(p.numel() for p in objective.parameters())
        trainer = DeepSpeedEngine(objective, config, stage=stage, accumulation=2, place=place)
        phases = {}
        for update in range(2):  # in the first update DeepSpeed makes its buffers
            for phase in ("inner", "boundary"):
                with Sent() as sent:
                    trainer.forward_backward(one_token(place.device), None, 4, 4)
                    if phase == "boundary":
                        trainer.step(1e-4)
                if update:
                    phases[phase] = dict(sent.num_bytes)
        found[stage] = phases | {"num_parameters": num_parameters}
    if place.is_main:
        print("RESULT " + json.dumps(found))
    ranks.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
