"""What a rank leaves behind when it hangs or fails: RUN/stacks/rank-00003.txt. Standard library only.

A collective that waits longer than --engine.timeout-s fails on the ranks that wait, not on the one they wait for. That one, when it
has done nothing for as long, writes down where all its threads stand and ends, too; a thread of faulthandler's own does it, whatever
the interpreter is doing. A process that the system has stopped (SIGSTOP) writes nothing, and torchrun kills it 30 s later.
"""

import contextlib
import faulthandler
import time
import traceback
from pathlib import Path

GRACE = 2
"""Seconds after the timeout: the ranks that wait come first, with an exception."""


class Watchdog:
    """Writes the stacks of this process unless `restart` is called again within `timeout_s` seconds.

    Args:
        alone: no other rank waits for this one: its stacks are written, it may go on.
    """

    def __init__(self, run: Path, rank: int, timeout_s: int, *, alone: bool) -> None:
        self.path = run / "stacks" / f"rank-{rank:05d}.txt"
        self.seconds, self.alone = timeout_s + GRACE, alone
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8")  # open now: faulthandler opens nothing
        faulthandler.enable()  # a crash in native code says where, on stderr
        self.restart()

    def restart(self) -> None:
        """The process is alive: count the seconds anew. Some microseconds."""
        faulthandler.dump_traceback_later(self.seconds, file=self.file, exit=not self.alone)

    def failed(self, error: BaseException) -> None:
        """Keep the traceback of what ends this rank, which a launcher may lose among others' output."""
        faulthandler.cancel_dump_traceback_later()
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        traceback.print_exception(error, file=self.file)
        self.file.flush()

    def close(self) -> None:
        """Stop watching; a file in which nothing stands is removed."""
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()
            with contextlib.suppress(OSError):  # others' stand there
                self.path.parent.rmdir()
