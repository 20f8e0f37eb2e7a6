# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages of a domain, and their contents."""

from __future__ import annotations

import numpy as np

from migrate.protocol.pfns import pfn_array
from xenbackend.contract import Domain
from xenbackend.pages import PAGE_SIZE, PfnArray

SPECIAL_PFNS = 16384


def pfns(*values: int) -> PfnArray:
    return pfn_array(values)


def span(first: int, count: int) -> PfnArray:
    return np.arange(first, first + count, dtype=np.uint64)


def read(domain: Domain, which: PfnArray) -> tuple[list[int], bytes]:
    with domain.map_pages(which) as mapped:
        return mapped.status.tolist(), b"".join(mapped.data)


def page(fill: int) -> bytes:
    return bytes([fill]) * PAGE_SIZE


def memory_of(domain: Domain) -> PfnArray:
    """Return the pfns with memory.  They are the lowest ones and a few at the highest, with a large
    hole between them.
    """
    low, high = domain.config().max_pages, max(domain.nr_pfns - SPECIAL_PFNS, 0)
    where = np.union1d(span(0, min(low, domain.nr_pfns)), span(high, domain.nr_pfns - high))
    return where[domain.present(where)]
