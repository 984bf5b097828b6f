"""Parameters of tests of which CI runs all, and every day some."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_long(every_day: Callable[..., bool], *values: Iterable[Any]) -> list[Any]:
    """Return all combinations of values; those that are not for every day are marked long."""
    return [
        pytest.param(*chosen, marks=() if every_day(*chosen) else pytest.mark.long)
        for chosen in itertools.product(*values)
    ]
