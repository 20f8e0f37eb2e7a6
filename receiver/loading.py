# SPDX-License-Identifier: GPL-2.0-or-later
"""Load pages that have arrived into the domain, also while the host has no memory for them."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from migrate.logs import Complaint
from migrate.units import pauses
from xenbackend.contract import Domain
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE, Buffer, PfnArray

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 2.0
"""The first and the longest pause between attempts to load pages for which the host has no memory.
Each pause is twice as long as the one before it.
"""


def select_pages(payload: memoryview, wanted: NDArray[np.bool_]) -> memoryview:
    """Copy the wanted pages of ``payload``, one after the other.

    ``wanted`` has one element for each page of ``payload``.
    """
    pages = np.frombuffer(payload, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    return pages[wanted].reshape(-1).data


def load(
    domain: Domain,
    pfns: PfnArray,
    pages: Buffer | None,
    make_room: Callable[[int], bool] = lambda _pages: False,
) -> NDArray[np.int32]:
    """Load pages as ``Domain.load`` does.  Raises ``XenError``, except for a page that the guest
    gave away and for a shortage of memory.

    ``make_room`` raises the domain's limit by a number of pages.  It returns whether the limit was
    too low.
    """
    results = domain.load(pfns, pages)
    if np.count_nonzero(short := results == -errno.ENOMEM) and make_room(
        int(np.count_nonzero(short))
    ):
        wanted = None if pages is None else select_pages(memoryview(pages), short)
        results[short] = domain.load(pfns[short], wanted)
    if np.count_nonzero(results):
        failed = np.flatnonzero(~np.isin(results, (0, -errno.ENOENT, -errno.ENOMEM)))
        if len(failed):
            raise XenError("mem_paging_load", -int(results[failed[0]]), pfn=int(pfns[failed[0]]))
    return results


def retries() -> Iterator[float]:
    """Return the pauses between attempts, in seconds, without end."""
    return pauses(FIRST_RETRY_S, LAST_RETRY_S, growth=2)


class Shortage:
    """How one thread waits while the host has no memory for pages that have arrived."""

    def __init__(self) -> None:
        self.pages = 0
        """The number of pages that wait for memory."""
        self._pauses = retries()
        self._complaint = Complaint(log.warning)

    def pause(self, pages: int) -> float:
        """Note that ``pages`` pages wait.  Returns the seconds until the next attempt."""
        if not self.pages:
            self._complaint.log(
                "the host has no memory for %d pages that have arrived: trying again until it has",
                pages,
            )
        self.pages = pages
        return next(self._pauses)

    def over(self) -> None:
        """Note that no page waits any more."""
        self.pages, self._pauses = 0, retries()
