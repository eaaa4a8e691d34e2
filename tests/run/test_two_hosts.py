"""Two hosts, each with its torchrun: network namespaces of this machine that one cable joins. What ends them, and that
the run goes on from there.
"""

import shutil
import signal
import time

import pytest

from fastdistil.run import checkpoint
from tests.support import forked, hosts, runs
from tests.support.hosts import Job
from tests.support.runs import long_arguments, status
from tests.workers import together_worker

hosted = pytest.mark.skipif(bool(why := hosts.unavailable()), reason=why)

SLOW = ["tests.workers.faulty_worker", "slow", 1, 0]
"""0.3 s before each of rank 1's two micro-batches: 12 updates take 8 s, in which something can happen."""
PLAIN = ["fastdistil.pretrain"]
TIMEOUT_S = 5
BOUND_S = 15
"""Beyond the timeout: ranks say why they end, torchrun looks once a second, and other tests run beside this one."""


def words(root, run, **changes):
    given = {"optim__duration": 12, "engine__timeout_s": TIMEOUT_S, "engine__threads": 1, "engine__zero_stage": 0}
    return long_arguments(root, run, **given | changes)


@pytest.fixture(scope="module")
def quiet(root, tmp_path_factory):
    """The run of two ranks to which nothing happens."""
    run = tmp_path_factory.mktemp("quiet") / "run"
    forked.run(*PLAIN, *words(root, run), ranks=2)
    return run


def end_is_known(job, begin, *, alive=(0, 1)):
    """Both hosts have ended in time, with nothing left over and no success; those that were `alive` say why."""
    assert 0 not in job.end(timeout_s=begin + TIMEOUT_S + BOUND_S - time.monotonic())
    assert not any(host.processes() for host in job.hosts)
    for rank in alive:
        assert "its host is gone" in job.printed(rank)


def every_checkpoint_is_whole(run):
    for found in (run / "checkpoints").iterdir():
        assert found.suffix == ".part" or checkpoint.verify(found) is None


def lose(job, rank):
    """Not even a reset of its connections arrives."""
    job.hosts[rank].unplug()
    job.hosts[rank].kill()


def goes_on_to_the_same_end(root, run, quiet, tmp_path):
    """On two hosts and, from a copy, on one host of two ranks bit for bit; of one rank but for rounding."""
    copies = [shutil.copytree(run, tmp_path / f"on-{ranks}") for ranks in ("two", "one")]
    with hosts.two_hosts() as pair:
        job = Job(pair, tmp_path / "last", [*PLAIN, *words(root, run)])
        assert job.end() == [0, 0], job.printed(0)
    forked.run(*PLAIN, *words(root, copies[0]), ranks=2)
    forked.run(*PLAIN, *words(root, copies[1]))
    for ended in (run, copies[0]):
        runs.same_ends(quiet, ended)
        assert runs.exact_metrics(ended) == runs.exact_metrics(quiet)
    for got, wanted in zip(runs.metrics_of(copies[1]), runs.metrics_of(quiet), strict=True):
        assert (got["update"], got.get("tokens")) == (wanted["update"], wanted.get("tokens"))
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@hosted
def test_one_run_through_a_cut_cable_a_lost_host_and_a_stop_of_both(root, quiet, tmp_path):
    run = tmp_path / "run"
    often, never = words(root, run, log__checkpoint_every=2), words(root, run, log__checkpoint_every=1000)
    # The cable is cut: each host hears nothing of the other.
    with hosts.two_hosts() as pair:
        job = Job(pair, tmp_path / "cut", [*SLOW, *often])
        job.wait_until("update 3/12")
        begin = time.monotonic()
        pair[1].unplug()
        end_is_known(job, begin)
    assert status(run)["state"] == "failed"
    assert "its host is gone" in status(run)["reason"]
    every_checkpoint_is_whole(run)

    # The second host is gone, and with it whatever could say so.
    with hosts.two_hosts() as pair:
        job = Job(pair, tmp_path / "lost", [*SLOW, *often])
        job.wait_until("update 6/12")
        begin = time.monotonic()
        lose(job, 1)
        end_is_known(job, begin, alive=(0,))
    assert "resuming after update 2 of 12" in job.printed(0)
    every_checkpoint_is_whole(run)

    # Both are asked to stop, as a scheduler does.
    with hosts.two_hosts() as pair:
        job = Job(pair, tmp_path / "stopped", [*SLOW, *never])
        job.wait_until("update 7/12")
        for torchrun in job.torchruns:
            torchrun.send_signal(signal.SIGTERM)
        assert 0 not in job.end()
        assert not any(host.processes() for host in pair)
    is_stopped(run, "SIGTERM")
    goes_on_to_the_same_end(root, run, quiet, tmp_path)


def is_stopped(run, reason):
    found = status(run)
    assert (found["state"], found["reason"]) == ("stopped", reason)
    assert checkpoint.newest(run) == checkpoint.folder_of(run, found["update"])


@pytest.mark.soak
@hosted
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_first_host_is_lost_or_cut_off(root, tmp_path, stage):
    """With it the store by which ranks meet, and, where it is lost, the run's lock and status."""
    changes = {"engine__zero_stage": stage, "log__checkpoint_every": 2}
    forked.run(*PLAIN, *words(root, tmp_path / "quiet", **changes), ranks=2)
    run = tmp_path / "run"
    for place, fault in (("cut", lambda job: job.hosts[0].unplug()), ("lost", lambda job: lose(job, 0))):
        with hosts.two_hosts() as pair:
            job = Job(pair, tmp_path / place, [*SLOW, *words(root, run, **changes)])
            job.wait_until("update 5/12")
            begin = time.monotonic()
            fault(job)
            end_is_known(job, begin, alive=(0, 1) if place == "cut" else (1,))
        every_checkpoint_is_whole(run)
    assert status(run)["state"] == "running"
    with hosts.two_hosts() as pair:
        assert Job(pair, tmp_path / "last", [*PLAIN, *words(root, run, **changes)]).end() == [0, 0]
    runs.same_ends(tmp_path / "quiet", run)


@pytest.mark.soak
@hosted
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_of_one_host_stops_both(root, quiet, tmp_path, rank):
    run = tmp_path / "run"
    with hosts.two_hosts() as pair:
        job = Job(pair, tmp_path / "stopped", [*SLOW, *words(root, run)])
        job.wait_until("update 3/12")
        job.torchruns[rank].send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert 0 not in job.end()
        assert time.monotonic() - begin < BOUND_S
        assert not any(host.processes() for host in pair)
    is_stopped(run, "another rank was asked to" if rank else "SIGTERM")
    goes_on_to_the_same_end(root, run, quiet, tmp_path)


@pytest.mark.soak
@hosted
def test_hosts_without_a_common_disk(root, quiet, tmp_path):
    """Only rank 0's holds the run; the other's leaves nothing but the stacks of ranks that fail."""
    here, there = tmp_path / "here", tmp_path / "there" / "deep"
    with hosts.two_hosts() as pair:
        job = Job(pair, tmp_path / "cut", *([*SLOW, *words(root, run)] for run in (here, there)))
        job.wait_until("wrote ")
        begin = time.monotonic()
        pair[1].unplug()
        end_is_known(job, begin)
    assert [p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()] == ["stacks/rank-00001.txt"]
    with hosts.two_hosts() as pair:
        assert Job(pair, tmp_path / "on", *([*PLAIN, *words(root, run)] for run in (here, there))).end() == [0, 0]
    runs.same_ends(quiet, here)


@pytest.mark.soak
@hosted
def test_a_host_that_refuses_is_not_waited_for_in_silence(root, tmp_path):
    """What only its own files tell: before any process group, so that the other host waits out the timeout."""
    with hosts.two_hosts() as pair:
        run = tmp_path / "run"
        without = [*words(root, run), "--data.shards", str(tmp_path / "nowhere")]
        job = Job(pair, tmp_path / "log", [*PLAIN, *words(root, run)], [*PLAIN, *without])
        assert job.end() == [1, 1]
    assert f"{tmp_path / 'nowhere'}/meta.json does not exist" in job.printed(1)
    assert f"the 2 ranks have not all met within --engine.timeout-s {TIMEOUT_S}" in job.printed(0)


def test_hosts_that_were_started_with_other_commands_refuse_together():
    """Ranks with another learning rate, seed or batch would meet, and nobody would know what was trained."""
    for found in forked.call(together_worker.other_commands, ranks=2):
        assert found == {
            "nothing": "passed",
            "places and threads": "passed",
            "an option": "--optim.lr is 0.001 on rank 1 and the default on rank 0: start the same command of the same "
            "version on every host",
            "code": "the code of fastdistil is code of rank 1 on rank 1 and code of rank 0 on rank 0: start the same "
            "command of the same version on every host",
        }
