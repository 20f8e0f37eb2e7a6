# SPDX-License-Identifier: GPL-2.0-or-later
"""The pager: between the paging ring, the two lanes and the domain, from the switchover on.

Two threads meet here.  The *pager thread* waits for the ring and the pull lane and does nothing
else.  The steps of a fault in this process are: wake, request, wake, load, answer.  In none of them
does a fault queue behind the event loop or behind a batch.  The thread of the push lane loads
pushed pages and acknowledges them.  :class:`OutstandingPages` makes all decisions, under one lock.
Pages are claimed under this lock and loaded outside it.

Nearly all faults take the fast path, in native code and in the pager thread
(``migrate/fastpath/api.py``).  This module does the accounting afterwards, and is the slow path for
the rest.

While there are no lanes, the pager thread serves the ring alone.  A vCPU that waits for a present
page continues, and the other requests are kept.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import PeerClosedError
from migrate.fastpath import api as fastpath
from migrate.fastpath.api import NativePager
from migrate.lanes import scheduling
from migrate.lanes.connection import LaneConnection
from migrate.lanes.scheduling import run_in_thread
from migrate.protocol.messages import (
    MAX_FAULT_PFNS,
    MAX_PFNS,
    Ahead,
    Dropped,
    Fault,
    Lane,
    Loaded,
    Message,
    Pages,
    Report,
)
from migrate.protocol.pfns import NO_PFNS, PfnMask, pieces, runs
from migrate.protocol.session import Phase, Session
from migrate.tasks import in_thread
from receiver.loading import Shortage, load, retries, select_pages
from receiver.origins import Origin
from receiver.outstanding import Actions, OutstandingPages
from receiver.statistics import PagerStatistics
from xenbackend.contract import Domain
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.pages import PAGE_SIZE, Buffer, PfnArray
from xenbackend.ring import PagingRequest, PagingRing

log = logging.getLogger(__name__)


class Pager:
    """The pager of one guest.  ``ring``: ``None`` if no page is missing.  ``send`` sends on the
    push lane.
    """

    def __init__(
        self,
        domain: Domain,
        ring: PagingRing | None,
        session: Session,
        pages: OutstandingPages,
        statistics: PagerStatistics,
        send: Callable[[Message], object],
        make_room: Callable[[int], bool] = lambda _pages: False,
    ):
        self._domain = domain
        self._make_room = make_room
        self._ring = ring
        self._pull: LaneConnection | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._session = session
        self._pages = pages
        self._statistics = statistics
        self._send = send
        self._lock = pages.pages.lock
        self._native: NativePager | None = None
        self._begun = False
        self._stopping = False
        self._held: list[tuple[PfnArray, bytes | None]] = []
        """Pages of the pull lane that wait for memory.  They are few, because vCPUs need them."""
        self._try_at = 0.0
        self._pull_shortage, self._push_shortage = Shortage(), Shortage()
        self._unacknowledged: list[PfnArray] = []
        self._dropped: list[PfnArray] = []
        self._acknowledging = threading.Lock()
        self.holds_back = False
        """If true, nothing is acknowledged, so that the sender keeps the missing pages."""
        self._token = trio.lowlevel.current_trio_token()
        self.nothing_outstanding = trio.Event()

    def begin(self) -> None:
        """Request pages from here on.  All missing pages are known, and the guest may run."""
        with self._lock:
            self._begun = True
            if self._native is not None:
                self._native.open()
            self._note_if_nothing_is_missing()

    def _note_if_nothing_is_missing(self) -> None:
        """Set :attr:`nothing_outstanding` if no page is missing.  The missing pages are not known
        before :meth:`begin`.
        """
        if self._begun and not self._pages.count:
            self._token.run_sync_soon(self.nothing_outstanding.set, idempotent=True)

    # ---- the pager thread ----
    async def serve(self, pull: LaneConnection | None) -> None:
        """Serve faults until cancelled.  Without lanes, only faults for pages that are present are
        served.  Raises the error that ends the thread.
        """
        if self._ring is not None:
            self._pull = pull
            self._stopping = False
            with contextlib.suppress(BlockingIOError):
                # The thread before this one may have been stopped when it had ended already.
                os.eventfd_read(self._wake_fd)
            await run_in_thread(self._serve, self._stop, scheduling.be_prompt)

    def _stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        if self._pull is not None:
            self._pull.shut()

    def _serve(self) -> None:
        assert self._ring is not None
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._ring, select.POLLIN)
        if self._pull is not None:
            poll.register(self._pull, select.POLLIN)
        try:
            self._repeat_requests()
            self._handle_ring()  # a predecessor may have left requests open
            if self._pull is not None:
                self._receive_all()
            self._prepare_fast_path()
            while not self._stopping:
                self._turn(poll)
        except PeerClosedError:
            if not self._stopping and self._session.phase < Phase.COMPLETE:
                raise
            # The sender has agreed, and ``completed`` is about to arrive on the push lane.
        finally:
            self._leave_fast_path()
            self._held.clear()  # the sender still has these pages
            self._pull_shortage.over()

    def _turn(self, poll: select.poll) -> None:
        """Wait for an event, and handle it."""
        assert self._ring is not None
        vacant = self._pull.vacant() if self._pull is not None else None
        if self._native is not None and vacant is not None and not self._held:
            self._turn_natively(self._native, vacant)
            return
        wait_ms = max(self._try_at - time.monotonic(), 0) * 1000 if self._held else None
        for fd, _event in poll.poll(wait_ms):
            if fd == self._ring.fileno():
                self._handle_ring()
            elif fd != self._wake_fd:
                self._handle_pull_lane()
        if self._held and time.monotonic() >= self._try_at:
            self._load_held()

    def _prepare_fast_path(self) -> None:
        """Prepare the fast path, if the lane, the domain and the ring support it."""
        assert self._ring is not None
        if self._pull is None:
            return
        lane, domain, ring = self._pull.native(), self._domain.native_pages(), self._ring.native()
        if lane is None or domain is None or ring is None:
            return
        native = NativePager(
            lane,
            domain,
            ring,
            self._pages.pages,
            wake_fd=self._wake_fd,
            ring_fd=self._ring.fileno(),
        )
        with self._lock:
            self._native = native
            if self._begun:
                native.open()

    def _turn_natively(self, native: NativePager, vacant: memoryview) -> None:
        """Wait in native code, account for what it has done, and handle what it hands back."""
        assert self._pull is not None
        met = native.wait(vacant)
        if met < 0:
            raise XenError("paging ring", -met)
        if native.has_results:  # seldom true after a request, whose page has not arrived yet
            self._account(native, pulled=bool(met & fastpath.LOADED))
        if met & fastpath.ASKED:
            touched, asked, size, error = native.asked()
            self._statistics.requests += asked
            self._pull.native_sent(size, error)
            self._ask_ahead(touched)
        if met & fastpath.RING:
            requests = native.requests
            self._handle_requests(lambda: requests)
        if met & fastpath.LANE:
            self._pull.native_received(native.received)
            self._receive_all()

    def _account(self, native: NativePager, *, pulled: bool) -> None:
        """Account for the pages that native code has loaded or dropped, and for its answers."""
        (pfns, results), answered = native.finished(), native.answered()
        if pulled:
            self._statistics.pulled_pages += len(pfns)
            if self._pull is not None:
                self._pull.bytes_received += len(pfns) * PAGE_SIZE
        with self._lock:
            self._count(answered)
            actions = self._pages.accounted(pfns, results)
            self._pages.origins.note_loaded(actions.loaded, answered, pulled=pulled)
            self._carry_out(actions)

    def _leave_fast_path(self) -> None:
        with self._lock:
            self._native = None

    def _repeat_requests(self) -> None:
        """Request the pages for which vCPUs have been waiting since before these lanes."""
        with self._lock:
            requested = self._pages.requested()
        for pfns in pieces(requested, MAX_FAULT_PFNS):
            self._ask(Fault(pfns))

    def _handle_ring(self) -> None:
        assert self._ring is not None
        self._handle_requests(self._ring.requests)

    def _handle_requests(self, take: Callable[[], list[PagingRequest]]) -> None:
        with self._lock:
            actions = self._pages.requests(take(), time.monotonic())
            self._statistics.requests += len(actions.ask)
            self._carry_out(actions)
        if len(actions.ask):
            self._ask(Fault(actions.ask))
        self._ask_ahead(actions.touched)  # after the requests, for which vCPUs wait

    def _ask_ahead(self, touched: list[int]) -> None:
        ahead = self._pages.ahead(touched) if self._pull is not None and not self._held else NO_PFNS
        if len(ahead):
            self._statistics.ahead_pages += len(ahead)
            self._ask(Ahead(ahead))

    def _ask(self, message: Message) -> None:
        if self._pull is None:
            return
        self._session.sent(message, Lane.PULL)
        self._pull.send_blocking(message)

    def _handle_pull_lane(self) -> None:
        assert self._pull is not None
        self._pull.fill()
        self._receive_all()

    def _receive_all(self) -> None:
        assert self._pull is not None
        self._take_pages()
        while self._pull.buffered():
            self._pull.fill()
            self._take_pages()

    def _take_pages(self) -> None:
        assert self._pull is not None
        while (received := self._pull.pending()) is not None:
            message, payload = received
            self._session.received(message, Lane.PULL)
            assert isinstance(message, Pages)
            for pfns, pages in self._claim(message, payload):
                self._statistics.pulled_pages += len(pfns)
                short, kept = self._load(pfns, pages, pulled=True)
                if len(short):
                    self._hold(short, None if kept is None else bytes(kept))

    def _hold(self, pfns: PfnArray, pages: bytes | None) -> None:
        """Keep pages for which the host has no memory, so that other requests are served."""
        if not self._held:
            self._try_at = time.monotonic() + self._pull_shortage.pause(len(pfns))
        self._held.append((pfns, pages))

    def _load_held(self) -> None:
        held, self._held = self._held, []
        for pfns, pages in held:
            short, kept = self._load(pfns, pages, pulled=True)
            if len(short):
                self._held.append((short, None if kept is None else bytes(kept)))
        if self._held:
            self._try_at = time.monotonic() + self._pull_shortage.pause(
                sum(len(pfns) for pfns, _pages in self._held)
            )
        else:
            self._pull_shortage.over()

    # ---- the push lane's thread ----
    def pushed(
        self, message: Pages, payload: memoryview, ends_within: Callable[[float], bool]
    ) -> None:
        """Load a batch.  One acknowledgement covers several batches, and the pages that arrived on
        the pull lane meanwhile.  Before the handover each batch is acknowledged, because the sender
        waits for that.

        While the host has no memory for this batch, no other batch is received.  ``ends_within``
        returns whether the lane ends within a number of seconds.  Raises :class:`PeerClosedError`
        if the lane ends first; pages that were not loaded stay outstanding.
        """
        for pfns, pages in self._claim(message, payload):
            pfns, pages = self._load(pfns, pages, pulled=False)
            while len(pfns):
                if ends_within(self._push_shortage.pause(len(pfns))):
                    self._push_shortage.over()
                    raise PeerClosedError("the connection has ended while pages waited for memory")
                pfns, pages = self._load(pfns, pages, pulled=False)
            if self._push_shortage.pages:
                self._push_shortage.over()
        many = sum(map(len, self._unacknowledged)) >= MAX_PFNS
        if many or not self._session.handed_over:
            self.acknowledge()

    @property
    def acknowledged(self) -> bool:
        """Whether :meth:`acknowledge` has nothing to report."""
        return not self._unacknowledged and not self._dropped

    def acknowledge(self) -> None:
        """Report to the sender what was loaded or dropped since the last call.

        When this returns, the reports of all threads have been sent, so ``complete`` may follow.
        """
        if self.holds_back:
            return
        with self._acknowledging:
            with self._lock:
                loaded, self._unacknowledged = self._unacknowledged, []
                dropped, self._dropped = self._dropped, []
            for kind, lists in ((Loaded, loaded), (Dropped, dropped)):
                for pfns in pieces(np.sort(np.concatenate([NO_PFNS, *lists])), MAX_PFNS):
                    self._send(kind(pfns))

    def rejoin(self) -> PfnMask:
        """Return what is outstanding, which the sender has to send again.  Called while no fault is
        served.
        """
        with self._lock:
            self._unacknowledged, self._dropped = [], []
            return self._pages.rejoin()

    def report(self) -> tuple[Report, int]:
        """Return the report for the sender, and the number of requests that wait now."""
        with self._lock:
            latency = self._statistics.latency
            report = Report(self._pages.count, latency.count, int(latency.quantile(0.5)))
            return report, self._pages.waiting

    def longest_wait_us(self, now: float) -> int:
        """Return the longest that a vCPU has waited, or has been waiting, up to ``now``."""
        with self._lock:
            since = self._pages.waits_since()
            waiting_us = 0.0 if since is None else (now - since) * 1e6
            return round(max(self._statistics.latency.max_us, waiting_us))

    async def finish(self) -> None:
        """Answer the requests that are still in the ring, and give the ring up.  Called when
        nothing is outstanding and the pager thread has ended.

        The guest is paused meanwhile, because a vCPU may be about to request a page that was just
        loaded.
        """
        self._pull = None
        if self._ring is not None:
            await in_thread(self._domain.pause)
            try:
                while not await in_thread(self._give_up, self._ring):
                    # vCPUs that waited for a slot of the ring are about to find their page present.
                    await trio.sleep(0.001)
            finally:
                await self._unpause()
            self._ring = None
        self.close()

    async def _unpause(self) -> None:
        """Unpause the guest.  Xen counts pauses, so a pause without an unpause would stop the guest
        for ever.
        """
        for pause_s in retries():
            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._domain.unpause)
                return
            except NoSuchDomainError:
                return
            except (XenError, RuntimeError) as error:
                log.error("%s; trying again until the guest continues", error)
                await trio.sleep(pause_s)

    def _give_up(self, ring: PagingRing) -> bool:
        """Give the ring up.  Returns false if the caller has to try again."""
        self._handle_ring()
        try:
            self._domain.paging_disable()
        except XenError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        ring.close()
        return True

    def close(self) -> None:
        """Release the pager's resources.  The ring itself is not changed."""
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    @property
    def short_of_memory(self) -> int:
        """The number of pages that have arrived and for which the host has no memory."""
        return self._pull_shortage.pages + self._push_shortage.pages

    # ---- both threads ----
    def _load(
        self, pfns: PfnArray, pages: Buffer | None, *, pulled: bool
    ) -> tuple[PfnArray, Buffer | None]:
        """Load claimed pages, ``pulled`` or pushed.  Returns those for which the host has no memory
        now; they stay claimed.
        """
        results = load(self._domain, pfns, pages, self._make_room)
        if not np.count_nonzero(short := results == -errno.ENOMEM):
            self._finished(pfns, results, pulled=pulled)
            return NO_PFNS, None
        self._finished(pfns[~short], results[~short], pulled=pulled)
        return pfns[short], None if pages is None else select_pages(memoryview(pages), short)

    def _claim(
        self, message: Pages, payload: memoryview
    ) -> Iterator[tuple[PfnArray, Buffer | None]]:
        """Claim the pages of a message, and yield the pages to be loaded, without a copy.  The few
        pages that have arrived before are left out.
        """
        with self._lock:
            wanted = self._pages.claim(message.pfns)
            zeros = (
                message.zeros[self._pages.claim(message.zeros)]
                if len(message.zeros)
                else message.zeros
            )
        for first, stop in runs(wanted):
            yield message.pfns[first:stop], payload[first * PAGE_SIZE : stop * PAGE_SIZE]
        if len(zeros):
            yield zeros, None

    def _finished(self, pfns: PfnArray, results: NDArray[np.int32], *, pulled: bool) -> None:
        with self._lock:
            actions = self._pages.finished(pfns, results)
            self._pages.origins.note_loaded(actions.loaded, actions.answer, pulled=pulled)
            self._carry_out(actions)

    def _carry_out(self, actions: Actions) -> None:
        """Carry actions out, under the lock, because the ring's response index is shared."""
        if actions.answer:
            assert self._ring is not None
            self._ring.respond([request for request, _since in actions.answer])
            now = time.monotonic()
            self._count([(request, now - since) for request, since in actions.answer])
        if len(actions.loaded):
            self._unacknowledged.append(actions.loaded)
        if len(actions.dropped):
            self._dropped.append(actions.dropped)
            self._pages.origins.note(actions.dropped, Origin.GIVEN_AWAY)
            self._statistics.dropped_pages += len(actions.dropped)
        self._note_if_nothing_is_missing()

    def _count(self, answered: list[tuple[PagingRequest, float]]) -> None:
        """Count the waits of vCPUs.  A vCPU that has requested one page several times has waited
        once.
        """
        stalls = {
            (request.vcpu, request.pfn): stall
            for request, stall in reversed(answered)
            if request.vcpu_waits
        }
        for (vcpu, _pfn), stall in stalls.items():
            self._statistics.answered(vcpu, stall)
