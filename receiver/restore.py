# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory before the guest runs: precopied pages in, unsent and outdated ones out."""

from __future__ import annotations

import errno

import numpy as np

from migrate.messages import Pages
from migrate.pfns import pieces
from xenbackend.contract import PAGE_SIZE, Domain, PfnArray, XenError

EVICT_BATCH = 65536


class MemoryRestorer:
    """Keeps what each pfn of an incoming domain is.  Calls block: run them in a thread."""

    def __init__(self, domain: Domain):
        self._domain = domain
        self._populated = np.zeros(domain.nr_pfns, dtype=np.bool_)
        self._evicted = np.zeros(domain.nr_pfns, dtype=np.bool_)
        self.limit = 0
        """Of frames, that the domain had; 0: it has it."""

    def pages(self, message: Pages, payload: memoryview) -> None:
        """Raises ``XenError``."""
        if len(message.holes):
            self._make_holes(message.holes)
        for pfns, data in ((message.pfns, payload), (message.zeros, None)):
            self._populate(pfns)
            self._domain.write_pages(pfns, data)

    def make_room(self, more: int) -> bool:
        """Let the domain have so many frames more, if it may not; returns whether that was needed.

        Its limit is from before the guest was copied, and the guest may have grown since (``xl mem-set``).
        """
        frames = self._domain.reservation()
        if frames.tot_pages + more <= frames.max_pages:
            return False
        self.limit = self.limit or frames.max_pages
        self._domain.set_max_pages(frames.tot_pages + more)
        return True

    def evict(self, pfns: PfnArray) -> None:
        """Make the pfns absent (invariant 3): their contents come after the handover.  Raises ``XenError``."""
        for batch in pieces(pfns[~self._evicted[pfns]], EVICT_BATCH):
            self._domain.populate_evicted(batch)
            self._evicted[batch] = True
            self._populated[batch] = False

    def _populate(self, pfns: PfnArray) -> None:
        """Those that are not there.  A paged-out pfn becomes memory like a hole."""
        new = pfns[~self._populated[pfns]]
        try:
            self._domain.populate(new)
        except XenError as error:
            rest = new[error.done :]
            if error.errno != errno.ENOMEM or not self.make_room(len(rest)):
                raise
            self._domain.populate(rest)
        self._populated[new] = True
        self._evicted[new] = False

    def _make_holes(self, pfns: PfnArray) -> None:
        self._populate(pfns[self._evicted[pfns]])
        there = pfns[self._populated[pfns]]
        self._domain.depopulate(there)
        self._populated[there] = False


def select_pages(payload: memoryview, wanted: np.typing.NDArray[np.bool_]) -> memoryview:
    """The wanted ones of a payload's pages, one behind the other."""
    pages = np.frombuffer(payload, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    return pages[wanted].reshape(-1).data
