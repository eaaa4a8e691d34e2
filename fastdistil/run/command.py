"""What the launcher (torchrun) says in the environment, and leaving it. The only reader of it. Standard library only."""

import atexit
import os
import sys
from typing import NamedTuple, NoReturn


class Launched(NamedTuple):
    """This process's place; without a launcher that of a single process."""

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
    """As sys.exit for a rank that has finished, without tearing the interpreter down under threads that are still alive.

    DeepSpeed holds its process groups to the end, and with them gloo's threads. One that drops a tensor after the interpreter
    has begun to end asks for a GIL that nobody gives, and PyTorch aborts: a finished run, exit status -6. 13 of 28 under strace.
    """
    if not launched().by_torchrun:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the `count` GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
