"""The staged program of benchmarks/first_light.py with other stages: stages_worker OUT [--only ...]."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import first_light
from benchmarks.first_light import STAGES, stage

STAGES.clear()


@stage(20)
def good(setting: Any) -> str:
    return "found"


@stage(20)
def wrong(setting: Any) -> None:
    raise ValueError("not equal")


@stage(0.5)
def late(setting: Any) -> None:
    """With a command of its own that would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (Path(setting.out) / "child").write_text(str(child.pid))
    time.sleep(60)


@stage(20)
def broken(setting: Any) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@stage(20)
def dies(setting: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@stage(20)
def last(setting: Any) -> int:
    print("what a stage prints is no record")
    return os.getpid()


if __name__ == "__main__":
    sys.exit(first_light.main("tests.workers.stages_worker"))
