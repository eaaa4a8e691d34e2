"""`fastdistil.pretrain` with a fault in one rank's update, under torchrun: faulty_worker.py KIND RANK UPDATE ARGUMENTS...

hang: it never ends.  stop: SIGSTOP to itself.  leave: exit status 0.  fail: an exception.  slow: 0.3 s more before every forward.
save: a disk so slow that every checkpoint takes 2 s and more; "planted" is printed when half of its bytes are written.
"""

import os
import signal
import sys
import time

from fastdistil import pretrain
from fastdistil.data import batches
from fastdistil.run import checkpoint
from fastdistil.run.command import launched, leave
from fastdistil.training import engine

KIND, RANK, UPDATE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def fault() -> None:
    print(f"planted: {KIND} at {time.time()}", flush=True)
    if KIND == "hang":
        time.sleep(1000)
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif KIND == "leave":
        os._exit(0)
    else:
        raise RuntimeError("planted failure")


if launched().rank == RANK:
    step, collate, count = engine.DeepSpeedEngine.step, batches.Collator.__call__, [0]
    save_file = checkpoint.save_file

    def spoilt_step(self, lr):
        count[0] += 1
        if count[0] == UPDATE and KIND not in ("slow", "save"):
            fault()
        return step(self, lr)

    def slow(self, slot):
        if KIND == "slow":
            time.sleep(0.3)
        return collate(self, slot)

    def slow_disk(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if KIND == "save" and path.name == checkpoint.FILES[1]:
            print(f"planted: half of {path.parent.name}", flush=True)
            time.sleep(2)

    engine.DeepSpeedEngine.step = spoilt_step  # type: ignore[method-assign]
    batches.Collator.__call__ = slow  # type: ignore[method-assign]
    checkpoint.save_file = slow_disk

leave(pretrain.main(sys.argv[4:]))
