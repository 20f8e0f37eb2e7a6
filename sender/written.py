# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest writes while it is being copied: log-dirty, and of each page how it was at the last looks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from migrate.pfns import PfnMask, mask_from_bitmap
from xenbackend.contract import Domain, PfnArray

WRITTEN_AT_LAST_LOOK = 0x80


class WrittenPages:
    """``enabled``: log-dirty may be, by a predecessor."""

    def __init__(self, domain: Domain, *, enabled: bool = False):
        self._domain = domain
        self._enabled = enabled
        self._heat = np.zeros(0, dtype=np.uint8)

    def enable(self) -> None:
        self._enabled = True  # or half so, when this fails
        self._domain.log_dirty_enable()
        self._heat = np.zeros(self._domain.nr_pfns, dtype=np.uint8)

    def disable(self) -> None:
        """If it is enabled."""
        if self._enabled:
            self._domain.log_dirty_disable()
            self._enabled = False

    def look(self) -> PfnMask:
        """What was written since the last look; of each page the last eight looks are remembered, the newest highest."""
        written = mask_from_bitmap(self._domain.log_dirty(clean=True), self._domain.nr_pfns)
        self._heat >>= 1
        self._heat |= written.view(np.uint8) << 7
        return written

    def last_look(self) -> NDArray[np.uint8]:
        """The same with the guest standing still, as a bitmap: nothing takes as long as the guest is large then."""
        return self._domain.log_dirty(clean=True)

    def hottest(self, written: PfnArray, most: int) -> PfnArray:
        """Of the pages written since the last look, those that are written all the time: the guest needs them at once.

        The kernel's own, mostly; each would be a fault before the guest does anything else.
        """
        heat = self._heat[written]
        order = np.argsort(heat, kind="stable")[::-1][:most]
        return np.sort(written[order[heat[order] >= WRITTEN_AT_LAST_LOOK]])
