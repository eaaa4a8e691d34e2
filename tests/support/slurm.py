"""A Slurm of two nodes on this machine: its own munged, slurmctld and two slurmd, Debian's packages. Wants root.

Nothing of it outlives the context.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.launch import ENVIRONMENT

NODES = (socket.gethostname().partition(".")[0], "zz")
"""The first is where rank 0 waits, so that its name must lead somewhere; they are sorted by name."""
PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
CONFIGURATION = """\
ClusterName=here
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName={nodes[0]},{nodes[1]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=4
PartitionName=cheap Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
"""Without systemd and cgroups. A job of `urgent` puts those of `cheap` back, which have a minute after SIGTERM.

A job that was put back waits for cred_expire, two minutes by default."""


class Cluster:
    """Jobs, and what becomes of them; `folder` is where their logs lie."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def ask(self, *words: object, **environment: str) -> str:
        """What one of Slurm's commands prints."""
        command = [str(word) for word in words]
        given = self.environment | environment
        done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=self.folder)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *words: object, **environment: str) -> str:
        """The number of a job of `sbatch`."""
        return self.ask("sbatch", "--parsable", *words, **environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        """What a job has printed in all its lives."""
        path = self.folder / f"fastdistil-{self.show(job)['JobId']}.log"
        return path.read_text() if path.exists() else ""

    def wait_until(
        self, job: str, text: str, when: Callable[[str], Any] | None = None, *, timeout_s: float = 180
    ) -> None:
        """Return when a job has printed `text`; or when `when` of all that it has printed is true, called `text`."""
        deadline = time.monotonic() + timeout_s
        while not (when(self.log(job)) if when else text in self.log(job)):
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s} s:\n{self.show(job)}\n{self.log(job)}"
            time.sleep(0.05)

    def end(self, job: str, *, timeout_s: float = 240) -> dict[str, str]:
        """What `show` says once a job has ended, for good."""
        deadline = time.monotonic() + timeout_s
        while (found := self.show(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"at work after {timeout_s} s:\n{found}\n{self.log(job)}"
            time.sleep(0.1)
        return found


def unavailable() -> str:
    """Why there can be no Slurm here; empty where there can."""
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if missing:
        return f"Slurm is not installed: apt-get install {' '.join(missing)}"
    with contextlib.suppress(OSError):
        socket.gethostbyname(NODES[0])
        return "" if os.geteuid() == 0 else "a Slurm of one's own wants root here"
    return f"this machine's name, {NODES[0]}, leads nowhere"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two idle nodes of four processors each, whatever this machine has, and no jobs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))  # short: sockets lie there
        configuration = folder / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(folder=folder, nodes=NODES, ports=_ports(3)))
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"  # the venv's, as if it were activated
        environment = ENVIRONMENT | {"SLURM_CONF": str(configuration), "PATH": path}
        munge = {name: folder / f"munge.{name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")}
        munge["key-file"] = folder / "munge.key"
        _start(stack, ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in munge.items())], environment)
        _wait_for(munge["socket"].exists)
        _start(stack, ["slurmctld", "-D", "-c"], environment)
        for node in NODES:
            _start(stack, ["slurmd", "-D", "-N", node], environment)
        found = Cluster(folder, environment)
        _wait_for(
            lambda: found.ask("sinfo", "--noheader", "--format=%T %D", "--partition=cheap").split() == ["idle", "2"]
        )
        try:
            yield found
        finally:
            found.ask("scancel", "--user=root")
            _wait_for(lambda: not found.ask("squeue", "--noheader"))


def _start(stack: ExitStack, words: list[str], environment: dict[str, str]) -> None:
    """A daemon that ends with `stack`."""
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait, timeout=60)
    stack.callback(process.terminate)


def _wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except AssertionError:  # slurmctld does not answer yet
            pass
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.1)


def _ports(count: int) -> list[int]:
    """Free ones."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
