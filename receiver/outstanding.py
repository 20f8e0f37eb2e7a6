# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that have not arrived yet, and the vCPUs that wait for them.  Sans-IO.

Each missing pfn goes

    OUTSTANDING -> REQUESTED -> LOADING -> READY        a vCPU requested the page
    OUTSTANDING -> LOADING -> READY                     the page was pushed before a request
    any of the first three -> DROPPED                   the guest gave the page away

A page is *claimed* before it is loaded, so a page that arrives twice, pushed and pulled, is loaded
once.  The later copy is always ignored, because the guest may have written the page since
(invariant 2).  Every request is answered exactly once (invariant 4).

The steps that requests and pages take are in C, for the fast path as well
(``migrate/fastpath/page_states.py``), and so is the table of the waiting requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
from receiver.origins import Origins
from receiver.readahead import ReadAhead, merged
from xenbackend.pages import PfnArray
from xenbackend.ring import PagingRequest


@dataclass
class Actions:
    """What the caller has to do now."""

    answer: list[Waiting] = field(default_factory=list)
    """Requests to respond to, each with the time at which it was made."""
    ask: PfnArray = field(default_factory=lambda: NO_PFNS)
    """The pfns to request from the sender."""
    touched: list[int] = field(default_factory=list)
    """The pfns that vCPUs needed, including those that have arrived since."""
    dropped: PfnArray = field(default_factory=lambda: NO_PFNS)
    """The pfns that the sender need not send."""
    loaded: PfnArray = field(default_factory=lambda: NO_PFNS)
    """The pfns that were loaded, and that the sender may release."""


class OutstandingPages:
    def __init__(self, nr_pfns: int):
        self.pages = DestinationPages(nr_pfns)
        self._state = self.pages.state
        self._read_ahead = ReadAhead(nr_pfns, self._outstanding)
        self.origins = Origins(nr_pfns)
        self.count = 0
        """The number of pages that are missing, or whose arrival was not accounted for yet."""

    @property
    def states(self) -> NDArray[np.uint8]:
        """The state of each pfn."""
        return self._state

    def add(self, pfns: PfnArray) -> None:
        """Note that these pages are missing.  Called before the guest runs."""
        self.count += int(np.count_nonzero(self._state[pfns] == PRESENT))
        self._state[pfns] = OUTSTANDING

    def remove(self, pfns: PfnArray) -> None:
        """Note that these pages are not missing any more: they have arrived, or have no memory any
        more.  Called before the guest runs.
        """
        if self.count:
            missing = pfns[self._state[pfns] == OUTSTANDING]
            self.count -= len(missing)
            self._state[missing] = PRESENT

    def summary_of_origins(self) -> dict[str, Any]:
        """Return where the pages came from; see :meth:`Origins.summary`.  Call this in a thread."""
        return self.origins.summary(self._state)

    def requests(self, requests: Iterable[PagingRequest], now: float) -> Actions:
        """Handle requests of the paging ring.  Raises ``XenError`` if they are more than a ring can
        have open.
        """
        actions = self.pages.requests(list(requests), now)
        self.count -= len(actions.dropped)
        return Actions(
            answer=actions.answer,
            ask=np.sort(actions.ask),
            touched=actions.touched,
            dropped=np.sort(actions.dropped),
        )

    def rejoin(self) -> PfnMask:
        """Return what is outstanding, after the link was lost with the pages in transit."""
        # If a load was cut short, some of its pages may be present; the next load detects that.
        self.pages.unclaim(np.flatnonzero(self._state == LOADING).astype(np.uint64))
        outstanding: PfnMask = (self._state == OUTSTANDING) | (self._state == REQUESTED)
        self.count = int(np.count_nonzero(outstanding))
        return outstanding

    def requested(self) -> PfnArray:
        """Return the pages for which vCPUs wait."""
        return self.pages.requested()

    def ahead(self, touched: list[int]) -> PfnArray:
        """Return the pages to fetch before they are needed.  They stay OUTSTANDING, so that a fault
        requests one of them as any other page.
        """
        windows = [
            self._read_ahead.after(pfn) for pfn in dict.fromkeys(touched) if pfn < len(self._state)
        ]
        return merged(windows, MAX_AHEAD_PFNS)

    def _outstanding(self, first: int, stop: int, step: int) -> PfnArray:
        """Return the outstanding pages among first, first + step, ... before stop; ascending for
        either direction.
        """
        states = self._state[first : stop if stop >= 0 else None : step]
        found = first + step * np.flatnonzero(states == OUTSTANDING)
        return (found if step > 0 else found[::-1]).astype(np.uint64)

    def claim(self, pfns: PfnArray) -> NDArray[np.bool_]:
        """Return which of the pages that arrived must be loaded, and make these LOADING.

        Raises :class:`RemoteProtocolError` for a page that was never missing.
        """
        wanted, wrong = self.pages.claim(pfns)
        if wrong is not None:
            raise RemoteProtocolError(f"pages: pfn {wrong:#x} was not announced as missing")
        return wanted

    def finished(self, pfns: PfnArray, results: NDArray[np.int32]) -> Actions:
        """Note that claimed pages were loaded, or that the guest gave them away meanwhile.

        If the ring is full, a drop request can be lost.  Then only ENOENT at the load shows that
        the page was given away.
        """
        answer = self.pages.finish(pfns, results)
        actions = self.accounted(pfns, results)
        actions.answer = answer
        return actions

    def accounted(self, pfns: PfnArray, results: NDArray[np.int32]) -> Actions:
        """Note that native code has finished these pages.  A page counts as missing until it is on
        the list of acknowledgements.
        """
        self.count -= len(pfns)
        if not np.count_nonzero(results):
            return Actions(loaded=pfns)
        return Actions(loaded=pfns[results == 0], dropped=pfns[results != 0])

    def waits_since(self) -> float | None:
        """Return since when the vCPU has waited that waits longest; ``None``: none waits."""
        return self.pages.waits_since()

    @property
    def waiting(self) -> int:
        """The number of requests that are not answered."""
        return self.pages.nr_waiting
