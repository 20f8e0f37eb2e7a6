# SPDX-License-Identifier: GPL-2.0-or-later
"""A cap on the bytes a second of background copying: a token bucket.  Time is an argument."""

from __future__ import annotations

import threading


class BandwidthCap:
    """A cap of ``bytes_per_s``, or none for ``None``.  Several threads may use it."""

    def __init__(self, bytes_per_s: float | None, burst_s: float = 0.05):
        self._rate = bytes_per_s
        self._burst_s = burst_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def spend(self, count: int, now: float) -> float:
        """Account for ``count`` bytes that were sent.  Returns the seconds to wait."""
        if self._rate is None:
            return 0.0
        with self._lock:
            self._free_at = max(self._free_at, now - self._burst_s) + count / self._rate
            return max(self._free_at - now, 0.0)
