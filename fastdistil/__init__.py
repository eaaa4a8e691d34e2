"""fastdistil: DistilBERT-style distillation of BERT-like encoders during pre-training.

Importing the package imports nothing heavy: `--help` and configuration errors must come before torch does.
"""

import os
import signal
import sys

__version__ = "0.1.0"
INTERRUPTED = "interrupted by {}: what was finished is kept, and the same command goes on from there"


def end_at_once(number: int, _frame: object) -> None:
    """End this process by the handler of a signal, with a line and the exit status of shells."""
    os.write(2, f"{INTERRUPTED.format(signal.Signals(number).name)}\n".encode())
    os._exit(128 + number)


_script = os.path.basename("".join(sys.orig_argv[1:2]))
# `python -m fastdistil.COMMAND` or `fastdistil COMMAND` begins: until `main` runs nothing is to be cleaned up.
if sys.argv[:1] == ["-m"] or _script in ("fastdistil", "fastdistil.exe"):
    for _number in (signal.SIGINT, signal.SIGTERM):  # An import elsewhere changes no handler.
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, end_at_once)
