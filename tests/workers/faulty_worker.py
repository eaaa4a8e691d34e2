"""`fastdistil.pretrain` with a fault in one rank's update, under torchrun: faulty_worker KIND RANK UPDATE ARGUMENTS...

hang: it never ends.  stop: SIGSTOP to itself.  leave: exit status 0.  fail: an exception.  kill: SIGKILL, once.
slow: 0.3 s more before every forward.  clock: its clock runs a million times as fast.
save: the checkpoint of UPDATE stays half written until there is a file RUN/go.  full: it finds the disk full.
"planted" is printed when it happens.
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

from fastdistil import pretrain
from fastdistil.data import batches
from fastdistil.run import checkpoint
from fastdistil.run.command import launched, leave
from fastdistil.training import engine, loop

KIND, RANK, UPDATE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def fault() -> None:
    print(f"planted: {KIND} at {time.time()}", flush=True)
    if KIND == "hang":
        time.sleep(1000)
    elif KIND == "leave":
        os._exit(0)
    elif KIND == "fail":
        raise RuntimeError("planted failure")
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[KIND])


def spoil_step(kind: type) -> None:
    """Put the fault before the step of an engine's update UPDATE; a process that torchrun has restarted has none."""
    step, count = kind.step, [0]

    def spoilt(self, lr):
        count[0] += 1
        if count[0] == UPDATE and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            fault()
        return step(self, lr)

    kind.step = spoilt


def slow_down() -> None:
    collate = batches.Collator.__call__

    def slow(self, plan):
        time.sleep(0.3)
        return collate(self, plan)

    batches.Collator.__call__ = slow  # type: ignore[method-assign]


class FastClock:
    """Python's `time`, but for what the loop decides by."""

    def perf_counter(self) -> float:
        return 1e6 * time.perf_counter()

    def __getattr__(self, name: str):
        return getattr(time, name)


def hold_save() -> None:
    save_file = checkpoint.save_file

    def half(tensors, path: Path, metadata):
        save_file(tensors, path, metadata)
        if path.name == checkpoint.OPTIMIZER and path.parent.name == f"update-{UPDATE:08d}.part":
            print(f"planted: half of {path.parent.name}", flush=True)
            while not (path.parents[2] / "go").exists():
                time.sleep(0.01)

    checkpoint.save_file = half


def fill_disk() -> None:
    write = checkpoint._write

    def full(folder: Path, tensors, state) -> None:
        if state["update"] == UPDATE:
            print(f"planted: {KIND}", flush=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, tensors, state)

    checkpoint._write = full


if launched().rank == RANK:
    if KIND == "slow":
        slow_down()
    elif KIND == "clock":
        loop.time = FastClock()
    elif KIND == "save":
        hold_save()
    elif KIND == "full":
        fill_disk()
    else:
        for kind in (engine.PlainEngine, engine.DeepSpeedEngine):
            spoil_step(kind)
leave(pretrain.main(sys.argv[4:]))
