"""Which of many similar cases `make test` runs; `make test-slow` runs the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def mostly_slow(cases: Iterable[Any], always: Collection[Any]) -> list[ParameterSet]:
    """The cases as parameters, slow but for those that run always.

    Raises:
        ValueError: a case that runs always is not among them.
    """
    listed = list(cases)
    if missing := set(always) - set(listed):
        raise ValueError(f"no case {missing} among {listed}")
    return [pytest.param(case, marks=() if case in always else pytest.mark.slow) for case in listed]
