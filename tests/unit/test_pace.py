# SPDX-License-Identifier: GPL-2.0-or-later
"""The push while a toolstack works: one batch in transit, and pauses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio

from migrate.protocol import messages as m
from migrate.protocol.pfns import pfn_array
from sender.pace import PAUSE, SlowPace
from sender.push import PushLane
from sender.statistics import SenderStatistics
from sender.throttle import Throttle
from tests.support.waiting import WAIT_S
from xenbackend.pages import MappedPages, PfnArray


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


def no_hurry() -> bool:
    return False


@pytest.fixture
def waits() -> Waits:
    return Waits()


def test_the_push_works_for_a_part_of_the_time(waits: Waits) -> None:
    pace = SlowPace(lambda: 0, no_hurry, lambda: waits.now)
    pace.over = waits
    for work_s in (0.1, 3.0):
        began = waits.now
        waits.now += work_s
        assert pace.continues()
        assert waits.now - began == pytest.approx(work_s * (1 + PAUSE))


def test_there_is_no_pause_while_the_toolstack_waits_for_pages(waits: Waits) -> None:
    waiting = [True, True, False]
    pace = SlowPace(lambda: 0, lambda: waiting.pop(0), lambda: waits.now)
    pace.over = waits
    for _ in range(2):
        began = waits.now
        waits.now += 10
        assert pace.continues()
        assert waits.now == began + 10
    assert pace.continues()


def test_the_next_batch_waits_until_the_last_one_is_loaded(waits: Waits) -> None:
    left = [256, 256, 100, 0]
    pace = SlowPace(lambda: left.pop(0), no_hurry, lambda: waits.now)
    pace.over = waits
    assert pace.continues()
    assert not left


def test_a_decision_ends_the_wait_for_the_destination() -> None:
    waits = Waits()
    waits.during = waits.set
    pace = SlowPace(lambda: 256, no_hurry, lambda: waits.now)
    pace.over = waits
    assert not pace.continues()
    assert waits.now == 0


def test_a_decision_ends_a_pause() -> None:
    waits = Waits()
    waits.during = waits.set
    pace = SlowPace(lambda: 0, no_hurry, lambda: waits.now)
    pace.over = waits
    waits.now = 7.0
    assert not pace.continues()
    assert waits.now == 7.0


@contextlib.contextmanager
def mapped(pfns: PfnArray) -> Iterator[Any]:
    yield SimpleNamespace(data=b"", status=np.zeros(len(pfns)))


async def test_a_push_that_is_cancelled_does_not_wait_for_the_destination() -> None:
    """Found by chaos: the destination was killed, xl had decided against it, and the sender waited
    for what was in transit.
    """
    connection: Any = SimpleNamespace(send_blocking=lambda *_message: 0, shut=lambda: None)
    session: Any = SimpleNamespace(sent=lambda *_message: None)
    domain: Any = SimpleNamespace(map_pages=mapped)
    push = PushLane(connection, session, domain, Throttle(None), SenderStatistics())
    pace, waiting = SlowPace(lambda: 256, no_hurry), threading.Event()

    def sent(_pfns: PfnArray, _message: m.Pages) -> bool:
        waiting.set()
        return pace.continues()

    def announce(pfns: PfnArray, _mapped: MappedPages) -> m.Pages:
        return m.Pages(pfns)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            batches = iter([pfn_array([1]), pfn_array([2])])
            nursery.start_soon(lambda: push.send_batches(batches, sent, announce, stop=pace.over))
            await trio.to_thread.run_sync(waiting.wait, WAIT_S)
            nursery.cancel_scope.cancel()
