# SPDX-License-Identifier: GPL-2.0-or-later
"""Mapped pages of a domain: for one read, and kept so that their contents outlive the domain.

Xen keeps a frame for as long as it is mapped anywhere, also after its domain was destroyed.  The
domain then stays as a nameless remnant, and no new mapping of it can be made.  A page is found by
its slot, a number of 32 bits.  Slots are mapped together in chunks.  A chunk is unmapped when none
of its slots is needed and no thread reads from it.

The keeper (``xenbackend/keeper.py``) finds pages by the same tables when this process has been
killed.  So a slot is set only when every table through which its page is found is complete, and is
cleared before its page is unmapped; and the end of the interpreter does not free the tables.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xenbackend._keeper import lib as keeper
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.pages import PAGE_SIZE, MappedPages, PageStatus, PfnArray

CHUNK_PAGES: int = lib.CHUNK_PAGES
"""The number of pages in one mapping, and thus in one hypercall.  Pages that are released one by
one are unmapped in chunks.
"""
NONE = np.uint32(lib.NOT_HELD)


@dataclass
class _Chunk:
    view: Any
    pfns: NDArray[Any]
    needed: int
    """The number of its slots that are not released."""
    users: int = 0


class HeldPages:
    """The held pages of a domain with ``nr_pfns`` pfns.  Several threads may use the object."""

    def __init__(self, host: Any, domid: int, nr_pfns: int):
        self._host, self._domid = host, domid
        self._tables: list[tuple[Any, int]] = []
        self._slot: NDArray[np.uint32] = self._table(nr_pfns, np.uint32)
        self._slot[:] = NONE
        self._small = np.min_scalar_type(nr_pfns)
        self._holds = np.zeros(nr_pfns, dtype=np.uint8)
        self._chunks: dict[int, _Chunk] = {}
        self._address: NDArray[np.uint64] = self._table(64, np.uint64)
        """The address of each chunk, by the chunk's number."""
        self._count = 0
        self._idle: list[int] = []
        """Chunks that are not needed any more, but of which native code may be reading a page."""
        self.native = ffi.cast("struct xen_held *", self._memory(ffi.sizeof("struct xen_held")))
        """The structure by which native code finds pages."""
        self.native.slot = self._pointer(self._slot)
        self.native.address = self._pointer(self._address)
        self._lock = threading.Lock()

    def _memory(self, size: int) -> Any:
        table = keeper.table_new(size)
        if table == ffi.NULL:
            raise MemoryError
        self._tables.append((table, size))
        return table

    def _table(self, count: int, dtype: type) -> NDArray[Any]:
        size = max(count, 1) * np.dtype(dtype).itemsize
        return np.frombuffer(ffi.buffer(self._memory(size), size), dtype=dtype)[:count]

    @staticmethod
    def _pointer(array: NDArray[Any]) -> Any:
        return ffi.cast("void *", array.ctypes.data)

    def holds(self, pfns: PfnArray) -> NDArray[np.uint8]:
        """Return how often each pfn is mapped here."""
        counts: NDArray[np.uint8] = self._holds[pfns]
        return counts

    def add(self, pfns: PfnArray) -> int:
        """Hold pfns.  Returns 0 or -errno; -EIO if a page is memory that cannot be read here.
        Holes are skipped.
        """
        for at in range(0, len(pfns), CHUNK_PAGES):
            batch = pfns[at : at + CHUNK_PAGES]
            status = np.empty(len(batch), dtype=np.uint8)
            pages, view = ffi.new("const void *[]", len(batch)), ffi.new("struct xen_view *")
            gfns = ffi.from_buffer("uint64_t[]", np.ascontiguousarray(batch))
            rc = lib.xen_map(
                self._host,
                self._domid,
                gfns,
                len(batch),
                ffi.from_buffer("uint8_t[]", status),
                pages,
                view,
            )
            if rc or (status >= PageStatus.PAGED).any():
                lib.xen_unmap(self._host, view)
                return int(rc) or -errno.EIO
            there = status == PageStatus.DATA
            addresses = np.frombuffer(ffi.buffer(pages), dtype=np.uint64)[there]
            with self._lock:
                self._forget(batch[self._slot[batch] != NONE])
                if not len(addresses):
                    continue
                base = int(ffi.cast("uintptr_t", view.address))
                number = self._new_chunk(
                    base, _Chunk(view, batch[there].astype(self._small), len(addresses))
                )
                slots = (addresses - np.uint64(base)) // PAGE_SIZE + np.uint64(number * CHUNK_PAGES)
                self._slot[batch[there]] = slots.astype(np.uint32)
                self._holds[batch[there]] += 1
        return 0

    def _new_chunk(self, address: int, chunk: _Chunk) -> int:
        number, self._count = self._count, self._count + 1
        if number == len(self._address):
            outgrown = self._address  # native code may be reading there
            self._address = self._table(2 * number, np.uint64)
            self._address[:number] = outgrown
            self.native.address = self._pointer(self._address)
        self._address[number] = address
        self._chunks[number] = chunk
        return number

    def release(self, pfns: PfnArray) -> None:
        """Release pfns.  Pfns that are not held are skipped."""
        with self._lock:
            self._forget(pfns[self._slot[pfns] != NONE])

    def use(
        self, pfns: PfnArray, addresses: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], list[int]]:
        """Put the address of each held pfn into ``addresses``.

        Returns which pfns are held, and the argument for :meth:`used`, which the caller calls when
        it does not read them any more.
        """
        with self._lock:
            slots = self._slot[pfns]
            there: NDArray[np.bool_] = slots != NONE
            slots = slots[there]
            numbers = slots // CHUNK_PAGES
            addresses[there] = self._address[numbers] + (slots % CHUNK_PAGES).astype(
                np.uint64
            ) * np.uint64(PAGE_SIZE)
            used: list[int] = sorted(set(numbers.tolist()))
            for number in used:
                self._chunks[number].users += 1
        return there, used

    def used(self, numbers: list[int]) -> None:
        with self._lock:
            for number in numbers:
                self._chunks[number].users -= 1
                self._unmap_if_idle(number)

    def close(self) -> None:
        """Unmap all pages.  The object is not used afterwards."""
        for chunk in self._chunks.values():
            lib.xen_unmap(self._host, chunk.view)
        del self._slot, self._address
        for table, size in self._tables:
            keeper.table_free(table, size)

    def _forget(self, pfns: PfnArray) -> None:
        idle, self._idle = self._idle, []
        for number in idle:
            self._unmap_if_idle(number)
        counts = Counter((self._slot[pfns] // CHUNK_PAGES).tolist())
        self._slot[pfns] = NONE
        for number, count in counts.items():
            self._chunks[number].needed -= count
            self._unmap_if_idle(number)

    def _unmap_if_idle(self, number: int) -> None:
        chunk = self._chunks[number]
        if chunk.needed or chunk.users:
            return
        if not lib.xen_held_idle(self.native):
            self._idle.append(number)
        else:
            lib.xen_unmap(self._host, chunk.view)
            self._holds[chunk.pfns] -= 1
            del self._chunks[number]


class XenMappedPages(MappedPages):
    """Pages of a domain, mapped by one call.  ``pages``: the address of each page that has
    PAGE_DATA (``const void *[]``).  ``done`` ends the mapping.
    """

    def __init__(self, pages: Any, status: NDArray[np.uint8], done: Callable[[], object]):
        runs = ffi.new("struct xen_run[]", max(len(status), 1))
        n = lib.xen_look(pages, len(status), ffi.from_buffer("uint8_t[]", status), runs)
        super().__init__(status, [_memory(run.address, run.pages * PAGE_SIZE) for run in runs[0:n]])
        self._done = done

    def __exit__(self, *_exception: object) -> None:
        self.data = []
        self._done()


def _memory(address: Any, size: int) -> memoryview:
    return memoryview(ffi.buffer(address, size)).toreadonly()
