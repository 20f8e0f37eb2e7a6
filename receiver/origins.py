# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each page of the guest came from: one byte for each pfn, for ``report``.

Any thread may note what it has loaded; the last note counts.  No decision depends on the notes.
"""

from __future__ import annotations

import base64
import zlib
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrate.fastpath.page_states import LOADING, OUTSTANDING, Waiting
from xenbackend.pages import PfnArray

MOST_CELLS = 2**17
"""The most pages that a map shows.  Of a larger guest it shows one page of several."""
CHUNK = 2**20
"""The number of pfns that are counted in one step."""
SCATTER = 0.6180339887
"""A guest's memory often has regular distances.  By steps of the golden ratio the pages that are
shown have none.
"""


class Origin(IntEnum):
    NOTHING = 0
    """The guest has no memory at this pfn."""
    PRECOPY = 1
    """The valid copy came while the guest ran at the source."""
    SWITCHOVER = 2
    """The valid copy came while the guest was suspended."""
    PUSHED = 3
    """The page came after the handover, on the push lane."""
    FAULT = 4
    """The page came on the pull lane, and a vCPU waited for the page."""
    READ_AHEAD = 5
    """The page came on the pull lane, before a vCPU waited for the page."""
    GIVEN_AWAY = 6
    """The guest has given the page away before it came."""
    MISSING = 7
    """The page has still to come."""
    UNKNOWN = 8
    """The page came before this process had the migration."""


FAULT, READ_AHEAD = int(Origin.FAULT), int(Origin.READ_AHEAD)


class Origins:
    def __init__(self, nr_pfns: int):
        self._of: NDArray[np.uint8] = np.zeros(nr_pfns, dtype=np.uint8)
        self._bytes = self._of.data
        self.others = Origin.NOTHING
        """The origin of pages that were never noted."""

    def note(self, pfns: PfnArray, origin: Origin) -> None:
        """Note where these pages came from."""
        self._of[pfns] = int(origin)

    def note_loaded(self, pfns: PfnArray, answered: list[Waiting], *, pulled: bool) -> None:
        """Note pages that were loaded after the handover.  ``answered``: the requests that have
        waited for them.  ``pulled``: the pages came on the pull lane.
        """
        if not pulled:
            self._of[pfns] = int(Origin.PUSHED)
            return
        waited_for = {request.pfn for request, _since in answered}
        for pfn in pfns.tolist():  # mostly one, for which numpy takes ten times as long
            self._bytes[pfn] = FAULT if pfn in waited_for else READ_AHEAD

    def summary(self, states: NDArray[np.uint8]) -> dict[str, Any]:
        """Return the number of pages of each origin, and a map as compressed bytes in Base64: for
        each of its cells the origin of one page among ``pages_per_cell``.  ``states``: of each pfn
        (``migrate/fastpath/page_states.py``).  Call this in a thread.
        """
        nr_pfns = len(self._of)
        counts = np.zeros(len(Origin), dtype=np.int64)
        for at in range(0, nr_pfns, CHUNK):
            part = self._now(states, slice(at, at + CHUNK))
            counts += np.bincount(part, minlength=len(Origin))
        per_cell = max(-(-nr_pfns // MOST_CELLS), 1)
        cells = np.arange(-(-nr_pfns // per_cell))
        scattered = (cells * SCATTER % 1.0 * per_cell).astype(np.int64)
        shown = self._now(states, np.minimum(cells * per_cell + scattered, nr_pfns - 1))
        return {
            "pages": {origin.name.lower(): int(counts[origin]) for origin in Origin},
            "pages_per_cell": per_cell,
            "cells": len(cells),
            "map": base64.b64encode(zlib.compress(shown.tobytes())).decode(),
        }

    def _now(
        self, states: NDArray[np.uint8], which: slice | NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Return the origins of some pages, as they are now."""
        found = np.array(self._of[which])
        found[found == Origin.NOTHING] = self.others
        state = states[which]
        found[(state >= OUTSTANDING) & (state <= LOADING)] = Origin.MISSING
        return found
