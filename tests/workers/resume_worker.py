"""Run under torchrun (or alone) by test_resume.py: pieces of runs, through checkpoints on disk.

resume_worker.py FOLDER OUT cells                  every engine of this number of ranks: 12 updates straight, 6 + 6, 4 + 4 + 4
resume_worker.py FOLDER OUT everything             the same, nothing left out with several ranks
resume_worker.py FOLDER OUT STAGES FIRST LAST      goes on from OUT/STAGE's checkpoint, from update FIRST to LAST; STAGES as 1,2,3, or plain
"""

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from fastdistil.data import batches
from fastdistil.data.shards import Shards
from fastdistil.model.weights import load_masked_lm
from fastdistil.run import checkpoint, ranks
from fastdistil.run.command import leave
from fastdistil.run.config import Config, EngineConfig, MaskingConfig, OptimConfig
from fastdistil.training import objective as losses
from fastdistil.training.engine import DeepSpeedEngine, Engine, PlainEngine
from fastdistil.training.objective import Objective
from fastdistil.training.teacher import Teacher

BUDGET, SEED = 256, 7
SOME = (("fp32", 4), ("bf16", 1))  # precision and accumulation of `cells` with several ranks: 40 s less of CI
CPU = torch.device("cpu")


def switch_dropout_on(student: torch.nn.Module, probability: float = 0.1) -> None:
    """After the embeddings, in the attention and after the feed-forward layer."""
    count = 0
    for module in student.modules():
        for name in ("dropout_p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
                count += 1
    assert count >= 3


def of_every_rank(mine: list, place: ranks.Place) -> list:
    everyone = [mine] * place.world_size
    if place.host_group is not None:
        torch.distributed.all_gather_object(everyone, mine, group=place.host_group)
    return list(chain.from_iterable(everyone))


class Job:
    """A run in this process, on the first `num_sequences`; `stage` None is the plain engine."""

    def __init__(self, root: Path, place: ranks.Place, stage: int | None, precision: str, micro_batches: int, num_sequences: int) -> None:  # fmt: skip
        self.place = place
        config = Config(
            optim=OptimConfig(clip_norm=1.0, weight_decay=0.01), engine=EngineConfig(bucket_elements=10_000)
        )
        config = replace(config, engine=replace(config.engine, precision=precision))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.teacher = Teacher(load_masked_lm(root / "teacher", need_head=True), device=CPU, dtype=dtype)  # fmt: skip
        student = load_masked_lm(root / "student", need_head=True)
        switch_dropout_on(student)
        objective = Objective(student, config.loss).train()
        self.engine: Engine
        if stage is None:
            self.engine = PlainEngine(objective, config, device=CPU)
        else:
            self.engine = DeepSpeedEngine(objective, config, stage=stage, accumulation=micro_batches // place.world_size, place=place)  # fmt: skip
        shards = Shards(root / "shards")
        self.plan = batches.Plan(shards.lengths[:num_sequences], seed=SEED, token_budget=BUDGET, micro_batches_per_update=micro_batches, mask_fraction=0.15)  # fmt: skip
        self.collator = batches.Collator(shards, shards.counts, token_budget=BUDGET, masking=MaskingConfig())  # fmt: skip

    def train(self, updates: range) -> list[dict]:
        """Loss sums and gradient norm of each update, in hexadecimal, and the sequences of each micro-batch that a rank met."""
        place, history = self.place, []
        for u in updates:
            update = self.plan.update(u)
            sums = torch.zeros(len(losses.SUMS), dtype=torch.float64)
            met: list[tuple[int, tuple[int, ...]]] = []
            slots = batches.rank_slots(update, rank=place.rank, world_size=place.world_size)
            for k, slot in enumerate(slots):
                batch = self.collator(slot)
                number = k * place.world_size + place.rank
                met.append((number, batch.sequences))
                torch.manual_seed(batches.seed_of(SEED, "dropout", u, number))
                hints = self.teacher(batch)
                sums += self.engine.forward_backward(batch, hints, update.num_tokens, update.num_masked)  # fmt: skip
            norm = self.engine.step(1e-3).item()
            numbers = [*ranks.sum_over_ranks(sums).tolist(), norm]
            history.append({"update": u, "sums": [x.hex() for x in numbers], "met": sorted(of_every_rank(met, place)), "epoch": self.plan.epoch_of(u)})  # fmt: skip
        return history

    def save(self, run: Path, update: int) -> None:
        tensors = self.engine.state()
        if self.place.is_main:
            checkpoint.save(run, tensors, {"update": update}, keep=9)
        ranks.barrier(self.place)

    def load(self, run: Path) -> None:
        saved = checkpoint.load(run, self.place)
        assert saved is not None
        self.engine.load(saved.tensors, step=saved.state["update"])


def pieces(root: Path, run: Path, place: ranks.Place, cell: tuple, ends: list[int]) -> dict:
    """A run in pieces, each a fresh engine that goes on from a checkpoint: its history and last state."""
    history, first = [], 0
    job = Job(root, place, *cell)
    for end in ends:
        if first:
            torch.manual_seed(999)  # whatever the generators were, a fresh process has others
            job = Job(root, place, *cell)
            job.load(run)
        history += job.train(range(first, end))
        job.save(run, end)
        first = end
    return {"history": history, "state": job.engine.state(), "generator": torch.get_rng_state()}


def cells(root: Path, out: Path, place: ranks.Place, *, everything: bool) -> None:
    results = {}
    for stage in [0, 1, 2, 3] if place.world_size > 1 else [None]:
        for precision in ("fp32", "bf16"):
            for accumulation in (1, 4):
                if stage is not None and not everything and (precision, accumulation) not in SOME:
                    continue
                # so few sequences that even 12 micro-batches go beyond an epoch
                cell = (stage, precision, accumulation * place.world_size, 80)
                name = f"{stage}-{precision}-{accumulation}"
                ways = {"straight": [12], "6 + 6": [6, 12]}
                if everything or stage is None:
                    ways["4 + 4 + 4"] = [4, 8, 12]
                if accumulation == 4 and precision == "fp32" and stage in ((None, 1) if everything else (None,)):
                    ways["every update"] = list(range(1, 13))
                for way, ends in ways.items():
                    result = pieces(root, out / name / way, place, cell, ends)
                    if place.is_main:
                        results[name, way] = result
    if place.is_main:
        torch.save({f"{n}|{w}": r for (n, w), r in results.items()}, out / "cells.pt")


def part(root: Path, out: Path, place: ranks.Place, stages: list[str], first: int, last: int) -> None:  # fmt: skip
    for stage in stages:
        run = out / stage
        job = Job(root, place, None if stage == "plain" else int(stage), "fp32", 4, 400)
        if first:
            job.load(run)
        history = job.train(range(first, last))
        job.save(run, last)
        if place.is_main:
            with (run / "history.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in history)


if __name__ == "__main__":
    here = ranks.init("cpu", timeout_s=120, threads=1)
    if sys.argv[3] in ("cells", "everything"):
        cells(Path(sys.argv[1]), Path(sys.argv[2]), here, everything=sys.argv[3] == "everything")
    else:
        stages = sys.argv[3].split(",")
        part(Path(sys.argv[1]), Path(sys.argv[2]), here, stages, *map(int, sys.argv[4:]))
    ranks.shutdown()
    leave(0)
