# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of the source domain, and the messages that announce them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np

from migrate.errors import MigrationError
from migrate.protocol.messages import Pages
from migrate.protocol.pfns import PfnMask, from_mask
from sender.backlog import Backlog
from xenbackend.contract import Domain
from xenbackend.errors import XenError
from xenbackend.pages import MappedPages, PageStatus, PfnArray

PIECE_PFNS = 1 << 18


def announce(pfns: PfnArray, mapped: MappedPages) -> Pages:
    """Return the message whose payload is ``mapped.data``.  Raises ``XenError`` if a page cannot be
    read now.
    """
    status = mapped.status
    if not np.count_nonzero(status):  # every status is PageStatus.DATA
        return Pages(pfns)
    unreadable = pfns[status >= PageStatus.PAGED]
    if len(unreadable):
        raise XenError(
            "map",
            errno.EAGAIN,
            pfn=int(unreadable[0]),
            why=f"{len(unreadable)} pages of the guest cannot be read: they are paged out or "
            "broken at this host; stop its pager",
        )
    return Pages(
        pfns[status == PageStatus.DATA],
        zeros=pfns[status == PageStatus.ZERO],
        holes=pfns[status == PageStatus.HOLE],
    )


def announce_missing(pfns: PfnArray, mapped: MappedPages, backlog: Backlog) -> Pages | None:
    """Return the message after the switchover.  Pages that the receiver has loaded since they were
    chosen are left out, because their mapping may have been given up.  ``None``: the receiver has
    loaded all of them.
    """
    message = announce(pfns, mapped)
    if not len(message.holes):
        return message
    lost = message.holes[~backlog.is_done(message.holes)]
    if len(lost):
        raise MigrationError(
            f"{len(lost)} missing pages of the guest are not held any more: "
            f"pfn {int(lost[0]):#x}, ..."
        )
    return Pages(message.pfns, message.zeros) if count_pages(message) else None


def count_pages(message: Pages) -> int:
    return len(message.pfns) + len(message.zeros)


def all_pfns(nr_pfns: int) -> Iterator[PfnArray]:
    """Yield all pfns in pieces, because the pfns of a large guest take gigabytes."""
    for base in range(0, nr_pfns, PIECE_PFNS):
        yield np.arange(base, min(base + PIECE_PFNS, nr_pfns), dtype=np.uint64)


def _pfns_of(mask: PfnMask) -> Iterator[PfnArray]:
    """Yield the pfns of a set, in the same pieces."""
    for base in range(0, len(mask), PIECE_PFNS):
        yield from_mask(mask[base : base + PIECE_PFNS], base)


def present(domain: Domain) -> PfnMask:
    """Return the pfns of a guest that have memory."""
    return np.concatenate([domain.present(pfns) for pfns in all_pfns(domain.nr_pfns)])


def pinned(domain: Domain) -> PfnArray:
    """Return the pinned set of a whole guest."""
    return np.concatenate([domain.pinned(pfns) for pfns in all_pfns(domain.nr_pfns)])


def held(domain: Domain, mask: PfnMask) -> PfnArray:
    """Return the pages of a set that other programs have mapped."""
    return np.concatenate([domain.held(pfns) for pfns in _pfns_of(mask)])


def device_memory(domain: Domain, mask: PfnMask) -> PfnArray:
    """Return the pages of a set that are memory of emulated devices."""
    return np.concatenate([domain.device_memory(pfns) for pfns in _pfns_of(mask)])


def hold(domain: Domain, mask: PfnMask) -> None:
    """Keep the pages of a set readable, even if the domain is destroyed."""
    for pfns in _pfns_of(mask):
        domain.hold(pfns)
