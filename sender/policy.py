# SPDX-License-Identifier: GPL-2.0-or-later
"""When to stop precopying: the policy that the sender consults after every batch.  Sans-IO.

A policy gets numbers and returns a :class:`Decision`.  Another round of precopy is worth its time
while a round leaves less to send than the round before.  What is left then is sent while the guest
is suspended (stop-and-copy), or after the switchover (postcopy).  Stop-and-copy freezes the guest
for the time that the rest takes.  After a switchover the guest is frozen at each page that it
touches before the page is pushed.  The policy expects both times from what was measured during
precopy, and chooses the shorter one.

If stop-and-copy is the shorter one, the guest gets as many rounds as xl would make, and so is not
frozen for longer than by xl's own migration.

An administrator may limit the time of precopy, and has chosen then what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from migrate.options import OnTimeout, PolicyOptions, Strategy
from xenbackend.pages import PAGE_SIZE

CONVERGING = 0.8
"""Precopy converges while a round leaves less than this share of the pages of the round before."""
FIRST_FAULTS, FAULT_SHARE, MOST_FAULTS = 80, 1 / 32, 500
"""The faults that a guest is expected to wait for before its programs run again: a number that its
kernel needs at once, a share of the missing pages, and the most.  Linux guests that lacked 1,200,
1,700 and 13,090 pages had 116, 118 and 414 faults.  With more faults the programs run in between.
"""
WAITING = 0.5
"""The share of the time of the push for which a vCPU is expected to wait, if faults do not slow the
push down.
"""


class Decision(Enum):
    CONTINUE = "continue"
    STOP_AND_COPY = "stop-and-copy"
    POSTCOPY = "postcopy"
    CANCEL = "cancel"


AT_TIMEOUT = {
    OnTimeout.POSTCOPY: Decision.POSTCOPY,
    OnTimeout.SUSPEND: Decision.STOP_AND_COPY,
    OnTimeout.CANCEL: Decision.CANCEL,
}


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
    """The rate at which the destination takes pages in; 0 if it is unknown."""
    fault_s: float = 0.0
    """The time that a fault is expected to take; 0 if it is unknown."""
    round_trip_s: float = 0.0
    """The part of that time in which the link alone works, and no CPU; 0 if it is unknown."""
    postcopy_asked: bool = False
    """An administrator has requested ``postcopy-now``."""
    elapsed_s: float = 0.0
    """The time since the beginning of precopy, without pauses."""

    @property
    def stop_and_copy_ms(self) -> float:
        """Return for how long stop-and-copy is expected to freeze the guest."""
        return (
            self.dirty_pages * PAGE_SIZE / self.bytes_per_s * 1000
            if self.bytes_per_s
            else float("inf")
        )

    @property
    def postcopy_ms(self) -> float:
        """Return for how long postcopy is expected to freeze the guest.

        Nothing is missing any more when the push has ended.  The push takes as long as
        stop-and-copy, and longer by the time for which faults need the CPUs.
        """
        faults = min(self.dirty_pages, FIRST_FAULTS + self.dirty_pages * FAULT_SHARE, MOST_FAULTS)
        of_faults_ms = faults * self.fault_s * 1000
        if not self.round_trip_s:
            return of_faults_ms
        slower = max(1.0, self.fault_s / self.round_trip_s)
        return min(of_faults_ms, WAITING * slower * self.stop_and_copy_ms)


@dataclass(frozen=True)
class DefaultPolicy:
    strategy: Strategy
    options: PolicyOptions = PolicyOptions()

    def decide(self, progress: PrecopyProgress) -> Decision:
        can_page = self.strategy.pages_after_handover
        if can_page and (progress.postcopy_asked or self.strategy is Strategy.POSTCOPY):
            return Decision.POSTCOPY
        timeout_s = self.options.timeout_s
        if timeout_s is not None and progress.elapsed_s >= timeout_s:
            return AT_TIMEOUT[self.options.on_timeout]
        if not progress.round_finished:
            return Decision.CONTINUE
        if (
            progress.dirty_pages <= self.options.dirty_threshold
            or progress.stop_and_copy_ms <= self.options.downtime_target_ms
        ):
            return Decision.STOP_AND_COPY
        sends_all = not can_page or progress.stop_and_copy_ms <= progress.postcopy_ms
        if progress.round >= self.options.max_rounds:
            return Decision.STOP_AND_COPY if sends_all else Decision.POSTCOPY
        converging = progress.dirty_pages < progress.previous_dirty_pages * CONVERGING
        return Decision.CONTINUE if sends_all or converging else Decision.POSTCOPY
