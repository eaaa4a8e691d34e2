"""Lines of the log, validations and checkpoints by time: when they are due, and that nothing computed depends on it."""

import math

import pytest

from fastdistil.training import loop
from tests.support import forked, runs
from tests.support.runs import arguments, long_arguments, metrics_of

FAULTY = "tests.workers.faulty_worker"


class Clock:
    """In place of the loop's `time`."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def test_a_number_is_multiples_of_updates_whatever_the_clock_says(clock):
    due = loop.Due(3, most=2, is_busy=lambda: True)
    clock.now += 1e6
    assert [update for update in range(1, 10) if due.now(update)] == [3, 6, 9]


def test_a_time_counts_from_the_last_time(clock):
    due = loop.Due("30s")
    clock.now += 29.9
    assert not due.now(1)
    clock.now += 0.1
    assert due.now(2)
    clock.now += 100  # a checkpoint that took longer than its interval
    due.done()
    assert not due.now(3)
    clock.now += 30
    assert due.now(4)


def test_a_time_waits_for_what_still_goes_on(clock):
    busy = [True]
    due = loop.Due("15min", is_busy=lambda: busy[0])
    clock.now += 1000
    assert not due.now(1)
    busy[0] = False
    assert due.now(2)


def test_very_fast_updates_are_written_before_they_become_many(clock):
    due = loop.Due("30s", most=1000)
    assert [update for update in range(1, 2500) if due.now(update)] == [1000, 2000]
    assert loop.Due("30s").updates == math.inf


def test_a_slow_run_shows_life_and_keeps_what_it_has(root, tmp_path):
    """0.3 s a micro-batch, three of them an update."""
    run = tmp_path / "run"
    given = {"log__every": "0.2s", "log__checkpoint_every": "0.5s", "log__validate_every": "1.5s"}
    words = long_arguments(root, run, **given, optim__duration=3, batch__size=24, data__validation_sequences=40)
    printed = forked.run(FAULTY, "slow", 0, 0, *words).stdout
    for said in (
        "update 1/3: micro-batch 1 of 3, 0:00:0",
        "update 1/3  loss ",
        "validation after update 2: micro-batch",
    ):
        assert said in printed
    assert printed.index("update 2/3: micro-batch 2 of 3") < printed.index("update 2/3  loss")
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "update-00000003"
    assert "checkpoints/update-00000001" in printed
    validated = [line["update"] for line in metrics_of(run) if line["split"] == "validation"]
    assert validated == [2, 3]


def test_the_first_update_has_a_line_of_its_own(root, tmp_path):
    run = tmp_path / "run"
    seldom = {f"log__{name}": "1h" for name in ("every", "checkpoint_every", "validate_every")}
    printed = forked.run(*arguments(root, run, **seldom)).stdout
    assert [line.split()[2] for line in printed.splitlines() if "  loss" in line and "validation" not in line] == [
        "1/12",
        "12/12",
    ]
    assert [line["update"] for line in metrics_of(run)] == [*range(1, 13), 12]
    assert printed.count("wrote ") == 1


def test_rank_0_s_clock_decides_and_no_number_depends_on_it(root, tmp_path):
    """An hour passes in 4 ms of rank 0, then of rank 1: did each decide for itself, they would wait for one another."""
    plain = {"engine__zero_stage": 0, "engine__timeout_s": 20}
    hours = {f"log__{name}": "1h" for name in ("every", "checkpoint_every", "validate_every")}
    runs_of = []
    for rank, num_lines in ((0, 12), (1, 2)):  # the first and the last alone
        words = arguments(root, tmp_path / str(rank), **plain, **hours)[1:]
        printed = forked.run(FAULTY, "clock", rank, 0, *words, ranks=2).stdout
        assert sum(" GiB  " in line for line in printed.splitlines()) == num_lines
        runs_of.append(tmp_path / str(rank))
    runs.same_ends(*runs_of)
    train = [[line for line in runs.exact_metrics(run) if ("split", "train") in line] for run in runs_of]
    assert len(train[0]) == 12
    assert train[0] == train[1]
