# SPDX-License-Identifier: GPL-2.0-or-later
"""A cap on the bytes a second of background copying: a token bucket.  Time is an argument.  In
``throttle.py`` threads wait for the cap.
"""

from __future__ import annotations

import threading


class BandwidthCap:
    """A cap of ``bytes_per_s``, or none for ``None``.  Several threads may use it."""

    def __init__(self, bytes_per_s: float | None, burst_s: float = 0.05):
        self._rate = bytes_per_s
        self._burst_s = burst_s
        self._excess = 0.0
        """The bytes that were sent beyond the cap; negative: the bytes that may be sent at once."""
        self._at = 0.0
        """The time to which the excess belongs."""
        self._lock = threading.Lock()

    def spend(self, count: int, now: float) -> float:
        """Account for ``count`` bytes that were sent.  Returns the seconds to wait."""
        with self._lock:
            self._pass_time(now)
            self._excess += count
            return self._wait_s()

    def wait_s(self, now: float) -> float:
        """Return the seconds to wait before more is sent."""
        with self._lock:
            self._pass_time(now)
            return self._wait_s()

    def change(self, bytes_per_s: float | None, now: float) -> None:
        """Change the cap.  What was sent beyond the old cap is waited for at the new one."""
        with self._lock:
            self._pass_time(now)
            self._rate = bytes_per_s

    def _pass_time(self, now: float) -> None:
        if self._rate is None:
            self._excess = 0.0
        else:
            at_once = self._rate * self._burst_s
            self._excess = max(self._excess - self._rate * max(now - self._at, 0.0), -at_once)
        self._at = max(now, self._at)

    def _wait_s(self) -> float:
        return 0.0 if self._rate is None else max(self._excess / self._rate, 0.0)
