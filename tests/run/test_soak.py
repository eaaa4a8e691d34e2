"""Half an hour of two ranks with a fault every half minute, beside a quiet run: the same weights, and nothing grows."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.support import launch
from tests.support.processes import processes_of, workers_of
from tests.support.runs import long_arguments, same_ends, status

MINUTES = float(os.environ.get("FASTDISTIL_SOAK_MINUTES", "30"))
UPDATES_A_CHECKPOINT = 50


class Sample(NamedTuple):
    """What a process holds."""

    megabytes: float  # resident
    descriptors: int
    threads: int


Samples = dict[tuple[str, int], list[Sample]]  # of ("rank 0", process), in order of time


def sample(run: Path, samples: Samples) -> None:
    """Look at every process of a run, once."""
    ranks = {pid: f"rank {rank}" for rank, pid in workers_of(run).items()}
    for pid in processes_of(run):
        try:
            process = psutil.Process(pid)
            found = Sample(process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
        except psutil.Error:  # it has just ended
            continue
        samples.setdefault((ranks.get(pid, "launcher"), pid), []).append(found)


def grown(before: list[Sample], after: list[Sample], num_late_threads: int) -> list[str]:
    """What is larger in `after` than in `before`: medians, since a validation and a save come and go."""

    typical = [[statistics.median(values) for values in zip(*part, strict=True)] for part in (before, after)]
    slack = (0.03 * typical[0][0] + 4, 0, num_late_threads)
    return [
        f"{name} {b:.0f} -> {a:.0f}"
        for name, b, a, more in zip(Sample._fields, *typical, slack, strict=True)
        if a > b + more
    ]


def growth(samples: Samples, *, num_late_threads: int) -> list[str]:
    """Which processes grew: from the second to the last quarter of a long life, and from a life of a role to its next.

    Where lives are short the saver's thread, which begins with the first save, may be missing from the earlier part of
    one.
    """
    found, lives = [], {}
    for (role, pid), series in samples.items():
        if len(series) >= 40:
            quarter = len(series) // 4

            found += [
                f"{role} {pid}: {g}" for g in grown(series[quarter : 2 * quarter], series[-quarter:], num_late_threads)
            ]
        if role != "launcher" and len(series) >= 4:
            lives.setdefault(role, []).append(series[len(series) // 2 :])
    for role, each in lives.items():
        half = len(each) // 2
        if half:
            found += [
                f"{role} over {len(each)} lives: {g}"
                for g in grown(list(chain(*each[:half])), list(chain(*each[half:])), num_late_threads)
            ]
    return found


def fault(run: Path, kind: str, launcher: subprocess.Popen[str], rng: random.Random) -> None:
    """A rank dies, the job is told to stop, or the machine is gone."""
    workers = workers_of(run)
    if kind == "rank":
        if workers:
            os.kill(rng.choice(list(workers.values())), signal.SIGKILL)
        return
    if kind == "stop":
        launcher.terminate()
    else:
        for pid in [launcher.pid, *workers.values()]:
            os.kill(pid, signal.SIGKILL)
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 20
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run), f"orphans after {kind}"


def begin(inputs: Path, run: Path, updates: int) -> subprocess.Popen[str]:
    """Two ranks under a launcher that restarts them; what they print is added to RUN/../log."""

    often = dict(
        optim__duration=updates, log__every=20, log__checkpoint_every=UPDATES_A_CHECKPOINT, log__validate_every=500
    )

    words = launch.command("fastdistil.pretrain", *long_arguments(inputs, run, **often), ranks=2, restarts=1000)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / "log").open("a") as file:
        return subprocess.Popen(
            words, env=launch.ENVIRONMENT | launch.RESTARTING, stdout=file, stderr=subprocess.STDOUT, text=True
        )


def updates_of(minutes: float, inputs: Path, folder: Path) -> int:
    """How many updates take so long where two runs share the machine, by a short try."""
    count, ends = 400, []
    tries = [begin(inputs, folder / name / "run", count) for name in ("one", "two")]
    for name, process in zip(("one", "two"), tries, strict=True):
        assert process.wait(timeout=600) == 0, (folder / name / "log").read_text()[-4000:]
        log = (folder / name / "log").read_text()
        clocks = [line.split()[0].split(":") for line in log.splitlines() if " update " in line]
        seconds = [3600 * int(h) + 60 * int(m) + int(s) for h, m, s in clocks]
        ends.append((seconds[-1] - seconds[0]) % 86400)
    return int(60 * minutes * count / max(1, *ends))


def soak(inputs: Path, folder: Path, *, minutes: float, seed: int) -> dict:
    """Two runs side by side, two ranks each: one quiet, one with a fault about every half minute.

    What both did and held.
    """
    rng = random.Random(seed)
    updates = updates_of(minutes, inputs, folder / "try")
    runs = {name: folder / name / "run" for name in ("quiet", "faulty")}
    samples: dict[str, Samples] = {name: {} for name in runs}
    faults = dict.fromkeys(("rank", "stop", "machine"), 0)
    processes = {name: begin(inputs, run, updates) for name, run in runs.items()}
    began = time.monotonic()
    next_fault = began + 10 + rng.expovariate(1 / 20)
    while any(process.poll() is None for process in processes.values()):
        time.sleep(2)
        for name, run in runs.items():
            sample(run, samples[name])
        now = time.monotonic()
        planting = next_fault < now < began + 60 * minutes  # then the run may end in peace
        if planting and processes["faulty"].poll() is None:
            kind = rng.choice(list(faults))
            fault(runs["faulty"], kind, processes["faulty"], rng)
            faults[kind] += 1
            if kind != "rank":
                processes["faulty"] = begin(inputs, runs["faulty"], updates)
            next_fault = time.monotonic() + 10 + rng.expovariate(1 / 20)
    for name, process in processes.items():
        assert process.returncode == 0, (folder / name / "log").read_text()[-4000:]
    return {
        "updates": updates,
        "minutes": (time.monotonic() - began) / 60,
        "faults": faults,
        "resumed": (folder / "faulty" / "log").read_text().count("resuming after update"),
        "growth": {name: growth(found, num_late_threads=int(name == "faulty")) for name, found in samples.items()},
        "held": {name: held(found) for name, found in samples.items()},
    }


def held(samples: Samples) -> dict[str, list[Sample]]:
    """Of every process that lived a minute or more: medians of the second and of the last quarter of its life."""
    return {
        f"{role} {pid}": [
            Sample(*(round(statistics.median(v), 1) for v in zip(*part, strict=True)))
            for part in (series[len(series) // 4 : len(series) // 2], series[-(len(series) // 4) :])
        ]
        for (role, pid), series in samples.items()
        if len(series) >= 30
    }


@pytest.mark.soak
def test_half_an_hour_of_faults(root, tmp_path):
    found = soak(root, tmp_path, minutes=MINUTES, seed=3)
    json.dump(found, sys.stdout, indent=1)
    same_ends(tmp_path / "quiet" / "run", tmp_path / "faulty" / "run")
    num_faults = sum(found["faults"].values())
    assert num_faults >= MINUTES
    assert found["resumed"] >= num_faults / 2  # some come before the first checkpoint, or two in one start
    assert found["growth"] == {"quiet": [], "faulty": []}
    for name in ("quiet", "faulty"):
        run = tmp_path / name / "run"
        assert status(run)["state"] == "finished"
        assert not processes_of(run)
        assert not list(run.rglob("*.part"))
        assert len(list((run / "checkpoints").iterdir())) <= 3
