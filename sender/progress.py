# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration shows of itself, to `list` and to the display of its progress."""

from __future__ import annotations

from dataclasses import dataclass

BEFORE_RESTART = ("round", "memory_bytes", "total_s", "downtime_s", "precopy", "switchover")
"""What a predecessor has measured, and has not noted in its journal."""
OF_DESTINATION = ("outstanding", "pages_done", "pages_total", "faults", "latency_us")
"""What a successor learns when the destination is in touch again."""


@dataclass
class Progress:
    """What ``list`` and the progress display show."""

    round: int = 0
    pages_done: int = 0
    """Of the current round, or of the pages missing at the switchover."""
    pages_total: int = 0
    outstanding: int = 0
    faults: int = 0
    latency_us: int = 0
    bytes_sent: int = 0
    checkpoints: int = 0
    """That have come back; the guest would go on here as it was at the last of them."""
    checkpoint_at: float = 0.0
    """When that came."""
    unprotected: str = ""
    """Why there are no further checkpoints, though they were asked for."""
    problem: str = ""
