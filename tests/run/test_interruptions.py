"""What clusters do to jobs: signals, ranks that die, hang or leave, two jobs in one folder. Real processes, under torchrun where it matters."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdistil.run import checkpoint
from fastdistil.run import folder as run_folder
from tests.support import launch, toy
from tests.support.launch import options


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruptions")
    toy.make_shards(folder / "shards")
    toy.make_teacher(folder / "teacher", folder / "shards")
    return folder


def arguments(root: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "data__shards": root / "shards",
        "teacher__path": root / "teacher",
        "out": out,
        "optim__duration": 400,
        "optim__unit": "updates",
        "batch__size": 1024,
        "batch__token_budget": 256,
        "data__num_workers": 0,
        "data__validation_sequences": 40,
        "log__every": 1,
        "log__validate_every": 10_000,
        "log__checkpoint_every": 5,
        "student__num_layers": 2,
        "engine__bucket_elements": 10_000,
        "resume": "auto",
    }
    return ["quickstart", "--log.no-tensorboard", *options(**values | changes)]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def processes_of(run: Path) -> list[int]:
    """Living processes whose command line names the run folder."""
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if not is_zombie(int(pid))]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def workers_of(run: Path) -> dict[int, int]:
    """{rank: process} of a run under torchrun."""
    found = {}
    for pid in processes_of(run):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        ranks = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = pid
    return found


def test_a_second_job_in_a_folder_is_refused_until_the_first_is_dead(root, tmp_path):
    run = tmp_path / "run"
    words = launch.command("fastdistil.pretrain", *arguments(root, run))
    first = launch.start_until("wrote ", words)  # a checkpoint, which a slow disk may delay for seconds
    try:
        second = launch.run("fastdistil.pretrain", *arguments(root, run), ok=False)
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
    assert third.returncode == 0
    assert status(run)["state"] == "stopped"
    assert status(run)["reason"] == "SIGUSR1"


def test_a_lock_outlives_no_process_and_no_fork(tmp_path):
    lock = run_folder.Lock(tmp_path)
    child = os.fork()
    if child == 0:  # a data worker, say: the lock is not its own
        try:
            run_folder.Lock(tmp_path)
        except ValueError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.file.close()
    run_folder.Lock(tmp_path).file.close()


def test_a_signal_before_the_first_update_leaves_a_run_that_can_start(root, tmp_path):
    run = tmp_path / "run"
    words = launch.command("fastdistil.pretrain", *arguments(root, run))
    process = launch.start_until("memory:", words)  # models and text are not loaded yet
    process.send_signal(signal.SIGTERM)
    launch.rest_of(process)
    assert process.returncode == 0
    assert status(run) | {"time": ""} == {"state": "stopped", "update": 0, "updates": 400, "reason": "SIGTERM", "time": ""}  # fmt: skip
    assert checkpoint.newest(run) is None
    again = launch.start_until("update 1/", words)
    again.terminate()
    launch.rest_of(again)
    assert status(run)["update"] >= 1


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(root, tmp_path):
    run = tmp_path / "run"
    words = launch.command("fastdistil.pretrain", *arguments(root, run, log__checkpoint_every=10_000), ranks=2)  # fmt: skip
    process = launch.start_until("update 3/", words)
    begin = time.monotonic()
    os.kill(workers_of(run)[1], signal.SIGTERM)
    launch.rest_of(process)
    assert time.monotonic() - begin < 15  # torchrun kills after 30
    assert process.returncode == 0
    found = status(run)
    assert (found["state"], found["reason"]) == ("stopped", "another rank was asked to")
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.name == f"update-{found['update']:08d}"


def test_a_signal_during_a_save(root, tmp_path):
    """SIGUSR1 to torchrun, as some clusters warn of preemption: it waits for the save, then for another of where the run is."""
    run = tmp_path / "run"
    words = launch.command(launch.ROOT / "tests" / "workers" / "faulty_worker.py", "save", 0, 0, *arguments(root, run), ranks=2, script=True)  # fmt: skip
    words.insert(words.index("torch.distributed.run") + 1, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")  # fmt: skip
    process = launch.start_until("planted: half of update-00000005.part", words)
    process.send_signal(signal.SIGUSR1)
    begin = time.monotonic()
    launch.rest_of(process)
    assert time.monotonic() - begin < 15  # torchrun kills after 30
    assert not processes_of(run)
    found = status(run)
    assert (found["state"], found["reason"]) == ("stopped", "SIGUSR1")
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names[-1] == f"update-{found['update']:08d}"
    assert all(checkpoint.verify(run / "checkpoints" / name) is None for name in names)


def test_a_second_signal_during_a_save_leaves_the_checkpoint_before(root, tmp_path):
    run = tmp_path / "run"
    words = launch.command(launch.ROOT / "tests" / "workers" / "faulty_worker.py", "save", 0, 0, *arguments(root, run), ranks=2, script=True)  # fmt: skip
    process = launch.start_until("planted: half of update-00000010.part", words)
    rank_0 = workers_of(run)[0]
    for _ in range(2):
        os.kill(rank_0, signal.SIGTERM)
        time.sleep(0.2)
    launch.rest_of(process)
    assert process.returncode != 0
    assert not processes_of(run)
    assert status(run)["state"] != "finished"
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.name == "update-00000005"
    assert (run / "checkpoints" / "update-00000010.part").exists()
    again = launch.start_until("update 6/", launch.command("fastdistil.pretrain", *arguments(root, run)))
    again.terminate()
    launch.rest_of(again)
    assert again.returncode == 0
    assert not list((run / "checkpoints").glob("*.part"))


# torchrun waits 30 s for a process that was stopped
@pytest.mark.parametrize("kind", ["hang", "leave", "fail", pytest.param("stop", marks=pytest.mark.soak)])
def test_a_rank_that_is_lost_ends_the_run(root, tmp_path, kind):
    run, timeout = tmp_path / "run", 8
    words = launch.command(
        launch.ROOT / "tests" / "workers" / "faulty_worker.py", kind, 1, 4,
        *arguments(root, run, engine__timeout_s=timeout), ranks=2, script=True,
    )  # fmt: skip
    process = launch.start_until("planted", words)
    planted = time.time()
    printed = launch.rest_of(process)
    ended = time.time()
    assert process.returncode != 0
    assert not processes_of(run)
    found = (run / "status.json").stat().st_mtime if kind != "fail" else ended
    assert found - planted < timeout + 5
    assert ended - planted < timeout + 10 + (30 if kind == "stop" else 0)
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
    words = arguments(root, tmp_path / "run", optim__duration=4, log__every=2)
    done = launch.run(launch.ROOT / "tests" / "workers" / "faulty_worker.py", "slow", 1, 0, *words, ranks=2, script=True)  # fmt: skip
    assert "rank 1 is slow" in done.stdout
    assert "rank 0 is slow" not in done.stdout


def killed_at_random(root: Path, run: Path, *, kills: int, updates: int, seed: int) -> str:
    """Train with two ranks while random ones are killed; what was printed."""
    rng = random.Random(seed)
    words = launch.command("fastdistil.pretrain", *arguments(root, run, optim__duration=updates), ranks=2, restarts=kills)  # fmt: skip
    log = run.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words, env=launch.ENVIRONMENT | launch.RESTARTING, stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
    left, seen = kills, 0
    while process.poll() is None:
        time.sleep(0.02)
        written = log.read_text().count("wrote ")
        if left and written > seen:  # it has begun to train, and got further than the last time
            time.sleep(rng.uniform(0, 0.5))
            workers = workers_of(run)
            if len(workers) == 2:
                os.kill(workers[rng.randrange(2)], signal.SIGKILL)
                left, seen = left - 1, log.read_text().count("wrote ")
    text = log.read_text()
    assert process.returncode == 0, text[-3000:]
    assert not left, f"{left} kills were not made"
    assert text.count("resuming after update") == kills
    return text


def same_ends(one: Path, other: Path) -> None:
    """The last checkpoints are equal bit for bit."""
    folders = [checkpoint.newest(run) for run in (one, other)]
    assert folders[0] is not None
    assert folders[1] is not None
    assert folders[0].name == folders[1].name
    for name in checkpoint.FILES[:2]:
        tensors = [load_file(folder / name) for folder in folders if folder]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())


def test_killed_ranks_are_restarted_and_leave_no_trace(root, tmp_path):
    launch.run("fastdistil.pretrain", *arguments(root, tmp_path / "quiet", optim__duration=40), ranks=2)
    (tmp_path / "killed").mkdir()
    killed_at_random(root, tmp_path / "killed" / "run", kills=2, updates=40, seed=1)
    same_ends(tmp_path / "quiet", tmp_path / "killed" / "run")


@pytest.mark.soak
def test_twenty_killed_ranks(root, tmp_path):
    launch.run("fastdistil.pretrain", *arguments(root, tmp_path / "quiet", optim__duration=300), ranks=2)
    (tmp_path / "killed").mkdir()
    killed_at_random(root, tmp_path / "killed" / "run", kills=20, updates=300, seed=2)
    same_ends(tmp_path / "quiet", tmp_path / "killed" / "run")
