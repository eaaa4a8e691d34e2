"""--profile: a trace, a table whose parts are the step, and no number changed."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch

from fastdistil.model.architecture import flops_per_token
from fastdistil.run import profile
from fastdistil.run.config import Config
from fastdistil.run.recipes import parse
from fastdistil.training import forecast
from fastdistil.training.preflight import resolve
from tests.support import forked, launch, runs


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_profiled_run(root, quiet, quiet_two, tmp_path, ranks):
    plain, profiled = quiet_two if ranks else quiet, tmp_path / "profiled"
    options = runs.TWO if ranks else {}
    options = options | {"log__every": 1, "log__validate_every": 2, "profile": "2:4"}  # a validation in the window
    log = forked.run(*runs.arguments(root, profiled, **options), ranks=ranks).stdout
    assert not (plain.run / "profile").exists()
    trained = [
        [line for line in runs.exact_metrics(run) if line[0] == ("split", "train")] for run in (profiled, plain.run)
    ]
    assert trained[0] == trained[1]
    assert runs.same(*(runs.tensors_of(run, 12) for run in (profiled, plain.run)))

    found = json.loads((profiled / "profile" / "table.json").read_text())
    assert found["updates"] == 2
    parts = {name: row["seconds"] for name, row in found["parts"].items()}
    assert set(parts) == {*profile.PARTS, "other"}
    assert sum(parts.values()) == pytest.approx(found["seconds_an_update"], rel=0.1)
    assert min(parts.values()) >= 0
    for part in ("teacher", "student forward", "loss", "backward", "optimiser"):
        assert parts[part] > 0
        assert found["parts"][part]["floor"] > 0
        assert f"profile: {part}" in log
    assert (parts["communication"] > 0) == (ranks == 2)
    trace = json.loads((profiled / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    micro_batches = 3  # of this rank in an update: 3 of 3, or 3 of 5
    assert names.count("backward") == names.count("teacher") == 2 * micro_batches
    assert names.count("optimiser") == names.count("update") == 2
    assert "[memory]" in names


def test_a_window_beyond_the_run_is_refused(root, tmp_path):
    done = forked.run(*runs.arguments(root, tmp_path / "run", profile="12:14"), ok=False)
    assert done.returncode == 2
    assert "goes beyond the run's 12 updates" in done.stderr


@pytest.mark.parametrize("window", ["0:2", "3:3", "13:10", "abc", "1", "1:2:3", "-1:2", "1:2x"])
def test_what_is_no_window(window):
    with pytest.raises(ValueError, match=r"--profile must be FIRST:END"):
        Config(profile=window)


def test_windows_count_from_one_for_people():
    assert Config(profile="10:13").profile_window == range(9, 12)
    assert not Config().profile_window


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(profile.time, "perf_counter", lambda: self.now)

    def work(self, part, seconds):
        with profile.span(part):
            self.now += seconds


def updates(profiled, clock, numbers):
    """Updates of 10 s, 6 of them in no part, with a validation after each."""
    for number in numbers:
        with profiled.update(number):
            clock.work("loss", 3.0)
            clock.work("backward", 1.0)
            clock.now += 6.0
        clock.work("loss", 100.0)


@pytest.mark.parametrize(("window", "made", "count"), [((1, 5), (0, 3), 2), ((1, 3), (0, 9), 2), ((1, 4), (2, 9), 2)])
def test_what_is_written_where_a_run_ends_or_resumes_in_the_window(tmp_path, caplog, monkeypatch, window, made, count):
    caplog.set_level("INFO", logger="fastdistil")
    clock = Clock(monkeypatch)
    cpu = torch.device("cpu")
    profiled = profile.Profile(range(*window), tmp_path, cpu, lambda: {"loss": 0.5})
    updates(profiled, clock, range(*made))
    assert (tmp_path / "table.json").exists() == (made[1] >= window[1])
    profiled.close()
    profiled.close()
    assert caplog.text.count("table.json") == 1
    found = json.loads((tmp_path / "table.json").read_text())
    assert (found["updates"], found["seconds_an_update"]) == (count, 10.0)
    got = {name: (row["seconds"], row["share"], row["floor"]) for name, row in found["parts"].items()}
    assert got == {
        "loss": (3.0, 0.3, 0.5),
        "backward": (1.0, 0.1, None),
        "communication": (0.0, 0.0, None),
        "other": (6.0, 0.6, None),
    }
    assert re.search(r"profile: loss +3000.0 +30.0% +500.0\n", caplog.text)


@pytest.mark.parametrize(("first", "noted"), [(1, True), (0, False)])
def test_on_cuda_allocations_are_noted_in_no_update_that_is_timed(tmp_path, caplog, monkeypatch, first, noted):
    """A stack for every allocation costs the host as much as the work itself."""
    caplog.set_level("INFO", logger="fastdistil")
    calls = []

    def record(enabled="all", max_entries=0):
        calls.append("stop" if enabled is None else "begin")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    profiled = profile.Profile(range(first, 3), tmp_path, torch.device("cpu"), dict)
    profiled.on_cuda = True  # spans by the clock, all else as on a GPU
    for number in range(4):
        with profiled.update(number):
            calls.append(number)
    before = ["begin", 0, str(tmp_path / "memory.pickle"), "stop"] if noted else [0]
    assert calls == [*before, 1, 2, 3]
    assert ("table.json, memory.pickle" if noted else "no update before it") in caplog.text


def test_a_window_that_is_past_says_so(tmp_path, caplog, monkeypatch):
    profiled = profile.Profile(range(1, 3), tmp_path, torch.device("cpu"), dict)
    updates(profiled, Clock(monkeypatch), range(3, 5))
    profiled.close()
    assert "none of the updates" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path, caplog, monkeypatch):
    def full(path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def half(_profiler: object, path: str) -> None:
        Path(f"{path}.tmp").write_text("{")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", max_entries=0: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)  # as Kineto there
    profiled = profile.Profile(range(1, 3), tmp_path, torch.device("cpu"), dict)
    profiled.on_cuda = True
    updates(profiled, Clock(monkeypatch), range(4))
    assert caplog.text.count("profile: going on without it") == 2
    assert "memory.pickle" in caplog.text
    assert "trace.json does not exist: the disk may be full" in caplog.text
    assert not list(tmp_path.iterdir())  # the disk has its room again


@pytest.mark.parametrize(("num_updates", "written"), [(1, False), (2, True)])
def test_an_error_in_a_profiled_run_keeps_its_exit_status(tmp_path, num_updates, written):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, torch
from pathlib import Path
from fastdistil.run.profile import Profile
profile = Profile(range(1, 5), Path({str(tmp_path / "profile")!r}), torch.device("cpu"), dict)
for update in range({num_updates}):
    with profile.update(update):
        torch.ones(3).sum()
sys.exit(3)
""")
    done = launch.run(script, script=True, ok=False)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "profile" / "table.json").exists() == written


def event(name, begin_ms, end_ms, **more):
    return {"ph": "X", "name": name, "ts": 1e3 * begin_ms, "dur": 1e3 * (end_ms - begin_ms), **more}


def test_collectives_that_run_at_once_count_once():
    trace = [
        event("update", 0, 100),
        event("backward", 10, 40),
        event("optimiser", 50, 90),
        event("gloo:all_reduce", 5, 25),  # begun before the part
        event("gloo:all_gather", 55, 75),
        event("gloo:all_gather", 60, 65),
        event("gloo:all_gather", 70, 80),
        event("gloo:all_reduce", 110, 130),
        {"ph": "i", "name": "[memory]", "ts": 1},
    ]
    assert profile.gloo_seconds(trace) == pytest.approx({"update": 0.045, "backward": 0.015, "optimiser": 0.025})
    assert profile.gloo_seconds(trace[:3])["update"] == 0


def test_of_nccl_the_kernels_count_and_not_what_launched_them():
    trace = [
        event("nccl:all_reduce", 0, 1, cat="user_annotation"),
        event("nccl:all_reduce", 5, 25, cat="gpu_user_annotation"),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 5, 25, cat="kernel"),
        event("gemm", 5, 25, cat="kernel"),
    ]
    assert profile.nccl_seconds(trace) == pytest.approx(0.02)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_floors_are_the_work_of_an_update(root, monkeypatch, has_teacher):
    monkeypatch.setattr(forecast, "copy_bytes_per_s", lambda device: 1e6)
    recipe = "distilbert" if has_teacher else "mlm"
    teacher = {"teacher__path": root / "teacher"} if has_teacher else {}
    size = {} if has_teacher else {"student__num_layers": 2, "student__hidden_size": 32, "student__num_heads": 4}
    config = parse(
        [recipe, *launch.options(data__shards=root / "shards", out=root / "none", **teacher, **size)], quiet=False
    )
    resolved = resolve(config, world_size=1, by_torchrun=False)
    given = {"num_tokens": 1000, "num_stepped": 500, "device": torch.device("cpu")}
    found = forecast.floors(resolved, lambda _window: 20.0, peak=1e9, **given)
    assert found.pop("optimiser") == pytest.approx(32 * 500 / 1e6)
    assert found.pop("waiting for data") == 0.0
    share = 1.0 if has_teacher else config.masking.fraction
    all_flops = flops_per_token(resolved.teacher, resolved.student, lambda _window: 20.0, head_fraction=share).total
    assert sum(found.values()) == pytest.approx(1000 * all_flops / 1e9)
    if not has_teacher:  # the loss is a forward like the student's own
        assert found["backward"] == pytest.approx(2 * (found["student forward"] + found["loss"]))
    assert set(forecast.floors(resolved, lambda _window: 20.0, peak=None, **given)) == {"optimiser", "waiting for data"}


def test_outside_a_window_spans_do_nothing():
    with pytest.raises(RuntimeError, match="through"), profile.span("teacher"):
        raise RuntimeError("through")
    assert list(profile.spanned([1, 2], "waiting for data")) == [1, 2]
    assert profile._recorder is None
