"""Run by test_numbers.py, alone or under torchrun: updates with a gradient that one rank's micro-batch spoils, for every engine.

tests/workers/numbers_worker.py FOLDER OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastdistil.data import batches
from fastdistil.data.shards import Shards
from fastdistil.run import ranks
from fastdistil.run.command import leave
from fastdistil.run.config import Config, EngineConfig, MaskingConfig, OptimConfig
from fastdistil.training import objective
from fastdistil.training.engine import Engine
from tests.training.test_objective import make_teacher
from tests.workers.engine_worker import BUDGET, CPU, make


def train(root: Path, engine: Engine, updates: list[int], spoilt: dict[int, float], place: ranks.Place) -> list[float]:
    """Gradient norms of some updates; in a spoilt one a number of the last rank's teacher is what the dictionary says."""
    shards = Shards(root / "shards")
    plan = batches.Plan(shards.lengths, seed=7, token_budget=BUDGET, micro_batches_per_update=2, mask_fraction=0.15)
    collator = batches.Collator(shards, shards.counts, token_budget=BUDGET, masking=MaskingConfig())
    teacher, norms = make_teacher(root, CPU), []
    teacher.model.float()
    for u in updates:
        update = plan.update(u)
        slots = batches.rank_slots(update, rank=place.rank, world_size=place.world_size)
        for k, slot in enumerate(slots):
            batch = collator(slot)
            torch.manual_seed(batches.seed_of(7, "dropout", u, k * place.world_size + place.rank))
            hints = teacher(batch)
            if u in spoilt and place.rank == place.world_size - 1 and k == len(slots) - 1:
                hints.transformed_NE[3, 5] = spoilt[u]
            engine.forward_backward(batch, hints, update.num_tokens, update.num_masked)
        norms.append(engine.step(1e-3).item())
    return norms


def main(root: Path, out: Path) -> None:
    place = ranks.init("cpu", timeout_s=120, threads=1)
    results = {}
    for precision in ("fp32", "bf16"):
        config = Config(
            optim=OptimConfig(clip_norm=1.0, weight_decay=0.01),
            engine=EngineConfig(bucket_elements=10_000, precision=precision),
        )
        config = replace(config, loss=objective.LossConfig())
        for stage in [0, 1, 2, 3] if place.world_size > 1 else [None]:

            def fresh(stage=stage, config=config) -> Engine:
                return make(root, config, stage, 2 // place.world_size, place, 0.1)

            spoilt, quiet = fresh(), fresh()
            norms = train(root, spoilt, [0, 1], {}, place)
            before = spoilt.state()
            norms += train(root, spoilt, [2, 3], {2: float("nan"), 3: float("inf")}, place)
            after = spoilt.state()
            norms += train(root, spoilt, [4], {}, place)
            train(root, quiet, [0, 1, 4], {}, place)
            results[f"{precision}-{stage}"] = {
                "norms": norms,
                "before": before,
                "after": after,
                "on": spoilt.state(),
                "without": quiet.state(),
            }
    if place.is_main:
        torch.save(results, out)
    ranks.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
