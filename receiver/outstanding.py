# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that are still to come, and the vCPUs that wait for them.  Sans-IO.

Each missing pfn goes

    OUTSTANDING -> REQUESTED -> LOADING -> READY        a vCPU asked for it
    OUTSTANDING -> LOADING -> READY                     it was pushed before anyone asked
    any of the first three -> DROPPED                   the guest gave it away

A page is *claimed* before it is loaded, so a page that comes twice, pushed and pulled, is loaded
once.  The later copy is ignored, whenever it comes: the guest may have written since (invariant 2).
Every request leaves here exactly once, as an answer (invariant 4).

The steps that requests and pages take are in C, for the fast path as well
(``migrate/fastpath/page_states.py``), and so is the table of who waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from migrate.errors import RemoteProtocolError
from migrate.fastpath.page_states import (
    LOADING,
    OUTSTANDING,
    PRESENT,
    REQUESTED,
    DestinationPages,
    Waiting,
)
from migrate.protocol.messages import MAX_AHEAD_PFNS
from migrate.protocol.pfns import NO_PFNS, PfnMask
from receiver.readahead import ReadAhead, merged
from xenbackend.pages import PfnArray
from xenbackend.ring import PagingRequest


@dataclass
class Verdict:
    """What is to be done now."""

    answer: list[Waiting] = field(default_factory=list)
    """Requests to respond to, each with the time at which it was made."""
    ask: PfnArray = field(default_factory=lambda: NO_PFNS)
    """pfns to fetch from the sender."""
    touched: list[int] = field(default_factory=list)
    """pfns that vCPUs needed, whether they are there by now or not."""
    dropped: PfnArray = field(default_factory=lambda: NO_PFNS)
    """pfns that the sender need not send."""
    loaded: PfnArray = field(default_factory=lambda: NO_PFNS)
    """pfns that the sender may forget."""


class OutstandingPages:
    def __init__(self, nr_pfns: int):
        self.pages = DestinationPages(nr_pfns)
        self._state = self.pages.state
        self._read_ahead = ReadAhead(nr_pfns, self._outstanding)
        self.count = 0
        """The number of pages that are missing, or whose arrival was not accounted for yet."""

    @property
    def states(self) -> NDArray[np.uint8]:
        """The state of each pfn."""
        return self._state

    def add(self, pfns: PfnArray) -> None:
        """These are missing.  Before the guest runs only."""
        self.count += int(np.count_nonzero(self._state[pfns] == PRESENT))
        self._state[pfns] = OUTSTANDING

    def remove(self, pfns: PfnArray) -> None:
        """These pages are not missing: they have come after all, or are no memory any more.  Called
        before the guest runs.
        """
        if self.count:
            missing = pfns[self._state[pfns] == OUTSTANDING]
            self.count -= len(missing)
            self._state[missing] = PRESENT

    def requests(self, requests: Iterable[PagingRequest], now: float) -> Verdict:
        """The paging ring has these.  Raises ``XenError`` if they are more than a ring can hold."""
        actions = self.pages.requests(list(requests), now)
        self.count -= len(actions.dropped)
        return Verdict(
            answer=actions.answer,
            ask=np.sort(actions.ask),
            touched=actions.touched,
            dropped=np.sort(actions.dropped),
        )

    def rejoin(self) -> PfnMask:
        """What is outstanding, now that the link was lost and nothing is on its way."""
        # Loads that were cut short: some pages may be there, and the next load finds that out.
        self.pages.unclaim(np.flatnonzero(self._state == LOADING).astype(np.uint64))
        outstanding: PfnMask = (self._state == OUTSTANDING) | (self._state == REQUESTED)
        self.count = int(np.count_nonzero(outstanding))
        return outstanding

    def requested(self) -> PfnArray:
        """What vCPUs wait for."""
        return self.pages.requested()

    def ahead(self, touched: list[int]) -> PfnArray:
        """The pages to fetch before they are needed.  They stay OUTSTANDING: a fault asks for one
        of them as for any other page.
        """
        windows = [
            self._read_ahead.after(pfn) for pfn in dict.fromkeys(touched) if pfn < len(self._state)
        ]
        return merged(windows, MAX_AHEAD_PFNS)

    def _outstanding(self, first: int, stop: int, step: int) -> PfnArray:
        """Ascending, for whichever direction."""
        states = self._state[first : stop if stop >= 0 else None : step]
        found = first + step * np.flatnonzero(states == OUTSTANDING)
        return (found if step > 0 else found[::-1]).astype(np.uint64)

    def claim(self, pfns: PfnArray) -> NDArray[np.bool_]:
        """Which of the pages that arrived are to be loaded; they are LOADING then.

        Raises :class:`RemoteProtocolError` for a page that was never missing.
        """
        wanted, wrong = self.pages.claim(pfns)
        if wrong is not None:
            raise RemoteProtocolError(f"pages: pfn {wrong:#x} was not announced as missing")
        return wanted

    def finished(self, pfns: PfnArray, results: NDArray[np.int32]) -> Verdict:
        """Claimed pages were loaded, or could not be because the guest gave them away meanwhile.

        A drop request can be lost when the ring is full.  ENOENT at the load is then the only sign
        of it.
        """
        answer = self.pages.finish(pfns, results)
        verdict = self.accounted(pfns, results)
        verdict.answer = answer
        return verdict

    def accounted(self, pfns: PfnArray, results: NDArray[np.int32]) -> Verdict:
        """Native code has finished these.  They count as missing until the sender can be told."""
        self.count -= len(pfns)
        if not np.count_nonzero(results):
            return Verdict(loaded=pfns)
        return Verdict(loaded=pfns[results == 0], dropped=pfns[results != 0])

    @property
    def waiting(self) -> int:
        """Requests that are unanswered."""
        return self.pages.nr_waiting
