# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that the destination lacks after the handover, as the sender sees them.  Sans-IO, and
safe to be used by the event loop and the fault server's thread at once.

Each page goes ``UNSENT -> SENT -> PULLED -> DONE``, or passes over some of these.  A page is SENT
when it was chosen for the push or for the read-ahead, and PULLED when it is sent on the pull lane.
A page is DONE when the receiver has loaded it or does not need it any more, and is kept until then
(invariant 6).  If a vCPU waits for a SENT page, which may still be among the pushed megabytes, the
page is sent once more on the pull lane and arrives first.  A PULLED page is not sent again, because
it precedes everything that is sent on that lane now.  When the link was lost, the pages in transit
are lost with it.  The receiver then reports what it lacks, and those pages are UNSENT again.

Pages are pushed in ascending order from a cursor.  Every fault moves the cursor, because the guest
will most probably touch pages near the page that it touched last.  The memory of emulated devices
is pushed first, because the device model maps it before the guest runs.  Pages that back ends had
mapped at the source follow, because back ends will probably need them at once, and fail a request
after half a minute without its page.

The steps that faults take are in C, for the fast path as well
(``migrate/fastpath/page_states.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migrate.errors import RemoteProtocolError
from migrate.fastpath.page_states import (
    BLOCK,
    DONE,
    NOT_MISSING,
    PULLED,
    SENT,
    UNSENT,
    SourcePages,
)
from migrate.protocol.pfns import NO_PFNS, PfnMask, from_mask, union
from xenbackend.pages import PfnArray


class Backlog:
    """The missing pages of one guest.  ``missing``: the pfns that are announced as missing.  The
    object takes the mask over.  ``first``: pfns to push before all others, in this order, if they
    are missing; a pfn may be there twice.
    """

    def __init__(self, missing: PfnMask, first: PfnArray = NO_PFNS):
        self.pages = SourcePages(missing)
        self._first = first
        self._state, self._left, self._lock = self.pages.state, self.pages.left, self.pages.lock
        self.unacknowledged = self.unsent

    @property
    def unsent(self) -> int:
        return self.pages.unsent

    @property
    def in_transit(self) -> int:
        """The number of pages that were sent and are not acknowledged."""
        return self.unacknowledged - self.unsent

    @property
    def has_first(self) -> bool:
        """Whether pages that precede all others are unsent."""
        return bool((self._state[self._first] == UNSENT).any())

    # ---- before the handover ----
    def are_missing(self, pfns: PfnArray) -> NDArray[np.bool_]:
        missing: NDArray[np.bool_] = self._state[pfns] != NOT_MISSING
        return missing

    def add(self, pfns: PfnArray) -> None:
        """Add pages that are not among the missing ones."""
        self._state[pfns] = UNSENT
        self._count(pfns, 1)
        self.unacknowledged = self.unsent

    def remove(self, pfns: PfnArray) -> None:
        """Remove missing pages that have been sent, or that have no memory any more."""
        self._state[pfns] = NOT_MISSING
        self._count(pfns, -1)
        self.unacknowledged = self.unsent

    def _count(self, pfns: PfnArray, change: int) -> None:
        if len(pfns):
            blocks = (pfns // BLOCK).astype(np.int64)
            counts = np.bincount(blocks - blocks[0])
            self._left[blocks[0] : blocks[0] + len(counts)] += change * counts
            self.pages.unsent += change * len(pfns)

    # ---- what is to be sent ----
    def next_batch(self, most: int) -> PfnArray:
        """Return up to ``most`` pages to push, and make them SENT; empty if none is left."""
        with self._lock:
            if not self.unsent:
                return NO_PFNS
            cursor = self.pages.cursor
            self._first = self._first[self._state[self._first] == UNSENT]
            if len(batch := union([self._first[:most]])):
                self.pages.sent(batch)
                self.pages.cursor = cursor
                return batch
            batch = self._behind_the_cursor(most)
            if not len(batch):
                self.pages.cursor = 0
                batch = self._behind_the_cursor(most)
            self.pages.sent(batch)
        return batch

    def _behind_the_cursor(self, most: int) -> PfnArray:
        """Return unsent pages between the cursor and the end, because a batch is ascending."""
        cursor = self.pages.cursor
        first, found, count = cursor // BLOCK, [], 0
        for block in np.flatnonzero(self._left[first:])[:most].tolist():
            at = max((first + block) * BLOCK, cursor)
            found.append(
                from_mask(self._state[at : (first + block + 1) * BLOCK] == UNSENT, at)[
                    : most - count
                ]
            )
            count += len(found[-1])
            if count == most:
                break
        return np.concatenate(found) if found else NO_PFNS

    def batches(self, most: int) -> Iterator[PfnArray]:
        """Yield all unsent pages in batches.  Each batch is chosen when it is requested."""
        while len(batch := self.next_batch(most)):
            yield batch

    def fault(self, pfns: PfnArray) -> PfnArray:
        """Return which of these pages, for which vCPUs wait, must be sent on the pull lane now.

        A page that is DONE was acknowledged before the fault arrived.  Raises
        :class:`RemoteProtocolError` for a pfn that was never missing.
        """
        with self._lock:
            wanted, wrong = self.pages.fault(pfns)
        if wrong is not None:
            raise RemoteProtocolError(f"fault: pfn {wrong:#x} is not outstanding")
        return pfns[wanted]

    def ahead(self, pfns: PfnArray) -> PfnArray:
        """Return the pages of a read-ahead that are not sent yet, and make them SENT.  The push
        continues after them.
        """
        with self._lock:
            wanted: PfnArray = pfns[self._state[pfns] == UNSENT]
            self.pages.sent(wanted)
        return wanted

    def pull(self, pfns: PfnArray) -> PfnArray:
        """Return which of these pages, which were read ahead, are still to be sent on the pull lane
        now: no fault has had them sent meanwhile.
        """
        with self._lock:
            wanted: PfnArray = pfns[self._state[pfns] == SENT]
            self._state[wanted] = PULLED
        return wanted

    def loaded(self, pfns: PfnArray) -> None:
        """Note that the receiver has loaded these pages.  Raises :class:`RemoteProtocolError` for a
        page that was not sent, or was acknowledged before.
        """
        with self._lock:
            states = self._state[pfns]
            in_transit = (states == SENT) | (states == PULLED)
            if not in_transit.all():
                raise RemoteProtocolError(
                    f"loaded: pfn {int(pfns[~in_transit][0]):#x} was not in transit"
                )
            self._done(pfns)

    def dropped(self, pfns: PfnArray) -> None:
        """Note that the receiver does not need these pages.  Raises :class:`RemoteProtocolError`
        for a page that was never missing or was acknowledged before.
        """
        with self._lock:
            states = self._state[pfns]
            if np.any((states == NOT_MISSING) | (states == DONE)):
                raise RemoteProtocolError("dropped: a pfn that is not outstanding")
            self._count(pfns[states == UNSENT], -1)
            self._done(pfns)

    def rejoin(self, outstanding: PfnMask) -> PfnArray:
        """Note all pages that the receiver lacks.  Returns the pages that are therefore DONE.

        Raises :class:`RemoteProtocolError` for a page that the receiver has confirmed, or that was
        never missing.
        """
        with self._lock:
            wrong = outstanding & ((self._state == NOT_MISSING) | (self._state == DONE))
            if wrong.any():
                raise RemoteProtocolError(
                    f"outstanding: pfn {int(np.argmax(wrong)):#x} is not outstanding"
                )
            done = from_mask(~outstanding & (self._state != NOT_MISSING) & (self._state != DONE))
            self._state[done] = DONE
            self._state[outstanding] = UNSENT
            self._left[:] = np.add.reduceat(
                outstanding, np.arange(0, len(outstanding), BLOCK), dtype=np.int64
            )
            self.pages.unsent = self.unacknowledged = int(self._left.sum())
        return done

    def is_done(self, pfns: PfnArray) -> NDArray[np.bool_]:
        with self._lock:
            done: NDArray[np.bool_] = self._state[pfns] == DONE
        return done

    def _done(self, pfns: PfnArray) -> None:
        self._state[pfns] = DONE
        self.unacknowledged -= len(pfns)
