# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted during a migration, and the result that is written of it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from migrate.messages import printable

SUBBUCKETS = 32
"""Buckets to each power of two: a quantile is off by 3% at most, in bounded memory."""


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
        """Microseconds below which a share ``q`` lies; 0 when nothing was recorded."""
        rank = q * self.count
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return float(min(2.0 ** ((bucket + 0.5) / SUBBUCKETS), self.max_us))
        return self.max_us

    def summary(self) -> dict[str, Any]:
        """``histogram``: for each power of two, how many were below it and not below the one before."""
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


_COUNT, _NUMBER, _WORD = "count", "number", "word"
_PEERS: dict[str, Any] = {
    "fault_latency_us": {
        "count": _COUNT, "mean": _NUMBER, "p50": _NUMBER, "p99": _NUMBER, "max": _NUMBER, "histogram": {None: _COUNT},
    },
    "vcpu_block_s": {None: _NUMBER},
    "pull": {"requests": _COUNT, "ahead": _COUNT, "pages": _COUNT},
    "dropped_pages": _COUNT,
    "populate_evicted": _WORD,
    "checkpoints": {"kept": _COUNT, "pages": _COUNT, "pause_s": _NUMBER, "longest_pause_s": _NUMBER},
}  # fmt: skip
"""The keys of :meth:`PagerStatistics.summary`; under ``None`` any number as a key."""
_MOST_KEYS = 512


def from_peer(told: object) -> dict[str, Any]:
    """The peer's counters in the form of :meth:`PagerStatistics.summary`, whatever the peer has
    sent.

    Unknown keys are left out.  A value that is missing or of the wrong type is 0.
    """
    found: dict[str, Any] = _checked(told, _PEERS)
    return found


def _checked(told: object, form: Any) -> Any:
    if isinstance(form, dict):
        given = told if isinstance(told, dict) else {}
        if None in form:
            numbers = [
                key for key in given if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
            ]
            return {key: _checked(given[key], form[None]) for key in numbers[:_MOST_KEYS]}
        return {key: _checked(given.get(key), inner) for key, inner in form.items()}
    if form == _WORD:
        return printable(told)[:16] if isinstance(told, str) else ""
    is_number = isinstance(told, int | float) and not isinstance(told, bool)
    if not is_number or not 0 <= told < 2**63:  # type: ignore[operator]
        return 0
    return told if form == _NUMBER else int(told)  # type: ignore[call-overload]


@dataclass
class PagerStatistics:
    """The receiver's: what faults cost.  Counted by the pager's threads, looked at by others."""

    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    vcpu_block_s: dict[int, float] = field(default_factory=dict)
    requests: int = 0
    """Pages asked for over the pull lane."""
    ahead_pages: int = 0
    """Pages that were asked for before anybody needed them; the push may have been faster."""
    pulled_pages: int = 0
    """Pages of the pull lane that came first."""
    dropped_pages: int = 0
    populate_evicted: str = ""
    checkpoints: int = 0
    """Kept by the source."""
    checkpoint_pages: int = 0
    checkpoint_pause_s: float = 0.0
    """For which the guest stood still, in all."""
    longest_pause_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, vcpu: int, seconds: float) -> None:
        with self._lock:
            self.latency.record(seconds)
            self.vcpu_block_s[vcpu] = self.vcpu_block_s.get(vcpu, 0.0) + seconds

    def stood_still(self, seconds: float) -> None:
        """For a checkpoint."""
        self.checkpoint_pause_s += seconds
        self.longest_pause_s = max(self.longest_pause_s, seconds)

    def summary(self) -> dict[str, Any]:
        with self._lock:
            latency, blocked = self.latency.summary(), sorted(self.vcpu_block_s.items())
        return {
            "fault_latency_us": latency,
            "vcpu_block_s": {str(vcpu): round(s, 6) for vcpu, s in blocked},
            "pull": {"requests": self.requests, "ahead": self.ahead_pages, "pages": self.pulled_pages},
            "dropped_pages": self.dropped_pages,
            "populate_evicted": self.populate_evicted,
            "checkpoints": {
                "kept": self.checkpoints,
                "pages": self.checkpoint_pages,
                "pause_s": round(self.checkpoint_pause_s, 6),
                "longest_pause_s": round(self.longest_pause_s, 6),
            },
        }


@dataclass
class SenderStatistics:
    """The sender's: what was sent, and when."""

    strategy: str = ""
    memory_bytes: int = 0
    started: float = 0.0
    suspended: float = 0.0
    """When that was asked for."""
    resumed: float = 0.0
    finished: float = 0.0
    rounds: int = 0
    precopy_pages: int = 0
    switchover_pages: int = 0
    missing_pages: int = 0
    push_pages: int = 0
    push_bytes: int = 0
    pull_pages: int = 0
    pull_zero_pages: int = 0
    zero_pages: int = 0
    bytes_sent: int = 0
    rejoins: int = 0
    """How often the lanes were lost, and the session taken up again."""

    @property
    def downtime_s(self) -> float:
        """0 where a predecessor suspended the guest: when, died with it."""
        return max(self.resumed - self.suspended, 0.0) if self.suspended else 0.0

    def summary(self) -> dict[str, Any]:
        total = (self.finished or time.monotonic()) - self.started if self.started else 0.0
        pages = self.precopy_pages + self.switchover_pages + self.push_pages + self.pull_pages
        return {
            "strategy": self.strategy,
            "memory_bytes": self.memory_bytes,
            "total_s": round(total, 6),
            "downtime_s": round(self.downtime_s, 6),
            "precopy": {"rounds": self.rounds, "pages": self.precopy_pages},
            "switchover": {"pages": self.switchover_pages, "missing_pages": self.missing_pages},
            "push": {"pages": self.push_pages, "bytes": self.push_bytes},
            "zero_pages": self.zero_pages + self.pull_zero_pages,
            "bytes_sent": self.bytes_sent,
            "rejoins": self.rejoins,
            "throughput_bytes_per_s": round(pages * 4096 / total) if total > 0 else 0,
        }
