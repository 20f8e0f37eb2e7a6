# SPDX-License-Identifier: GPL-2.0-or-later
"""The sender's end of the push lane: its messages, and batches of pages, which are sent from the
guest's memory without a copy.

Until the handover each message depends on those before it, so messages and pages have one order.  A
thread sends the pages.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable

from migrate.lanes.connection import LaneConnection
from migrate.lanes.scheduling import run_in_thread
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.pfns import NO_PFNS, pieces
from migrate.protocol.session import Session
from sender.source_pages import announce
from sender.statistics import SenderStatistics
from sender.throttle import Throttle
from xenbackend.contract import Domain
from xenbackend.pages import MappedPages, PfnArray

BATCH_PAGES = 1024
"""The number of pages that are read, sent and loaded together.  It is so large that the time spent
in Python is negligible.
"""
CANCEL_GRACE_S = 2.0
"""How long a peer may take to receive the rest of a frame when sending has to stop."""

Announce = Callable[[PfnArray, MappedPages], m.Pages | None]
"""Makes the message for pages that are mapped; ``None``: the pages need not be sent."""
Sent = Callable[[PfnArray, m.Pages], bool]
"""Called with each batch that was sent; returns whether to send the next one."""
Stops = Callable[[], bool]
"""Returns whether nothing more is to be sent, also while the bandwidth cap is waited for."""


def never() -> bool:
    return False


class PushLane:
    """The push lane over one connection.  A session may use several push lanes in turn."""

    def __init__(
        self,
        connection: LaneConnection,
        session: Session,
        domain: Domain,
        cap: Throttle,
        statistics: SenderStatistics,
    ):
        self.connection = connection
        self._session = session
        self._domain = domain
        self._cap = cap
        self._statistics = statistics

    # ---- messages ----
    async def send(self, message: m.Message) -> None:
        self._session.sent(message, Lane.PUSH)
        await self.connection.send(message)

    def send_blocking(self, message: m.Message) -> None:
        self._session.sent(message, Lane.PUSH)
        self.connection.send_blocking(message)

    async def receive(self) -> m.Message:
        message, _pages = await self.connection.receive()
        self._session.received(message, Lane.PUSH)
        return message

    def receive_blocking(self) -> tuple[m.Message, memoryview]:
        message, payload = self.connection.receive_blocking()
        self._session.received(message, Lane.PUSH)
        return message, payload

    # ---- pages ----
    async def send_batches(
        self,
        batches: Iterable[PfnArray],
        sent: Sent,
        announce: Announce = announce,
        stops: Stops = never,
        stop: threading.Event | None = None,
    ) -> None:
        """Call :meth:`send_all` in a thread, until ``stops`` returns true or ``stop`` is set.
        Cancellation sets ``stop``, so ``sent`` may wait for it.
        """
        stopping = stop or threading.Event()

        def is_over() -> bool:
            return stopping.is_set() or stops()

        send = functools.partial(self.send_all, batches, sent, announce, is_over)
        await self.send_in_thread(send, stopping.set)

    async def send_in_thread(self, send: Callable[[], None], stop: Callable[[], object]) -> None:
        """Run ``send`` in a thread.  On cancellation ``stop`` is called, which makes ``send``
        return.
        """
        # If the peer receives nothing, the thread does not return from its call.  The connection is
        # therefore ended after CANCEL_GRACE_S.
        cut_off = threading.Timer(CANCEL_GRACE_S, self.connection.shut)
        cut_off.daemon = True

        def stop_sending() -> None:
            stop()
            self._cap.wake()
            cut_off.start()

        try:
            await run_in_thread(send, stop_sending)
        finally:
            cut_off.cancel()

    def send_all(
        self,
        batches: Iterable[PfnArray],
        sent: Sent,
        announce: Announce = announce,
        stops: Stops | None = None,
    ) -> None:
        """Map and send batches of pages, until all are sent or ``stops`` returns true.  The
        bandwidth cap applies if there is ``stops``.
        """
        rest = iter(batches)
        while stops is None or self._cap.hold(stops):
            if (pfns := next(rest, None)) is None:
                return
            with self._domain.map_pages(pfns) as mapped:
                message = announce(pfns, mapped)
                if message is None:
                    continue
                self._session.sent(message, Lane.PUSH)
                size = self.connection.send_blocking(message, mapped.data)
            self._statistics.zero_pages += len(message.zeros)
            if stops is not None:
                self._cap.spend(size, time.monotonic())
            if not sent(pfns, message):
                return

    async def report_holes(self, pfns: PfnArray) -> PfnArray:
        """Call :meth:`send_holes` in a thread.  Returns the pfns that have no memory."""
        found: list[PfnArray] = []
        await self.send_in_thread(lambda: found.append(self.send_holes(pfns)[1]), lambda: None)
        return found[0]

    def send_holes(self, pfns: PfnArray) -> tuple[PfnArray, PfnArray]:
        """Send the pfns that have no memory any more (ballooned) as holes.  Returns the pfns with
        memory, and the pfns without.
        """
        present = self._domain.present(pfns)
        gone = pfns[~present]
        for holes in pieces(gone, m.MAX_PFNS):
            self.send_blocking(m.Pages(NO_PFNS, holes=holes))
        return pfns[present], gone
