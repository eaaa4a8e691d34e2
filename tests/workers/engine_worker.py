"""What the tests of engines do on every rank (forked.call): gradients of an update, runs in pieces, spoilt updates."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from fastdistil.data.shards import Shards
from fastdistil.model.sentence import Pooling
from fastdistil.run import checkpoint
from fastdistil.run.config import Config, EngineConfig, LossConfig, OptimConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training.engine import DeepSpeedEngine, Engine, PlainEngine
from fastdistil.training.objective import SUMS, Objective, means
from tests.support import toy
from tests.support.updates import CPU, by_their_names, make_batches, make_student, make_teacher

SEED = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_engine(
    ranks: Ranks,
    root: Path,
    student: str,
    *,
    stage: int,
    precision: str,
    accumulation: int,
    loss: LossConfig | None = None,
    pooling: Pooling | None = None,
    attention: Any = "auto",
) -> Engine:
    """An engine in training mode, with clipping and decay; `accumulation` micro-batches a rank in an update.

    In bf16 the encoder has a rate of its own.
    """
    encoder_lr = 1e-4 if precision == "bf16" else None
    config = Config(
        loss=loss or LossConfig(),
        optim=OptimConfig(clip_norm=1.0, weight_decay=0.01, encoder_lr=encoder_lr),
        engine=EngineConfig(bucket_elements=10_000),
    )
    model = make_student(root, student, CPU, loss=loss)
    model.encoder.attention_backend = attention
    objective, dtype = Objective(model, config.loss, pooling).train(), DTYPES[precision]
    if stage == 0:
        return PlainEngine(objective, config, ranks, dtype)
    return DeepSpeedEngine(objective, config, ranks, dtype, stage=stage, accumulation=accumulation)


def gradients(
    ranks: Ranks,
    root: Path,
    student: str,
    precision: str,
    stages: Sequence[int],
    micro_batches: int,
    loss: LossConfig | None = None,
    pooling: Pooling | None = None,
) -> dict[int, Any]:
    """{stage: (reported losses, gradients)} of an update, as updates.one_update has them of one process."""
    loss, found = loss or LossConfig(), {}
    accumulation = -(-micro_batches // ranks.world_size)
    update, batches = make_batches(root, micro_batches, CPU, ranks=ranks.world_size)
    teacher = make_teacher(root, CPU, loss=loss, dtype=DTYPES[precision])
    for stage in stages:
        engine = make_engine(
            ranks,
            root,
            student,
            stage=stage,
            precision=precision,
            accumulation=accumulation,
            loss=loss,
            pooling=pooling,
        )
        sums = torch.zeros(len(SUMS))
        for batch in batches[accumulation * ranks.rank :][:accumulation]:
            sums += engine.forward_backward(batch, teacher(batch))
        totals = ranks.sum(sums).tolist()
        reported = means(totals, update.counts, loss)
        found[stage] = reported, _full_gradients(engine)
    return found


def _full_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    model = engine.objective.student
    if isinstance(engine, PlainEngine):
        engine._sum_gradients()
        full = {n: p.grad for n, p in model.named_parameters()}
    else:
        from deepspeed.utils import safe_get_full_grad

        full = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
    return by_their_names({n: g.float() for n, g in full.items() if g is not None}, model)


class Job:
    """A run with dropout in this process, on the first `num_sequences`, of `micro_batches` an update over all ranks."""

    def __init__(
        self,
        ranks: Ranks,
        root: Path,
        stage: int,
        precision: str,
        micro_batches: int,
        num_sequences: int,
        attention: str = "auto",
    ) -> None:
        self.ranks = ranks
        self.teacher = make_teacher(root, CPU, dtype=DTYPES[precision])
        self.engine = make_engine(
            ranks,
            root,
            "dropping",
            stage=stage,
            precision=precision,
            accumulation=micro_batches // ranks.world_size,
            attention=attention,
        )
        shards = Shards(root / "shards")
        self.plan = toy.make_plan(shards.lengths[:num_sequences], seed=SEED, micro_batches=micro_batches)
        self.collator = toy.make_collator(shards)

    def train(self, updates: Iterable[int], spoilt: dict[int, float] | None = None) -> list[dict[str, Any]]:
        """A record an update: exact loss sums and gradient norm in hexadecimal, and the sequences of every micro-batch.

        In a spoilt update a number of the teacher is the dictionary's, in the last micro-batch of the last rank.
        """
        ranks, history = self.ranks, []
        for u in updates:
            update = self.plan.update(u)
            sums = torch.zeros(len(SUMS), dtype=torch.float64)
            met: list[tuple[int, tuple[int, ...]]] = []
            mine = update.of_rank(ranks.rank, ranks.world_size)
            for k, micro_batch in enumerate(mine):
                number, batch = k * ranks.world_size + ranks.rank, self.collator(micro_batch)
                met.append((number, batch.sequences))
                output = self.teacher(batch)
                if u in (spoilt or {}) and ranks.rank == ranks.world_size - 1 and k == len(mine) - 1:
                    assert output.vocabulary is not None
                    output.vocabulary.transformed_NE[3, 5] = (spoilt or {})[u]
                sums += self.engine.forward_backward(batch, output)
            norm = float(self.engine.step(1e-3))
            numbers = dict(zip((*SUMS, "norm"), (*ranks.sum(sums).tolist(), norm), strict=True))
            record = {"update": u, "epoch": self.plan.epoch_of(u), "met": sorted(_of_every_rank(met, ranks))}
            history.append(record | {"numbers": {name: x.hex() for name, x in numbers.items()}})
        return history

    def save(self, run: Path, update: int) -> None:
        """Write a checkpoint; every rank waits for it."""
        tensors = self.engine.state()
        if self.ranks.is_main:
            checkpoint.save(run, tensors, {"update": update}, keep=9)
        self.ranks.any(False)

    def load(self, run: Path) -> None:
        """Go on from the newest checkpoint."""
        saved = checkpoint.load(run, self.ranks)
        assert saved is not None
        self.engine.load(saved.tensors, step=saved.state["update"])


def _of_every_rank(mine: list[Any], ranks: Ranks) -> list[Any]:
    everyone: list[Any] = [mine] * ranks.world_size
    if ranks.host_group is not None:
        torch_dist.all_gather_object(everyone, mine, group=ranks.host_group)
    return list(chain.from_iterable(everyone))


def in_pieces(
    ranks: Ranks, root: Path, out: Path, num_sequences: int, cells: dict[tuple[Any, ...], dict[str, list[int]]]
) -> dict[tuple[Any, ...], Any]:
    """{cell: {way: history and last state}}; a way is the updates after which a fresh engine goes on from a checkpoint.

    A cell is (ZeRO stage, precision, micro-batches a rank in an update, attention).
    """
    found: dict[tuple[Any, ...], Any] = {}
    for cell, ways in cells.items():
        stage, precision, accumulation, attention = cell
        settings = stage, precision, accumulation * ranks.world_size, num_sequences, attention
        for way, ends in ways.items():
            run, history, first = out / "-".join(map(str, cell)) / way, [], 0
            job = Job(ranks, root, *settings)
            for end in ends:
                if first:
                    torch.manual_seed(999)  # whatever the generators were, a fresh process has others
                    job = Job(ranks, root, *settings)
                    job.load(run)
                history += job.train(range(first, end))
                job.save(run, end)
                first = end
            found.setdefault(cell, {})[way] = {"history": history, "state": job.engine.state()}
    return found


def piece(
    ranks: Ranks, root: Path, out: Path, stages: Sequence[int], first: int, last: int, cell: tuple[Any, ...]
) -> None:
    """Updates `first` to `last` of a run of each stage, which goes on from its checkpoint; adds to its history.jsonl.

    The cell is (precision, micro-batches of an update over all ranks, sequences).
    """
    for stage in stages:
        run = out / str(stage)
        job = Job(ranks, root, stage, *cell)
        if first:
            job.load(run)
        history = job.train(range(first, last))
        job.save(run, last)
        if ranks.is_main:
            with (run / "history.jsonl").open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in history)


def spoilt(ranks: Ranks, root: Path, stages: Sequence[int]) -> dict[str, Any]:
    """What updates whose gradient is not finite leave behind, and a run that never met them, for every engine."""
    found = {}
    for precision in DTYPES:
        for stage in stages:
            cell = (stage, precision, 2, 400)
            job, quiet = Job(ranks, root, *cell), Job(ranks, root, *cell)
            history = job.train([0, 1])
            before = job.engine.state()
            history += job.train([2, 3], {2: float("nan"), 3: float("inf")})
            after = job.engine.state()
            history += job.train([4])
            quiet.train([0, 1, 4])
            found[f"{precision}-{stage}"] = {
                "norms": [float.fromhex(record["numbers"]["norm"]) for record in history],
                "before": before,
                "after": after,
                "on": job.engine.state(),
                "without": quiet.engine.state(),
            }
    return found
