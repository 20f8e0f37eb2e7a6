# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a condition, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

WAIT_S = 50.0
"""The limit of a wait for a condition, on the slowest machine.  It is less than ``STEP_TIMEOUT_S``,
so that a wait which only a time limit of the daemons ends is a failure.
"""


async def until_async(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.005)


def until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until the condition holds.  ``what``: the failure that is named if the time has
    passed.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
