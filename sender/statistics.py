# SPDX-License-Identifier: GPL-2.0-or-later
"""What was sent and when, and the receiver's counters as the sender accepts them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from migrate.protocol.messages import printable
from sender.policy import PrecopyProgress

_COUNT, _NUMBER, _WORD = "count", "number", "word"
_PEERS: dict[str, Any] = {
    "fault_latency_us": {
        "count": _COUNT, "mean": _NUMBER, "p50": _NUMBER, "p99": _NUMBER, "max": _NUMBER,
        "histogram": {None: _COUNT},
    },
    "vcpu_block_s": {None: _NUMBER},
    "pull": {"requests": _COUNT, "ahead": _COUNT, "pages": _COUNT},
    "dropped_pages": _COUNT,
    "populate_evicted": _WORD,
    "checkpoints": {
        "kept": _COUNT, "pages": _COUNT, "pause_s": _NUMBER, "longest_pause_s": _NUMBER,
    },
}  # fmt: skip
"""The keys of ``PagerStatistics.summary`` (``receiver/statistics.py``).  ``None`` stands for any
number as a key.
"""
_MOST_KEYS = 512
_EXPECTED = (
    "pages", "bytes_per_s", "fault_us", "round_trip_us", "stop_and_copy_ms", "postcopy_ms",
)  # fmt: skip


def from_peer(value: object) -> dict[str, Any]:
    """Return the peer's counters in the form of ``PagerStatistics.summary``
    (``receiver/statistics.py``), whatever the peer has sent.

    Unknown keys are left out.  A value that is missing or of the wrong type is 0.
    """
    found: dict[str, Any] = _checked(value, _PEERS)
    return found


def _checked(value: object, form: Any) -> Any:
    if isinstance(form, dict):
        given = value if isinstance(value, dict) else {}
        if None in form:
            numbers = [
                key
                for key in given
                if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
            ]
            return {key: _checked(given[key], form[None]) for key in numbers[:_MOST_KEYS]}
        return {key: _checked(given.get(key), inner) for key, inner in form.items()}
    if form == _WORD:
        return printable(value)[:16] if isinstance(value, str) else ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 2**63:  # type: ignore[operator]
        return 0
    return value if form == _NUMBER else int(value)  # type: ignore[call-overload]


@dataclass
class SenderStatistics:
    """The sender's counters and times."""

    strategy: str = ""
    memory_bytes: int = 0
    started: float = 0.0
    suspended: float = 0.0
    """The time at which the suspension was requested."""
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
    ahead_pages: int = 0
    """The number of the pages on the pull lane that no vCPU waited for yet."""
    zero_pages: int = 0
    push_lane_bytes: int = 0
    """Everything that was put on push lanes that are closed."""
    pull_lane_bytes: int = 0
    expected: PrecopyProgress | None = None
    """What the policy has compared last; the rate is known."""
    rejoins: int = 0
    """How often the lanes were lost and the session was resumed."""

    @property
    def downtime_s(self) -> float:
        """The downtime; 0 if a predecessor suspended the guest, because the journal does not have
        the time.
        """
        return max(self.resumed - self.suspended, 0.0) if self.suspended else 0.0

    def summary(self, push_bytes: int = 0, pull_bytes: int = 0) -> dict[str, Any]:
        """Return the figures for the result.  ``push_bytes``, ``pull_bytes``: what was put on the
        lanes, also on those that are open.
        """
        lanes = {"push_bytes": push_bytes, "pull_bytes": pull_bytes}
        total = (self.finished or time.monotonic()) - self.started if self.started else 0.0
        pages = self.precopy_pages + self.switchover_pages + self.push_pages + self.pull_pages
        return {
            "strategy": self.strategy,
            "memory_bytes": self.memory_bytes,
            "total_s": round(total, 6),
            "downtime_s": round(self.downtime_s, 6),
            "precopy": {"rounds": self.rounds, "pages": self.precopy_pages},
            "switchover": {"pages": self.switchover_pages, "missing_pages": self.missing_pages},
            "expected": _summary(self.expected),
            "push": {"pages": self.push_pages, "bytes": self.push_bytes},
            "zero_pages": self.zero_pages + self.pull_zero_pages,
            "bytes_sent": sum(lanes.values()),
            "lanes": lanes,
            "answered": {
                "fault_pages": self.pull_pages - self.ahead_pages,
                "ahead_pages": self.ahead_pages,
            },
            "rejoins": self.rejoins,
            "throughput_bytes_per_s": round(pages * 4096 / total) if total > 0 else 0,
        }


def _summary(compared: PrecopyProgress | None) -> dict[str, Any]:
    """Return what the policy has compared.  What is unknown is 0."""
    if compared is None:
        return dict.fromkeys(_EXPECTED, 0)
    return {
        "pages": compared.dirty_pages,
        "bytes_per_s": round(compared.bytes_per_s),
        "fault_us": round(compared.fault_s * 1e6),
        "round_trip_us": round(compared.round_trip_s * 1e6),
        "stop_and_copy_ms": round(compared.stop_and_copy_ms, 3),
        "postcopy_ms": round(compared.postcopy_ms, 3),
    }
