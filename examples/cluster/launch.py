"""torchrun with the exit status of what it starts: `python launch.py --nproc-per-node 8 -m fastdistil.pretrain ...`

torchrun ends with 1 whatever its processes ended with, and a scheduler has to know 75 (stopped with a checkpoint, start
it again) from 2 (refused, do not). On a signal torchrun gives them 30 s; here they get it, and the time that they need.
"""

import os
import signal
import sys

import psutil


def pass_on(number: int, _frame: object) -> None:
    """To the processes that were started; without any there is nothing to wait for."""
    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        os._exit(128 + number)


for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(signal_number, pass_on)  # before torch takes its seconds: process 1 of a container is deaf without it

from torch.distributed import run  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

try:
    run.main(["--signals-to-handle=SIGQUIT", *sys.argv[1:]])
except ChildFailedError as error:
    status = error.get_first_failure()[1].exitcode
    if status != 75:
        print(error, file=sys.stderr)
    sys.exit(status if status > 0 else 128 - status)
