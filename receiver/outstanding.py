# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that are still to come, and the vCPUs that wait for them.  Sans-IO.

Each missing pfn goes

    OUTSTANDING -> REQUESTED -> LOADING -> READY        a vCPU asked for it
    OUTSTANDING -> LOADING -> READY                     it was pushed before anyone asked
    any of the first three -> DROPPED                   the guest gave it away

A page is *claimed* before it is loaded, so one that comes twice, pushed and pulled, is loaded once; the later
copy is ignored, whenever it comes: the guest may have written since (invariant 2).  Every request leaves here
exactly once, as an answer (invariant 4).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from migrate.errors import RemoteProtocolError
from migrate.protocol.messages import MAX_AHEAD_PFNS
from migrate.protocol.pfns import NO_PFNS, PfnMask, pfn_array
from receiver.readahead import ReadAhead, merged
from xenbackend.pages import PfnArray
from xenbackend.ring import PagingRequest

PRESENT, OUTSTANDING, REQUESTED, LOADING, READY, DROPPED = range(6)  # in this order: code below compares


@dataclass
class Verdict:
    """What is to be done now."""

    answer: list[tuple[PagingRequest, float]] = field(default_factory=list)
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
        self._state = np.zeros(nr_pfns, dtype=np.uint8)
        """Native code does some of the steps below (``migrate/fastpath/native/fault.c``)."""
        self._waiting: dict[int, list[tuple[PagingRequest, float]]] = {}
        self._read_ahead = ReadAhead(nr_pfns, self._outstanding)
        self.count = 0

    @property
    def states(self) -> NDArray[np.uint8]:
        """Of all pfns."""
        return self._state

    def add(self, pfns: PfnArray) -> None:
        """These are missing.  Before the guest runs only."""
        self.count += int(np.count_nonzero(self._state[pfns] == PRESENT))
        self._state[pfns] = OUTSTANDING

    def remove(self, pfns: PfnArray) -> None:
        """These are not missing: they have come after all, or are no memory any more.  Before the guest runs only."""
        if self.count:
            missing = pfns[self._state[pfns] == OUTSTANDING]
            self.count -= len(missing)
            self._state[missing] = PRESENT

    def requests(self, requests: Iterable[PagingRequest], now: float) -> Verdict:
        """From the paging ring."""
        verdict = Verdict()
        ask, dropped = set(), set()
        for request in requests:
            pfn = request.pfn
            state = int(self._state[pfn]) if pfn < len(self._state) else PRESENT
            if request.is_drop:
                verdict.answer.append((request, now))
                if state in (OUTSTANDING, REQUESTED):
                    self._drop(pfn)
                    dropped.add(pfn)
                    verdict.answer += self._waiting.pop(pfn, [])
                continue
            verdict.touched.append(pfn)
            if request.eviction_failed or state in (PRESENT, READY, DROPPED):
                # The page is there, or came while the request was on its way; or it is gone, and the retry
                # will show the guest why.
                verdict.answer.append((request, now))
            else:
                self._waiting.setdefault(pfn, []).append((request, now))
                if state == OUTSTANDING:
                    self._state[pfn] = REQUESTED
                    ask.add(pfn)
        if ask:
            verdict.ask = pfn_array(sorted(ask - dropped))
        if dropped:
            verdict.dropped = pfn_array(sorted(dropped))
        return verdict

    def rejoin(self) -> PfnMask:
        """What is outstanding, now that the link was lost and nothing is on its way."""
        failed = self._state == LOADING  # cut short: some of them may be there, which the next load finds out
        self._state[failed] = OUTSTANDING
        self._state[pfn_array(sorted(pfn for pfn in self._waiting if self._state[pfn] == OUTSTANDING))] = REQUESTED
        outstanding: PfnMask = (self._state == OUTSTANDING) | (self._state == REQUESTED)
        self.count = int(np.count_nonzero(outstanding))
        return outstanding

    def adopt(self, request: PagingRequest, since: float) -> None:
        """Of native code that waits no more: its page is REQUESTED."""
        self._waiting.setdefault(request.pfn, []).append((request, since))

    def requested(self) -> PfnArray:
        """What vCPUs wait for."""
        return pfn_array(sorted(pfn for pfn in self._waiting if self._state[pfn] == REQUESTED))

    def ahead(self, touched: list[int]) -> PfnArray:
        """What to fetch before it is needed.  They stay outstanding: a fault for one asks for it as for any other."""
        windows = [self._read_ahead.after(pfn) for pfn in dict.fromkeys(touched) if pfn < len(self._state)]
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
        if not len(pfns):
            return np.zeros(0, dtype=np.bool_)
        states = self._state[pfns]
        if np.count_nonzero(states) < len(states):  # PRESENT
            raise RemoteProtocolError(f"pages: pfn {int(pfns[states == PRESENT][0]):#x} was not announced as missing")
        wanted: NDArray[np.bool_] = states <= REQUESTED
        self._state[pfns[wanted]] = LOADING
        return wanted

    def finished(self, pfns: PfnArray, results: NDArray[np.int32]) -> Verdict:
        """Claimed pages were loaded, or could not be because the guest gave them away meanwhile.

        A drop request can be lost when the ring is full; ENOENT at the load is then the only sign of it.
        """
        verdict = Verdict(loaded=pfns)
        self._state[pfns] = READY
        if np.count_nonzero(results):
            verdict.loaded, verdict.dropped = pfns[results == 0], pfns[results != 0]
            self._state[verdict.dropped] = DROPPED
        self.count -= len(pfns)
        for pfn in [pfn for pfn in self._waiting if self._state[pfn] >= READY]:
            verdict.answer += self._waiting.pop(pfn)
        return verdict

    @property
    def waiting(self) -> int:
        """Requests that are unanswered."""
        return sum(len(requests) for requests in self._waiting.values())

    def _drop(self, pfn: int) -> None:
        self._state[pfn] = DROPPED
        self.count -= 1
