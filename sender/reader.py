"""Pages out of the source domain and into messages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from migrate.errors import MigrationError
from migrate.messages import Pages
from migrate.pfns import WINDOW_PFNS, PfnMask, from_mask
from xenbackend.contract import PAGE_SIZE, Domain, PageStatus, PfnArray


class PageReader:
    """One buffer, used again for each batch: a message is to be sent before the next is read."""

    def __init__(self, domain: Domain, batch_pages: int):
        self._domain = domain
        self._buffer = memoryview(bytearray(batch_pages * PAGE_SIZE))

    def read(self, pfns: PfnArray) -> tuple[Pages, memoryview]:
        """Blocks for the copying.  Raises :class:`MigrationError` for pages that cannot be read at this host."""
        status = self._domain.read_pages(pfns, self._buffer)
        if not status.any():  # PageStatus.DATA throughout
            return Pages(pfns), self._buffer[: len(pfns) * PAGE_SIZE]
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


def batches_of(mask: PfnMask, batch_pages: int) -> Iterator[PfnArray]:
    """The set in ascending batches, looked at window by window."""
    for base in range(0, len(mask), WINDOW_PFNS):
        pfns = from_mask(mask[base : base + WINDOW_PFNS], base)
        for at in range(0, len(pfns), batch_pages):
            yield pfns[at : at + batch_pages]
