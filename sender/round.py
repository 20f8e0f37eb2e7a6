# SPDX-License-Identifier: GPL-2.0-or-later
"""One round of precopy, which also measures what the policy compares.

The rate at which the destination takes pages in is measured during the whole round.  At its end a
few pages are sent alone: the next one follows when the destination has loaded the one before.  Such
a page costs what a fault costs later: a message in each direction, a page that is mapped here and
loaded there, and the threads that wait for them.
"""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from migrate.errors import PeerClosedError
from migrate.lanes.connection import STEP_TIMEOUT_S
from migrate.protocol import messages as m
from migrate.protocol.pfns import NO_PFNS, PfnMask, batches_of, pieces
from sender.context import Context
from sender.intake import Intake
from sender.push import BATCH_PAGES, PushLane
from sender.source_pages import count_pages
from xenbackend.pages import PAGE_SIZE, PfnArray

PAGES_ALONE = 5
"""How many pages of the last batch of a round are sent alone, at most."""
ALONE_S = 0.1
"""After this time the rest of them is not measured, because the guest writes meanwhile."""


class Round:
    """One round over the set ``to_send``, from which each page is removed when it was sent.

    ``total``: the number of pages in the set.  ``continues`` is called again and again with the
    number of pages that are left, and returns whether the round continues.
    """

    def __init__(
        self,
        context: Context,
        push: PushLane,
        to_send: PfnMask,
        total: int,
        continues: Callable[[int], bool],
    ):
        self._context = context
        self._push = push
        self._to_send = to_send
        self._left = total
        self._continues = continues
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._intake = Intake()
        self._alone = NO_PFNS
        self._alone_s: list[float] = []

    @property
    def bytes_per_s(self) -> float:
        """The rate at which the destination took the round's pages in; 0 if it is unknown."""
        return self._intake.bytes_per_s

    @property
    def page_alone_s(self) -> float:
        """The median time that a page took which was sent alone; 0 if it is unknown."""
        return statistics.median(self._alone_s) if self._alone_s else 0.0

    def send(self) -> None:
        """Send the set.  Called in a thread.  Raises :class:`PeerClosedError`."""
        self._push.send_all(self._batches(), self._sent, stops=self._is_over)
        if self._is_over():
            return
        self._wait(self._intake.passed if self._intake.end() else _nothing)
        ends_at = time.monotonic() + ALONE_S
        for pfns in pieces(self._alone, 1):
            if self._is_over():
                return
            began = time.monotonic()
            self._push.send_all([pfns], self._count)
            if began < ends_at:
                self._wait(functools.partial(self._loaded_alone, began))

    def stop(self) -> None:
        """Have :meth:`send` return soon."""
        self._stopping.set()
        self._wake.set()

    def _batches(self) -> Iterator[PfnArray]:
        """Yield the batches of the set, without the pages that are sent alone."""
        batch = NO_PFNS
        for following in batches_of(self._to_send, BATCH_PAGES):
            if len(batch):
                self._intake.begin(time.monotonic())
                yield batch
            batch = following
        self._alone = batch[-PAGES_ALONE:]
        if len(batch) > PAGES_ALONE:
            self._intake.begin(time.monotonic())
            yield batch[:-PAGES_ALONE]

    def _sent(self, pfns: PfnArray, message: m.Pages) -> bool:
        if self._intake.sent(len(message.pfns) * PAGE_SIZE):
            self._intake.end()
            self._barrier(self._intake.passed)
        return self._count(pfns, message)

    def _count(self, pfns: PfnArray, message: m.Pages) -> bool:
        self._to_send[pfns] = False
        self._left -= len(pfns)
        self._context.statistics.precopy_pages += count_pages(message)
        self._context.progress.pages_done += len(pfns)
        return not self._is_over()

    def _is_over(self) -> bool:
        if not self._stopping.is_set() and not self._continues(self._left):
            self._stopping.set()
        return self._stopping.is_set()

    def _loaded_alone(self, began: float, now: float) -> None:
        self._alone_s.append(now - began)

    def _barrier(self, passed: Callable[[float], object]) -> None:
        self._push.send_blocking(m.Barrier(self._context.barriers.add(passed)))

    def _wait(self, passed: Callable[[float], object]) -> None:
        """Wait until the destination has loaded what was sent, and call ``passed`` with the time.
        Raises :class:`PeerClosedError`.
        """

        def wake(now: float) -> None:
            passed(now)
            self._wake.set()

        self._wake.clear()
        if self._stopping.is_set():
            return
        self._barrier(wake)
        if not self._wake.wait(STEP_TIMEOUT_S):
            raise PeerClosedError(
                f"the destination did not load what it was sent within {STEP_TIMEOUT_S:g} s"
            )


def _nothing(_now: float) -> None:
    """Ignore when a barrier was passed."""
