"""Run under torchrun by test_engine.py: every ZeRO stage in one launch, results to a file.

    torchrun ... tests/workers/engine_worker.py FOLDER OUT precision

For each engine: the gradient and loss terms of one update, then six updates straight against three, a saved state, a fresh
engine and three more. Dropout is on in the second part.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastdistil.data import batches as data
from fastdistil.data.shards import Shards
from fastdistil.model.weights import hugging_face_state
from fastdistil.run import ranks
from fastdistil.run.command import leave
from fastdistil.run.config import Config, EngineConfig, MaskingConfig, OptimConfig
from fastdistil.training import objective as losses
from fastdistil.training.engine import DeepSpeedEngine, Engine, PlainEngine
from fastdistil.training.objective import Objective
from tests.training.test_objective import make_batches, make_student, make_teacher
from tests.workers.resume_worker import switch_dropout_on

BUDGET, UPDATES = 256, 6
CPU = torch.device("cpu")


def make(
    root: Path, config: Config, stage: int | None, accumulation: int, place: ranks.Place, dropout: float
) -> Engine:
    student = make_student(root, CPU)
    if dropout:
        switch_dropout_on(student, dropout)
    objective = Objective(student, config.loss)
    if stage is None:
        return PlainEngine(objective, config, device=place.device)
    return DeepSpeedEngine(objective, config, stage=stage, accumulation=accumulation, place=place)


def one_update(root: Path, config: Config, stage: int | None, place: ranks.Place) -> dict:
    """Loss terms and full gradients of one update of 4 micro-batches, as hugging_face_state names them."""
    update, batches = make_batches(root, 4, CPU)
    accumulation = 4 // place.world_size
    engine, teacher = make(root, config, stage, accumulation, place, 0.0), make_teacher(root, CPU)
    teacher.model.to(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    sums = torch.zeros(len(losses.SUMS))
    for k in range(accumulation):
        batch = batches[k * place.world_size + place.rank]
        sums += engine.forward_backward(batch, teacher(batch), update.num_tokens, update.num_masked)
    if stage is None:
        full = {n: p.grad for n, p in engine.objective.student.named_parameters()}
    else:
        from deepspeed.utils import safe_get_full_grad

        full = {n: safe_get_full_grad(p) for n, p in engine.objective.student.named_parameters()}
    grads = {n: g.float() for n, g in full.items() if g is not None}
    means = losses.means(
        ranks.sum_over_ranks(sums).tolist(), update.num_tokens, update.num_masked, config.loss, has_teacher=True
    )
    return {"means": means, "gradients": hugging_face_state(grads, engine.objective.student.architecture)}


def train(root: Path, config: Config, engine: Engine, updates: range, place: ranks.Place) -> list[list[float]]:
    shards = Shards(root / "shards")
    plan = data.Plan(shards.lengths, seed=7, token_budget=BUDGET, micro_batches_per_update=2, mask_fraction=0.15)
    collator = data.Collator(shards, shards.counts, token_budget=BUDGET, masking=MaskingConfig())
    teacher = make_teacher(root, CPU)
    teacher.model.to(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    history = []
    for u in updates:
        update = plan.update(u)
        sums = torch.zeros(len(losses.SUMS))
        for k, slot in enumerate(data.rank_slots(update, rank=place.rank, world_size=place.world_size)):
            batch = collator(slot)
            torch.manual_seed(data.seed_of(7, "dropout", u, k * place.world_size + place.rank))
            sums += engine.forward_backward(batch, teacher(batch), update.num_tokens, update.num_masked)
        norm = engine.step(1e-3)
        history.append([*ranks.sum_over_ranks(sums).tolist(), norm.item()])
    return history


def main(root: Path, out: Path, precision: str) -> None:
    config = Config(optim=OptimConfig(clip_norm=1.0, weight_decay=0.01), engine=EngineConfig(bucket_elements=10_000))
    config = replace(config, engine=replace(config.engine, precision=precision))
    place = ranks.init("cpu", timeout_s=120, threads=1)
    results = {}
    stages: list[int | None] = [0, 1, 2, 3] if place.world_size > 1 else [None, 0, 3]
    for stage in stages:
        result = one_update(root, config, stage, place)
        accumulation = 2 // place.world_size
        straight = make(root, config, stage, accumulation, place, 0.1)
        history = train(root, config, straight, range(UPDATES), place)
        first = make(root, config, stage, accumulation, place, 0.1)
        train(root, config, first, range(UPDATES // 2), place)
        box = [first.state()]
        state = ranks.broadcast_object(box[0], place)
        second = make(root, config, stage, accumulation, place, 0.1)
        second.load(state, step=UPDATES // 2)
        resumed = train(root, config, second, range(UPDATES // 2, UPDATES), place)
        result |= {
            "history": history,
            "resumed": resumed,
            "straight_state": straight.state(),
            "resumed_state": second.state(),
            "half_state": state,
        }
        results[stage] = result
    if place.is_main:
        torch.save(results, out)
    ranks.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    leave(0)
