# SPDX-License-Identifier: GPL-2.0-or-later
"""The pace of the push while a toolstack works at both ends.

The toolstack needs the CPUs of dom0: it starts QEMU and hotplug scripts.  The push is not given a
lower priority, because a thread of a low priority may be put off while it holds the interpreter
lock, and the threads that serve the faults of other guests would wait for the lock.  Instead the
push works for a part of the time only.  It sends a small batch, waits until the destination has
loaded the batch, and pauses for a multiple of the time that all of this has taken.  So the push
becomes slower if either host is busy.

The toolstack itself waits for some pages: QEMU maps the memory of the devices that it emulates, and
libxl gives QEMU a minute to start.  There is no pause while these pages are sent.

No more than one batch is in transit, so a decision against the destination does not wait behind
pages for long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from migrate.units import pauses

SLOW_PACE_PAGES = 256
"""The number of pages that are in transit at most."""
PAUSE = 4
"""The length of a pause, as a multiple of the work before it."""
FIRST_POLL_S, LAST_POLL_S = 0.001, 0.05
"""The first and the longest pause between two checks of what the destination has loaded."""


class SlowPace:
    """The pace of one thread that pushes.  ``in_transit`` returns how many pages the destination
    has not acknowledged yet.  ``hurries`` returns whether pages are unsent for which the toolstack
    waits.
    """

    def __init__(
        self,
        in_transit: Callable[[], int],
        hurries: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._in_transit = in_transit
        self._hurries = hurries
        self._clock = clock
        self._began = clock()
        self.over = threading.Event()
        """Set when the push is to continue without pauses, or is to stop."""

    def continues(self) -> bool:
        """Wait after a batch.  Returns whether to send another one at this pace."""
        for poll_s in pauses(FIRST_POLL_S, LAST_POLL_S):
            if not self._in_transit() or self.over.wait(poll_s):
                break
        if not self._hurries():
            self.over.wait(PAUSE * (self._clock() - self._began))
        self._began = self._clock()
        return not self.over.is_set()
