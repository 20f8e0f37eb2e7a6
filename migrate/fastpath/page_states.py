# SPDX-License-Identifier: GPL-2.0-or-later
"""The states of pages at either end, in memory that both languages use.

Every step that the fast path and the slow path have in common is a function in C
(``native/page_states.h``), and the methods here call these functions.  Python owns the arrays, for
steps that concern many pages at a time.  The caller of a method holds the lock of the pages, unless
no other thread uses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from migrate.fastpath._fault import ffi, lib
from migrate.fastpath.lock import NativeLock
from migrate.protocol.pfns import PfnMask, pfn_array
from xenbackend.pages import PfnArray
from xenbackend.ring import PagingRequest, PagingRing, paging_request

NOT_MISSING, UNSENT = lib.PAGE_NOT_MISSING, lib.PAGE_UNSENT
SENT, PULLED, DONE = lib.PAGE_SENT, lib.PAGE_PULLED, lib.PAGE_DONE
BLOCK: int = lib.PAGE_BLOCK
"""The number of pfns whose unsent pages are counted together."""

PRESENT, OUTSTANDING = lib.PAGE_PRESENT, lib.PAGE_OUTSTANDING
REQUESTED, LOADING = lib.PAGE_REQUESTED, lib.PAGE_LOADING
READY, DROPPED = lib.PAGE_READY, lib.PAGE_DROPPED

Waiting = tuple[PagingRequest, float]
"""A request of the ring, and the time at which it was made (monotonic seconds)."""


def _list(pfns: PfnArray) -> Any:
    return ffi.from_buffer("uint64_t[]", np.ascontiguousarray(pfns, dtype=np.uint64))


def _array(native: Any, count: int) -> PfnArray:
    return pfn_array(ffi.unpack(native, count))


def _waiting(native: Any, count: int) -> list[Waiting]:
    return [(paging_request(waiting.request), waiting.since) for waiting in native[0:count]]


class SourcePages:
    """The sender's pages: ``struct source_pages``.  The object takes ``missing`` over, and the
    caller must not use it afterwards.
    """

    def __init__(self, missing: PfnMask):
        self.lock = NativeLock()
        self.state = missing.view(np.uint8)  # False: NOT_MISSING, True: UNSENT
        self.left = np.array(
            [np.count_nonzero(missing[at : at + BLOCK]) for at in range(0, len(missing), BLOCK)],
            dtype=np.int64,
        )
        """The number of unsent pages of each block."""
        state = ffi.from_buffer("uint8_t[]", self.state, require_writable=True)
        left = ffi.from_buffer("int64_t[]", self.left)
        self._keep = state, left
        self.native = ffi.new(
            "struct source_pages *",
            {
                "lock": self.lock.native,
                "state": state,
                "nr_pfns": len(missing),
                "left": left,
                "unsent": int(self.left.sum()),
            },
        )

    @property
    def unsent(self) -> int:
        return int(self.native.unsent)

    @unsent.setter
    def unsent(self, count: int) -> None:
        self.native.unsent = count

    @property
    def cursor(self) -> int:
        """The pfn from which pages are pushed next."""
        return int(self.native.cursor)

    @cursor.setter
    def cursor(self, pfn: int) -> None:
        self.native.cursor = pfn

    def sent(self, pfns: PfnArray) -> None:
        lib.source_sent(self.native, _list(pfns), len(pfns))

    def fault(self, pfns: PfnArray) -> tuple[PfnMask, int | None]:
        """Return which pages must be sent now; or the first pfn that was never missing."""
        wanted = np.empty(len(pfns), dtype=np.bool_)
        into = ffi.from_buffer("uint8_t[]", wanted)
        count = lib.source_fault(self.native, _list(pfns), len(pfns), into)
        return wanted, None if count == len(pfns) else int(pfns[count])


class RequestActions(NamedTuple):
    """What the caller has to do after requests of the ring: ``struct page_actions``."""

    answer: list[Waiting]
    ask: PfnArray
    touched: list[int]
    dropped: PfnArray


class DestinationPages:
    """The receiver's pages: ``struct destination_pages``, which has the one table of waiting
    requests.
    """

    def __init__(self, nr_pfns: int):
        self.lock = NativeLock()
        """The lock of the states, of the table, and of the ring."""
        self.state: NDArray[np.uint8] = np.zeros(nr_pfns, dtype=np.uint8)
        self._keep = ffi.from_buffer("uint8_t[]", self.state)
        self.native = ffi.new(
            "struct destination_pages *",
            {"lock": self.lock.native, "state": self._keep, "nr_pfns": nr_pfns},
        )
        self._actions = ffi.new("struct page_actions *")

    def requests(self, requests: list[PagingRequest], now: float) -> RequestActions:
        """Handle requests of the ring.  Raises ``XenError`` (EPROTO) if they are more than a ring
        can have open.
        """
        actions, batch = self._actions, ffi.new("struct ring_request[]", requests)
        PagingRing.check(lib.destination_requests(self.native, batch, len(requests), now, actions))
        return RequestActions(
            _waiting(actions.answer, actions.nr_answers),
            _array(actions.ask, actions.nr_ask),
            ffi.unpack(actions.touched, actions.nr_touched),
            _array(actions.dropped, actions.nr_dropped),
        )

    def claim(self, pfns: PfnArray) -> tuple[PfnMask, int | None]:
        """Return which pages must be loaded; or the first pfn that was never missing."""
        wanted = np.empty(len(pfns), dtype=np.bool_)
        into = ffi.from_buffer("uint8_t[]", wanted)
        count = lib.destination_claim(self.native, _list(pfns), len(pfns), into)
        return wanted, None if count == len(pfns) else int(pfns[count])

    def unclaim(self, pfns: PfnArray) -> None:
        lib.destination_unclaim(self.native, _list(pfns), len(pfns))

    def finish(self, pfns: PfnArray, results: NDArray[np.int32]) -> list[Waiting]:
        """Note that claimed pages were loaded or given away.  Returns the requests to answer."""
        given = ffi.from_buffer("int32_t[]", np.ascontiguousarray(results, dtype=np.int32))
        lib.destination_finish(self.native, _list(pfns), given, len(pfns), self._actions)
        return _waiting(self._actions.answer, self._actions.nr_answers)

    @property
    def nr_waiting(self) -> int:
        """The number of requests that are not answered."""
        return int(self.native.nr_waiting)

    def waits_since(self) -> float | None:
        """Return the time of the oldest request for which a vCPU waits; ``None`` if none does."""
        waiting = _waiting(self.native.waiting, self.nr_waiting)
        return min((since for request, since in waiting if request.vcpu_waits), default=None)

    def waits_s(self, now: float) -> dict[int, float]:
        """Return for how many seconds each vCPU has been waiting that waits now."""
        waiting = _waiting(self.native.waiting, self.nr_waiting)
        return {
            request.vcpu: max(now - since, 0.0) for request, since in waiting if request.vcpu_waits
        }

    def requested(self) -> PfnArray:
        """The pages for which vCPUs wait and which are not being loaded, ascending."""
        waiting = self.native.waiting[0 : self.nr_waiting]
        pfns = {w.request.gfn for w in waiting if self.state[w.request.gfn] == REQUESTED}
        return pfn_array(sorted(pfns))
