"""Two hosts on this machine: network namespaces that one cable joins, each with its torchrun. Wants Linux and root."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.launch import ENVIRONMENT, RESTARTING
from tests.support.processes import is_zombie

PORT = 29500
"""Of the first host, where nobody else listens."""


class Host(NamedTuple):
    """A network namespace with one end of the cable."""

    name: str
    device: str
    address: str

    def processes(self) -> list[int]:
        """What lives there."""
        return [pid for pid in map(int, _ip("netns", "pids", self.name).split()) if not is_zombie(pid)]

    def kill(self) -> None:
        """It is gone: SIGKILL for all at once, torchrun included."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def unplug(self) -> None:
        """Nothing arrives any more, in either direction; nobody is told."""
        _ip("-n", self.name, "link", "set", self.device, "down")


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def unavailable() -> str:
    """Why two hosts cannot be had here; empty where they can."""
    try:
        with two_hosts():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not to be had: {getattr(error, 'stderr', '') or error}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The hosts, with a cable of their own; all that still lives there is ended in the end."""
    hosts = tuple(Host(f"fastdistil-{os.getpid()}-{i}", f"cable{i}", f"10.77.0.{i + 1}") for i in range(2))
    try:
        for host in hosts:
            if Path("/run/netns", host.name).exists():  # of a test that was killed, by a process of the same number
                _ip("netns", "del", host.name)
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        a, b = hosts
        _ip("link", "add", a.device, "netns", a.name, "type", "veth", "peer", "name", b.device, "netns", b.name)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip("-n", host.name, "link", "set", host.device, "up")
        yield hosts  # type: ignore[misc]
    finally:
        for host in hosts:
            if Path("/run/netns", host.name).exists():
                host.kill()
                _ip("netns", "del", host.name)


class Job:
    """torchrun on every host, one process each, as Slurm would start it; what each prints is a file in `folder`."""

    def __init__(
        self, hosts: Sequence[Host], folder: Path, *words: Sequence[object], restarts: int | None = None
    ) -> None:
        """`words`: module and arguments for every host, or one each."""
        folder.mkdir(parents=True)
        self.hosts, self.folder, self.torchruns = hosts, folder, []
        for rank, (host, mine) in enumerate(zip(hosts, words * len(hosts) if len(words) == 1 else words, strict=True)):
            where = [f"--master-addr={hosts[0].address}", f"--master-port={PORT}", f"--node-rank={rank}"]
            if restarts is not None:
                where = [
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={hosts[0].address}:{PORT}",
                    f"--max-restarts={restarts}",
                ]
                where += [f"--local-addr={host.address}", f"--rdzv-conf=is_host={int(not rank)},join_timeout=60"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", *where, "-m"]
            command = ["ip", "netns", "exec", host.name, *torchrun, *map(str, mine)]
            environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": host.device} | (RESTARTING if restarts else {})
            with self._log(rank).open("w") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            self.torchruns.append(process)

    def _log(self, rank: int) -> Path:
        return self.folder / f"host-{rank}.log"

    def printed(self, rank: int) -> str:
        """What a host has printed so far."""
        return self._log(rank).read_text()

    def wait_until(self, text: str, *, timeout_s: float = 60) -> None:
        """Return when the first host has printed `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.printed(0):
            ended = [process.poll() for process in self.torchruns]
            assert None in ended, f"ended with {ended} and without {text!r}:\n{self.printed(0)}\n{self.printed(1)}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s} s:\n{self.printed(0)}\n{self.printed(1)}"
            time.sleep(0.05)

    def end(self, *, timeout_s: float = 60) -> list[int]:
        """The exit status of every host's torchrun, once all have ended."""
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.torchruns]
