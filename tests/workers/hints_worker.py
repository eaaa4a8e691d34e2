"""Run under torchrun by test_hints.py: gradients of one update with the losses of hints.py, ZeRO 1 and 3, results to a file.

torchrun ... tests/workers/hints_worker.py FOLDER OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastdistil.model.weights import hugging_face_state, load_masked_lm
from fastdistil.run import ranks as dist
from fastdistil.run.command import leave
from fastdistil.run.config import Config, EngineConfig
from fastdistil.training import objective as losses
from fastdistil.training.engine import DeepSpeedEngine
from fastdistil.training.objective import Objective
from tests.training.test_hints import VALUES, make_batches, make_teacher


def main(root: Path, out: Path) -> None:
    place = dist.init("cpu", timeout_s=60, threads=1)
    loss = replace(VALUES, hidden=2.0)
    update, batches = make_batches(root, 3, ranks=2)  # the last round of rank 1 is empty
    results = {}
    for stage in (1, 3):
        config = Config(loss=loss, engine=EngineConfig(bucket_elements=10_000))
        objective = Objective(load_masked_lm(root / "same", need_head=True), loss)
        engine = DeepSpeedEngine(objective, config, stage=stage, accumulation=2, place=place)
        teacher, sums = make_teacher(root, loss), torch.zeros(len(losses.SUMS))
        for batch in batches[2 * place.rank :][:2]:
            sums += engine.forward_backward(batch, teacher(batch), update.num_tokens, update.num_masked)
        from deepspeed.utils import safe_get_full_grad

        student = engine.objective.student
        full = {n: safe_get_full_grad(p) for n, p in student.named_parameters()}
        gradients = {n: g.float() for n, g in full.items() if g is not None}
        totals = dist.sum_over_ranks(sums)
        results[stage] = totals, hugging_face_state(gradients, student.architecture)
    if place.is_main:
        torch.save(results, out)
    dist.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
