"""The pager: between the paging ring, the two lanes and the domain, from the handover on.

Three tasks meet here: one reads the ring, one the pull lane, one the push lane.  All decisions are
:class:`OutstandingPages`'; this moves pages and messages.  A single page is loaded where it arrives, a batch in
a thread, so that a fault never waits for the copying of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import numpy as np
import trio

from migrate.messages import Dropped, Loaded, Message, Pages
from migrate.statistics import PagerStatistics
from receiver.outstanding import OutstandingPages, Verdict
from receiver.restore import select_pages
from xenbackend.contract import Buffer, Domain, PfnArray
from xenbackend.ring import PagingRing

log = logging.getLogger(__name__)

SMALL = 8
"""Pages up to here are loaded at once: a thread would cost more than the copy."""
ACKNOWLEDGE_AT = 64
"""Pulled pages are acknowledged in batches of this size, or with the next pushed one."""


class Pager:
    """``say`` sends on the push lane, ``ask`` fetches pfns over the pull lane."""

    def __init__(
        self,
        domain: Domain,
        ring: PagingRing | None,
        pages: OutstandingPages,
        statistics: PagerStatistics,
        say: Callable[[Message], Awaitable[object]],
        ask: Callable[[PfnArray], Awaitable[object]],
    ):
        self._domain = domain
        self._ring = ring
        self._pages = pages
        self._statistics = statistics
        self._say = say
        self._ask = ask
        self._unacknowledged: list[PfnArray] = []
        self._dropped: list[PfnArray] = []
        self._acknowledging = trio.Lock()
        self.nothing_outstanding = trio.Event()
        self._check_end()

    async def serve_ring(self) -> None:
        """Until cancelled."""
        if self._ring is None:
            return
        while True:
            await trio.lowlevel.wait_readable(self._ring)
            await self._handle_ring()

    async def _handle_ring(self) -> None:
        assert self._ring is not None
        verdict = self._pages.requests(self._ring.requests(), trio.current_time())
        self._carry_out(verdict)
        if len(verdict.ask):
            self._statistics.requests += len(verdict.ask)
            await self._ask(verdict.ask)
        if len(verdict.dropped):
            await self.acknowledge()

    async def pushed(self, message: Pages, payload: memoryview) -> None:
        await self._arrived(message, payload)
        await self.acknowledge()

    async def pulled(self, message: Pages, payload: memoryview) -> None:
        self._statistics.pulled_pages += await self._arrived(message, payload)
        if sum(len(pfns) for pfns in self._unacknowledged) >= ACKNOWLEDGE_AT:
            await self.acknowledge()

    async def _arrived(self, message: Pages, payload: memoryview) -> int:
        """Returns how many of the pages were news."""
        wanted = self._pages.claim(message.pfns)
        zeros = message.zeros[self._pages.claim(message.zeros)]
        pfns = message.pfns[wanted]
        if len(pfns):
            await self._load(pfns, select_pages(payload, wanted))
        if len(zeros):
            await self._load(zeros, None)
        return len(pfns) + len(zeros)

    async def _load(self, pfns: PfnArray, pages: Buffer | None) -> None:
        if len(pfns) <= SMALL:
            results = self._domain.load(pfns, pages)
        else:
            with trio.CancelScope(shield=True):  # what is claimed is loaded
                results = await trio.to_thread.run_sync(self._domain.load, pfns, pages)
        self._carry_out(self._pages.finished(pfns, results))

    def _carry_out(self, verdict: Verdict) -> None:
        if verdict.answer:
            assert self._ring is not None
            self._ring.respond([request for request, _since in verdict.answer])
            now = trio.current_time()
            for request, since in verdict.answer:
                if request.vcpu_waits:
                    self._statistics.answered(request.vcpu, now - since)
        if len(verdict.loaded):
            self._unacknowledged.append(verdict.loaded)
        if len(verdict.dropped):
            self._dropped.append(verdict.dropped)
            self._statistics.dropped_pages += len(verdict.dropped)
        self._check_end()

    def _check_end(self) -> None:
        if self._pages.count == 0:
            self.nothing_outstanding.set()

    async def acknowledge(self) -> None:
        """Tell the sender what was loaded or dropped since the last time.

        When this returns all of it has been said, by whichever task: ``complete`` may follow.
        """
        async with self._acknowledging:
            loaded, self._unacknowledged = self._unacknowledged, []
            dropped, self._dropped = self._dropped, []
            if loaded:
                await self._say(Loaded(np.sort(np.concatenate(loaded))))
            if dropped:
                await self._say(Dropped(np.sort(np.concatenate(dropped))))

    async def finish(self) -> None:
        """Nothing is outstanding: answer what is still in the ring and give it up."""
        if self._ring is None:
            return
        await self._handle_ring()
        self._domain.paging_disable()
        self._ring.close()
