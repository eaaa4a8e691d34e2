"""run/command.py: what a launcher says, how a command refuses, how it is stopped, how a rank leaves."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastdistil import end_at_once
from fastdistil.run.command import (
    LAUNCHER,
    REPEATS_S,
    SPEAKS_FIRST_S,
    STOP_SIGNALS,
    STOPPED,
    Failed,
    Interrupted,
    Interruption,
    Launched,
    StopRequest,
    again,
    command,
    command_of_ranks,
    launched,
    started_at,
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


def test_what_to_type_to_go_on(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    words = ["mlm", "--out", "my run", "--resume", "never", "--dry-run", "--world-size=8", "--seed", "3"]
    line = "python -m fastdistil.pretrain mlm --out 'my run' --seed 3"
    assert again(words) == line
    assert again(words, "--resume", "auto") == f"{line} --resume auto"
    monkeypatch.setattr("sys.argv", ["x", "mlm"])
    assert again(None) == "python -m fastdistil.pretrain mlm"
    for name, value in zip(NAMES, ("0", "4", "0", "4", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert again(words) == line.replace("python", "torchrun --nproc-per-node 4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert again(words) == f"on every host, by torchrun as before: {line}"


def test_hours_count_from_the_command_or_from_torchrun(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    began = time.time()
    assert command(lambda args=None: int(began <= started_at() <= time.time()))() == 1
    monkeypatch.setenv("RANK", "0")
    assert started_at() < began  # its parent's


def raising(error, kind=command):
    """A command whose work ends with `error`, or with a status."""

    @kind
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
    assert raising(ValueError("x"), command_of_ranks)(["words"]) == 2
    assert capsys.readouterr().err == "error: x\n" * said


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyError("a defect"), SystemExit(2)])
def test_a_defect_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        raising(error)(["words"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "works"), [("0", True), ("1", False)])
def test_of_several_ranks_the_first_does_the_work_of_a_command(monkeypatch, rank, works):
    """Alone: what it imports or starts finds no launcher's words in the environment."""
    for name in LAUNCHER:
        monkeypatch.setenv(name, rank if name.endswith("RANK") else "2")
    called = []

    @command
    def main(args=None):
        called.append(launched())
        return 7

    assert main([]) == (7 if works else 0)
    alone = Launched(by_torchrun=False, rank=0, world_size=1, local_rank=0, local_world_size=1, num_restarts=0)
    assert called == ([alone] if works else [])


def test_torchrun_is_told_the_cause(monkeypatch, tmp_path, capsys):
    """In its own form, so that it ends what it says of a failed job with it; a traceback there is not replaced."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert raising(ValueError("wanted a, got b"), command_of_ranks)(["words"]) == 2
    assert raising(ValueError("another"), command_of_ranks)(["words"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    message: Any = failure.message
    assert message["message"] == "error: wanted a, got b"


@pytest.fixture
def default_handlers():
    """SIGINT and SIGTERM as in a fresh interpreter, whatever runs the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, h) for n, h in zip(numbers, (signal.default_int_handler, signal.SIG_DFL), strict=True)]
    yield numbers
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def signalled(number, *, then=None, during=None):
    """A command that sends itself a signal, and what it does about the exception."""

    @command
    def main(args=None):
        if during:
            during(number)
        try:
            signal.raise_signal(number)
            raise AssertionError("not interrupted")
        finally:
            if then:
                raise then

    return main


INTERRUPTED = "interrupted by {}: what was finished is kept, and the same command does the rest\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("then", [None, ImportError("numpy failed to import"), ValueError("a worker was killed")])
def test_a_signal_is_one_line_and_a_status(default_handlers, capsys, number, status, then):
    """Whatever a library made of it. Afterwards the process has its handlers back."""
    before = [signal.getsignal(n) for n in default_handlers]
    assert signalled(number, then=then)([]) == status
    assert capsys.readouterr() == ("", INTERRUPTED.format(number.name))
    assert [signal.getsignal(n) for n in default_handlers] == before


def test_a_signal_in_a_destructor_is_not_dropped(default_handlers, capsys):
    went_on = []

    class Dropping:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def during(_number):
        Dropping()
        time.sleep(60)  # the signal comes again here
        went_on.append(True)

    assert signalled(signal.SIGTERM, during=during)([]) == 143
    assert capsys.readouterr() == ("", INTERRUPTED.format("SIGTERM"))
    assert not went_on


def test_handlers_of_others_stay(default_handlers):
    heard = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert (heard, interruption.number) == ([signal.SIGTERM], 0)


def test_outside_the_main_thread_a_command_works(default_handlers):
    results = []
    thread = threading.Thread(target=lambda: results.append(raising(3)(["words"])))
    thread.start()
    thread.join()
    assert results == [3]


@pytest.mark.parametrize(("seconds", "ends"), [(0.0, False), (REPEATS_S + 1, True)])
def test_a_repeat_is_the_same_request_and_a_late_one_ends_at_once(default_handlers, seconds, ends):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        with Interruption() as interruption:
            try:
                signal.raise_signal(signal.SIGINT)
            except Interrupted:
                interruption.came_at -= seconds
                signal.raise_signal(signal.SIGTERM)
                os._exit(7)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (143 if ends else 7)
    with os.fdopen(read) as said:
        assert said.read() == (INTERRUPTED.format("SIGTERM") if ends else "")


def test_a_refusal_is_not_cut_short_by_the_launcher(default_handlers, monkeypatch):
    """torchrun ends the ranks that wait for the one that speaks."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    assert raising(ValueError("no"), command_of_ranks)(["words"]) == 2


NVML = """
#include <stdint.h>
struct memory { unsigned long long total, free, used; };
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) { *gpu = (void *)(intptr_t)(index + 1); return 0; }
int nvmlDeviceGetMemoryInfo(void *gpu, struct memory *memory) {
  if ((intptr_t)gpu == 3) return 999;  /* a GPU that does not answer */
  memory->total = (intptr_t)gpu == 1 ? 85899345920ull : 25757220864ull;
  return 0;
}
"""


@pytest.mark.parametrize(("visible", "found"), [(None, "25757220864"), ("", "None"), ("0,1", "25757220864")])
def test_the_memory_of_the_smallest_gpu_is_known_without_torch(tmp_path, visible, found):
    """By a driver that is not here: one of two GPUs that answer, unless the environment hides all."""
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    environment = launch.ENVIRONMENT | {"LD_LIBRARY_PATH": str(tmp_path)}
    environment = environment if visible is None else environment | {"CUDA_VISIBLE_DEVICES": visible}
    code = "import sys; from fastdistil.run.command import gpu_bytes; print(gpu_bytes(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found, "False"]


def test_importing_the_package_changes_no_handler():
    code = "import signal, fastdistil; print([signal.getsignal(n).__name__ for n in (2,)], signal.getsignal(15))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=launch.ENVIRONMENT)
    assert done.stdout == "['default_int_handler'] 0\n", done.stderr


@pytest.mark.parametrize("how", ["-m fastdistil.report", "-m fastdistil report", "{}/fastdistil report"])
def test_while_a_command_is_imported_a_signal_ends_it_with_its_line(tmp_path, how):
    """`slow` is imported by a command before its `main`, where the interpreter alone would print a traceback."""
    (tmp_path / "tyro.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "fastdistil").write_text("from fastdistil.__main__ import main\nmain()\n")  # as pip's script
    environment = launch.ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{launch.ROOT}"}
    words = [sys.executable, *how.format(tmp_path).split()]
    process = subprocess.Popen(words, env=environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", INTERRUPTED.format("SIGINT"))
    assert process.returncode == 130
    assert end_at_once.__module__ == "fastdistil"


@pytest.mark.parametrize("error", [None, BrokenPipeError(32, "Broken pipe")])
def test_a_reader_that_has_gone_is_no_error(error):
    """`fastdistil.export ... | head`: at a print, or where the last of the output is flushed."""
    code = f"""
import sys
from fastdistil.run.command import command, leave
@command
def main(args=None):
    print("x" * {10**6 if error else 10})
    return 0
sys.stdin.readline()
leave(main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=launch.ENVIRONMENT, stdin=-1, stdout=-1, stderr=-1, text=True
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


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


def test_a_second_signal_in_the_middle_of_the_first_is_the_same_request(monkeypatch, caplog):
    """As a scheduler's and torchrun's arrive: the handler itself is interrupted."""
    named = signal.Signals

    def and_again(number):
        monkeypatch.setattr(signal, "Signals", named)
        os.kill(os.getpid(), signal.SIGTERM)
        return named(number)

    with caplog.at_level(logging.INFO, "fastdistil"), StopRequest() as stop:
        monkeypatch.setattr(signal, "Signals", and_again)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert stop.reason == "SIGTERM"
    assert caplog.text.count("stopping after this update") == 1


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_later_signal_ends_the_process(monkeypatch, second):
    monkeypatch.setattr("fastdistil.run.command.REPEATS_S", 0.0)
    child = os.fork()
    if child == 0:
        signal.signal(second, signal.SIG_DFL)  # Python's own of Ctrl-C raises, as a notebook wants it
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


ASKED_AGAIN = """
import atexit, os, sys
from fastdistil.run.command import STOPPED, leave

atexit.register(os.kill, os.getpid(), int(sys.argv[1]))
leave(STOPPED)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}], ids=["alone", "torchrun"])
def test_a_stop_that_is_asked_for_again_while_python_ends_keeps_its_status(number, environment):
    """SIGUSR1 ended a stopped run with status -10, where Slurm's requeue wants 75."""
    words = [sys.executable, "-c", ASKED_AGAIN, str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True, env=launch.ENVIRONMENT | environment)
    assert (done.returncode, done.stderr) == (STOPPED, "")


def test_who_says_nothing_waits_for_who_does(monkeypatch, capsys):
    """torchrun ends all ranks once one has failed: the first rank's line got lost where another one was faster."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for local_rank, said in (("1", ""), ("0", "error: no\n")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert raising(ValueError("no"), command_of_ranks)(["words"]) == 2
        assert capsys.readouterr().err == said
    assert waited == [SPEAKS_FIRST_S]
