"""A micro-batch as one CUDA graph: what is recorded, replayed and refused. Here a graph runs its work again on the CPU.

What only a GPU can say, that recording succeeds and what it gains, benchmarks/first_light.py asks.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.data.batches import MicroBatch
from fastdistil.data.shards import Shards
from fastdistil.model.sentence import Pooling
from fastdistil.run import profile
from fastdistil.run.config import Config, LossConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training import graph
from fastdistil.training.engine import PlainEngine
from fastdistil.training.graph import Step
from fastdistil.training.objective import Objective
from tests.support import toy
from tests.support.updates import CPU, make_student, make_teacher
from tests.workers.memory_worker import Case

MILLISECONDS = {False: 2.0, True: 1.0}
POOLING = Pooling(mode="mean", normalise=True, max_length=None)
EMBED = LossConfig(kd=0.0, mlm=0.0, cosine=0.0, hidden=1.0, embedding=1.0, similarity=1.0)


class Replayed:
    """Stands for a CUDA graph: it knows nothing of a micro-batch but its buffers."""

    def __init__(self, work: Any) -> None:
        self.work, self.result, self.replays = work, torch.zeros(0), 0

    def pool(self) -> str:
        return "of the first"

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.work())


@pytest.fixture
def recorded(monkeypatch):
    """(work, pool) of everything that was recorded."""
    seen: list[tuple[Any, Any]] = []

    def capture(work: Any, pool: Any) -> tuple[Replayed, Tensor]:
        seen.append((work, pool))
        made = Replayed(work)
        made.result = torch.zeros_like(work())  # on a GPU nothing runs while it is recorded, which Recorded undoes
        return made, made.result

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(graph, "warm_up", lambda work, device: [work() for _ in range(graph.WARM_UP)])
    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "milliseconds", lambda made: MILLISECONDS[made.work.keywords["overlap"]])
    return seen


def trainer(folder, *, teacher: bool = True, loss: LossConfig | None = None) -> tuple[PlainEngine, Any]:
    """An engine of a student with dropout, whose gradient is cleared as on a GPU, and its teacher."""
    loss = loss or LossConfig()
    objective = Objective(make_student(folder, "dropping", CPU, loss=loss), loss, POOLING).train()
    engine = PlainEngine(objective, Config(), Ranks(0, 1, CPU), torch.float32)
    engine.flat.zeroed = True
    engine.flat.clear()
    frozen = make_teacher(folder, CPU, loss=loss)
    for model in (engine.objective.student, frozen.model):
        model.encoder.attention_backend = "fused"  # as on a GPU: PyTorch's own reads the lengths on the host
    return engine, frozen if teacher else None


def batches(folder, budgets: tuple[int, ...] = (256, 256, 256)) -> list[MicroBatch]:
    """One after the other of a plan, by a collator of each budget."""
    shards = Shards(folder / "shards")
    found = []
    for number, budget in enumerate(budgets):
        plan = toy.make_plan(shards.lengths, token_budget=min(budgets)).update(number).micro_batches[0]
        found.append(toy.make_collator(shards, token_budget=budget)(plan))
    return found


def numbers(engine: PlainEngine, run: Callable[[MicroBatch], Tensor], given: list[MicroBatch]) -> tuple[Any, Tensor]:
    """The sums of micro-batches, and the gradient that they add up to."""
    engine.flat.clear()
    sums = [run(batch).tolist() for batch in given]
    return sums, engine.flat.gradient.clone()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("with_teacher", "loss"), [(False, None), (True, None), (True, EMBED)], ids=["alone", "distilbert", "embed"]
)
def test_replays_give_the_numbers_of_the_engine(of_each, recorded, with_teacher, loss, overlap):
    """Of micro-batches that differ in text, layout, denominators and dropout, bit for bit, over two updates."""
    engine, teacher = trainer(of_each, teacher=with_teacher, loss=loss)
    given = batches(of_each)
    assert len({b.dropout_seed.item() for b in given}) == len({tuple(b.denominators.tolist()) for b in given}) == 3
    wanted = numbers(engine, lambda b: engine.forward_backward(b, teacher(b) if teacher else None), given)
    step = Step(engine, teacher, overlap=overlap)
    for _ in range(2):
        found = numbers(engine, lambda b: step.forward_backward(b, None), given)
        assert found[0] == wanted[0]
        assert torch.equal(found[1], wanted[1])
    ways = [work.keywords["overlap"] for work, _ in recorded]
    assert ways == ([False, True] if overlap and with_teacher else [False])
    assert [pool for _, pool in recorded] == [None, "of the first"][: len(ways)]
    (one,) = step.recorded.values()
    assert one.graph.replays == 6  # type: ignore[attr-defined]


def test_recording_in_the_middle_of_an_update_leaves_its_gradient(folder, recorded):
    engine, teacher = trainer(folder)
    given = batches(folder)
    _, wanted = numbers(engine, lambda b: engine.forward_backward(b, teacher(b)), given)
    step = Step(engine, teacher, overlap=True)
    engine.flat.clear()
    engine.forward_backward(given[0], teacher(given[0]))
    for batch in given[1:]:
        step.forward_backward(batch, None)
    assert torch.equal(engine.flat.gradient, wanted)


def test_another_shape_is_another_graph(folder, recorded):
    engine, teacher = trainer(folder)
    given = batches(folder, (256, 512, 256))
    wanted = numbers(engine, lambda b: engine.forward_backward(b, teacher(b)), given)
    step = Step(engine, teacher, overlap=False)
    found = numbers(engine, lambda b: step.forward_backward(b, None), given)
    assert len(step.recorded) == len(recorded) == 2
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_way_stays(folder, recorded, monkeypatch, caplog, faster):
    monkeypatch.setitem(MILLISECONDS, faster, 0.5)
    caplog.set_level(logging.INFO, "fastdistil")
    engine, teacher = trainer(folder)
    step = Step(engine, teacher, overlap=True)
    step.forward_backward(batches(folder)[0], None)
    (one,) = step.recorded.values()
    assert one.graph.work.keywords["overlap"] is faster  # type: ignore[attr-defined]
    assert "0.50 ms: teacher beside the student's forward" in caplog.text


def test_a_step_that_cannot_be_recorded_runs_and_says_why(folder, recorded, monkeypatch, caplog):
    def fails(work: Any, pool: Any) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture", fails)
    engine, teacher = trainer(folder)
    given = batches(folder)
    wanted = numbers(engine, lambda b: engine.forward_backward(b, teacher(b)), given)
    step = Step(engine, teacher, overlap=True)
    found = numbers(engine, lambda b: step.forward_backward(b, None), given)
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])
    (line,) = [r.message for r in caplog.records if "not permitted" in r.message]
    assert "launch by launch" in line


def test_an_update_that_is_profiled_runs_launch_by_launch(folder, recorded, monkeypatch):
    engine, teacher = trainer(folder)
    step = Step(engine, teacher, overlap=True)
    monkeypatch.setattr(profile, "_recorder", SimpleNamespace(timed=lambda part: nullcontext()))
    step.forward_backward(batches(folder)[0], None)
    assert recorded == []


def test_what_is_not_recorded_is_told(folder):
    """Each reason by the configuration that has it, and none by the default one."""
    engine, teacher = trainer(folder)
    engine.ranks = Ranks(0, 1, torch.device("cuda"))
    case = Case(student=toy.architecture(), teacher=toy.architecture(), tokens=256)
    plain = case.resolved()

    def told(**sections: dict[str, Any]) -> str | None:
        config = plain.config
        changes: Any = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
        return graph.reason(engine, teacher, replace(plain, config=replace(config, **changes)))

    assert told() is None
    expected = {
        "off": {"engine": {"graph": False}},
        "compile": {"engine": {"compile": True}},
        "relations": {"loss": {"keys": 1.0}},
        "another device": {"teacher": {"device": "second"}},
        "sdpa": {"engine": {"attention": "sdpa"}},
    }
    for word, sections in expected.items():
        said = told(**sections)
        assert said is not None
        assert word in said
    other: Any = SimpleNamespace(ranks=engine.ranks, description="DeepSpeed 0 ZeRO stage 1")
    assert "ZeRO stage 1" in (graph.reason(other, teacher, plain) or "")
    assert graph.recorded(trainer(folder)[0], teacher, plain) is None  # on a CPU
