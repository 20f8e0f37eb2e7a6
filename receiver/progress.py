# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of an incoming migration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrate.outcomes import ENDED
from migrate.service.progress import LEAST_BYTES, STEADY_S, Phases, Rate, rounded, time_left_s

AFTER_HANDOVER = ("deciding", "postcopy", "completing")
"""The phases in which the sender sends what is missing."""
QUIET_S = 5.0
"""A shorter time in which nothing is copied is not shown."""


@dataclass
class IncomingProgress:
    """The values that ``list`` shows besides the phase.  No decision depends on them.  ``None``:
    unknown, or it does not apply.
    """

    domain: str = ""
    outstanding: int = 0
    waiting: int = 0
    unprotected: str = ""
    """Why there are no further checkpoints, although they were requested."""
    problem: str = ""
    io_fails_in_s: float | None = None
    """The time until dom0 gives up I/O to missing pages.  ``None``: there are lanes, or the guest
    has no devices in dom0.
    """
    started_at: float | None = None
    """Seconds since 1970."""
    elapsed_s: float | None = None
    """The time from the connection of the sender to now, or to the end."""
    pages_done: int | None = None
    """The pages that have arrived of those that were missing at the handover.  If the journal is of
    an earlier release: of those that were missing when this process began to serve the guest.
    """
    pages_total: int | None = None
    bytes_received: int = 0
    """Messages and pages.  Of a page that took the fast path the contents count, without its
    message.
    """
    bytes_per_s: float | None = None
    """The rate at which bytes were received in the last seconds."""
    quiet_s: float | None = None
    """For how long the sender has copied nothing in the background.  The pages that vCPUs wait for
    do not count.  ``None``: for less than :data:`QUIET_S`, or nothing is to come.
    """
    eta_s: float | None = None
    """The time until the migration is expected to be completed.  Only a sender can expect the end
    of precopy.  ``None`` while nothing is copied in the background.
    """
    faults: int | None = None
    latency_us: int | None = None
    """The median latency of the faults so far."""
    faults_per_s: float | None = None
    longest_wait_us: int | None = None
    """The longest that a vCPU has waited for a page, or has been waiting for one."""
    phases: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Faults:
    """What the pager has counted of a guest that is served, or was."""

    count: int
    latency_us: int
    longest_wait_us: int


class Meter:
    """Keeps those values of an :class:`IncomingProgress` up to date that depend on time."""

    def __init__(self, progress: IncomingProgress, started: float | None):
        """``started``: when the migration began (time.monotonic()); ``None``: a predecessor had
        it.
        """
        self._progress = progress
        self._started = started
        self._ended: float | None = None
        self._phases = Phases()
        self._bytes, self._pages, self._faults = Rate(LEAST_BYTES), Rate(), Rate()
        self._pushed, self._looked_at, self._copied_at = -LEAST_BYTES, 0.0, 0.0
        """The bytes of background copying at a look, when that was, and when some were last new."""

    def enter(self, now: float, at: float, phase: str) -> None:
        """Note the phase.  ``now``: time.monotonic(); ``at``: seconds since 1970."""
        self._phases.add(at, phase)
        if phase in ENDED and self._ended is None:
            self._ended = now

    def copying(self, now: float, phase: str, pushed: int, *, is_busy: bool) -> None:
        """Note what background copying has brought.  ``now``: time.monotonic().  ``pushed``: the
        bytes on the push lane, which also has small messages at any time.  ``is_busy``: this end
        puts memory in place, or evicts pages, and the sender may wait for it.
        """
        shown = self._progress
        is_to_come = phase == "precopy" or (phase in AFTER_HANDOVER and shown.outstanding > 0)
        if is_busy or not is_to_come or pushed >= self._pushed + LEAST_BYTES:
            self._pushed, self._looked_at, self._copied_at = pushed, now, now
        elif now - self._looked_at >= QUIET_S:  # small messages do not add up
            self._pushed, self._looked_at = pushed, now
        quiet_s = now - self._copied_at
        shown.quiet_s = round(quiet_s, 1) if quiet_s >= QUIET_S else None

    def measure(self, now: float, phase: str, bytes_received: int, faults: Faults | None) -> None:
        """``now``: time.monotonic().  ``faults``: ``None`` before the guest is served."""
        shown = self._progress
        shown.phases = list(self._phases.began)
        shown.bytes_received = bytes_received
        if self._started is not None:
            shown.elapsed_s = round((self._ended or now) - self._started, 1)
        if faults is not None:
            shown.pages_total = shown.pages_total or shown.outstanding
            shown.pages_done = max(shown.pages_total - shown.outstanding, 0)
            shown.faults, shown.latency_us = faults.count, faults.latency_us
            shown.longest_wait_us = faults.longest_wait_us
        shown.bytes_per_s = shown.faults_per_s = shown.eta_s = None
        if phase in ENDED:
            return
        self._bytes.add(now, bytes_received)
        shown.bytes_per_s = rounded(self._bytes.per_s(now))
        if faults is not None and shown.pages_done is not None:
            self._faults.add(now, faults.count)
            self._pages.add(now, shown.pages_done)
            shown.faults_per_s = rounded(self._faults.per_s(now), 1)
            pages_per_s = self._pages.per_s(now, over_s=STEADY_S)
            if phase in AFTER_HANDOVER and shown.quiet_s is None:
                shown.eta_s = rounded(time_left_s(shown.outstanding, pages_per_s), 1)
