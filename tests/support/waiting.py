# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a condition, with a limit."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

WAIT_S = 50.0
"""The limit of a wait for a condition, on the slowest machine.  It is less than ``STEP_TIMEOUT_S``,
so that a wait which only a time limit of the daemons ends is a failure.
"""
PAUSES_PER_LOOK = 9
"""How long :func:`until` pauses, in times of what its last look took."""
LEAST_PAUSE_S, MOST_PAUSE_S = 0.002, 0.01
"""The limits of that.  Some conditions hold for a short time only."""


def ready(file: FileDescriptorLike, timeout_s: float) -> bool:
    """Whether a file can be read, or its other end is closed, within ``timeout_s``."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(max(timeout_s, 0) * 1000))


async def until_async(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.005)


def until(
    condition: Callable[[], object],
    what: str,
    timeout_s: float = WAIT_S,
    most_pause_s: float = MOST_PAUSE_S,
) -> None:
    """Wait until the condition holds.  ``what``: the failure that is named if the time has
    passed.

    The pause between two looks grows with what a look costs, because a look may take the CPU
    from the programs that the condition depends on.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, what
        time.sleep(min(max(LEAST_PAUSE_S, PAUSES_PER_LOOK * (now - began)), most_pause_s))
