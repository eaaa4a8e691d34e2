"""Ranks and commands in processes that are forked from one that has imported torch and deepspeed: 30 ms each, not 6 s.

That process, multiprocessing's fork server, imports and does nothing else: it has no threads, no tensors and no state
that a child could inherit. It has not imported fastdistil, so the code under test starts as in a process of its own.
launch.py starts the same commands as a user does, by the interpreter and torchrun; tests of those use it.
"""

import gc
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import torch

from fastdistil.run.command import STOPPED
from tests.support.launch import ENVIRONMENT, ROOT

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed",
    # ZeRO imports it to ask whether our optimiser is one, and it imports Inductor: 2 s of every engine's start.
    "deepspeed.runtime.zero.muon.original_muon",
    "triton",
    "safetensors.torch",
    "tyro",
    "pytest",
]


@cache
def _context() -> ForkServerContext:
    """The server, in the environment of `launch.run`: OpenMP and DeepSpeed read theirs while they are imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, DS_ACCELERATOR="cpu", TORCHINDUCTOR_COMPILE_THREADS="1")  # no pool of its own
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _environments(ranks: int | None) -> list[dict[str, str]]:
    """What torchrun would set for each rank; None is a process without a launcher."""
    if ranks is None:
        return [ENVIRONMENT]
    with socket.socket() as s:  # a port of our own: tests may run side by side
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    size, shared = str(ranks), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [ENVIRONMENT | shared | sizes | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


def call(
    work: Callable[..., Any], *args: object, ranks: int | None = None, device: str = "cpu", timeout_s: float = 300
) -> list[Any]:
    """What `work(ranks, *args)` returns on each rank, in their order.

    `work` is a function of a module and returns tensors and what JSON knows, with tuples. With `ranks` None there is
    one process without a process group.
    """
    # What a library did with the GPU when it was imported would be inherited by a fork.
    context = _context() if device == "cpu" else multiprocessing.get_context("spawn")
    processes, connections = [], []
    for environment in _environments(ranks):
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(its, environment, device, work, args))
        process.start()
        its.close()
        processes.append(process)
        connections.append(mine)
    results: dict[int, Any] = {}
    deadline, grace_s = time.monotonic() + timeout_s, 0.0
    try:
        while waiting := [c for rank, c in enumerate(connections) if rank not in results]:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            assert ready, f"{work.__name__}: {len(waiting)} rank(s) are at work after {timeout_s} s"
            for rank, connection in enumerate(connections):
                if connection in ready:
                    results[rank] = _received(connection, rank)
        grace_s = 10.0
    finally:
        _end(processes, grace_s)
    return [results[rank] for rank in range(len(processes))]


def _received(connection: Connection, rank: int) -> Any:
    try:
        answer = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=True)
    except EOFError:
        raise AssertionError(f"rank {rank} has ended without an answer") from None
    assert "error" not in answer, f"rank {rank}:\n{answer['error']}"
    return answer["result"]


def _rank(
    connection: Connection, environment: dict[str, str], device: str, work: Callable[..., Any], args: Any
) -> None:
    """The process of a rank of `call`."""
    _enter(environment, ROOT)
    from fastdistil.run.ranks import init_ranks

    try:
        answer = {"result": work(init_ranks(device, timeout_s=120, threads=1), *args)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    data = io.BytesIO()
    torch.save(answer, data)
    connection.send_bytes(data.getbuffer())


def run(
    module: str,
    *words: object,
    ranks: int | None = None,
    ok: bool = True,
    timeout_s: float = 300,
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    stop_at: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`launch.run`, without the interpreter's start and torchrun's; a rank that fails ends the others, as there.

    When `stop_at` has been printed, every rank gets the SIGTERM that torchrun would pass on.
    """
    given = [str(word) for word in words]
    wanted = STOPPED if stop_at else 0
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        processes = []
        for of_rank in _environments(ranks):
            arguments = (of_rank | (environment or {}), cwd, outputs, module, given)
            processes.append(_context().Process(target=_command, args=arguments))
            processes[-1].start()
        deadline = time.monotonic() + timeout_s
        try:
            while (running := [p for p in processes if p.exitcode is None]) and not any(p.exitcode for p in processes):
                wait([p.sentinel for p in running], 0.02 if stop_at else max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired([module, *given], timeout_s)
                if stop_at and stop_at in outputs[0].read_text():
                    stop_at = None
                    for process in running:
                        process.terminate()
        finally:
            _end(processes, grace_s=2.0)  # the others' last words
        status = next((p.exitcode for p in processes if p.exitcode), 0)
        stdout, stderr = (path.read_text() for path in outputs)
    if ok:
        assert status == wanted, f"exit {status}\n{stdout[-4000:]}\n{stderr[-6000:]}"
    return subprocess.CompletedProcess([module, *given], status, stdout, stderr)


def _command(environment: dict[str, str], cwd: Path, outputs: Sequence[Path], module: str, words: list[str]) -> None:
    """The process of a rank of `run`."""
    _enter(environment, cwd)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _enter(environment: dict[str, str], cwd: Path) -> None:
    gc.freeze()  # DeepSpeed collects garbage at every start of an engine: 0.2 s with all that was imported
    multiprocessing.set_start_method("fork", force=True)  # Linux's own: data workers would be the server's otherwise
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)


def _end(processes: Sequence[Any], grace_s: float) -> None:
    """Wait for processes to end by themselves, then end them."""
    for process in processes:
        process.join(grace_s)
        process.terminate()
        process.join(grace_s)
        process.kill()
        process.join()
