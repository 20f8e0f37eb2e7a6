# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads that wait for a bandwidth cap."""

from __future__ import annotations

import threading
import time

import pytest

from sender.throttle import Throttle
from tests.support.waiting import WAIT_S


class Held(threading.Thread):
    """A thread that waits for a cap of a byte a second, or until it is to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.cap = Throttle(1.0)
        self.cap.spend(10**9, time.monotonic())
        self.looks = threading.Semaphore(0)
        self.stop = False
        self.result: list[bool] = []
        self.start()
        self.looks.acquire(timeout=WAIT_S)

    def run(self) -> None:
        def stops() -> bool:
            self.looks.release()
            return self.stop

        self.result.append(self.cap.hold(stops))

    def ends(self) -> bool:
        self.join(WAIT_S)
        return self.result.pop()


def test_a_thread_that_waits_for_a_cap_continues_as_soon_as_the_cap_is_raised() -> None:
    for rate in (None, 1e12):
        held = Held()
        held.cap.change(rate, time.monotonic())
        assert held.ends() is True


@pytest.mark.parametrize("woken", [True, False])
def test_a_thread_that_waits_for_a_cap_can_be_stopped(woken: bool) -> None:
    held = Held()
    held.stop = True
    if woken:
        held.cap.wake()
    assert held.ends() is False


def test_without_a_wait_a_thread_that_is_to_stop_stops() -> None:
    assert Throttle(None).hold(lambda: False)
    assert not Throttle(None).hold(lambda: True)
