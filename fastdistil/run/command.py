"""What every command stands on: the place that a launcher gave it, how it refuses, how it ends. Standard library only.

The environment that torchrun sets is read here and nowhere else.
"""

import atexit
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

log = logging.getLogger("fastdistil")

SPEAKS_FIRST_S = 1.0
"""For so long the ranks that say nothing of a refusal wait for the one that says it."""

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


def launched() -> Launched:
    """What RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    return Launched(
        by_torchrun="RANK" in os.environ,
        rank=number("RANK", 0),
        world_size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK", 0),
        local_world_size=number("LOCAL_WORLD_SIZE", 1),
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
    """Set by SIGTERM, SIGINT or SIGUSR1; whoever works looks at `asked` when it can stop.

    A second one ends the process.
    """

    def __init__(self) -> None:
        self.asked, self.reason = False, ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked, self.reason = True, signal.Signals(number).name
        log.info("%s: stopping after this update; send it again to stop at once", self.reason)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the `count` GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
