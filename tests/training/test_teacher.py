"""The teacher beside the student: the same numbers ahead, on a second device and on ranks of its own; no race, nobody left waiting."""

# ruff: noqa: F811 (fixtures of other files)

import json
import logging
import signal
import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from fastdistil.data.batches import MicroBatch
from fastdistil.model.weights import load_masked_lm
from fastdistil.run import ranks as dist
from fastdistil.run.config import Config, DataConfig, LossConfig, TeacherConfig
from fastdistil.training.objective import Objective, TeacherOutput
from fastdistil.training.preflight import resolve
from fastdistil.training.teacher import Feed, RemoteTeacher, Split, Teacher, serve
from tests.support import launch
from tests.test_pretrain import arguments, losses, root, same, tensors  # noqa: F401
from tests.training.test_objective import folder, make_batches, make_student, make_teacher  # noqa: F401

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and their allocator exist on a GPU only")


def equal(a: TeacherOutput, b: TeacherOutput) -> bool:
    pairs = zip((*a[:4], *a.kept), (*b[:4], *b.kept), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_on_a_cpu_the_teacher_precedes(folder, caplog):
    _, batches = make_batches(folder, 4, CPU)
    teacher, happened = make_teacher(folder, CPU), []
    infer = teacher._states
    teacher._states = lambda batch: (happened.append("teacher"), infer(batch))[1]
    with caplog.at_level(logging.INFO, "fastdistil"):
        feed = Feed(teacher, CPU, overlap=True)
    assert "precedes the student" in caplog.text
    for given, (batch, hints) in zip(batches, feed.ahead(iter(batches)), strict=True):
        happened.append("student")
        assert all(torch.equal(getattr(batch, n), getattr(given, n)) for n in ("input_ids", "labels"))
        assert hints is not None
        assert equal(hints, make_teacher(folder, CPU)(given))
    assert happened == ["teacher", "student"] * 4


def test_without_a_teacher_there_are_no_hints(folder):
    _, batches = make_batches(folder, 2, CPU)
    pairs = list(Feed(None, CPU, overlap=True).ahead(iter(batches)))
    assert [b.sequences for b, _ in pairs] == [b.sequences for b in batches]
    assert [hints for _, hints in pairs] == [None, None]


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
        return TeacherOutput(*torch.ones(4, 1, 1).unbind(), kept=())


@pytest.mark.parametrize("encoder_index", [0, 1])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_streams_wait_for_each_other_and_for_no_more(folder, monkeypatch, encoder_index, with_teacher):
    _, batches = make_batches(folder, 4, CPU)
    cuda = FakeCuda(monkeypatch)
    device, encoder_device = torch.device("cuda", 0), torch.device("cuda", encoder_index)
    cuda.default[encoder_device].behind.add(("weights",))
    teacher = FakeTeacher(cuda, encoder_device) if with_teacher else None
    feed = Feed(teacher, device, overlap=True)
    if teacher and encoder_index:
        assert isinstance(feed.far, FakeStream)
        assert ("weights",) in feed.far.behind
    ids = [b.sequences for b in batches]
    for k, (batch, hints) in enumerate(feed.ahead(iter(batches))):
        before = cuda.work("student", batch, device)
        side = {w for w in before if w[0] in ("copy", "teacher")}
        done = {("copy", i) for i in ids[: k + 1]} | {("teacher", i) for i in (ids[: k + 1] if with_teacher else ())}
        assert side == done, "waits for its own hints, and not for the next"
        tensors_ = [batch.input_ids, batch.position_ids, batch.labels, batch.masked_rows, batch.num_rows]
        tensors_ += [batch.layout.cu_seqlens, batch.layout.tiles, *(hints or ())[:2]]
        assert {id(t) for t in tensors_} <= cuda.recorded, "trap 14"
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
    feed = Feed(FakeTeacher(cuda, device), device, overlap=True)
    states = []
    with caplog.at_level(logging.INFO, "fastdistil"):
        for update in range(1, 20):
            FakeEvent.ready = update > 15  # the device is behind the host: read later, without waiting
            states.append(feed.overlapping)
            with feed.update():
                # what surrounds the two measurements must not count: warm-up, and an update half with and half without
                around = update in (1, 4, 9, 14)
                took = 1000.0 if around else overlapped_ms if feed.overlapping else 10.0
                FakeEvent.clock += took + 0.1 * (update - (6.5 if update < 9 else 11.5))
            FakeEvent.clock += 500.0  # a validation
    gains = overlapped_ms < 10
    assert states == [True] * 8 + [False] * 5 + [True] * 3 + [gains] * 3
    assert caplog.text.count("teacher overlap") == 1
    assert f"teacher overlap: {says} than teacher-then-student (updates 5-8 against 10-13)" in caplog.text


# --- on a GPU


def pinned(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [b.pin_memory() for b in batches]


@needs_gpu
def test_overlap_changes_no_bit_on_a_gpu(folder):
    device = torch.device("cuda", 0)
    update, batches = make_batches(folder, 4, CPU)
    found = []
    for overlap in (True, False):
        objective = Objective(make_student(folder, device), LossConfig())
        feed, sums = Feed(make_teacher(folder, device), device, overlap=overlap), []
        assert feed.overlapping == overlap
        for batch, hints in feed.ahead(iter(pinned(batches * 8))):
            loss, part = objective(batch, hints, update.num_tokens, update.num_masked)
            loss.backward()
            sums.append(part)
        found.append([*sums, *(p.grad for p in objective.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_gpu
@pytest.mark.parametrize("recording", [True, False])
def test_memory_is_not_given_away_while_the_student_reads(folder, monkeypatch, recording):
    """Trap 14: freed while the student's stream is far behind, then taken again on the side stream; without record_stream it breaks."""
    device = torch.device("cuda", 0)
    _, batches = make_batches(folder, 1, CPU)
    teacher = make_teacher(folder, device)
    wanted = teacher(batches[0].to(device)).hidden_NE.clone()
    if not recording:
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    feed = Feed(teacher, device, overlap=True)
    ((_, hints),) = feed.ahead(iter(pinned(batches)))
    assert hints is not None
    torch.cuda._sleep(1_000_000_000)  # about half a second
    read = hints.hidden_NE * 1
    del hints, _
    with torch.cuda.stream(feed.side):
        _junk = [torch.full_like(wanted, torch.nan) for _ in range(64)]
    assert torch.equal(read, wanted) == recording


# --- ranks of their own


def linked(num_students: int, num_teachers: int, work) -> list:
    """What `work(link, rank)` returns on each rank, each a thread with a TeacherLink of its own; an exception is returned."""
    store, size = HashStore(), num_students + num_teachers
    results: list = [None] * size

    def one(rank: int) -> None:
        try:
            timeout = timedelta(seconds=30)
            link = dist.TeacherLink(store, rank, num_students, num_teachers, backend="gloo", timeout=timeout)
            results[rank] = work(link, rank)
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

    def work(link: dist.TeacherLink, rank: int) -> list[TeacherOutput] | None:
        if rank >= 2:
            return serve(make_teacher(folder, CPU), link, batches_from)
        remote = RemoteTeacher(
            load_masked_lm(folder / "teacher", need_head=True), link, device=CPU, dtype=torch.float32
        )
        feed, got = Feed(remote, CPU, overlap=True), []
        training = feed.ahead(iter(train[rank + 1 :]), Split.TRAIN, 1)
        got += [hints for _, hints in (next(training), next(training))]
        for _ in range(2):
            got += [h for _, h in feed.ahead(iter(validation[rank : rank + 2]), Split.VALIDATION)]
        got.append(next(training)[1])
        link.stop()
        return got

    results = linked(2, num_teachers, work)
    teacher = make_teacher(folder, CPU)
    for rank, got in enumerate(results[:2]):
        wanted = [train[rank + 1], train[rank + 2], *validation[rank : rank + 2] * 2, train[rank + 3]]
        assert len(got) == len(wanted)
        assert all(equal(a, teacher(b)) for a, b in zip(got, wanted, strict=True))
    assert results[2:] == [None] * num_teachers
    assert sorted(made) == [(s, *c) for s in (0, 1) for c in ((0, 1), (1, 0), (1, 0))]


def test_a_student_that_dies_ends_its_teacher(folder):
    def work(link: dist.TeacherLink, rank: int) -> None:
        if rank == 1:
            serve(make_teacher(folder, CPU), link, lambda *_: iter(()))

    student, teacher = linked(1, 1, work)
    assert student is None
    assert isinstance(teacher, RuntimeError)
    assert "closed" in str(teacher) or "reset" in str(teacher)


def test_an_error_of_a_teacher_rank_reaches_the_students():
    def work(link: dist.TeacherLink, rank: int) -> str | None:
        place = dist.Place(rank, 2, CPU, None, None, link)
        assert place.is_teacher == (rank == 2)
        found = dist.first_error("x" + "ö" * 3000 if rank == 2 else None, place)
        assert dist.first_error(None, place) is None
        return found

    assert linked(2, 1, work) == ["rank 2: x" + "ö" * 1999] * 3  # whole characters of 4,000 bytes


def test_students_with_teacher_ranks_are_bitwise_those_without(root, tmp_path):
    """ZeRO-1 on two students, one teacher rank, a SIGTERM in the middle and a resume; metrics, weights, moments."""
    fixed = {"engine__zero_stage": 1, "engine__threads": 1, "log__every": 1}
    launch.run(*arguments(root, tmp_path / "straight", **fixed), ranks=2)
    run = tmp_path / "run"
    process = launch.start_until(
        "update 7/12", launch.command(*arguments(root, run, teacher__ranks=1, **fixed), ranks=3)
    )
    process.send_signal(signal.SIGTERM)
    assert "--resume auto goes on" in launch.rest_of(process)
    stopped = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["update"]
    assert 7 <= stopped < 12
    done = launch.run(*arguments(root, run, teacher__ranks=1, resume="auto", **fixed), ranks=3)
    assert "teacher: on 1 rank(s) of its own" in done.stdout
    assert losses(run) == losses(tmp_path / "straight")
    assert same(tensors(run, 12), tensors(tmp_path / "straight", 12))


# --- what is refused


def refused(root, *, world_size=3, by_torchrun=True, **teacher) -> str:
    config = Config(
        data=DataConfig(shards=root / "shards"),
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
        data=DataConfig(shards=root / "shards"),
        teacher=TeacherConfig(path=root / "teacher", ranks=1),
        batch=Config().batch.__class__(size=24, token_budget=256),
    )
    assert resolve(config, world_size=4).micro_batches_per_update == 3
    with pytest.raises(ValueError, match="4 ranks cannot divide"):
        resolve(config, world_size=5)


def test_a_second_device_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="wants a second GPU, got the CPU"):
        dist.init("cpu", timeout_s=10, threads=1, second_device=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name, value in (("is_available", True), ("device_count", 3), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(ValueError, match="wants 4 GPUs for 2 process"):
        dist.init("cuda", timeout_s=10, threads=1, second_device=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    place = dist.init("cuda", timeout_s=10, threads=1, second_device=True)
    assert (place.device.index, place.second_device) == (1, torch.device("cuda", 3))
