"""What ended a run, in words: on every rank, in status.json, in RUN/stacks and for the launcher."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from fastdistil.run import console, folder
from fastdistil.run.command import SPEAKS_FIRST_S, Failed
from fastdistil.run.config import Config
from fastdistil.run.folder import Watchdog
from fastdistil.run.ranks import Ranks, tell_launcher

log = logging.getLogger("fastdistil")

MEANINGS = {
    "killed by signal: Killed": "a data worker was killed, most likely for want of memory: use fewer "
    "--data.num-workers, fewer ranks on this machine, or shorter micro-batches",
    "killed by signal: Bus error": "a data worker could not read a file: it was changed or cut, or its disk failed",
    "exited unexpectedly": "a data worker ended unexpectedly, perhaps killed for want of memory",
    "Connection closed by peer": "another rank has ended, and did not say why: it was killed (perhaps for want of "
    "memory) or its host is gone; the launcher names the one that ended first",
    "Connection reset by peer": "the connection to another rank was cut: it was killed, or its host is gone",
    "Application timeout": "another rank did not answer for --engine.timeout-s: it hangs, or its host is gone",
    "Timed out waiting": "another rank did not answer for --engine.timeout-s: it hangs, or its host is gone; see "
    "RUN/stacks",
    "CUDA out of memory": "the GPU's memory is full: lower --batch.token-budget, or use --engine.activation-"
    "checkpointing",
    "can't allocate memory": "this machine's memory is full: lower --batch.token-budget",
}
"""What PyTorch says -> what it means to the user of a run."""


def cause_of(error: Exception) -> tuple[str, bool]:
    """(one line about what went wrong, whether it is known to be no defect of this program)."""
    text = str(error).strip() or repr(error)
    for sign, meaning in MEANINGS.items():
        if sign in text:
            return meaning, True
    # The last line: a data worker's exception carries its traceback in its words.
    return text.splitlines()[-1], isinstance(error, OSError | ValueError | Failed)


def _with_traceback(error: Exception, cause: str) -> str:
    """What RUN/console.log keeps of the end of a run that failed."""
    return f"{''.join(traceback.format_exception(error))}{console.now()} error: the run failed: {cause}\n"


@contextmanager
def watched(config: Config, ranks: Ranks) -> Iterator[Watchdog]:
    """Around a run: a rank that hangs leaves its stacks.

    One that fails leaves its traceback, tells torchrun and the other ranks the cause, and writes a status. Raises
    Failed, with the cause of the rank that failed first, where it is no defect of this program.
    """
    with ranks.together():
        watchdog = Watchdog(config.out, ranks.rank, config.engine.timeout_s, alone=ranks.world_size == 1)
    try:
        yield watchdog
    except Exception as error:  # torchrun ends the other ranks
        watchdog.restart()  # else it would end this one before it has asked for the cause, where the store is gone
        about, is_known = cause_of(error)
        when = f"update {watchdog.update}" if watchdog.update else "before its first update"
        own = f"rank {ranks.rank}, {when}: {about}"
        cause = ranks.first_cause(own)
        # A full disk, or a folder that is gone, must not keep any of these from being tried.
        told: list[Callable[[], None]] = [partial(watchdog.failed, error)]
        if cause == own:
            told.append(partial(tell_launcher, error))
        else:  # torchrun names the first, and knows when each ended to the second
            time.sleep(SPEAKS_FIRST_S)
        if ranks.is_main:
            told.append(partial(console.append, config.out, _with_traceback(error, cause)))
            told.append(
                partial(folder.write_status, config.out, "failed", update=max(0, watchdog.update - 1), reason=cause)
            )
        for tell in told:
            try:
                tell()
            except OSError as broken:
                log.error("%s", broken)
        if is_known or cause != own:
            raise Failed(f"the run failed: {cause}") from error
        raise
    watchdog.close()
