# SPDX-License-Identifier: GPL-2.0-or-later
"""The push while a toolstack works: one batch in transit, and pauses."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sender.pace import PAUSE, SlowPace


class Waits(threading.Event):
    """An event whose waits move a clock."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.now, self.during = 0.0, during

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.during()
        if not self.is_set():
            self.now += timeout
        return self.is_set()


@pytest.fixture
def waits() -> Waits:
    return Waits()


def test_the_push_works_for_a_part_of_the_time(waits: Waits) -> None:
    pace = SlowPace(lambda: 0, lambda: waits.now)
    pace.over = waits
    for work_s in (0.1, 3.0):
        began = waits.now
        waits.now += work_s
        assert pace.continues()
        assert waits.now - began == pytest.approx(work_s * (1 + PAUSE))


def test_the_next_batch_waits_until_the_last_one_is_loaded(waits: Waits) -> None:
    left = [256, 256, 100, 0]
    pace = SlowPace(lambda: left.pop(0), lambda: waits.now)
    pace.over = waits
    assert pace.continues()
    assert not left


def test_a_decision_ends_the_wait_for_the_destination() -> None:
    waits = Waits()
    waits.during = waits.set
    pace = SlowPace(lambda: 256, lambda: waits.now)
    pace.over = waits
    assert not pace.continues()
    assert waits.now == 0


def test_a_decision_ends_a_pause() -> None:
    waits = Waits()
    waits.during = waits.set
    pace = SlowPace(lambda: 0, lambda: waits.now)
    pace.over = waits
    waits.now = 7.0
    assert not pace.continues()
    assert waits.now == 7.0
