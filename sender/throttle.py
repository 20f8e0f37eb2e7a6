# SPDX-License-Identifier: GPL-2.0-or-later
"""The threads that copy in the background wait here for the bandwidth cap, which an operator may
change at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sender.bandwidth import BandwidthCap

LOOK_EVERY_S = 0.2
"""How often a thread that waits finds out whether it is to stop.  When a time limit passes, nobody
wakes the thread.
"""


class Throttle(BandwidthCap):
    """A cap for which threads wait."""

    def __init__(self, bytes_per_s: float | None):
        super().__init__(bytes_per_s)
        self._woken = threading.Condition()

    def hold(self, stops: Callable[[], bool]) -> bool:
        """Wait until more may be sent.  Returns false as soon as ``stops`` returns true."""
        with self._woken:
            while not stops():
                wait_s = self.wait_s(time.monotonic())
                if not wait_s:
                    return True
                self._woken.wait(min(wait_s, LOOK_EVERY_S))
        return False

    def wake(self) -> None:
        """Have each thread that waits find out at once whether it may send, or is to stop."""
        with self._woken:
            self._woken.notify_all()

    def change(self, bytes_per_s: float | None, now: float) -> None:
        super().change(bytes_per_s, now)
        self.wake()
