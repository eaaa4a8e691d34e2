"""What the summary says about this machine: nothing is silently left out."""

import pytest
import torch


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with the folders shards and teacher, which a test may read and must not change."""
    from tests.support import runs

    return runs.make_inputs(tmp_path_factory.mktemp("inputs"))


def pytest_terminal_summary(terminalreporter):
    from fastdistil.kernels._backend import CPU_BACKEND

    terminalreporter.section("where the operators ran")
    if torch.cuda.is_available():
        terminalreporter.write_line(f"on {torch.cuda.get_device_name()} by Triton")
    else:
        terminalreporter.write_line(
            f"on the CPU by {CPU_BACKEND}. Not run: the same tests on a GPU, since there is none (make gpu)"
        )
