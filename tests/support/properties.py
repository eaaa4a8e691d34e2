"""Properties of operators, tried on cases that Hypothesis makes up; the profiles in tests/conftest.py say how many."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def for_any(cases: Callable[[Any], dict[str, Any]], *, always: Sequence[dict[str, Any]] = ()) -> Callable:
    """Decorator: the test holds for any arguments drawn from `cases`, and for each set of arguments in `always`.

    Args:
        cases: hypothesis.strategies -> a strategy for each argument, by name.
        always: arguments that are tried every time, because the property once failed there.

    Machines that are lent for their GPU have no Hypothesis: there the test is skipped.
    """
    if importlib.util.find_spec("hypothesis") is None:
        return pytest.mark.skip(reason="hypothesis is not installed")
    from hypothesis import example, given, strategies

    def decorate(test: Callable) -> Callable:
        for arguments in always:
            test = example(**arguments)(test)
        return given(**cases(strategies))(test)

    return decorate
