"""run/command.py: what a launcher says, how a command refuses, how it is stopped, how a rank leaves."""

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastdistil.run.command import (
    SPEAKS_FIRST_S,
    STOP_SIGNALS,
    Failed,
    Launched,
    StopRequest,
    command,
    launched,
    visible_gpus,
)
from tests.support import launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launched() == Launched(
        by_torchrun=False, rank=0, world_size=1, local_rank=0, local_world_size=1, num_restarts=0
    )


def test_what_torchrun_says(monkeypatch):
    for name, value in zip(NAMES, ("5", "8", "1", "4", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert launched() == Launched(
        by_torchrun=True, rank=5, world_size=8, local_rank=1, local_world_size=4, num_restarts=2
    )


def raising(error):
    """A command whose work ends with `error`, or with a status."""

    @command
    def main(args=None):
        """Its help."""
        assert args == ["words"]
        if isinstance(error, int):
            return error
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (ValueError("wanted a, got b: use a"), 2, "error: wanted a, got b: use a\n"),
        (FileNotFoundError("a does not exist: make it"), 2, "error: a does not exist: make it\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, None),  # a ValueError
        (Failed("it did not converge"), 1, "error: it did not converge\n"),
        (type("Both", (Failed, OSError), {})("no checkpoint"), 1, "error: no checkpoint\n"),
    ],
)
def test_a_refusal_is_one_line_and_a_status(monkeypatch, capsys, error, status, said):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert raising(error)(["words"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") if said is None else err == said
    assert err.count("\n") <= 1


@pytest.mark.parametrize(("rank", "local_rank", "said"), [("0", "0", True), ("9", "1", False), ("8", "0", True)])
def test_one_process_of_a_machine_speaks_and_all_have_the_status(monkeypatch, capsys, rank, local_rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert raising(ValueError("x"))(["words"]) == 2
    assert capsys.readouterr().err == "error: x\n" * said


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyError("a defect"), KeyboardInterrupt(), SystemExit(2)])
def test_a_defect_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        raising(error)(["words"])
    assert capsys.readouterr().err == ""


def test_a_command_keeps_its_name_and_help():
    main = raising(0)
    assert (main.__name__, main.__doc__) == ("main", "Its help.")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_asks_and_what_follows_at_once_is_the_same_request(caplog, number):
    caplog.set_level(logging.INFO, "fastdistil")
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with StopRequest() as stop:
        assert (stop.asked, stop.reason) == (False, "")
        signal.raise_signal(number)
        for again in (number, signal.SIGTERM):  # a scheduler's, and what torchrun makes of it
            signal.raise_signal(again)
        assert (stop.asked, stop.reason) == (True, number.name)
    assert caplog.text.count("stopping after this update; send it again after 5 s to stop at once") == 1
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_later_signal_ends_the_process(monkeypatch, second):
    monkeypatch.setattr("fastdistil.run.command.REPEATS_S", 0.0)
    child = os.fork()
    if child == 0:
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(second)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second


def test_a_hang_up_that_is_ignored_stays_so():
    """By nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nobody_asks():
    """Where a notebook or a server runs it: Python lets only the main thread handle signals."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: StopRequest().__enter__().asked).result() is False


def test_names_of_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1a,2")
    assert visible_gpus(3) == ["5", "GPU-1a", "2"]
    assert visible_gpus(2) == ["5", "GPU-1a"]


AT_THE_END = """
import atexit, sys
from fastdistil.run.command import leave

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
    words = [sys.executable, "-c", AT_THE_END]
    done = subprocess.run(words, capture_output=True, text=True, env=launch.ENVIRONMENT | environment)
    assert done.returncode == 3, done.stderr
    assert "the last line, atexit\n" in done.stdout
    assert ("torn down" in done.stdout) == torn_down


def test_who_says_nothing_waits_for_who_does(monkeypatch, capsys):
    """torchrun ends all ranks once one has failed: the first rank's line got lost where another one was faster."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for local_rank, said in (("1", ""), ("0", "error: no\n")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert raising(ValueError("no"))(["words"]) == 2
        assert capsys.readouterr().err == said
    assert waited == [SPEAKS_FIRST_S]
