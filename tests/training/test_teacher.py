"""The teacher beside the student: the same numbers ahead, on a second device and on ranks of its own.

No race, and nobody left waiting.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from fastdistil.data.batches import MicroBatch
from fastdistil.model.weights import load_masked_lm
from fastdistil.run.config import BatchConfig, Config, DataConfig, LossConfig, TeacherConfig
from fastdistil.run.link import TeacherLink
from fastdistil.run.ranks import Ranks, init_ranks
from fastdistil.training.objective import EncoderOutputs, Objective, TeacherOutput, VocabularyInputs
from fastdistil.training.preflight import resolve
from fastdistil.training.teacher import RemoteTeacher, Split, Teacher, TeacherPrefetcher, serve
from tests.support import forked
from tests.support.runs import arguments, exact_metrics, metrics_of, same, tensors_of
from tests.support.updates import CPU, make_batches, make_student, make_teacher
from tests.workers import together_worker

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and their allocator exist on a GPU only")


def equal(a: TeacherOutput, b: TeacherOutput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_on_a_cpu_the_teacher_precedes(folder, caplog):
    _, batches = make_batches(folder, 4, CPU)
    teacher, happened = make_teacher(folder, CPU), []
    infer = teacher._states
    teacher._states = lambda batch: (happened.append("teacher"), infer(batch))[1]
    with caplog.at_level(logging.INFO, "fastdistil"):
        prefetcher = TeacherPrefetcher(teacher, CPU, overlap=True)
    assert "precedes the student" in caplog.text
    for given, (batch, output) in zip(batches, prefetcher.ahead(iter(batches)), strict=True):
        happened.append("student")
        assert all(torch.equal(getattr(batch, n), getattr(given, n)) for n in ("input_ids", "labels"))
        assert output is not None
        assert equal(output, make_teacher(folder, CPU)(given))
    assert happened == ["teacher", "student"] * 4


def test_without_a_teacher_there_is_no_output(folder):
    _, batches = make_batches(folder, 2, CPU)
    pairs = list(TeacherPrefetcher(None, CPU, overlap=True).ahead(iter(batches)))
    assert [b.sequences for b, _ in pairs] == [b.sequences for b in batches]
    assert [output for _, output in pairs] == [None, None]


# --- streams, without a GPU: what CUDA orders is modelled as the set of all work that a stream has behind it


class FakeStream:
    def __init__(self, device) -> None:
        self.device, self.behind = torch.device(device), set()

    def wait_stream(self, other: "FakeStream") -> None:
        self.behind |= other.behind

    def record_event(self) -> set:
        return set(self.behind)

    def wait_event(self, event: set) -> None:
        self.behind |= event


class FakeCuda:
    """Enough of torch.cuda to follow which work is ordered after which, and which memory is whose."""

    def __init__(self, monkeypatch) -> None:
        self.current: dict[torch.device, FakeStream] = {}
        self.recorded: set[int] = set()
        for name in ("stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: self.record_stream(x, s))
        monkeypatch.setattr(MicroBatch, "to", lambda batch, device: self.copied(batch))
        self.default = {d: self.current_stream(d) for d in map(torch.device, ("cuda:0", "cuda:1"))}

    def current_stream(self, device) -> FakeStream:
        return self.current.setdefault(device, FakeStream(device))

    @contextmanager
    def stream(self, stream: FakeStream):
        before = self.current_stream(stream.device)
        self.current[stream.device] = stream
        yield
        self.current[stream.device] = before

    def record_stream(self, tensor, stream) -> None:
        assert stream is self.current_stream(stream.device)
        self.recorded.add(id(tensor))

    def copied(self, batch: MicroBatch) -> MicroBatch:
        self.work("copy", batch, torch.device("cuda", 0))
        return batch

    def work(self, what: str, batch: MicroBatch, device) -> set:
        """Enqueue something on the device's current stream; what it is ordered after."""
        stream = self.current_stream(device)
        before = set(stream.behind)
        stream.behind.add((what, batch.sequences))
        return before


class FakeTeacher(Teacher):
    def __init__(self, cuda: FakeCuda, encoder_device) -> None:
        self.cuda, self.began = cuda, {}
        self.device, self.encoder_device = torch.device("cuda", 0), encoder_device

    def __call__(self, batch: MicroBatch) -> TeacherOutput:
        far = self.cuda.current_stream(self.encoder_device)
        assert far is not self.cuda.default[self.encoder_device]
        self.began[batch.sequences] = self.cuda.work("teacher", batch, self.device)
        hidden_NE, *others = torch.ones(4, 1, 1).unbind()
        return TeacherOutput(EncoderOutputs(hidden_NE), VocabularyInputs(*others))


@pytest.mark.parametrize("encoder_index", [0, 1])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_streams_wait_for_each_other_and_for_no_more(folder, monkeypatch, encoder_index, with_teacher):
    _, batches = make_batches(folder, 4, CPU)
    cuda = FakeCuda(monkeypatch)
    device, encoder_device = torch.device("cuda", 0), torch.device("cuda", encoder_index)
    cuda.default[encoder_device].behind.add(("weights",))
    teacher = FakeTeacher(cuda, encoder_device) if with_teacher else None
    prefetcher = TeacherPrefetcher(teacher, device, overlap=True)
    if teacher and encoder_index:
        assert isinstance(prefetcher.far, FakeStream)
        assert ("weights",) in prefetcher.far.behind
    ids = [b.sequences for b in batches]
    for k, (batch, output) in enumerate(prefetcher.ahead(iter(batches))):
        before = cuda.work("student", batch, device)
        side = {w for w in before if w[0] in ("copy", "teacher")}
        done = {("copy", i) for i in ids[: k + 1]} | {("teacher", i) for i in (ids[: k + 1] if with_teacher else ())}
        assert side == done, "waits for its own teacher output, and not for the next"
        read = [
            batch.input_ids,
            batch.position_ids,
            batch.labels,
            batch.masked_rows,
            batch.num_rows,
            batch.dropout_seed,
        ]
        read += [batch.layout.cu_seqlens, batch.layout.tiles]
        read += output.tensors() if output else []
        assert {id(t) for t in read} <= cuda.recorded, "trap 14"
        if teacher and k + 1 < len(ids):
            students = {w for w in teacher.began[ids[k + 1]] if w[0] == "student"}
            assert students == {("student", i) for i in ids[:k]}, "one ahead of the student: no more, no less"


class FakeEvent:
    clock, ready = 0.0, True

    def __init__(self, enable_timing) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at

    def query(self) -> bool:
        return FakeEvent.ready


@pytest.mark.parametrize(("overlapped_ms", "says"), [(8.0, "25.0% faster"), (12.5, "20.0% slower")])
def test_the_overlap_is_measured_and_kept_where_it_gains(monkeypatch, caplog, overlapped_ms, says):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    device = torch.device("cuda", 0)
    prefetcher = TeacherPrefetcher(FakeTeacher(cuda, device), device, overlap=True)
    states = []
    with caplog.at_level(logging.INFO, "fastdistil"):
        for update in range(1, 20):
            FakeEvent.ready = update > 15  # the device is behind the host: read later, without waiting
            states.append(prefetcher.overlapping)
            with prefetcher.update():
                # what surrounds the two measurements must not count: warm-up, and an update half with and half without
                around = update in (1, 4, 9, 14)
                took = 1000.0 if around else overlapped_ms if prefetcher.overlapping else 10.0
                FakeEvent.clock += took + 0.1 * (update - (6.5 if update < 9 else 11.5))
            FakeEvent.clock += 500.0  # a validation
    gains = overlapped_ms < 10
    assert states == [True] * 8 + [False] * 5 + [True] * 3 + [gains] * 3
    assert caplog.text.count("teacher overlap") == 1
    assert f"teacher overlap: {says} than teacher-then-student (updates 5-8 against 10-13)" in caplog.text


# --- on a GPU


def pinned(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [b.pin_memory() for b in batches]


@pytest.mark.gpu
@needs_gpu
def test_overlap_changes_no_bit_on_a_gpu(folder):
    device = torch.device("cuda", 0)
    _update, batches = make_batches(folder, 4, CPU)
    found = []
    for overlap in (True, False):
        objective = Objective(make_student(folder, device=device), LossConfig())
        prefetcher, sums = TeacherPrefetcher(make_teacher(folder, device), device, overlap=overlap), []
        assert prefetcher.overlapping == overlap
        for batch, output in prefetcher.ahead(iter(pinned(batches * 8))):
            loss, part = objective(batch, output)
            loss.backward()
            sums.append(part)
        found.append([*sums, *(p.grad for p in objective.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recording", [True, False])
def test_memory_is_not_given_away_while_the_student_reads(folder, monkeypatch, recording):
    """Trap 14: freed while the student's stream is far behind, then taken again on the side stream.

    Without record_stream it breaks.
    """
    device = torch.device("cuda", 0)
    _, batches = make_batches(folder, 1, CPU)
    teacher = make_teacher(folder, device)
    wanted = teacher(batches[0].to(device)).encoder.hidden_ND.clone()
    if not recording:
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    prefetcher = TeacherPrefetcher(teacher, device, overlap=True)
    ((_, output),) = prefetcher.ahead(iter(pinned(batches)))
    assert output is not None
    torch.cuda._sleep(1_000_000_000)  # about half a second
    read = output.encoder.hidden_ND * 1
    del output, _
    with torch.cuda.stream(prefetcher.side):
        _junk = [torch.full_like(wanted, torch.nan) for _ in range(64)]
    assert torch.equal(read, wanted) == recording


# --- ranks of their own


def linked(
    num_students: int, num_teachers: int, work: Callable[[Ranks, TeacherLink], Any], *, timeout_s: float = 30
) -> list[Any]:
    """What `work(ranks, link)` returns or raises on each rank, each a thread with a TeacherLink of its own."""
    store, size = HashStore(), num_students + num_teachers
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            timeout = timedelta(seconds=timeout_s)
            link = TeacherLink(store, rank, num_students, num_teachers, backend="gloo", timeout=timeout)
            results[rank] = work(Ranks(rank, num_students, CPU, link=link), link)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "somebody waits for ever"
    return results


@pytest.mark.parametrize("num_teachers", [1, 2])
def test_teacher_ranks_answer_what_a_teacher_of_ones_own_would(folder, num_teachers):
    """A validation between two training micro-batches, and a stop with a question that nobody waits for any more."""
    _, train = make_batches(folder, 8, CPU)
    _, validation = make_batches(folder, 4, CPU)
    made = []

    def batches_from(student: int, split: Split, number: int):
        made.append((student, split, number))
        return iter((train if split == Split.TRAIN else validation)[student + number :])

    def work(ranks: Ranks, link: TeacherLink) -> list[TeacherOutput | None] | None:
        if ranks.is_teacher:
            return serve(make_teacher(folder, CPU), link, batches_from)
        rank, model = ranks.rank, load_masked_lm(folder / "teacher", need_head=True)
        prefetcher = TeacherPrefetcher(RemoteTeacher(model, link, device=CPU, dtype=torch.float32), CPU, overlap=True)
        got: list[TeacherOutput | None] = []
        training = prefetcher.ahead(iter(train[rank + 1 :]), Split.TRAIN, 1)
        got += [output for _, output in (next(training), next(training))]
        for _ in range(2):
            got += [o for _, o in prefetcher.ahead(iter(validation[rank : rank + 2]), Split.VALIDATION)]
        got.append(next(training)[1])
        ranks.leave()
        return got

    results = linked(2, num_teachers, work)
    teacher = make_teacher(folder, CPU)
    for rank, got in enumerate(results[:2]):
        wanted = [train[rank + 1], train[rank + 2], *validation[rank : rank + 2] * 2, train[rank + 3]]
        assert len(got) == len(wanted)
        assert all(equal(a, teacher(b)) for a, b in zip(got, wanted, strict=True))
    assert results[2:] == [None] * num_teachers
    assert sorted(made) == [(s, *c) for s in (0, 1) for c in ((0, 1), (1, 0), (1, 0))]


def test_a_teacher_waits_longer_than_the_timeout_for_students_that_say_so(folder):
    """As while the last upload to a mirror goes on."""

    def work(ranks: Ranks, link: TeacherLink) -> str:
        if ranks.is_teacher:
            serve(make_teacher(folder, CPU), link, lambda *_: iter(()))
            return "served to the end"
        for _ in range(3):
            time.sleep(1.5)
            link.ask_later()
        ranks.leave()
        return "left"

    assert linked(2, 1, work, timeout_s=3) == ["left", "left", "served to the end"]


def test_a_student_that_dies_ends_its_teacher(folder):
    def work(ranks: Ranks, link: TeacherLink) -> None:
        if ranks.is_teacher:
            serve(make_teacher(folder, CPU), link, lambda *_: iter(()))

    student, teacher = linked(1, 1, work)
    assert student is None
    assert isinstance(teacher, RuntimeError)
    assert "closed" in str(teacher) or "reset" in str(teacher)


# --- a stage that all ranks pass or none


def test_what_one_of_two_ranks_refuses_is_raised_on_both():
    """In the words of the lowest rank, with its number where it is not the first; and the process group is left."""
    first, second = forked.call(together_worker.refusals, ranks=2)
    assert first == {
        "nobody": "passed",
        "rank 1": "ValueError: rank 1: no space on rank 1; left",
        "both": "OSError: no space on rank 0; left",
    }
    assert second == {
        "nobody": "passed",
        "rank 1": "ValueError: rank 1: no space on rank 1; left",
        "both": "ValueError: no space on rank 0; left",
    }


def test_what_a_teacher_rank_refuses_is_raised_on_its_students_too():
    def work(ranks: Ranks, link: TeacherLink) -> list[str]:
        assert ranks.is_teacher == (ranks.rank == 2)
        said = []
        for refusing in (None, 2, 0):
            try:
                with ranks.together(with_teachers=True):
                    if ranks.rank == refusing:
                        raise ValueError("x" + "ö" * 3000)
                said.append("passed")
            except ValueError as error:
                said.append(str(error))
        return said

    whole = "x" + "ö" * 1999  # characters of 4,000 bytes
    student, other, teacher = linked(2, 1, work)
    assert other == teacher == ["passed", f"rank 2: {whole}", whole]
    assert student == ["passed", f"rank 2: {whole}", "x" + "ö" * 3000]


def test_a_refusal_stops_the_teacher_that_serves(folder):
    def work(ranks: Ranks, link: TeacherLink) -> str:
        if ranks.is_teacher:
            serve(make_teacher(folder, CPU), link, lambda *_: iter(()))
            return "served to the end"
        with pytest.raises(ValueError, match="too far"), ranks.together():
            raise ValueError("too far")
        return "refused"

    assert linked(1, 1, work) == ["refused", "served to the end"]


def test_a_run_with_a_teacher_rank_that_is_refused_leaves_nobody_waiting(root, tmp_path):
    """After the teacher has begun to serve: its drift is too large. One error, nothing written."""
    few = {"teacher__precision": "bf16", "teacher__ranks": 1, "teacher__max_drift": 1e-9}
    refused = forked.run(*arguments(root, tmp_path / "run", **few), ranks=3, ok=False, timeout_s=60)
    assert refused.returncode == 2
    assert refused.stderr.count("error: --teacher.precision bf16 wants") == 1
    assert not (tmp_path / "run").exists()


def test_students_with_teacher_ranks_are_bitwise_those_without(root, tmp_path):
    """ZeRO-1 on two students, one teacher rank, a SIGTERM in the middle and a resume; metrics, weights, moments."""
    fixed = {"engine__zero_stage": 1, "engine__threads": 1, "log__every": 1}
    forked.run(*arguments(root, tmp_path / "straight", **fixed), ranks=2)
    run = tmp_path / "run"
    with_teacher = arguments(root, run, teacher__ranks=1, **fixed)
    done = forked.run(*with_teacher, ranks=3, stop_at="update 7/12")
    assert "stopped after update" in done.stdout
    stopped = metrics_of(run)[-1]["update"]
    assert 7 <= stopped < 12
    done = forked.run(*with_teacher, "--resume", "auto", ranks=3)
    assert "teacher: on 1 rank(s) of its own" in done.stdout
    assert exact_metrics(run) == exact_metrics(tmp_path / "straight")
    assert same(tensors_of(run, 12), tensors_of(tmp_path / "straight", 12))


# --- what is refused


def refused(root, *, world_size=3, by_torchrun=True, **teacher) -> str:
    config = Config(
        data=DataConfig(shards=(str(root / "shards"),)),
        teacher=TeacherConfig(**{"path": root / "teacher"} | teacher),
        loss=LossConfig() if teacher.get("path", 1) else LossConfig(kd=0, cosine=0),
    )
    with pytest.raises(ValueError, match="--teacher") as caught:
        resolve(config, world_size=world_size, by_torchrun=by_torchrun)
    return str(caught.value)


def test_teacher_ranks_that_leave_nobody_to_train(root):
    assert "wants 4 ranks or more" in refused(root, ranks=3)
    assert "torchrun --nproc-per-node 2" in refused(root, ranks=1, world_size=1, by_torchrun=False)
    assert "leave --teacher.device out" in refused(root, ranks=1, device="second")
    assert "give a --teacher.path" in refused(root, ranks=1, path=None)


def test_micro_batches_are_divided_among_the_students(root):
    """24 sequences are 3 micro-batches of 256 tokens: for 3 ranks of which one teaches, not for 4 that all train."""
    config = Config(
        data=DataConfig(shards=(str(root / "shards"),)),
        teacher=TeacherConfig(path=root / "teacher", ranks=1),
        batch=BatchConfig(size=24, token_budget=256),
    )
    assert resolve(config, world_size=4).micro_batches_per_update == 3
    with pytest.raises(ValueError, match="4 ranks cannot divide"):
        resolve(config, world_size=5)


def test_a_second_device_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="wants a second GPU, got the CPU"):
        init_ranks("cpu", timeout_s=10, threads=1, second_device=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name, value in (("is_available", True), ("device_count", 3), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(ValueError, match="wants 4 GPUs for 2 process"):
        init_ranks("cuda", timeout_s=10, threads=1, second_device=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks = init_ranks("cuda", timeout_s=10, threads=1, second_device=True)
    assert (ranks.device.index, ranks.second_device) == (1, torch.device("cuda", 3))
