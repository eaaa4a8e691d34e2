"""The usual cases of an operator's benchmark as pytest-benchmark tests, and where their results go."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder to put the results into, which are printed in any case")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(metafunc.module.usual_cases()), ids=str)


@pytest.fixture
def results(request):
    """The folder of --results, or None."""
    return request.config.getoption("--results")
