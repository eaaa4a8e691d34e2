"""Run by test_footprint.py, alone or under torchrun: real updates of each case, and their peaks of memory to OUT.

    python tests/workers/memory_worker.py CASES.json OUT.json

A peak is the allocator's, from before the models are made: on the CPU of torch.profiler's memory events, on CUDA
torch.cuda.max_memory_allocated.
"""

import gc
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from fastdistil.data import batches
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.architecture import Architecture
from fastdistil.model.encoder import MaskedLM
from fastdistil.run import ranks as dist
from fastdistil.run.command import leave
from fastdistil.run.config import BatchConfig, Config, EngineConfig, TeacherConfig
from fastdistil.training import engine
from fastdistil.training.objective import Objective
from fastdistil.training.preflight import Resolved
from fastdistil.training.teacher import Teacher

FOLDER = Path("unused")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run at the size of a test."""

    student: Architecture
    teacher: Architecture | None
    tokens: int
    length: int = 128  # of every sequence
    rounds: int = 1  # micro-batches a rank in an update
    ranks: int = 1
    device: str = "cpu"
    engine: dict[str, Any] = field(default_factory=dict)

    def resolved(self) -> Resolved:
        return Resolved(
            config=Config(
                batch=BatchConfig(token_budget=self.tokens),
                teacher=TeacherConfig(path=FOLDER if self.teacher else None, overlap=False),
                engine=EngineConfig(device=cast(Any, self.device), **self.engine),
            ),
            teacher=self.teacher,
            source=None,
            source_path=None,
            layers=(),
            student=self.student,
            meta=cast(Any, SimpleNamespace(max_length=self.length)),
            tokenizer_path=FOLDER,
            micro_batches_per_update=self.rounds * self.ranks,
        )

    def micro_batch(self, device: torch.device) -> batches.MicroBatch:
        """Random ids; the last sequence is padding, 15 % of the others are predicted."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, self.student.vocab_size, (self.tokens,), generator=generator)
        real, count = self.tokens - self.length, self.tokens // self.length
        rows = torch.arange(int(0.15 * real))
        labels = torch.full_like(ids, batches.NO_LABEL)
        labels[rows] = ids[rows]
        positions = torch.arange(self.length).repeat(count)
        num_rows = torch.tensor(real, dtype=torch.int32)
        lengths = (self.length,) * count
        return batches.MicroBatch(
            ids, positions, labels, rows, num_rows, lengths, sequence_layout(lengths), real, len(rows), ()
        ).to(device)  # fmt: skip


def save(cases: list[Case], path: Path) -> None:
    path.write_text(json.dumps([asdict(case) for case in cases]))


def load(path: Path) -> list[Case]:
    return [
        Case(**r | {k: r[k] and Architecture(**r[k]) for k in ("student", "teacher")})
        for r in json.loads(path.read_text())
    ]


def updates(case: Case, place: dist.Place) -> None:
    """Two updates as pretrain.train makes them, then what a checkpoint asks of the engine."""
    config = case.resolved().config
    dtype = engine.compute_dtype(config, place.device)
    teacher = None
    if case.teacher is not None:
        teacher = Teacher(MaskedLM(case.teacher), device=place.device, dtype=dtype)
        teacher.model.encoder.attention_backend = config.engine.attention
    student = MaskedLM(case.student)
    student.encoder.activation_checkpointing = config.engine.activation_checkpointing
    student.encoder.attention_backend = config.engine.attention
    objective = Objective(student, config.loss)
    trainer = engine.make_engine(objective, config, accumulation=case.rounds, place=place)
    objective.train()
    batch, hints = case.micro_batch(place.device), None
    for _ in range(2):
        for _ in range(case.rounds):
            hints = teacher(batch) if teacher else None
            trainer.forward_backward(batch, hints, batch.num_tokens, batch.num_masked)
        trainer.step(1e-4)
    trainer.state()


def cpu_peak(case: Case, place: dist.Place, trace: Path) -> int:
    """Most bytes that PyTorch's allocator had given out at once."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        updates(case, place)
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = [(e["ts"], e["args"]) for e in events if e["name"] == "[memory]"]
    live: dict[int, int] = {}
    peak = total = 0
    for _, event in sorted(memory, key=lambda pair: pair[0]):
        address, num_bytes = event["Addr"], event["Bytes"]
        # by address, not by the sum of the events: gloo's threads free tensors that the profiler does not see go
        total -= live.pop(address, 0)
        if num_bytes > 0:
            live[address] = num_bytes
            total += num_bytes
        peak = max(peak, total)
    return peak


def main(cases: list[Case], out: Path) -> None:
    place = dist.init(cases[0].device, timeout_s=60, threads=1)
    peaks = []
    for case in cases:
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            updates(case, place)
            peaks.append(torch.cuda.max_memory_allocated())
        else:
            peaks.append(cpu_peak(case, place, out.with_suffix(f".trace{place.rank}")))
        gc.collect()  # DeepSpeed's engines are cycles
    if place.is_main:
        out.write_text(json.dumps(peaks))
    dist.shutdown()


if __name__ == "__main__":
    main(load(Path(sys.argv[1])), Path(sys.argv[2]))
    leave(0)
