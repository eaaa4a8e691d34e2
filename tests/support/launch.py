"""Start our commands as a user does: a subprocess, with torchrun where there are several ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET"))},
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait make a run beside another one ten times slower
    "PYTHONPATH": str(ROOT),
}


RESTARTING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""The environment that `restarts` want: else one after SIGKILL often fails, pytorch#135712."""


def command(*args: object, ranks: int | None = None, script: bool = False, restarts: int | None = None) -> list[str]:
    """The argument list: `python -m module ...` or `torchrun ... -m module ...`; `script` runs a file in its place."""
    words = [str(a) for a in args]
    how = [] if script else ["-m"]
    if ranks is None:
        return [sys.executable, *how, *words]
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    if restarts is not None:
        torchrun += ["--standalone", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        return [sys.executable, *torchrun, *how, *words]
    with socket.socket() as s:  # a port of our own: tests may run side by side
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [sys.executable, *torchrun, f"--master-port={port}", *how, *words]


def run(
    *args: object,
    ranks: int | None = None,
    script: bool = False,
    ok: bool = True,
    timeout_s: float = 300,
    restarts: int | None = None,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `ok` a failure shows what was printed."""
    done = subprocess.run(
        command(*args, ranks=ranks, script=script, restarts=restarts),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=ENVIRONMENT | (RESTARTING if restarts else {}) | (environment or {}),
        cwd=cwd,
    )
    if ok:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done


def start_until(text: str, words: Sequence[str]) -> subprocess.Popen[str]:
    """A running command that has just printed `text`; its output can be read on from there."""
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    read_until(text, process)
    return process


def read_until(text: str, process: subprocess.Popen[str]) -> None:
    """Return when a running command has just printed `text`."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if text in line:
            return
    raise AssertionError(f"ended with {process.wait()} and without {text!r}:\n{''.join(printed[-60:])}")


def rest_of(process: subprocess.Popen[str]) -> str:
    """What the command still prints, to its end. Not `communicate`, which would lose lines read ahead."""
    assert process.stdout is not None
    rest = process.stdout.read()
    process.wait(timeout=60)
    return rest


def options(**values: object) -> Sequence[str]:
    """{"optim__lr": 1} -> ["--optim.lr", "1"]; a tuple gives several words."""
    words: list[str] = []
    for name, value in values.items():
        words.append("--" + name.replace("__", ".").replace("_", "-"))
        words += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return words
