# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that the destination lacks after the handover, as the sender sees them.  Sans-IO, and
safe to be used by the event loop and the fault server's thread at once.

Each goes ``UNSENT -> SENT -> DONE``; DONE when the receiver has it loaded, or does not want it any more.  A page
is kept until then (invariant 6), so a SENT one can be sent again: when a vCPU waits for a page that is still
somewhere among the pushed megabytes, it is sent once more on the pull lane and comes first.  And when the link was lost, and with
it whatever was on its way, the receiver says what it lacks: that is UNSENT again.

Background pages go out in ascending order from a cursor which every fault moves: what the guest touched
last says best what it touches next.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migrate.errors import RemoteProtocolError
from migrate.fastpath.api import FaultAnswerer, NativeLock
from migrate.protocol.pfns import NO_PFNS, PfnMask, from_mask, pfn_array
from xenbackend.pages import NativePages, PfnArray

NOT_OURS, UNSENT, SENT, DONE = range(4)
BLOCK = 4096
"""pfns that are looked at together for unsent ones, if there are any."""


class Backlog:
    """``missing``: the pfns that are announced as missing.  It belongs to this object from then on."""

    def __init__(self, missing: PfnMask):
        self._state = missing.view(np.uint8)  # False: NOT_OURS, True: UNSENT
        self._left = np.array(
            [np.count_nonzero(missing[at : at + BLOCK]) for at in range(0, len(missing), BLOCK)], dtype=np.int64
        )
        """Unsent ones of each block."""
        self._counts = np.array([self._left.sum(), 0], dtype=np.int64)  # unsent, cursor
        self.unacknowledged = self.unsent
        self._lock = NativeLock()

    @property
    def unsent(self) -> int:
        return int(self._counts[0])

    @unsent.setter
    def unsent(self, count: int) -> None:
        self._counts[0] = count

    @property
    def _cursor(self) -> int:
        return int(self._counts[1])

    @_cursor.setter
    def _cursor(self, pfn: int) -> None:
        self._counts[1] = pfn

    def open(self, answerer: FaultAnswerer, pages: NativePages) -> None:
        """It does :meth:`fault` in native code from here on."""
        answerer.open(pages, (self._lock, self._state, self._left, self._counts))

    # ---- before the handover ----
    def are_missing(self, pfns: PfnArray) -> NDArray[np.bool_]:
        missing: NDArray[np.bool_] = self._state[pfns] != NOT_OURS
        return missing

    def add(self, pfns: PfnArray) -> None:
        """These, which are not among them, are missing as well."""
        self._state[pfns] = UNSENT
        self._count(pfns, 1)
        self.unacknowledged = self.unsent

    def remove(self, pfns: PfnArray) -> None:
        """These, which are among them, are not: they have been sent, or are no memory any more."""
        self._state[pfns] = NOT_OURS
        self._count(pfns, -1)
        self.unacknowledged = self.unsent

    def _count(self, pfns: PfnArray, change: int) -> None:
        if len(pfns):
            blocks = (pfns // BLOCK).astype(np.int64)
            counts = np.bincount(blocks - blocks[0])
            self._left[blocks[0] : blocks[0] + len(counts)] += change * counts
            self.unsent += change * len(pfns)

    # ---- what is to be sent ----
    def next_batch(self, most: int) -> PfnArray:
        """Up to ``most`` pages to push, now SENT; empty when there are none left."""
        with self._lock:
            if not self.unsent:
                return NO_PFNS
            batch = self._behind_the_cursor(most)
            if not len(batch):
                self._cursor = 0
                batch = self._behind_the_cursor(most)
            self._sent(batch)
            self._cursor = (int(batch[-1]) + 1) % len(self._state)
        return batch

    def _behind_the_cursor(self, most: int) -> PfnArray:
        """Unsent ones up to the end: a batch is ascending."""
        first, found, count = self._cursor // BLOCK, [], 0
        for block in np.flatnonzero(self._left[first:])[:most].tolist():
            at = max((first + block) * BLOCK, self._cursor)
            found.append(from_mask(self._state[at : (first + block + 1) * BLOCK] == UNSENT, at)[: most - count])
            count += len(found[-1])
            if count == most:
                break
        return np.concatenate(found) if found else NO_PFNS

    def _sent(self, pfns: PfnArray) -> None:
        self._state[pfns] = SENT
        self._count(pfns, -1)

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
                if state == UNSENT:
                    self._state[pfn] = SENT
                    self._left[pfn // BLOCK] -= 1
                    self.unsent -= 1
                self._cursor = (pfn + 1) % len(self._state)
                wanted.append(pfn)
        return pfn_array(wanted) if len(wanted) < len(pfns) else pfns

    def ahead(self, pfns: PfnArray) -> PfnArray:
        """These may be needed soon: returns those to send, and the push goes on behind them."""
        with self._lock:
            wanted: PfnArray = pfns[self._state[pfns] == UNSENT]
            if len(wanted):
                self._sent(wanted)
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
            self._count(pfns[states == UNSENT], -1)
            self._done(pfns)

    def rejoin(self, outstanding: PfnMask) -> PfnArray:
        """All that the receiver lacks; returns those that are DONE by that.

        Raises :class:`RemoteProtocolError` where it lacks what it has confirmed, or was never missing.
        """
        with self._lock:
            wrong = outstanding & ((self._state == NOT_OURS) | (self._state == DONE))
            if wrong.any():
                raise RemoteProtocolError(f"outstanding: pfn {int(np.argmax(wrong)):#x} is not outstanding")
            done = from_mask(~outstanding & (self._state != NOT_OURS) & (self._state != DONE))
            self._state[done] = DONE
            self._state[outstanding] = UNSENT
            self._left[:] = np.add.reduceat(outstanding, np.arange(0, len(outstanding), BLOCK), dtype=np.int64)
            self.unsent = self.unacknowledged = int(self._left.sum())
        return done

    def is_done(self, pfns: PfnArray) -> NDArray[np.bool_]:
        with self._lock:
            done: NDArray[np.bool_] = self._state[pfns] == DONE
        return done

    def _done(self, pfns: PfnArray) -> None:
        self._state[pfns] = DONE
        self.unacknowledged -= len(pfns)
