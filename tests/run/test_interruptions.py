"""What clusters do to jobs: signals, ranks that die, hang or leave, two jobs in one folder.

Real processes, by torchrun.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fastdistil.run import checkpoint
from fastdistil.run.command import REPEATS_S, STOP_SIGNALS, STOPPED
from tests.support import forked, launch, runs
from tests.support.processes import parent_of, processes_of, workers_of
from tests.support.runs import long_arguments, status

FAULTY = "tests.workers.faulty_worker"
PLAIN = {"engine__zero_stage": 0}
"""Where DeepSpeed has no part in what is tested: 3 s less."""


def test_interrupted_while_it_loads_then_in_use_then_killed_then_taken_up(root, tmp_path):
    run = tmp_path / "run"
    words = launch.command("fastdistil.pretrain", *long_arguments(root, run))
    early = launch.start_until("memory:", words)  # models and text are not loaded yet
    early.send_signal(signal.SIGTERM)
    assert launch.rest_of(early).splitlines()[-1].startswith("interrupted by SIGTERM: ")
    assert early.returncode == 128 + signal.SIGTERM
    assert not (run / "status.json").exists()

    first = launch.start_until("wrote ", words)  # a checkpoint, which a slow disk may delay for seconds
    try:
        second = forked.run("fastdistil.pretrain", *long_arguments(root, run), ok=False)
        assert second.returncode == 2
        assert f"--out {run} is in use by process {first.pid} on " in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert status(run)["state"] == "running"  # which only a killed job leaves

    third = launch.start_until("resuming after update", words)
    third.send_signal(signal.SIGUSR1)
    launch.rest_of(third)
    assert third.returncode == STOPPED
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", "SIGUSR1")
    assert status(run)["update"] >= 5


def was_stopped(run: Path, *, by: str) -> None:
    """The run has a checkpoint of where it was stopped, and nobody works in it any more."""
    found = status(run)
    assert (found["state"], found["reason"]) == ("stopped", by)
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.name == f"update-{found['update']:08d}"
    assert not processes_of(run)


WITH_WORKERS = {"data__num_workers": 2, "log__checkpoint_every": 10_000}
"""Processes beside the ranks, and no checkpoint but that of the stop."""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_every_process_of_a_run_and_again(root, tmp_path, number):
    """As `timeout`, systemd, Slurm and a terminal send theirs: data workers get it, too."""
    run = tmp_path / "run"
    words = launch.command("fastdistil.pretrain", *long_arguments(root, run, **WITH_WORKERS))
    process = launch.start_until("update 3/", words)
    assert len(processes_of(run)) == 3
    for _ in range(2):
        for pid in processes_of(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.05)
    rest = launch.rest_of(process)
    assert process.returncode == STOPPED
    was_stopped(run, by=number.name)
    assert rest.count(f"{number.name}: stopping after this update") == 1
    assert rest.endswith(" --resume auto\n"), rest


@pytest.mark.parametrize("every_process", [False, True])
def test_a_signal_to_torchrun_with_data_workers(root, tmp_path, every_process):
    """A scheduler's SIGTERM to every process of the job reaches the ranks again, as torchrun's own."""
    run = tmp_path / "run"
    options = long_arguments(root, run, **PLAIN, **WITH_WORKERS)
    process = launch.start_until("update 3/", launch.command("fastdistil.pretrain", *options, ranks=2))
    assert len(processes_of(run)) == 1 + 2 + 4
    begin = time.monotonic()
    for pid in processes_of(run) if every_process else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    rest = launch.rest_of(process)
    assert time.monotonic() - begin < 15  # torchrun kills after 30
    assert process.returncode == 1  # its own, whatever the ranks'
    was_stopped(run, by="SIGTERM")
    assert rest.count("SIGTERM: stopping after this update") == 1


@pytest.mark.parametrize("teacher_ranks", [0, 1])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(root, tmp_path, teacher_ranks):
    """Under a launcher that starts ranks anew which failed: these have not. The last one may serve a teacher."""
    run, ranks = tmp_path / "run", 2 + teacher_ranks
    options = long_arguments(root, run, **PLAIN, log__checkpoint_every=10_000, teacher__ranks=teacher_ranks)
    process = launch.start_until("update 3/", launch.command("fastdistil.pretrain", *options, ranks=ranks, restarts=1))
    begin = time.monotonic()
    os.kill(workers_of(run)[ranks - 1], signal.SIGTERM)
    rest = launch.rest_of(process)
    assert time.monotonic() - begin < 15  # torchrun kills after 30
    assert process.returncode == 1
    was_stopped(run, by="a teacher rank was asked to" if teacher_ranks else "another rank was asked to")
    assert "resuming" not in rest


def test_data_workers_end_with_a_killed_run(root, tmp_path):
    """They would hold its output open, and `| tee` would wait for them for good."""
    run = tmp_path / "run"
    words = launch.command("fastdistil.pretrain", *long_arguments(root, run, **WITH_WORKERS))
    process = launch.start_until("update 3/", words)
    process.kill()
    launch.rest_of(process)  # to the end of its output
    assert not processes_of(run)


def test_a_killed_data_worker_is_named_on_every_rank(root, tmp_path):
    run = tmp_path / "run"
    options = long_arguments(root, run, **PLAIN, **WITH_WORKERS)
    process = launch.start_until("update 3/", launch.command("fastdistil.pretrain", *options, ranks=2))
    rank_1 = workers_of(run)[1]
    os.kill(next(pid for pid in processes_of(run) if parent_of(pid) == rank_1), signal.SIGKILL)
    rest = launch.rest_of(process)
    assert process.returncode == 1
    assert not processes_of(run)
    wanted = r"rank 1, update \d+: a data worker was killed, most likely for want of memory"
    assert re.search(f"^error: the run failed: {wanted}", rest, re.MULTILINE), rest
    found = status(run)
    assert found["state"] == "failed"
    assert re.match(wanted, found["reason"])
    assert found["update"] >= 3


def test_a_shard_that_is_cut_while_it_is_read(root, tmp_path):
    run, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(root / "shards", shards)
    options = long_arguments(root, run, data__num_workers=1, data__shards=shards)
    process = launch.start_until("update 3/", launch.command("fastdistil.pretrain", *options))
    os.truncate(shards / "shard-00000.tokens", 1000)
    rest = launch.rest_of(process)
    assert process.returncode == 1
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].endswith(
        "shard-00000.tokens was cut since it was opened: run `python -m fastdistil.prepare` again with --overwrite"
    )
    assert "was cut since" in status(run)["reason"]


@pytest.mark.parametrize("go_on", [False, True])
def test_a_disk_that_takes_no_metrics_any_more(root, tmp_path, go_on):
    run = tmp_path / "run"
    changes = {"log__failed_save": "go-on"} if go_on else {}
    options = long_arguments(root, run, optim__duration=60, **changes)
    process = launch.start_until("update 3/", launch.command("fastdistil.pretrain", *options))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    if go_on:
        launch.read_until("going on without writing metrics: [Errno 28] No space left", process)
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").write_text(lines)
    rest = launch.rest_of(process)
    assert "Traceback" not in rest
    assert process.returncode == (0 if go_on else 1)
    assert status(run)["state"] == ("finished" if go_on else "failed")
    if go_on:
        assert {line["update"] for line in runs.metrics_of(run)} == set(range(1, 61))
    else:
        assert "No space left on device" in rest.splitlines()[-1]
        assert "No space left on device" in status(run)["reason"]


def test_a_run_folder_that_is_removed_is_made_anew(root, tmp_path):
    run = tmp_path / "run"
    process = launch.start_until(
        "update 3/", launch.command("fastdistil.pretrain", *long_arguments(root, run, optim__duration=40))
    )
    run.rename(tmp_path / "elsewhere")
    rest = launch.rest_of(process)
    assert process.returncode == 0, rest
    assert "was removed or moved while the run worked: it is made anew" in rest
    assert status(run)["state"] == "finished"
    assert (run / "tokenizer" / "vocab.txt").is_file()
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.name == "update-00000040"


def test_a_signal_during_a_save(root, tmp_path):
    """SIGUSR1 to torchrun, as some clusters warn of preemption: the save ends, and then another of where the run is."""
    run = tmp_path / "run"
    words = launch.command(FAULTY, "save", 0, 5, *long_arguments(root, run), ranks=2)
    words.insert(words.index("torch.distributed.run") + 1, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    process = launch.start_until("planted: half of update-00000005.part", words)
    process.send_signal(signal.SIGUSR1)
    begin = time.monotonic()
    launch.read_until("SIGUSR1: stopping after this update", process)
    assert not checkpoint.folder_of(run, 5).exists()
    (run / "go").touch()
    launch.rest_of(process)
    assert time.monotonic() - begin < 15  # torchrun kills after 30
    assert not processes_of(run)
    found = status(run)
    assert (found["state"], found["reason"]) == ("stopped", "SIGUSR1")
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names[-1] == f"update-{found['update']:08d}"
    assert all(checkpoint.verify(run / "checkpoints" / name) is None for name in names)
    assert "update-00000005" in names


def test_no_rank_goes_before_the_last_checkpoint_is_written(root, tmp_path):
    """Launchers take its 75 for a failure, and end the rank that still writes."""
    run = tmp_path / "run"
    process = launch.start_until(
        "planted: half of", launch.command(FAULTY, "save", 0, 5, *long_arguments(root, run), ranks=2)
    )
    before = workers_of(run)
    for pid in before.values():
        os.kill(pid, signal.SIGTERM)
    launch.read_until("update 6/", process)
    time.sleep(2)
    assert workers_of(run) == before
    (run / "go").touch()
    assert "closing signal" not in launch.rest_of(process).partition("stopped after update 6")[0]
    assert status(run)["state"] == "stopped"
    assert checkpoint.newest(run) == checkpoint.folder_of(run, 6)


def test_a_rank_that_is_killed_takes_no_checkpoint_with_it(root, tmp_path):
    """The other one loses it while it writes: what it has learnt so far is finished before it goes."""
    run = tmp_path / "run"
    options = long_arguments(root, run, **PLAIN)
    process = launch.start_until("planted: half of", launch.command(FAULTY, "save", 0, 10, *options, ranks=2))
    os.kill(workers_of(run)[1], signal.SIGKILL)
    launch.read_until("error: the run failed: rank 0", process)
    assert checkpoint.newest(run) == checkpoint.folder_of(run, 5)
    (run / "go").touch()
    launch.rest_of(process)
    assert process.returncode != 0
    assert status(run)["state"] == "failed"
    assert checkpoint.newest(run) == checkpoint.folder_of(run, 10)


def test_a_disk_that_was_full_costs_no_work(root, tmp_path):
    """A checkpoint that cannot be written ends the run at once, not when the next is due, with one of where it is."""
    run = tmp_path / "run"
    options = long_arguments(root, run, **PLAIN, log__checkpoint_every=40)
    done = forked.run(FAULTY, "full", 0, 40, *options, ranks=2, ok=False)
    found, newest = status(run), checkpoint.newest(run)
    assert newest is not None
    assert newest.name in [f"update-{update:08d}" for update in range(41, 60)]
    assert "saving once more without this checkpoint: cannot write" in done.stdout + done.stderr
    assert found["state"] == "failed"
    assert "No space left on device" in found["reason"]
    ending = f"That of update {int(newest.name[-8:])} could be written, so that nothing is lost"
    assert found["reason"].endswith(ending)
    assert ending in done.stdout + done.stderr


def test_a_second_signal_during_a_save_leaves_the_checkpoint_before(root, tmp_path):
    run = tmp_path / "run"
    options = long_arguments(root, run, **PLAIN, optim__duration=12)
    process = launch.start_until("planted: half of", launch.command(FAULTY, "save", 0, 10, *options, ranks=2))
    rank_0 = workers_of(run)[0]
    os.kill(rank_0, signal.SIGTERM)
    time.sleep(REPEATS_S + 0.2)
    os.kill(rank_0, signal.SIGTERM)
    launch.rest_of(process)
    assert process.returncode != 0
    assert not processes_of(run)
    assert status(run)["state"] != "finished"
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.name == "update-00000005"
    assert (run / "checkpoints" / "update-00000010.part").exists()
    again = forked.run("fastdistil.pretrain", *options)
    assert "resuming after update 5 of 12" in again.stdout
    assert not list((run / "checkpoints").glob("*.part"))


# torchrun waits 30 s for a process that was stopped
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("hang", 1),
        ("leave", 0),
        ("fail", 0),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (("hang", 0), ("leave", 1), ("fail", 1), ("stop", 1))
        ),
    ],
)
def test_a_rank_that_is_lost_ends_the_run(root, tmp_path, kind, stage):
    run, timeout_s = tmp_path / "run", 6
    options = long_arguments(root, run, engine__timeout_s=timeout_s, engine__zero_stage=stage)
    process = launch.start_until("planted", launch.command(FAULTY, kind, 1, 4, *options, ranks=2))
    planted = time.time()
    printed = launch.rest_of(process)
    ended = time.time()
    assert process.returncode != 0
    assert not processes_of(run)
    found = (run / "status.json").stat().st_mtime if kind != "fail" else ended
    assert found - planted < timeout_s + 5
    assert ended - planted < timeout_s + 10 + (30 if kind == "stop" else 0)
    stacks = {p.name: p.read_text() for p in (run / "stacks").iterdir()}
    if kind == "fail":  # its own traceback, and named as the first
        assert "RuntimeError: planted failure" in stacks["rank-00001.txt"]
        cause = printed[printed.index("Root Cause") :]
        assert re.search(r"rank\s*:\s*1 ", cause)
        assert "planted failure" in cause
    else:
        assert "in train" in stacks["rank-00000.txt"]  # it waited in vain
        assert status(run)["state"] == "failed"
    if kind == "hang":  # written by the rank that can say nothing else
        assert "faulty_worker.py" in stacks["rank-00001.txt"]
        assert "in fault" in stacks["rank-00001.txt"]


def test_a_straggler_is_named(root, tmp_path):
    options = long_arguments(
        root, tmp_path / "run", **PLAIN, optim__duration=2, log__every=2, data__validation_sequences=4
    )
    done = forked.run(FAULTY, "slow", 1, 0, *options, ranks=2)
    assert "rank 1 is slow" in done.stdout
    assert "rank 0 is slow" not in done.stdout


def test_a_killed_rank_is_restarted_and_leaves_no_trace(root, tmp_path):
    """Rank 0, in its eighth update: torchrun ends the other, starts both anew, and they go on from the fifth."""
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    changes = {**PLAIN, "optim__duration": 12, "data__num_workers": 1}
    forked.run("fastdistil.pretrain", *long_arguments(root, quiet, **changes), ranks=2)
    done = launch.run(FAULTY, "kill", 0, 8, *long_arguments(root, run, **changes), ranks=2, restarts=1)
    assert "planted: kill" in done.stdout
    assert done.stdout.count("resuming after update 5 of 12") == 1
    assert not processes_of(run)
    runs.same_ends(quiet, run)
    assert runs.exact_metrics(run) == runs.exact_metrics(quiet)


def killed_at_random(words: list[str], run: Path, *, kills: int, seed: int) -> str:
    """Two ranks under a launcher that restarts them, of which random ones are killed; what was printed."""
    rng = random.Random(seed)
    log = run.parent / "log"
    environment = launch.ENVIRONMENT | launch.RESTARTING
    with log.open("w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
    left = kills
    while process.poll() is None:
        time.sleep(0.02)
        *lives, now = log.read_text().split("resuming after update")
        if left and len(lives) == kills - left and "wrote " in now:  # it has got further than the last time
            time.sleep(rng.uniform(0, 0.5))
            workers = workers_of(run)
            if len(workers) == 2:
                os.kill(workers[rng.randrange(2)], signal.SIGKILL)
                left -= 1
    text = log.read_text()
    assert process.returncode == 0, text[-3000:]
    assert not left, f"{left} kills were not made"
    assert text.count("resuming after update") == kills
    return text


@pytest.mark.soak
def test_twenty_killed_ranks(root, tmp_path):
    changes = {"optim__duration": 300, "engine__zero_stage": 1}
    forked.run("fastdistil.pretrain", *long_arguments(root, tmp_path / "quiet", **changes), ranks=2)
    run = tmp_path / "killed" / "run"
    run.parent.mkdir()
    words = launch.command("fastdistil.pretrain", *long_arguments(root, run, **changes), ranks=2, restarts=20)
    killed_at_random(words, run, kills=20, seed=2)
    runs.same_ends(tmp_path / "quiet", run)
