"""Pages out of the source domain and into messages."""

from __future__ import annotations

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import MigrationError
from migrate.messages import Pages
from xenbackend.contract import PAGE_SIZE, Domain, PageStatus, PfnArray


class PageReader:
    """One buffer, used again for each batch: a message is to be sent before the next is read."""

    def __init__(self, domain: Domain, batch_pages: int):
        self._domain = domain
        self._buffer = memoryview(bytearray(batch_pages * PAGE_SIZE))

    async def read(self, pfns: PfnArray) -> tuple[Pages, memoryview]:
        """In a thread.  Raises :class:`MigrationError` for pages that cannot be read at this host."""
        return self._message(pfns, await trio.to_thread.run_sync(self._domain.read_pages, pfns, self._buffer))

    def read_now(self, pfns: PfnArray) -> tuple[Pages, memoryview]:
        """The same, blocking: for a few pages, or in a thread of one's own."""
        return self._message(pfns, self._domain.read_pages(pfns, self._buffer))

    def _message(self, pfns: PfnArray, status: NDArray[np.uint8]) -> tuple[Pages, memoryview]:
        unreadable = pfns[status >= PageStatus.PAGED]
        if len(unreadable):
            raise MigrationError(
                f"{len(unreadable)} pages of the guest cannot be read (the first is pfn {int(unreadable[0]):#x}): "
                "they are paged out or broken at this host; stop its pager first"
            )
        data = pfns[status == PageStatus.DATA]
        message = Pages(data, zeros=pfns[status == PageStatus.ZERO], holes=pfns[status == PageStatus.HOLE])
        return message, self._buffer[: len(data) * PAGE_SIZE]


def count_pages(message: Pages) -> int:
    return len(message.pfns) + len(message.zeros)


def all_pfns(nr_pfns: int) -> PfnArray:
    return np.arange(nr_pfns, dtype=np.uint64)
