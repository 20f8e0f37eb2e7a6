# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a condition, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from tests.conftest import WAIT_S


async def until_async(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.005)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
