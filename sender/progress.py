# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of a migration, which `list` and the progress display show."""

from __future__ import annotations

from dataclasses import dataclass

BEFORE_RESTART = (
    "round", "memory_bytes", "total_s", "downtime_s", "precopy", "switchover", "expected",
)  # fmt: skip
"""What a predecessor has measured, and has not noted in its journal."""
OF_DESTINATION = ("outstanding", "pages_done", "pages_total", "faults", "latency_us")
"""What a successor has only after the destination has reconnected."""
OF_CHECKPOINTS = ("checkpoints", "checkpoint_age_s")
"""What a successor has only after the next checkpoint of a protected guest has arrived."""


@dataclass
class Progress:
    """What ``list`` and the progress display show."""

    round: int = 0
    pages_done: int = 0
    """The pages that are done, of the current round or of the pages missing at the switchover."""
    pages_total: int = 0
    outstanding: int = 0
    faults: int = 0
    latency_us: int = 0
    bytes_sent: int = 0
    checkpoints: int = 0
    """The number of checkpoints that have arrived.  The guest would continue here from the last."""
    checkpoint_at: float = 0.0
    """The time at which the last checkpoint arrived."""
    unprotected: str = ""
    """Why there are no further checkpoints, although they were requested."""
    problem: str = ""
