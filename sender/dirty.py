# SPDX-License-Identifier: GPL-2.0-or-later
"""What changes in a guest while the guest is copied: its writes, as log-dirty records them, and its
balloon.

Log-dirty has one user.  Each look checks that log-dirty is still on.  If somebody has switched it
off, the record looks as if the guest had written nothing.

Log-dirty does not record the balloon.  Up to Xen 4.18 a pfn that loses its frame or gets another
frame is not recorded.  Writes to the new frame are not recorded until the next look (Xen commit
98fccdf0ac).  A search of the whole physmap finds a pfn without a frame, but no pfn that was given
away and taken back between two looks.

So the guest can get no frame while it is copied.  The sender sets the domain's maximum below what
the domain has, and the balloon driver tries again after the migration.  The guest can still give
frames away.  Its number of frames is smaller then, and the sender searches the physmap.

An administrator may set another maximum meanwhile (``xl mem-set``, ``xl mem-max``).  The next look
finds the other maximum, sets its own again, and counts every page as written.
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
"""The maximum for a domain that is to get no frame: fewer frames than any domain has, and a number
that nobody else would set.
"""


def limit_of(domain: Domain) -> int:
    """How many frames a domain may have, when it is not being copied."""
    frames = domain.reservation()
    # A sender that was killed may have left it so, without a successor.
    return frames.tot_pages if frames.max_pages == NO_FURTHER else frames.max_pages


class DirtyLog:
    """``max_pages``: the domain's own limit.  ``enabled``: log-dirty may be on, and then a
    predecessor enabled it, since Xen refuses a second user.
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
            self._enabled = error.errno != errno.EBUSY  # otherwise it may be half so
            raise
        self._enabled = self._holds_balloon = True
        self._hold_balloon()
        # Writes to a frame that has come meanwhile are recorded from now on.  All memory is still
        # to be copied.
        self._domain.log_dirty(clean=True)
        self._heat = np.zeros(self._domain.nr_pfns, dtype=np.uint8)

    def memory(self) -> PfnMask:
        """Everything that is to be copied: each pfn that has memory.  Called when every writer is
        recorded.
        """
        self._tot_pages = self._domain.reservation().tot_pages
        self._present = present(self._domain)
        return self._present.copy()

    def disable(self) -> None:
        """If it is enabled."""
        if self._holds_balloon:
            self._let_balloon_go()
            self._holds_balloon = False
        if self._enabled:
            self._domain.log_dirty_disable()
            self._enabled = False

    def read(self) -> PfnMask:
        """The pages written since the last reading.  Of each page eight bits are kept, one for each
        of the last eight readings, the newest in the highest bit.
        """
        bitmap, moved = self._read()
        written = mask_from_bitmap(bitmap, self._domain.nr_pfns)
        self._heat >>= 1
        self._heat |= written.view(np.uint8) << 7
        return written if moved is None else written | moved

    def read_last(self) -> NDArray[np.uint8]:
        """As :meth:`read`, of a suspended guest, as a bitmap.  No step takes time in proportion to
        the guest, unless the balloon has moved since the last look.
        """
        bitmap, moved = self._read()
        self._let_balloon_go()
        if moved is not None:
            bitmap[: (len(moved) + 63) // 64 * 8] |= bitmap_of(moved)
        return bitmap

    def hottest(self, written: PfnArray, most: int) -> PfnArray:
        """Up to ``most`` of the pages written since the last reading: those that are written most
        often.

        Most of them are the kernel's own, and the guest needs them at once: each would be a fault
        before the guest does anything else.
        """
        heat = self._heat[written]
        order = np.argsort(heat, kind="stable")[::-1][:most]
        return np.sort(written[order[heat[order] >= WRITTEN_AT_LAST_LOOK]])

    def _read(self) -> tuple[NDArray[np.uint8], PfnMask | None]:
        """Log-dirty, and which other pages may have changed, if any."""
        frames = self._domain.reservation()
        came = frames.max_pages != NO_FURTHER
        if came:
            log.warning(
                "the guest's maximum memory was changed: all of its memory counts as written"
            )
            self.max_pages = frames.max_pages
            self._hold_balloon()
        # After that: what is written to frames that came until now is recorded from here on.
        bitmap = self._domain.log_dirty(clean=True)
        if not self._domain.log_dirty_is_on():
            self._enabled = False
            raise MigrationError(
                "somebody has switched log-dirty off, so that it is not known what the guest has "
                "written: end what else migrates or saves this guest, and migrate it again"
            )
        if not came and frames.tot_pages == self._tot_pages:
            return bitmap, None
        before = self._present
        self._tot_pages, self._present = frames.tot_pages, present(self._domain)
        return bitmap, before | self._present if came else before & ~self._present

    def _hold_balloon(self) -> None:
        self._domain.set_max_pages(NO_FURTHER)

    def _let_balloon_go(self) -> None:
        if self.max_pages and self._domain.reservation().max_pages == NO_FURTHER:
            self._domain.set_max_pages(self.max_pages)
