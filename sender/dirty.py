# SPDX-License-Identifier: GPL-2.0-or-later
"""What changes in a guest while the guest is copied: its writes, as log-dirty records them, and its
balloon.

Log-dirty has one user.  Each reading checks that log-dirty is still on.  If another program has
switched it off, the record looks as if the guest had written nothing.

Log-dirty does not record the balloon.  Up to Xen 4.18 a pfn that loses its frame or gets another
frame is not recorded.  Writes to the new frame are not recorded until the next reading (Xen commit
98fccdf0ac).  A search of the whole physmap finds a pfn without a frame, but no pfn that was given
away and taken back between two readings.

So the guest can get no frame while it is copied.  The sender sets the domain's maximum below what
the domain has, and the balloon driver tries again after the migration.  The guest can still give
frames away.  Its number of frames is smaller then, and the sender searches the physmap.

An administrator may set another maximum meanwhile (``xl mem-set``, ``xl mem-max``).  The next
reading finds the other maximum, sets its own again, and counts every page as written.
"""

from __future__ import annotations

import errno
import logging

import numpy as np
from numpy.typing import NDArray

from migrate.errors import MigrationError
from migrate.protocol.pfns import PfnMask, bitmap_of, mask_from_bitmap
from sender.source_pages import present
from xenbackend.contract import Domain
from xenbackend.errors import XenError
from xenbackend.pages import PfnArray

log = logging.getLogger(__name__)

WRITTEN_AT_LAST_LOOK = 0x80
NO_FURTHER = 1
"""The maximum for a domain that must get no frame.  Every domain has more frames, and no
administrator would set this number.
"""


def limit_of(domain: Domain) -> int:
    """Return the number of frames that a domain may have when it is not being copied."""
    frames = domain.reservation()
    # A sender that was killed, and has no successor, may have left the domain with this maximum.
    return frames.tot_pages if frames.max_pages == NO_FURTHER else frames.max_pages


class DirtyLog:
    """The dirty log of one domain.  ``max_pages``: the domain's own limit.  ``enabled``: log-dirty
    may be on.  If it is, a predecessor enabled it, because Xen refuses a second user.
    """

    def __init__(self, domain: Domain, max_pages: int, *, enabled: bool = False):
        self._domain = domain
        self.max_pages = max_pages
        self._enabled = self._holds_balloon = enabled
        self._heat = np.zeros(0, dtype=np.uint8)
        self._present: PfnMask
        self._tot_pages = 0

    def enable(self) -> None:
        try:
            self._domain.log_dirty_enable()
        except XenError as error:
            self._enabled = error.errno != errno.EBUSY  # otherwise log-dirty may be partly on
            raise
        self._enabled = self._holds_balloon = True
        self._hold_balloon()
        # Writes to frames that were added meanwhile are recorded from now on.  All memory is still
        # to be copied.
        self._domain.log_dirty(clean=True)
        self._heat = np.zeros(self._domain.nr_pfns, dtype=np.uint8)

    def memory(self) -> PfnMask:
        """Return each pfn that has memory, all of which must be copied.  Called when the writes of
        every writer are recorded.
        """
        self._tot_pages = self._domain.reservation().tot_pages
        self._present = present(self._domain)
        return self._present.copy()

    def disable(self) -> None:
        """Restore the domain's limit and switch log-dirty off, if this object has changed them."""
        if self._holds_balloon:
            self._restore_limit()
            self._holds_balloon = False
        if self._enabled:
            self._domain.log_dirty_disable()
            self._enabled = False

    def read(self) -> PfnMask:
        """Return the pages written since the last reading.  Each page has eight bits, one for each
        of the last eight readings; the newest is the highest bit.
        """
        bitmap, moved = self._read()
        written = mask_from_bitmap(bitmap, self._domain.nr_pfns)
        self._heat >>= 1
        self._heat |= written.view(np.uint8) << 7
        return written if moved is None else written | moved

    def read_last(self) -> NDArray[np.uint8]:
        """Return the pages of a suspended guest written since the last reading, as a bitmap.  No
        step takes time in proportion to the guest, unless the balloon has moved since then.
        """
        bitmap, moved = self._read()
        self._restore_limit()
        if moved is not None:
            bitmap[: (len(moved) + 63) // 64 * 8] |= bitmap_of(moved)
        return bitmap

    def hottest(self, written: PfnArray, most: int) -> PfnArray:
        """Return up to ``most`` of the pages written since the last reading: those that are written
        most often.

        Most of them belong to the guest's kernel, which needs them at once.  Each would be a fault
        before the guest does anything else.
        """
        heat = self._heat[written]
        order = np.argsort(heat, kind="stable")[::-1][:most]
        return np.sort(written[order[heat[order] >= WRITTEN_AT_LAST_LOOK]])

    def _read(self) -> tuple[NDArray[np.uint8], PfnMask | None]:
        """Return the dirty bitmap, and the other pages that may have changed, if any."""
        frames = self._domain.reservation()
        came = frames.max_pages != NO_FURTHER
        if came:
            log.warning(
                "the guest's maximum memory was changed: all of its memory counts as written"
            )
            self.max_pages = frames.max_pages
            self._hold_balloon()
        # After the limit was set: writes to frames that exist now are recorded from here on.
        bitmap = self._domain.log_dirty(clean=True)
        if not self._domain.log_dirty_is_on():
            self._enabled = False
            raise MigrationError(
                "another program has switched log-dirty off, so that the pages that the guest has "
                "written are unknown: end what else migrates or saves this guest, and migrate it "
                "again"
            )
        if not came and frames.tot_pages == self._tot_pages:
            return bitmap, None
        before = self._present
        self._tot_pages, self._present = frames.tot_pages, present(self._domain)
        return bitmap, before | self._present if came else before & ~self._present

    def _hold_balloon(self) -> None:
        self._domain.set_max_pages(NO_FURTHER)

    def _restore_limit(self) -> None:
        if self.max_pages and self._domain.reservation().max_pages == NO_FURTHER:
            self._domain.set_max_pages(self.max_pages)
