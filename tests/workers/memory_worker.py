"""Real updates of each case and their peaks of memory, from before the models are made (forked.call).

A peak is the allocator's: on the CPU of torch.profiler's memory events, on CUDA torch.cuda.max_memory_allocated.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from fastdistil.data.batches import NO_LABEL, MicroBatch
from fastdistil.kernels.layout import sequence_layout
from fastdistil.kernels.mixture import running_shares
from fastdistil.model.architecture import Architecture
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.sentence import Pooling
from fastdistil.run.config import BatchConfig, Config, EngineConfig, LossConfig, TeacherConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training.engine import make_engine
from fastdistil.training.models import spread_layers
from fastdistil.training.objective import Objective, kept_outputs
from fastdistil.training.preflight import Resolved
from fastdistil.training.teacher import Teacher

FOLDER = Path("unused")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run at the size of a test."""

    student: Architecture
    teacher: Architecture | None
    others: tuple[Architecture, ...] = ()
    tokens: int
    length: int = 128  # of every sequence
    rounds: int = 1  # micro-batches a rank in an update
    ranks: int = 1
    device: str = "cpu"
    engine: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)

    def resolved(self) -> Resolved:
        return Resolved(
            config=Config(
                batch=BatchConfig(token_budget=self.tokens),
                teacher=TeacherConfig(
                    path=FOLDER if self.teacher else None, others=(FOLDER,) * len(self.others), overlap=False
                ),
                loss=self.loss if self.teacher else LossConfig(kd=0.0, cosine=0.0),
                engine=EngineConfig(device=cast(Any, self.device), **self.engine),
            ),
            teacher=self.teacher,
            others=self.others,
            source_path=None,
            layers=spread_layers(self.student.num_layers, self.teacher) if self.teacher else (),
            student=self.student,
            metas=(cast(Any, SimpleNamespace(max_length=self.length, num_sequences=1, num_tokens=self.length)),),
            world_size=self.ranks,
            micro_batches_per_update=self.rounds * self.ranks,
            notes=(),
            inputs={},
        )

    def micro_batch(self, device: torch.device) -> MicroBatch:
        """Random ids; the last sequence is padding, 15 % of the others are predicted."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, self.student.vocab_size, (self.tokens,), generator=generator)
        real, count = self.tokens - self.length, self.tokens // self.length
        rows = torch.arange(int(0.15 * real))
        labels = torch.full_like(ids, NO_LABEL)
        labels[rows] = ids[rows]
        positions = torch.arange(self.length).repeat(count)
        lengths = (self.length,) * count
        return MicroBatch(
            input_ids=ids,
            position_ids=positions,
            labels=labels,
            masked_rows=rows,
            num_rows=torch.tensor(real, dtype=torch.int32),
            denominators=torch.tensor([real, len(rows), real // self.length], dtype=torch.float64),
            dropout_seed=torch.tensor(0),
            generator_seed=0,
            lengths=lengths,
            layout=sequence_layout(lengths),
            num_tokens=real,
            num_masked=len(rows),
            sequences=tuple(range(count - 1)),
        ).to(device)


def updates(case: Case, ranks: Ranks) -> None:
    """Two updates as the loop makes them, then what a checkpoint asks of the engine."""
    resolved = case.resolved()
    settings, teacher = resolved.config.engine, None
    if case.teacher is not None:
        model = MaskedLM(case.teacher)
        model.encoder.attention_backend = settings.attention
        kept = kept_outputs(resolved.config.loss, resolved.imitated_layers, resolved.relation_layer)
        place: dict[str, Any] = {"device": ranks.device, "dtype": resolved.teacher_dtype(ranks.device)}
        others = [Teacher(MaskedLM(other), **place) for other in case.others]
        shares = running_shares([1.0] * (1 + len(others)))
        teacher = Teacher(model, **place, kept_outputs=kept, others=others, shares=shares)
    student = MaskedLM(case.student)
    student.encoder.activation_checkpointing = settings.activation_checkpointing
    student.encoder.attention_backend = settings.attention
    objective = Objective(student, resolved.config.loss, Pooling(mode="mean", normalise=True, max_length=None))
    engine = make_engine(objective, resolved, ranks)
    objective.train()
    batch, output = case.micro_batch(ranks.device), None
    for _ in range(2):
        for _ in range(case.rounds):
            output = teacher(batch) if teacher else None
            engine.forward_backward(batch, output)
        engine.step(1e-4)
    engine.state()


def cpu_peak(case: Case, ranks: Ranks) -> int:
    """Most bytes that PyTorch's allocator had given out at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        updates(case, ranks)
    live: dict[int, int] = {}
    peak = total = 0
    for _, address, num_bytes in sorted(_memory_events(profile)):
        # by address, not by the sum of the events: gloo's threads free tensors that the profiler does not see go
        total -= live.pop(address, 0)
        if num_bytes > 0:
            live[address] = num_bytes
            total += num_bytes
        peak = max(peak, total)
    return peak


def _memory_events(profile: torch.profiler.profile) -> Iterator[tuple[int, int, int]]:
    """(nanosecond, address, bytes; negative where they are freed) of all threads."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.experimental_event_tree()
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def peaks(ranks: Ranks, cases: list[Case]) -> list[int]:
    """Of this rank, every case on all of them; on a GPU where `ranks` has one."""
    found = []
    for case in cases:
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            updates(case, ranks)
            found.append(torch.cuda.max_memory_allocated())
        else:
            found.append(cpu_peak(case, ranks))
        gc.collect()  # DeepSpeed's engines are cycles
    return found


def peaks_alone(ranks: Ranks, cases: list[Case]) -> list[int]:
    """Of every so many-th case, each in one process."""
    return peaks(Ranks(0, 1, ranks.device), cases[ranks.rank :: ranks.world_size])
