# SPDX-License-Identifier: GPL-2.0-or-later
"""One round of precopy, with a destination that confirms at once or never."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from migrate.errors import PeerClosedError
from migrate.protocol import messages as m
from sender import round as round_module
from sender.context import Barriers, Context
from sender.progress import Progress
from sender.push import BATCH_PAGES, PushLane, Sent
from sender.round import PAGES_ALONE, Round
from sender.statistics import SenderStatistics
from xenbackend.pages import PfnArray


class Destination:
    """The push lane and its other end."""

    def __init__(self, *, confirms: bool = True) -> None:
        self.confirms = confirms
        self.barriers = Barriers()
        self.batches: list[PfnArray] = []
        self.stop_at_barrier: Round | None = None

    def send_all(self, batches: Iterable[PfnArray], sent: Sent, **_options: object) -> None:
        for pfns in batches:
            assert len(pfns), "an empty batch is no message"
            self.batches.append(pfns)
            if not sent(pfns, m.Pages(pfns)):
                return

    def send_blocking(self, message: m.Barrier) -> None:
        if self.stop_at_barrier is not None:
            self.stop_at_barrier.stop()
        elif self.confirms:
            self.barriers.passed(message.number, time.monotonic())


def round_of(pages: int, destination: Destination, batches: int = 10**9) -> tuple[Round, Any]:
    """Return a round over ``pages`` pages that continues for so many batches."""
    context = SimpleNamespace(
        barriers=destination.barriers, progress=Progress(), statistics=SenderStatistics()
    )
    to_send = np.zeros(pages * 2, dtype=np.bool_)
    to_send[::2] = True

    def continues(left: int) -> bool:
        assert left == np.count_nonzero(to_send)
        return len(destination.batches) < batches

    push = cast(PushLane, destination)
    return Round(cast(Context, context), push, to_send, pages, continues), to_send


@pytest.mark.parametrize("pages", [0, 1, PAGES_ALONE, PAGES_ALONE + 1, 1024, 1029, 3 * 1024 + 2])
def test_each_page_is_sent_once_and_the_last_ones_alone(pages: int) -> None:
    destination = Destination()
    one, to_send = round_of(pages, destination)
    one.send()
    assert not to_send.any()
    sizes = [len(pfns) for pfns in destination.batches]
    assert sum(sizes) == pages and max(sizes, default=0) <= BATCH_PAGES
    alone = min(pages % BATCH_PAGES or pages, PAGES_ALONE)  # of the last batch
    assert sizes[len(sizes) - alone :] == [1] * alone
    assert (one.page_alone_s > 0) is (pages > 0)
    assert (one.bytes_per_s > 0) is (pages > PAGES_ALONE)


def test_a_round_that_the_policy_ends_waits_for_nothing() -> None:
    destination = Destination(confirms=False)
    one, to_send = round_of(3 * BATCH_PAGES, destination, batches=1)
    one.send()
    assert np.count_nonzero(to_send) == 2 * BATCH_PAGES
    assert one.bytes_per_s == one.page_alone_s == 0.0


def test_a_round_that_the_policy_ends_among_the_pages_that_are_sent_alone() -> None:
    destination = Destination()
    one, to_send = round_of(BATCH_PAGES, destination, batches=3)
    one.send()
    assert np.count_nonzero(to_send) == PAGES_ALONE - 2


def test_a_destination_that_confirms_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_module, "STEP_TIMEOUT_S", 0.01)
    one, _to_send = round_of(BATCH_PAGES, Destination(confirms=False))
    with pytest.raises(PeerClosedError, match="did not load what it was sent within"):
        one.send()


def test_a_round_that_is_stopped_does_not_wait_for_the_destination() -> None:
    destination = Destination(confirms=False)
    one, _to_send = round_of(BATCH_PAGES, destination)
    destination.stop_at_barrier = one
    one.send()
    assert one.bytes_per_s == 0.0
