# SPDX-License-Identifier: GPL-2.0-or-later
"""Every structure and every pass that depends on the number of pages, at the size of a terabyte,
without its memory.

Passes in the downtime must not depend on the size of the guest.  They are measured with the same
5000 written pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from migrate.protocol.pfns import from_bitmap, mask_from_bitmap, windows
from receiver.outstanding import OutstandingPages
from sender.backlog import Backlog
from tests.bench.runs import Limits, row
from xenbackend.pages import PAGE_SIZE

WRITTEN = 5000
BATCHES = 200


def timed(what: Callable[[], object]) -> float:
    """Return the time of a call in milliseconds."""
    began = time.perf_counter()
    what()
    return (time.perf_counter() - began) * 1000


def measure(nr_pfns: int) -> dict[str, float]:
    """Return the milliseconds of each pass, by name."""
    generator = np.random.default_rng(1)
    written = np.unique(generator.integers(0, nr_pfns, WRITTEN, dtype=np.uint64))
    bitmap = np.zeros((nr_pfns + 63) // 64 * 8, dtype=np.uint8)
    np.bitwise_or.at(bitmap, written // 8, np.left_shift(1, written % 8).astype(np.uint8))
    found: dict[str, float] = {}

    deferred = np.ones(nr_pfns, dtype=np.bool_)
    found["running: a look at what was written"] = timed(lambda: mask_from_bitmap(bitmap, nr_pfns))
    found["running: what is put off, as messages"] = timed(
        lambda: sum(len(bits) for _base, bits in windows(deferred))
    )
    found["running: the sender's account"] = timed(lambda: Backlog(deferred))
    backlog = Backlog(deferred)

    def stand_still() -> None:
        changed = from_bitmap(bitmap | unsent, nr_pfns)
        new = changed[~backlog.are_missing(changed)]
        backlog.add(new)
        backlog.remove(changed[:256])

    unsent = np.zeros_like(bitmap)
    found["standing still"] = timed(stand_still)
    pages = OutstandingPages(nr_pfns)
    found["running: the receiver's account"] = (
        timed(lambda: pages.add(np.arange(nr_pfns // 256, dtype=np.uint64))) * 256
    )
    found["postcopy: a batch to push, all there"] = (
        timed(lambda: [backlog.next_batch(1024) for _ in range(BATCHES)]) / BATCHES
    )

    sparse = np.zeros(nr_pfns, dtype=np.bool_)
    sparse[written] = True
    rest = Backlog(sparse)

    def last_ones() -> None:
        for pfn in written[: BATCHES * 8 : 8].tolist():
            rest.fault(np.array([pfn], dtype=np.uint64))
            rest.next_batch(8)

    found["postcopy: a fault and a batch, few left"] = timed(last_ones) / BATCHES
    return found


def describe(nr_pfns: int) -> str:
    size = nr_pfns * PAGE_SIZE
    return f"{size >> 40} TiB" if size >= 1 << 40 else f"{size >> 30} GiB"


def scaling(_limits: Limits, _runs: int) -> None:
    """Measure each value once, because 2^28 pfns are 2 GiB of arrays."""
    small, large = (measure(1 << bits) for bits in (18, 28))
    for what, ms in large.items():
        row(
            what,
            ms / small[what],
            f"{describe(1 << 28)}: {ms:.2f} ms",
            f"{describe(1 << 18)}: {small[what]:.2f} ms",
        )
