# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's memory before the guest runs: precopied pages are written, and missing pages are
evicted.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import numpy as np

from migrate.protocol.messages import Pages
from migrate.protocol.pfns import pieces
from xenbackend.contract import Domain
from xenbackend.errors import XenError
from xenbackend.pages import PfnArray

EVICT_BATCH = 65536


class FrameLimit:
    """The number of frames that the domain may have, until all of the guest's memory is here.

    The domain was made with the limit from before the copy.  The guest may have grown since, or
    ``xl mem-set`` may have lowered the limit.  The guest cannot obey a lower limit before it has
    the pages that it has to give away.

    ``raised``: the toolstack's limit and ours, as a predecessor noted them; 0: none.  ``note`` is
    called with them before a limit is set, and may raise ``MigrationError``.
    """

    def __init__(
        self, domain: Domain, raised: tuple[int, int], note: Callable[[tuple[int, int]], None]
    ):
        self._domain = domain
        self._found, self._set = raised
        self._note = note
        self._lock = threading.Lock()

    def make_room(self, more: int) -> bool:
        """Raise the limit so that the domain can have ``more`` frames, and the frames of its
        missing pages.  Returns whether the limit was too low.
        """
        with self._lock:
            frames = self._domain.reservation()
            if frames.tot_pages + more <= frames.max_pages:
                return False
            if frames.max_pages != self._set:
                self._found = frames.max_pages
            self._set = frames.tot_pages + max(more, frames.paged_pages)
            self._note((self._found, self._set))
            self._domain.set_max_pages(self._set)
            return True

    def give_back(self) -> None:
        """Restore the toolstack's limit, unless the toolstack has set another one since.  A domain
        that has more frames keeps them.
        """
        with self._lock:
            if self._set and self._domain.reservation().max_pages == self._set:
                self._domain.set_max_pages(self._found)


class MemoryRestorer:
    """The memory of an incoming domain, with the state of each pfn.  Calls block: run them in a
    thread.
    """

    def __init__(self, domain: Domain, limit: FrameLimit, max_pages: int):
        self._domain = domain
        self._limit = limit
        self._max_pages = max_pages
        self._populated = np.zeros(domain.nr_pfns, dtype=np.bool_)
        self._evicted = np.zeros(domain.nr_pfns, dtype=np.bool_)

    def pages(self, message: Pages, payload: memoryview) -> None:
        """Put the pages of a message in place.  Raises ``XenError``."""
        if len(message.holes):
            self._make_holes(message.holes)
        for pfns, data in ((message.pfns, payload), (message.zeros, None)):
            self._populate(pfns)
            self._domain.write_pages(pfns, data)

    def evict(self, pfns: PfnArray) -> None:
        """Make the pfns absent (invariant 3): their contents come after the handover.  Raises
        ``XenError``.
        """
        freed = 0
        for batch in pieces(pfns[~self._evicted[pfns]], EVICT_BATCH):
            self._domain.populate_evicted(batch)
            freed += int(np.count_nonzero(self._populated[batch]))
            self._evicted[batch] = True
            self._populated[batch] = False
        if freed:
            self._domain.reserve(self._max_pages)  # no other domain may take the freed frames

    def _populate(self, pfns: PfnArray) -> None:
        """Populate the pfns that have no memory.  A paged-out pfn gets memory as a hole does."""
        new = pfns[~self._populated[pfns]]
        try:
            self._domain.populate(new)
        except XenError as error:
            rest = new[error.done :]
            if error.errno != errno.ENOMEM or not self._limit.make_room(len(rest)):
                raise
            self._domain.populate(rest)
        self._populated[new] = True
        self._evicted[new] = False

    def _make_holes(self, pfns: PfnArray) -> None:
        self._populate(pfns[self._evicted[pfns]])
        there = pfns[self._populated[pfns]]
        self._domain.depopulate(there)
        self._populated[there] = False
