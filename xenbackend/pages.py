# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages: their size, their numbers (pfns), what is found at a pfn, and pages for native code."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from xenbackend.errors import XenError

PAGE_SIZE = 4096
"""The number of bytes of a page (XC_PAGE_SIZE)."""
PfnArray = NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview


class PageStatus(IntEnum):
    """What ``Domain.map_pages`` found at a pfn."""

    DATA = 0
    ZERO = 1
    HOLE = 2
    """The pfn has no frame, or a frame that is not memory (mmio)."""
    PAGED = 3
    """The page is paged out at this host; its contents are elsewhere."""
    BROKEN = 4


class MappedPages:
    """Pages of a domain, to be read in place; a context manager that ends the mapping.

    ``status`` has a :class:`PageStatus` for each pfn.  ``data`` has the DATA pages in their order,
    in as few pieces of memory as possible, each of whole pages.  A running guest writes to the
    pages meanwhile.  Nothing of ``data`` may be touched after the end.
    """

    def __init__(self, status: NDArray[np.uint8], data: list[memoryview]):
        self.status = status
        self.data = data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Do nothing, because a backend may have the whole memory mapped for good."""


@dataclass(frozen=True)
class NativePages:
    """Addresses of the calls by which native code looks at one page of a domain and loads one page.

    The addresses are valid for as long as the ``Domain`` is open.  Each call of
    ``Domain.native_pages`` returns the same addresses, because the keeper has those of an earlier
    call.

    ``look`` is ``int (void *domain, uint64_t pfn, const void **page)`` and returns a
    :class:`PageStatus`.  A DATA page can be read at ``*page`` until ``looked`` is called.
    ``looked`` is ``void (void *domain, const void *page)``, or 0 if there is nothing to call.
    ``load`` is ``int (void *domain, uint64_t pfn, const void *page)``, one page's ``Domain.load``.
    """

    domain: int
    look: int
    looked: int
    load: int


def batch_error(operation: str, number: int, pfns: PfnArray, done: int) -> XenError:
    """Return the error of a batch that stopped after ``done`` pfns.

    If there is no ring, the batch was not begun, and the error has no pfn.
    """
    pfn = None if number == errno.ENODEV else int(pfns[done])
    return XenError(operation, number, pfn=pfn, done=done)


def page_bytes(pages: Buffer, count: int) -> NDArray[np.uint8]:
    """Return the pages as an array for native code.

    Raises ``ValueError`` if the buffer has fewer than ``count`` pages, because native code would
    read beyond its end.

    A memoryview cannot be used instead.  The traceback of a failed call puts the memoryview into a
    reference cycle.  Python's garbage collector then clears the memoryview although native code
    still has its buffer, and the process dies (CPython 3.11).
    """
    if len(pages) < count * PAGE_SIZE:
        raise ValueError(f"{len(pages)} bytes are not {count} pages")
    return np.frombuffer(pages, dtype=np.uint8)
