# SPDX-License-Identifier: GPL-2.0-or-later
"""The fault server: a thread that waits for faults on the pull lane and answers each at once.

The thread has a lane of its own, so that a fault never queues behind the push.  The thread waits
for other threads only at the locks of the backlog, of the bandwidth cap, and of the lane, over
which the event loop sends ``alive``.  The same thread answers the receiver's read-ahead, whenever
no fault is waiting.  While copying is paused, nothing is read ahead; the push sends those pages
later.  Native code answers nearly all faults before they reach this code
(``migrate/fastpath/api.py``).
"""

from __future__ import annotations

import errno
import time
from collections import deque

from migrate.errors import PeerClosedError
from migrate.fastpath.api import NativeFaultServer
from migrate.lanes import scheduling
from migrate.lanes.connection import LaneConnection
from migrate.lanes.scheduling import run_in_thread
from migrate.protocol.messages import Ahead, Fault, Lane
from migrate.protocol.pfns import pieces
from migrate.protocol.session import Phase, Session
from sender.backlog import Backlog
from sender.bandwidth import BandwidthCap
from sender.pause import Pause
from sender.source_pages import announce_missing
from sender.statistics import SenderStatistics
from xenbackend.contract import Domain
from xenbackend.pages import PfnArray

AHEAD_PIECE = 64
"""The most pages that are sent ahead in one step, for the end of which a fault has to wait."""


class FaultServer:
    def __init__(
        self,
        domain: Domain,
        pull: LaneConnection,
        session: Session,
        statistics: SenderStatistics,
        cap: BandwidthCap,
        pause: Pause,
    ):
        self._pull = pull
        self._session = session
        self._backlog: Backlog
        self._statistics = statistics
        self._cap = cap
        self._pause = pause
        self._domain = domain
        self._stopping = False
        self._ahead: deque[PfnArray] = deque()
        lane = pull.native()
        self._native = None if lane is None else NativeFaultServer(lane)

    def open(self, backlog: Backlog) -> None:
        """Answer faults for the pages of ``backlog`` from here on."""
        self._backlog = backlog
        pages = self._domain.native_pages()
        if self._native is not None and pages is not None:
            self._native.open(pages, backlog.pages)

    async def serve(self) -> None:
        """Serve faults until cancelled, or until the receiver has completed and closed the lane."""
        await run_in_thread(self._serve, self._stop, scheduling.be_prompt)

    def _stop(self) -> None:
        self._stopping = True
        self._pull.shut()

    def _serve(self) -> None:
        try:
            self._answer()  # a fault may have arrived in one packet with the hello
            while True:
                if not self._ahead or self._pull.readable():
                    self._receive()
                else:
                    pfns = self._ahead.popleft()
                    # No vCPU waits for these pages yet, so they count against the cap on background
                    # copying.
                    before = self._statistics.pull_pages
                    size = self._send(self._backlog.pull(pfns))
                    self._statistics.ahead_pages += self._statistics.pull_pages - before
                    self._cap.spend(size, time.monotonic())
        except PeerClosedError:
            if not self._stopping and self._session.phase is not Phase.CLOSED:
                raise

    def _receive(self) -> None:
        self._fill()
        self._answer()

    def _answer(self) -> None:
        """Send at once the pages for which vCPUs wait.  Pages that a vCPU may need next are sent
        when no vCPU waits.
        """
        while (received := self._pull.pending()) is not None:
            message, _pages = received
            self._session.received(message, Lane.PULL)
            if isinstance(message, Fault):
                self._send(self._backlog.fault(message.pfns))
                continue
            assert isinstance(message, Ahead)
            if not self._pause.is_on:
                pfns = self._backlog.ahead(message.pfns)
                self._ahead += pieces(pfns, AHEAD_PIECE)

    def _fill(self) -> None:
        vacant = self._pull.vacant()
        if self._native is None or vacant is None:
            self._pull.fill()
            return
        received = self._native.serve(vacant, wait=not self._ahead)
        pages, zeros, size, error = self._native.sent()
        self._statistics.pull_pages += pages
        self._statistics.pull_zero_pages += zeros
        self._pull.native_sent(size, error)
        if received != -errno.EAGAIN:
            self._pull.native_received(received)

    def _send(self, pfns: PfnArray) -> int:
        """Send these pages.  Returns the number of bytes that were sent."""
        if not len(pfns):
            return 0
        with self._domain.map_pages(pfns) as mapped:
            pages = announce_missing(pfns, mapped, self._backlog)
            if pages is None:
                return 0
            self._session.sent(pages, Lane.PULL)
            size = self._pull.send_blocking(pages, mapped.data)
        self._statistics.pull_pages += len(pfns)
        self._statistics.pull_zero_pages += len(pages.zeros)
        return size
