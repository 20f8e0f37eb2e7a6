# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration is expected to take, before it begins.  Sans-IO: what was measured goes in.

Precopy is played round by round: a round takes as long as its pages take on the link, and the guest
dirties pages meanwhile.  After each round :class:`sender.policy.DefaultPolicy` decides, as it does
in the migration itself.  So the expected end of precopy, and the expected freezes, are the
policy's.

A guest that writes the same pages again dirties fewer and fewer further pages.  The number of dirty
pages is known for some times within the measurement.  Later the number is extrapolated as for a
guest that writes a set of pages at random: of the pages that are left, the same share is dirtied in
equal times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from migrate.options import MigrationOptions, Strategy
from migrate.units import human_us
from sender.policy import Decision, DefaultPolicy, PrecopyProgress
from xenbackend.pages import PAGE_SIZE

SWITCHOVER_S = 0.005
"""The downtime without pages: the guest is suspended, and its vCPUs are moved."""
MESSAGES = 2
"""How often an end waits for the other one in the downtime."""
ABOUT = 1.1
"""Of two strategies whose freezes differ by less than this factor, the sooner one is better."""
LEAST_S = 0.001
"""A difference below this time is none."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a guest and of the link to its destination."""

    memory_pages: int
    content_share: float
    """The share of the pages that are not zero."""
    dirtied: Sequence[tuple[float, int]]
    """Times in seconds, ascending, and how many pages the guest had dirtied by then, each of them
    counted once.
    """
    bytes_per_s: float
    """The rate at which the destination took pages in; above 0."""
    fault_s: float
    """The time of a page that was sent alone."""
    round_trip_s: float
    """The part of that time in which the link alone works; 0 if it is unknown."""

    def dirty_pages(self, seconds: float) -> int:
        """Return how many pages the guest is expected to dirty in this time."""
        known = [(0.0, 0), *self.dirtied]
        for (before_s, before), (at_s, pages) in pairwise(known):
            if seconds <= at_s:
                found = before + (pages - before) * (seconds - before_s) / (at_s - before_s)
                return min(round(found), self.memory_pages)
        return min(round(self._later(seconds)), self.memory_pages)

    def _later(self, seconds: float) -> float:
        """Return the number for a time after the measurement."""
        if not self.dirtied:
            return 0.0
        last_s, last = self.dirtied[-1]
        half = self.dirty_pages(last_s / 2)
        further = last - half
        if not 0 < further < half:  # no page is written twice, or none is written any more
            return last + max(further, 0) * 2 * (seconds - last_s) / last_s
        left = further / half  # of the pages to come, after half of the time
        return half / (1 - left) * (1 - math.pow(left, 2 * seconds / last_s))

    @property
    def dirty_bytes_per_s(self) -> float:
        """The dirty rate over the whole measurement; each page counts once."""
        if not self.dirtied:
            return 0.0
        last_s, last = self.dirtied[-1]
        return last * PAGE_SIZE / last_s


@dataclass(frozen=True)
class Expected:
    """What a strategy is expected to take."""

    strategy: Strategy
    ends_by: Decision
    rounds: int
    sent_pages: int
    missing_pages: int
    """The pages that arrive after the handover."""
    total_s: float
    downtime_s: float
    freeze_s: float
    """The longest time for which the guest's programs do not run: the downtime and, after a
    handover, the pages for which they wait at first.
    """


def expect(measured: Measured, options: MigrationOptions) -> Expected:
    """Return what a migration with these options is expected to take."""
    policy = DefaultPolicy(options.strategy, options.policy)
    rate = _capped(measured.bytes_per_s, options.bandwidth_bytes_per_s)
    seen = PrecopyProgress(
        0,
        True,
        measured.memory_pages,
        measured.memory_pages,
        measured.bytes_per_s,
        measured.fault_s,
        measured.round_trip_s,
    )
    left_bytes = measured.memory_pages * measured.content_share * PAGE_SIZE
    at_once = options.strategy is Strategy.POSTCOPY
    decision = policy.decide(seen) if at_once else Decision.CONTINUE
    sent = 0
    while decision is Decision.CONTINUE:
        takes_s, share = _round(left_bytes / rate, seen.elapsed_s, options.policy.timeout_s)
        left = seen.dirty_pages
        unsent = round(left * (1 - share))
        dirty = min(unsent + measured.dirty_pages(takes_s), measured.memory_pages)
        sent += left - unsent
        left_bytes = dirty * PAGE_SIZE
        seen = replace(
            seen,
            round=seen.round + 1,
            dirty_pages=dirty,
            previous_dirty_pages=left,
            elapsed_s=seen.elapsed_s + takes_s,
        )
        decision = policy.decide(seen)
    return _end(measured, options, seen, decision, sent, left_bytes)


def _round(takes_s: float, elapsed_s: float, timeout_s: float | None) -> tuple[float, float]:
    """Return how long a round takes that the time limit may end, and which share of it is done."""
    if timeout_s is None or elapsed_s + takes_s < timeout_s:
        return takes_s, 1.0
    rest_s = timeout_s - elapsed_s
    return rest_s, rest_s / takes_s


def _end(
    measured: Measured,
    options: MigrationOptions,
    seen: PrecopyProgress,
    decision: Decision,
    sent: int,
    left_bytes: float,
) -> Expected:
    """Return what follows precopy, besides precopy itself."""
    switchover_s = SWITCHOVER_S + MESSAGES * measured.fault_s
    downtime_s = freeze_s = after_s = 0.0
    missing = 0
    if decision is Decision.STOP_AND_COPY:
        downtime_s = freeze_s = switchover_s + seen.stop_and_copy_ms / 1000
        sent += seen.dirty_pages
    elif decision is Decision.POSTCOPY:
        downtime_s, missing, waits_s = switchover_s, seen.dirty_pages, seen.postcopy_ms / 1000
        freeze_s = switchover_s + waits_s
        # While the guest waits, pages are missing.  So the push that the faults slow down lasts for
        # at least as long.
        push_s = left_bytes / _capped(measured.bytes_per_s, options.cap_of_postcopy)
        after_s = max(push_s, waits_s)
        sent += missing
    total_s = seen.elapsed_s + downtime_s + after_s
    return Expected(
        options.strategy, decision, seen.round, sent, missing, total_s, downtime_s, freeze_s
    )


def _capped(bytes_per_s: float, cap: float | None) -> float:
    return bytes_per_s if cap is None else min(bytes_per_s, cap)


def recommend(expected: Sequence[Expected], downtime_target_ms: float) -> tuple[Expected, str]:
    """Return the best of the strategies that are possible, and the reason.

    Precopy is the best one if its freeze is short, because afterwards the guest needs this host no
    more.  Otherwise the best one has the shortest freeze, or about that and takes less time.
    """
    by_strategy = {one.strategy: one for one in expected}
    shortest = min(expected, key=lambda one: one.freeze_s)

    def is_about(one: Expected) -> bool:
        return one.freeze_s <= max(shortest.freeze_s * ABOUT, shortest.freeze_s + LEAST_S)

    precopy = by_strategy.get(Strategy.PRECOPY)
    if precopy is not None:
        frozen = f"it freezes the guest for {in_words(precopy.freeze_s)}"
        if len(expected) == 1:
            return precopy, f"{frozen}, and no other strategy is possible"
        if precopy.freeze_s * 1000 <= downtime_target_ms or is_about(precopy):
            within = (
                f", which is within the downtime target of {downtime_target_ms:g} ms"
                if precopy.freeze_s * 1000 <= downtime_target_ms
                else ", and no other strategy freezes the guest for less time"
            )
            return precopy, f"{frozen}{within}; this host is not needed after the handover"
    best = min(filter(is_about, expected), key=lambda one: one.total_s)
    others = [one for one in expected if one is not best]
    longest = max(others, key=lambda one: one.freeze_s, default=best)
    reason = f"it freezes the guest for {in_words(best.freeze_s)}"
    if longest.freeze_s > best.freeze_s:
        reason += f", and {longest.strategy.value} for {in_words(longest.freeze_s)}"
    sooner = [one for one in others if is_about(one) and one.total_s > best.total_s]
    if sooner:
        reason += f"; {sooner[0].strategy.value} takes longer in all"
    return best, reason


def in_words(seconds: float) -> str:
    return human_us(seconds * 1e6)
