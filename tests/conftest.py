"""What the summary says about this machine, where nothing is silently left out; fixtures and profiles of all tests."""

import importlib.util
import os
import signal

import pytest
import torch

# `nohup` and `&` in a script start programs with these ignored, which a command of ours leaves as it is.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("hypothesis") is not None:  # the machines that are lent for their GPU have none
    from hypothesis import settings

    # Every run of `make test` tries the same cases. --hypothesis-profile=soak (make soak) draws others each time, and
    # more of them. A case costs Triton's interpreter up to a second; on a GPU most cases are kernels to be compiled.
    slow = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    settings.register_profile("test", derandomize=True, max_examples=5 if slow else 50, deadline=None)
    settings.register_profile("soak", max_examples=100 if slow else 1000, deadline=None)
    settings.load_profile("test")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with the folders shards and teacher, which a test may read and must not change."""
    from tests.support import runs

    return runs.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one_thread():
    """For toy models in this process: on a busy machine two threads that wait for each other took 14 times as long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def quiet(root, tmp_path_factory):
    """A short run in one go, in one process, as a user starts it; read only, like all that sessions share."""
    from tests.support import launch, runs

    run = tmp_path_factory.mktemp("quiet") / "run"
    return runs.Done(run, launch.run(*runs.arguments(root, run)).stdout)


@pytest.fixture(scope="session")
def quiet_two(root, tmp_path_factory):
    """The same of two ranks, with runs.TWO."""
    from tests.support import forked, runs

    run = tmp_path_factory.mktemp("quiet-two") / "run"
    return runs.Done(run, forked.run(*runs.arguments(root, run, **runs.TWO), ranks=2).stdout)


BROKEN = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")
"""Errors of CUDA after which nothing in the process reaches the GPU."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Each failure when it happens, to the end of the file that FAILURES names: a run that is cut off has its reasons.

    It is written by the process that started the others, where there are some. One of these with a broken CUDA context
    ends, and pytest-xdist starts another: it would fail at all that is left, which workers that are done steal.
    """
    if not report.failed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash else str(report.longrepr)).strip()
    if "PYTEST_XDIST_WORKER" in os.environ:
        if any(error in message for error in BROKEN):
            os._exit(1)
    elif "FAILURES" in os.environ:
        worker, first = getattr(report, "worker_id", "-"), message.partition("\n")[0]
        with open(os.environ["FAILURES"], "a") as log:
            log.write(f"{worker} {report.nodeid} {report.duration:.1f} s: {first[:300]}\n")


def pytest_terminal_summary(terminalreporter):
    from fastdistil.kernels._backend import CPU_BACKEND

    terminalreporter.section("where the operators ran")
    if torch.cuda.is_available():
        terminalreporter.write_line(f"on {torch.cuda.get_device_name()} by Triton")
    else:
        terminalreporter.write_line(
            f"on the CPU by {CPU_BACKEND}. Not run: the same tests on a GPU, since there is none (make gpu)"
        )
