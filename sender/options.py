# SPDX-License-Identifier: GPL-2.0-or-later
"""What an administrator asks of a migration, and what it shows of itself."""

from __future__ import annotations

from dataclasses import dataclass

from migrate.errors import MigrationError
from migrate.policy import MAX_CHECKPOINT_MS, PolicyOptions, Strategy
from migrate.units import MAX_SIZE


@dataclass(frozen=True)
class MigrationOptions:
    strategy: Strategy = Strategy.HYBRID
    policy: PolicyOptions = PolicyOptions()
    bandwidth_bytes_per_s: float | None = None
    checkpoint_every_s: float | None = None
    """What the guest becomes at the destination is sent back, so that it survives that; ``None``: it is not."""
    take_log_dirty: bool = False
    """Where log-dirty is on, an administrator says that nobody uses it any more."""

    def __post_init__(self) -> None:
        """Raises :class:`MigrationError`: a request may come from another program than ours."""
        if problem := self.policy.problems():
            raise MigrationError(problem)
        cap, every_s = self.bandwidth_bytes_per_s, self.checkpoint_every_s
        if cap is not None and not 0 < cap <= MAX_SIZE:
            raise MigrationError(f"bandwidth {cap}: more than 0 bytes a second, or none for no cap")
        if every_s is not None and not 0.001 <= every_s <= MAX_CHECKPOINT_MS / 1000:
            raise MigrationError(f"checkpoints every {every_s} s: 0.001 s to {MAX_CHECKPOINT_MS / 1000:g} s")
        if self.checkpoint_every_s is not None and not self.strategy.pages_after_handover:
            raise MigrationError("--strategy precopy has nothing to protect: there the guest arrives as a whole")


@dataclass
class Progress:
    """What ``list`` and the progress display show."""

    phase: str = "connecting"
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
