# SPDX-License-Identifier: GPL-2.0-or-later
"""When to stop precopying: the policy that the sender consults after every batch.  Sans-IO.

A policy gets numbers and returns a :class:`Decision`.  Another round of precopy is worth its time
while a round leaves less to send than the round before.  The rest can be sent with the guest
suspended (stop-and-copy) if that fits the downtime target.  Otherwise the rest follows after the
switchover (postcopy), where a page that the guest touches before the page is pushed costs a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from migrate.options import PolicyOptions, Strategy
from xenbackend.pages import PAGE_SIZE

CONVERGING = 0.8
"""Precopy converges while a round leaves less than this share of the pages of the round before."""


class Decision(Enum):
    CONTINUE = "continue"
    STOP_AND_COPY = "stop-and-copy"
    POSTCOPY = "postcopy"
    ABORT = "abort"


@dataclass(frozen=True)
class PrecopyProgress:
    """The state of precopy after a batch."""

    round: int
    """The number of the round; round 1 is of all memory."""
    round_finished: bool
    dirty_pages: int
    """The pages that remain to be sent.  At the end of a round they are the pages dirtied during
    it; within a round they are the rest of the round.
    """
    previous_dirty_pages: int
    """``dirty_pages`` at the end of the round before; in the first round, all pages."""
    bytes_per_s: float
    """The measured rate of sending; 0 if it is unknown."""
    postcopy_asked: bool = False
    """An administrator has requested ``postcopy-now``."""

    @property
    def stop_and_copy_ms(self) -> float:
        """Return the time that sending the dirty pages would take."""
        return (
            self.dirty_pages * PAGE_SIZE / self.bytes_per_s * 1000
            if self.bytes_per_s
            else float("inf")
        )


class Policy(Protocol):
    def decide(self, progress: PrecopyProgress) -> Decision: ...


@dataclass(frozen=True)
class DefaultPolicy:
    strategy: Strategy
    options: PolicyOptions = PolicyOptions()

    def decide(self, progress: PrecopyProgress) -> Decision:
        can_page = self.strategy.pages_after_handover
        if can_page and (progress.postcopy_asked or self.strategy is Strategy.POSTCOPY):
            return Decision.POSTCOPY
        if not progress.round_finished:
            return Decision.CONTINUE
        if (
            progress.dirty_pages <= self.options.dirty_threshold
            or progress.stop_and_copy_ms <= self.options.downtime_target_ms
        ):
            return Decision.STOP_AND_COPY
        last_round = progress.round >= self.options.max_rounds
        if not can_page:
            return Decision.STOP_AND_COPY if last_round else Decision.CONTINUE
        converging = progress.dirty_pages < progress.previous_dirty_pages * CONVERGING
        return Decision.CONTINUE if converging and not last_round else Decision.POSTCOPY
