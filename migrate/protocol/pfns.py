# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets and lists of pfns, in memory and on the wire.

In memory, a set is a boolean array with one element for each pfn, and a list is an ascending
``uint64`` array.  On the wire, a short list is its little-endian 64-bit numbers.  A set can be as
large as the guest, and is sent as windows of a bitmap; empty windows are left out.

While the guest is suspended, only lists are used: a pass over the set of a large guest would add to
the downtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from xenbackend.pages import PfnArray

MAX_PFN = 2**40
"""Every pfn in a message is lower than this."""
WINDOW_PFNS = 2**18
"""The number of pfns in one window: 32 KiB of bitmap, 1 GiB of guest."""

MOST_PFNS_OF_SMALL = 2**22
"""The pfns that a guest of any size may have: 16 GiB of guest-physical addresses.  Also in a small
guest, memory above the hole for devices begins at 4 GiB.
"""
MOST_PFNS_A_PAGE = 16
"""The most pfns that a guest may have for each page of its memory; guests leave holes."""

PfnMask = NDArray[np.bool_]


def sparseness(nr_pfns: int, max_pages: int) -> str:
    """Return why the guest's memory is too sparse to be migrated; empty if it is not.

    A daemon needs several bytes for each pfn up to the highest one.  The guest chooses the highest
    pfn by where it maps a page.
    """
    most = max(MOST_PFNS_OF_SMALL, MOST_PFNS_A_PAGE * max_pages)
    if nr_pfns <= most:
        return ""
    return (
        f"the guest's memory is too sparse: its highest pfn is {nr_pfns - 1:#x}, and with "
        f"{max_pages} pages it may be {most - 1:#x} at most"
    )


def pfn_array(values: object = ()) -> PfnArray:
    return np.array(values, dtype=np.uint64)


NO_PFNS = pfn_array()
NO_PFNS.flags.writeable = False


def mask_from_bitmap(bitmap: NDArray[np.uint8], nr_pfns: int) -> PfnMask:
    """Return the set in a bitmap of Xen's: least significant bit first."""
    return np.unpackbits(bitmap, count=nr_pfns, bitorder="little").view(np.bool_)


def bitmap_of(mask: PfnMask) -> NDArray[np.uint8]:
    """Return a set as a bitmap of Xen's: least significant bit first, in words of eight bytes."""
    return np.packbits(np.pad(mask, (0, -len(mask) % 64)), bitorder="little")


def from_bitmap(bitmap: NDArray[np.uint8], nr_pfns: int) -> PfnArray:
    """Return the pfns of a bitmap, as :func:`mask_from_bitmap` does, in a time that depends on the
    number of set bits.  Eight bytes are tested together.
    """
    words = bitmap.view(np.uint64)
    found = np.flatnonzero(
        words != 0
    )  # in a sixth of the time that it takes without the comparison
    bits = np.flatnonzero(
        np.unpackbits(words[found].view(np.uint8), bitorder="little").view(np.bool_)
    )
    pfns = (found[bits >> 6] << 6 | bits & 63).view(np.uint64)
    within: PfnArray = pfns[: np.searchsorted(pfns, np.uint64(nr_pfns))]
    return within


def in_bitmap(bitmap: NDArray[np.uint8], pfns: PfnArray) -> PfnMask:
    """Return which of the pfns have their bit set."""
    found: PfnMask = (bitmap[pfns // 8] >> (pfns % 8).astype(np.uint8) & 1).view(np.bool_)
    return found


def from_mask(mask: PfnMask, base: int = 0) -> PfnArray:
    return np.flatnonzero(mask).astype(np.uint64) + np.uint64(base)


def union(lists: Sequence[PfnArray]) -> PfnArray:
    """Return the union of lists, which may be in any order.

    ``np.unique`` is not used: its first call imports ``numpy.ma``, which takes 9 ms and would add
    to the downtime.
    """
    pfns = np.sort(np.concatenate(lists))
    first = np.ones(len(pfns), dtype=np.bool_)
    np.not_equal(pfns[1:], pfns[:-1], out=first[1:])
    return pfns[first]


def runs(mask: PfnMask) -> list[list[int]]:
    """Return [first, stop] of each run of true elements."""
    if np.count_nonzero(mask) == len(mask):  # the usual case, for which a vCPU may be waiting
        return [[0, len(mask)]] if len(mask) else []
    edges: list[list[int]] = (
        np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2).tolist()
    )
    return edges


def windows(mask: PfnMask, width: int = WINDOW_PFNS) -> Iterator[tuple[int, bytes]]:
    """Return (first pfn, bitmap) of each window that is not empty.

    ``width``: the pfns of a window, a multiple of 8 and at most :data:`WINDOW_PFNS`.
    """
    for base in range(0, len(mask), width):
        window = mask[base : base + width]
        if window.any():
            yield base, np.packbits(window, bitorder="little").tobytes()


def pfns_of_window(base: int, bitmap: bytes) -> PfnArray:
    return from_mask(
        np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little").view(np.bool_), base
    )


def pieces(pfns: PfnArray, most: int) -> Iterator[PfnArray]:
    """Cut a list into lists of at most ``most`` pfns."""
    for at in range(0, len(pfns), most):
        yield pfns[at : at + most]


def batches_of(mask: PfnMask, batch_pages: int) -> Iterator[PfnArray]:
    """Return the set in ascending batches; the set is read window by window."""
    for base in range(0, len(mask), WINDOW_PFNS):
        yield from pieces(from_mask(mask[base : base + WINDOW_PFNS], base), batch_pages)
