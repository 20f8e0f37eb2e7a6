# SPDX-License-Identifier: GPL-2.0-or-later
"""An operator's pause of copying.  Time is an argument.

In precopy no round is made: the guest runs on, and the pages that it writes accumulate.  In
postcopy faults are answered, and nothing is pushed or read ahead.
"""

from __future__ import annotations

import trio


class Pause:
    """Changed in the event loop.  Any thread may read it."""

    def __init__(self, is_on: bool = False):
        """``is_on``: as a predecessor has noted."""
        self.is_on = is_on
        self._over = trio.Event()
        self._began = self._seconds = 0.0

    def begin(self, now: float) -> None:
        self.is_on, self._began, self._over = True, now, trio.Event()

    def end(self, now: float) -> None:
        self._seconds += now - self._began
        self.is_on = False
        self._over.set()

    async def wait(self) -> None:
        """Wait until copying is not paused."""
        while self.is_on:
            await self._over.wait()

    def seconds(self, now: float) -> float:
        """Return how long all pauses have taken up to ``now``."""
        return self._seconds + (now - self._began if self.is_on else 0.0)
