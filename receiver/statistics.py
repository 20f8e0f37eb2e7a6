# SPDX-License-Identifier: GPL-2.0-or-later
"""The cost of faults, which the pager counts, for the result of the migration."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SUBBUCKETS = 32
"""The buckets for each power of two.  With them a quantile is wrong by 3% at most, in bounded
memory.
"""
FINE = 4
"""The buckets for each power of two in a record."""


class LatencyHistogram:
    """Durations, kept in microseconds."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_us = 0.0
        self.max_us = 0.0
        self._buckets: Counter[int] = Counter()

    def record(self, seconds: float) -> None:
        us = seconds * 1e6
        self.count += 1
        self.sum_us += us
        self.max_us = max(self.max_us, us)
        self._buckets[int(math.log2(max(us, 1.0)) * SUBBUCKETS)] += 1

    def quantile(self, q: float) -> float:
        """Return the duration below which a share ``q`` lies, in microseconds; 0 if nothing was
        recorded.
        """
        rank = q * self.count
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return float(min(2.0 ** ((bucket + 0.5) / SUBBUCKETS), self.max_us))
        return self.max_us

    def fine_histogram(self) -> list[tuple[float, float, int]]:
        """Return for each bucket its limits in microseconds and the number of samples in it.  There
        are :data:`FINE` buckets for each power of two.
        """
        found: Counter[int] = Counter()
        for bucket, count in self._buckets.items():
            found[bucket * FINE // SUBBUCKETS] += count
        return [
            (round(2 ** (bucket / FINE), 3), round(2 ** ((bucket + 1) / FINE), 3), found[bucket])
            for bucket in sorted(found)
        ]

    def summary(self) -> dict[str, Any]:
        """Return the figures for the result.  ``histogram``: for each power of two, the number of
        samples below it and not below the power before.
        """
        powers: Counter[int] = Counter()
        for bucket, count in self._buckets.items():
            powers[2 ** (bucket // SUBBUCKETS + 1)] += count
        return {
            "count": self.count,
            "mean": round(self.sum_us / self.count, 1) if self.count else 0.0,
            "p50": round(self.quantile(0.5), 1),
            "p99": round(self.quantile(0.99), 1),
            "max": round(self.max_us, 1),
            "histogram": {str(power): powers[power] for power in sorted(powers)},
        }


@dataclass
class PagerStatistics:
    """The receiver's counters.  The pager's threads count, and other threads read."""

    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    vcpu_block_s: dict[int, float] = field(default_factory=dict)
    requests: int = 0
    """The number of pages requested over the pull lane."""
    ahead_pages: int = 0
    """The number of pages requested before a vCPU needed them; some were pushed before that."""
    pulled_pages: int = 0
    """The number of pages that arrived first on the pull lane."""
    dropped_pages: int = 0
    populate_evicted: str = ""
    checkpoints: int = 0
    """The number of checkpoints that the source has kept."""
    checkpoint_pages: int = 0
    checkpoint_pause_s: float = 0.0
    """The time for which the guest was suspended for checkpoints, in all."""
    longest_pause_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, vcpu: int, seconds: float) -> None:
        with self._lock:
            self.latency.record(seconds)
            self.vcpu_block_s[vcpu] = self.vcpu_block_s.get(vcpu, 0.0) + seconds

    def waited_s(self, still: dict[int, float]) -> dict[int, float]:
        """Return for how many seconds each vCPU has waited so far.  ``still``: for how long those
        have been waiting that wait now.
        """
        with self._lock:
            waited = dict(self.vcpu_block_s)
        return {vcpu: waited.get(vcpu, 0.0) + still.get(vcpu, 0.0) for vcpu in {*waited, *still}}

    def latencies(self) -> list[tuple[float, float, int]]:
        """Return what :meth:`LatencyHistogram.fine_histogram` returns."""
        with self._lock:
            return self.latency.fine_histogram()

    def count_suspension(self, seconds: float) -> None:
        """Count the time for which the guest was suspended for one checkpoint."""
        self.checkpoint_pause_s += seconds
        self.longest_pause_s = max(self.longest_pause_s, seconds)

    def summary(self) -> dict[str, Any]:
        with self._lock:
            latency, blocked = self.latency.summary(), sorted(self.vcpu_block_s.items())
        return {
            "fault_latency_us": latency,
            "vcpu_block_s": {str(vcpu): round(s, 6) for vcpu, s in blocked},
            "pull": {
                "requests": self.requests,
                "ahead": self.ahead_pages,
                "pages": self.pulled_pages,
            },
            "dropped_pages": self.dropped_pages,
            "populate_evicted": self.populate_evicted,
            "checkpoints": {
                "kept": self.checkpoints,
                "pages": self.checkpoint_pages,
                "pause_s": round(self.checkpoint_pause_s, 6),
                "longest_pause_s": round(self.longest_pause_s, 6),
            },
        }
