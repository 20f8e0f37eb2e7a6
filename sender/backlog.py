"""The pages that the destination lacks after the handover, as the sender sees them.  Sans-IO, and
safe to be used by the event loop and the fault server's thread at once.

Each goes ``UNSENT -> SENT -> DONE``; DONE when the receiver has it loaded, or does not want it any more.  A page
is kept until then (invariant 6), so a SENT one can be sent again: when a vCPU waits for a page that is still
somewhere among the pushed megabytes, it is sent once more on the pull lane and comes first.

Background pages go out in ascending order from a cursor which every fault moves: what the guest touched
last says best what it touches next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migrate.errors import RemoteProtocolError
from migrate.pfns import PfnMask, from_mask, pfn_array
from xenbackend.contract import PfnArray

NOT_OURS, UNSENT, SENT, DONE = range(4)
SCAN = 4096
"""pfns that are looked at together for unsent ones."""


class Backlog:
    """``missing``: the pfns that were announced as missing, ``count`` of them.  It belongs to this object from then on."""

    def __init__(self, missing: PfnMask, count: int):
        self._state = missing.view(np.uint8)  # False: NOT_OURS, True: UNSENT
        self.unsent = count
        self.unacknowledged = self.unsent
        self._cursor = 0
        self._lock = threading.Lock()

    def next_batch(self, most: int) -> PfnArray:
        """Up to ``most`` pages to push, now SENT; empty when there are none left."""
        with self._lock:
            return self._next_batch(most)

    def _next_batch(self, most: int) -> PfnArray:
        nr_pfns = len(self._state)
        batch = np.empty(0, dtype=np.uint64)
        if not self.unsent:
            return batch
        scanned = 0
        while len(batch) < most and scanned <= nr_pfns:
            end = min(self._cursor + SCAN, nr_pfns)
            found = from_mask(self._state[self._cursor : end] == UNSENT, self._cursor)[: most - len(batch)]
            batch = np.concatenate((batch, found))
            scanned += end - self._cursor
            if len(batch) == most:
                end = int(batch[-1]) + 1
            self._cursor = end
            if end == nr_pfns:
                self._cursor = 0
                if len(batch):
                    break  # a batch is ascending: it does not go round the end
        self._state[batch] = SENT
        self.unsent -= len(batch)
        return batch

    def batches(self, most: int) -> Iterator[PfnArray]:
        """All that is unsent, each batch chosen when it is asked for."""
        while len(batch := self.next_batch(most)):
            yield batch

    def fault(self, pfns: PfnArray) -> PfnArray:
        """vCPUs wait for these; returns those to send now.

        One that is DONE had crossed the fault.  Raises :class:`RemoteProtocolError` for a pfn that was never missing.
        """
        wanted = []
        with self._lock:
            for pfn in pfns.tolist():  # a few: element by element is quicker than array by array
                state = self._state[pfn]
                if state == NOT_OURS:
                    raise RemoteProtocolError(f"fault: pfn {pfn:#x} is not outstanding")
                if state == DONE:
                    continue
                self.unsent -= int(state == UNSENT)
                self._state[pfn] = SENT
                self._cursor = (pfn + 1) % len(self._state)
                wanted.append(pfn)
        return pfn_array(wanted) if len(wanted) < len(pfns) else pfns

    def ahead(self, pfns: PfnArray) -> PfnArray:
        """These may be needed soon: returns those to send, and the push goes on behind them."""
        with self._lock:
            wanted: PfnArray = pfns[self._state[pfns] == UNSENT]
            if len(wanted):
                self._state[wanted] = SENT
                self.unsent -= len(wanted)
                self._cursor = (int(wanted[-1]) + 1) % len(self._state)
        return wanted

    def loaded(self, pfns: PfnArray) -> None:
        """Raises :class:`RemoteProtocolError` for a page that was not sent, or was acknowledged before."""
        with self._lock:
            states = self._state[pfns]
            if np.any(states != SENT):
                raise RemoteProtocolError(f"loaded: pfn {int(pfns[states != SENT][0]):#x} was not on its way")
            self._done(pfns)

    def dropped(self, pfns: PfnArray) -> None:
        """Raises :class:`RemoteProtocolError` for a page that is not the receiver's to drop."""
        with self._lock:
            states = self._state[pfns]
            if np.any((states == NOT_OURS) | (states == DONE)):
                raise RemoteProtocolError("dropped: a pfn that is not outstanding")
            self.unsent -= int(np.count_nonzero(states == UNSENT))
            self._done(pfns)

    def is_done(self, pfns: PfnArray) -> NDArray[np.bool_]:
        with self._lock:
            done: NDArray[np.bool_] = self._state[pfns] == DONE
        return done

    def _done(self, pfns: PfnArray) -> None:
        self._state[pfns] = DONE
        self.unacknowledged -= len(pfns)
