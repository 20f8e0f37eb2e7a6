# SPDX-License-Identifier: GPL-2.0-or-later
"""What an administrator asks of a migration, wherever the request is made: the command line, the
configuration, the control socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from migrate.errors import MigrationError
from migrate.units import MAX_SIZE

LEAST_BANDWIDTH = 4096
"""One page a second.  ``PAGE_SIZE`` is not imported, because commands load this module and must not
load numpy.
"""
MAX_CHECKPOINT_MS = 3_600_000
"""The longest time between two checkpoints that a sender may ask for."""


class Strategy(Enum):
    HYBRID = "hybrid"
    POSTCOPY = "postcopy"
    PRECOPY = "precopy"

    @property
    def pages_after_handover(self) -> bool:
        """The receiver has to be able to page."""
        return self is not Strategy.PRECOPY


@dataclass(frozen=True)
class PolicyOptions:
    max_rounds: int = 5
    """Rounds after which precopy ends (libxl's default for xl migrate is 5)."""
    dirty_threshold: int = 50
    """If at most so many pages are dirty, they are sent while the guest is suspended (Xen: 50)."""
    downtime_target_ms: float = 20.0
    """If the dirty pages can be sent in this time, they are sent while the guest is suspended."""

    def problems(self) -> str | None:
        if type(self.max_rounds) is not int or not 1 <= self.max_rounds <= 1000:
            return f"--max-rounds {self.max_rounds}: a whole number, 1 to 1000"
        if type(self.dirty_threshold) is not int or self.dirty_threshold < 0:
            return f"--dirty-threshold {self.dirty_threshold}: a whole number, at least 0"
        if not 0 < self.downtime_target_ms <= 3_600_000:
            target = self.downtime_target_ms
            return f"--downtime-target {target}: more than 0 milliseconds, at most an hour"
        return None


@dataclass(frozen=True)
class MigrationOptions:
    strategy: Strategy = Strategy.HYBRID
    policy: PolicyOptions = PolicyOptions()
    bandwidth_bytes_per_s: float | None = None
    checkpoint_every_s: float | None = None
    """The interval at which the guest's state at the destination is sent back, so that the guest
    survives the loss of the destination.  ``None``: nothing is sent back.
    """
    take_log_dirty: bool = False
    """Use log-dirty even if it is on already: an administrator has found that no other program uses
    it any more.
    """

    def __post_init__(self) -> None:
        """Check the values, because another program than ours may have sent the request.  Raises
        :class:`MigrationError`.
        """
        if problem := self.policy.problems():
            raise MigrationError(problem)
        cap, every_s = self.bandwidth_bytes_per_s, self.checkpoint_every_s
        if cap is not None and not LEAST_BANDWIDTH <= cap <= MAX_SIZE:
            raise MigrationError(
                f"bandwidth {cap}: at least one page ({LEAST_BANDWIDTH} bytes) a second, or none "
                "for no cap"
            )
        if every_s is not None and not 0.001 <= every_s <= MAX_CHECKPOINT_MS / 1000:
            raise MigrationError(
                f"checkpoints every {every_s} s: 0.001 s to {MAX_CHECKPOINT_MS / 1000:g} s"
            )
        if self.checkpoint_every_s is not None and not self.strategy.pages_after_handover:
            raise MigrationError(
                "--strategy precopy has nothing to protect: with it the guest arrives as a whole"
            )
