"""What torchrun says, and how a rank leaves."""

import subprocess
import sys

import pytest

from fastdistil.run.command import Launched, launched
from tests.support import launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launched() == Launched(False, 0, 1, 0, 1)


def test_what_torchrun_says(monkeypatch):
    for name, value in zip(NAMES, ("5", "8", "1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert launched() == Launched(True, 5, 8, 1, 4)


AT_THE_END = """
import atexit, sys
from fastdistil.launcher import leave

class Native:  # stands for a thread of gloo's, which the interpreter's end would take by surprise
    def __del__(self):
        print("torn down")

native = Native()
atexit.register(print, "atexit")
sys.stdout.write("the last line, ")
leave(3)
"""


@pytest.mark.parametrize(("environment", "torn_down"), [({}, True), ({"RANK": "0"}, False)])
def test_a_rank_leaves_with_its_status_and_output_but_tears_nothing_down(environment, torn_down):
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, env=launch.ENVIRONMENT | environment)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "the last line, atexit\n" in done.stdout
    assert ("torn down" in done.stdout) == torn_down
