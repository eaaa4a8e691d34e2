"""What every command stands on: the place that a launcher gave it, how it refuses, how it ends. Standard library only.

The environment that torchrun sets is read here and nowhere else.
"""

import atexit
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Self

log = logging.getLogger("fastdistil")

SPEAKS_FIRST_S = 1.0
"""For so long the ranks that say nothing of a refusal wait for the one that says it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What asks a run to stop with a checkpoint: schedulers, people, warnings of preemption, a terminal that is closed."""
REPEATS_S = 5.0
"""Signals that follow the first within so many seconds are the same request."""
STOPPED = 75
"""Exit status of a run that a signal stopped, with a checkpoint: sysexits.h's EX_TEMPFAIL, "try again later"."""

Main = Callable[..., int]  # main(args: list[str] | None = None); None: the words of the command line


class Failed(Exception):
    """The work of a command failed, though its command line and files had been found right: exit status 1."""


def command(main: Main) -> Main:
    """`main` as a command: what it refuses is one line on stderr, from the first process of a machine, and a status.

    Exit status 1 for Failed, 2 for ValueError and OSError, which say what was wanted, what was got and what to do. Any
    other exception is a defect of the program, and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(args: list[str] | None = None) -> int:
        # OpenMP reads it when torch is imported. Threads that spin while they wait for one another take the cores from
        # whatever else runs here, data workers or another run: it was 4 to 30 times slower, and gains nothing alone.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            return main(args)
        except (Failed, ValueError, OSError) as error:
            if launched().local_rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:  # torchrun ends all ranks once one has failed, also the one that has not spoken yet
                time.sleep(SPEAKS_FIRST_S)
            return 1 if isinstance(error, Failed) else 2

    return wrapped


class Launched(NamedTuple):
    """This process among those of its job; without a launcher it is a single one."""

    by_torchrun: bool
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_restarts: int
    """How often torchrun has started the job anew (--max-restarts)."""


def launched() -> Launched:
    """What RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and TORCHELASTIC_RESTART_COUNT say."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    return Launched(
        by_torchrun="RANK" in os.environ,
        rank=number("RANK", 0),
        world_size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK", 0),
        local_world_size=number("LOCAL_WORLD_SIZE", 1),
        num_restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def leave(status: int) -> NoReturn:
    """sys.exit; under torchrun without tearing down the interpreter while other threads are still alive.

    DeepSpeed keeps its process groups to the end, and with them gloo's threads. A thread that frees a tensor after the
    interpreter has begun to end waits for a lock that nobody gives back, and PyTorch aborts: a finished run with exit
    status -6, in 13 of 28 runs under strace.
    """
    if not launched().by_torchrun:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Set by the first of STOP_SIGNALS; whoever works looks at `asked` when it can stop. Puts the handlers back.

    What comes within REPEATS_S is the same request: a scheduler signals every process of a job, and torchrun passes its
    own signal on. A later one ends the process. Outside the main thread, where Python lets nobody handle signals, it is
    never set. A hang-up that is ignored (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.asked, self.reason, self.asked_at = False, "", 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if not self.asked:
            self.asked, self.reason, self.asked_at = True, signal.Signals(number).name, time.monotonic()
            log.info("%s: stopping after this update; send it again after %g s to stop at once", self.reason, REPEATS_S)
        elif time.monotonic() - self.asked_at > REPEATS_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the `count` GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
