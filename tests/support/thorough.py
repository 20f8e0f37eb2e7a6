# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of a long search a run of the tests does.

Tests marked ``sweep`` have a case for each instant, state or error; a test of a property has
random examples.  A run is thorough if ``THOROUGH`` is 1 in its environment, as in ``make
everything``, or is not set and the command names tests.  Any other run, such as ``make test``, does
a share of both.
"""

from __future__ import annotations

import math
import os
from collections import Counter

import pytest

SWEEP = "sweep: many cases of one kind, of which a run that is not thorough takes a share"
SHARE = (3 - 5**0.5) / 2
"""The share of the cases of a sweep in a run that is not thorough.  This part of the golden section
is in step with no parameter, so the cases that are taken have each value of every parameter.
"""
FEWER_EXAMPLES = 0.25
"""The share of the examples of a property."""
EXAMPLES = 100
"""Hypothesis' own default."""


def is_thorough() -> bool:
    return os.environ.get("THOROUGH") == "1"


def examples(count: int = EXAMPLES) -> int:
    """Return how many examples of a property are tried, if a thorough run tries ``count``."""
    return count if is_thorough() else math.ceil(count * FEWER_EXAMPLES)


def is_in_share(number: int) -> bool:
    """Whether a run that is not thorough takes this case of a sweep; the first has number 1."""
    return math.ceil(number * SHARE) > math.ceil((number - 1) * SHARE)


def configure(config: pytest.Config) -> None:
    """Note for this process and the workers that it starts whether the run is thorough."""
    config.addinivalue_line("markers", SWEEP)
    is_worker = hasattr(config, "workerinput")
    if not is_worker and config.args_source is pytest.Config.ArgsSource.ARGS:
        os.environ.setdefault("THOROUGH", "1")


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases of sweeps that this run does not take."""
    if is_thorough():
        return
    seen: Counter[str] = Counter()

    def is_taken(item: pytest.Item) -> bool:
        if item.get_closest_marker("sweep") is None:
            return True
        sweep = item.nodeid.partition("[")[0]
        seen[sweep] += 1
        return is_in_share(seen[sweep])

    taken = [item for item in items if is_taken(item)]
    kept = set(taken)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = taken
