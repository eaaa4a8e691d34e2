"""A program of stages (benchmarks/stages.py) that fail in every way: stages_worker OUT [--only ...]."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.stages import Setting, main, stage


@stage(20)
def good(setting: Setting) -> str:
    return "found"


@stage(20)
def wrong(setting: Setting) -> None:
    raise ValueError("not equal")


@stage(0.5)
def late(setting: Setting) -> None:
    """With a command of its own that would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (setting.out / "child").write_text(str(child.pid))
    time.sleep(60)


@stage(20)
def broken(setting: Setting) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@stage(20)
def dies(setting: Setting) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@stage(20)
def last(setting: Setting) -> int:
    print("what a stage prints is no record")
    return os.getpid()


if __name__ == "__main__":
    sys.exit(main((good, wrong, late, broken, dies, last), Setting, "tests.workers.stages_worker", __doc__))
