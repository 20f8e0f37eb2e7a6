# SPDX-License-Identifier: GPL-2.0-or-later
"""What both daemons measure of a migration that is under way: rates, the time that is left, and the
phases so far.  Sans-IO except :func:`keep_measuring`; time is an argument.  No decision depends on
any of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from migrate.outcomes import MOST_PHASES
from migrate.tasks import kept_up

MEASURE_EVERY_S = 0.25
RATE_S = 3.0
"""A rate is that of the last seconds."""
LEAST_BYTES = 4096
"""The least step of a count of bytes: one page."""
LEAST_STEPS = 3
"""A rate is over this number of steps at least, also if they take longer than :data:`RATE_S`."""
STEADY_S = 1.0
"""What is expected is not derived from a rate over less than this time."""
SECOND_STEP_S = 30.0
"""How long a second step is waited for, before the rate is 0."""


def state_in_words(name: str, phase: str, problem: str) -> str:
    """Return a guest with the state of its migration, in which there may be no problem."""
    return f"{name} ({': '.join(filter(None, (phase, problem)))})"


class Rate:
    """The rate at which a count grows.

    A sender with a bandwidth cap sends megabytes at once and then waits, for seconds if the cap is
    low.  So the count grows in steps, and the rate is what was added after one step, up to another
    one, over the time between them.  The time before the first step and the time after the last one
    are not a part of that, because it is not known how much of a step belongs to them.

    ``least``: what a step has to add.  The messages that keep an idle lane alive are no steps.
    """

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._steps: deque[tuple[float, int]] = deque()
        """The times at which the count was found to have grown, and the count then."""
        self._first_at: float | None = None
        self._count = 0

    def add(self, now: float, count: int) -> None:
        """Note the count at ``now`` (seconds).  A smaller count than before begins a new rate."""
        if self._first_at is None or count < self._count:
            self._first_at, self._count = now, count
            self._steps.clear()
        if count < self._count + self._least:
            return
        self._count = count
        if self._is_silent(now):  # a pause or a lost link is no part of the rate after it
            self._steps.clear()
        self._steps.append((now, count))
        while len(self._steps) > LEAST_STEPS and self._steps[1][0] <= now - RATE_S:
            self._steps.popleft()

    def per_s(self, now: float, *, over_s: float = 0.0) -> float | None:
        """Return the rate a second; ``None`` while it is unknown, or while the steps are not
        ``over_s`` apart.
        """
        if self._first_at is None:
            return None
        if len(self._steps) < 2:
            quiet_since, patience_s = self._first_at, RATE_S
            if self._steps:
                quiet_since, patience_s = self._steps[0][0], SECOND_STEP_S
            return 0.0 if now - quiet_since > patience_s else None
        if self._is_silent(now):
            return 0.0
        (then, before), (last, count) = self._steps[0], self._steps[-1]
        if last - then < over_s:
            return None
        until = last if now - last <= 1.5 * self._pause_s else now
        return (count - before) / (until - then)

    @property
    def _pause_s(self) -> float:
        """The mean time between two steps, of which there are at least two."""
        return (self._steps[-1][0] - self._steps[0][0]) / (len(self._steps) - 1)

    def _is_silent(self, now: float) -> bool:
        """Whether the steps have ended, as far as their pauses show."""
        if len(self._steps) < 2:
            return False
        return now - self._steps[-1][0] > max(RATE_S, 2 * self._pause_s)


@dataclass
class Phases:
    """The phases of a migration and the times at which they began.  Any thread may add one."""

    began: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_PHASES))
    """``phase``, and ``at`` in seconds since 1970."""

    def add(self, now: float, phase: str) -> None:
        """Note the phase at ``now`` (seconds since 1970), if it is another one."""
        if not self.began or self.began[-1]["phase"] != phase:
            self.began.append({"phase": phase, "at": round(now, 3)})


def time_left_s(left: int, per_s: float | None) -> float | None:
    """Return the seconds until nothing is left; ``None`` if that is unknown, or never."""
    if not left:
        return 0.0
    return left / per_s if per_s else None


def rounded(value: float | None, digits: int = 0) -> float | None:
    return None if value is None else round(value, digits)


async def keep_measuring(
    measure: Callable[[], object],
    ended: trio.Event,
    pause_s: Callable[[], float] = lambda: MEASURE_EVERY_S,
) -> None:
    """Call ``measure`` again and again until the migration has ended, because a rate needs more
    than the counts at the time of a question.  An error of ``measure`` is logged, and ends nothing.
    """

    async def measure_again() -> None:
        while not ended.is_set():
            measure()
            with trio.move_on_after(pause_s()):
                await ended.wait()

    await kept_up("the progress of a migration", measure_again)
