"""`fastdistil.pretrain` with a fault in one rank's update, under torchrun: faulty_worker.py KIND RANK UPDATE ARGUMENTS...

hang: it never ends.  stop: SIGSTOP to itself.  leave: exit status 0.  fail: an exception.  slow: 0.3 s more before every forward.
"""

import os
import signal
import sys
import time

from fastdistil import data, engine, pretrain
from fastdistil.launcher import launched, leave

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
    step, forward_backward, count = engine.DeepSpeedEngine.step, data.Collator.__call__, [0]

    def spoilt_step(self, lr):
        count[0] += 1
        if count[0] == UPDATE and KIND != "slow":
            fault()
        return step(self, lr)

    def slow(self, slot):
        if KIND == "slow":
            time.sleep(0.3)
        return forward_backward(self, slot)

    engine.DeepSpeedEngine.step = spoilt_step  # type: ignore[method-assign]
    data.Collator.__call__ = slow  # type: ignore[method-assign]

leave(pretrain.main(sys.argv[4:]))
