# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of a migration, which `list` and the progress display show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from migrate.control.client import Json
from migrate.options import MigrationOptions
from migrate.service.journal import Kept
from migrate.service.progress import LEAST_BYTES, STEADY_S, Phases, Rate, rounded, time_left_s
from sender.policy import CONVERGING, PrecopyProgress
from xenbackend.pages import PAGE_SIZE

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
    """What ``list`` and the progress display show.  ``None``: unknown, or it does not apply."""

    round: int = 0
    pages_done: int = 0
    """The pages that are done, of the current round or of the pages missing at the switchover."""
    pages_total: int = 0
    outstanding: int = 0
    faults: int = 0
    latency_us: int = 0
    bytes_sent: int = 0
    """Everything that was put on the lanes."""
    checkpoints: int = 0
    """The number of checkpoints that have arrived.  The guest would continue here from the last."""
    checkpoint_at: float = 0.0
    """The time at which the last checkpoint arrived."""
    unprotected: str = ""
    """Why there are no further checkpoints, although they were requested."""
    problem: str = ""
    started_at: float | None = None
    """Seconds since 1970."""
    elapsed_s: float | None = None
    """The time from the start to now, or to the end."""
    bytes_per_s: float | None = None
    """The rate at which bytes were sent in the last seconds."""
    dirty_bytes_per_s: float | None = None
    """The rate at which the guest dirtied memory in the last round; each page counts once."""
    expected_freeze_ms: float | None = None
    """The expected freeze of the guest, if precopy ends as at the end of the last round:
    by stop-and-copy or by postcopy, whichever is shorter and allowed.
    """
    eta_s: float | None = None
    """The time until the migration is expected to be completed.  ``None`` while copying is
    paused.
    """
    eta_least_s: float | None = None
    """The least time until completion at the present rate."""
    faults_per_s: float | None = None
    longest_wait_us: int | None = None
    """The longest that a vCPU has waited for a page, or has been waiting for one."""
    phases: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Now:
    """What the figures that depend on time are made of."""

    at: float
    """time.monotonic()"""
    phase: str
    has_ended: bool
    options: MigrationOptions
    is_paused: bool
    """An operator has paused copying."""
    started: float
    """time.monotonic(); 0: not yet, or it is not known."""
    finished: float
    """time.monotonic(); 0: not yet."""
    bytes_sent: int
    pages_sent: int
    """The number of pages that were sent in precopy."""
    pages_confirmed: int
    """After the handover."""
    memory_pages: int
    expected: PrecopyProgress | None


class Meter:
    """Keeps those values of a :class:`Progress` up to date that depend on time."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self.phases = Phases()
        self._bytes = Rate(LEAST_BYTES)
        self._sent, self._confirmed, self._faults = Rate(), Rate(), Rate()

    def measure(self, now: Now) -> None:
        shown = self._progress
        shown.phases = list(self.phases.began)
        shown.bytes_sent = now.bytes_sent
        if now.started:
            shown.elapsed_s = round((now.finished or now.at) - now.started, 1)
        shown.bytes_per_s = shown.faults_per_s = shown.eta_s = shown.eta_least_s = None
        shown.expected_freeze_ms = None
        if now.has_ended:
            return
        self._bytes.add(now.at, now.bytes_sent)
        shown.bytes_per_s = rounded(self._bytes.per_s(now.at))
        if now.phase == "precopy":
            self._sent.add(now.at, now.pages_sent)
            self._measure_precopy(now, self._sent.per_s(now.at, over_s=STEADY_S))
        elif now.phase in ("postcopy", "completing", "deciding"):
            self._faults.add(now.at, shown.faults)
            shown.faults_per_s = rounded(self._faults.per_s(now.at), 1)
            self._confirmed.add(now.at, now.pages_confirmed)
            pages_per_s = self._confirmed.per_s(now.at, over_s=STEADY_S)
            shown.eta_s = rounded(time_left_s(shown.outstanding, pages_per_s), 1)
            shown.eta_least_s = shown.eta_s
        if now.is_paused:  # the end of the pause is not known
            shown.eta_s = shown.eta_least_s = None

    def _measure_precopy(self, now: Now, pages_per_s: float | None) -> None:
        shown = self._progress
        if now.expected is not None:
            shown.expected_freeze_ms = rounded(
                expected_freeze_ms(now.expected, now.options.strategy.pages_after_handover), 1
            )
        if not shown.pages_total:  # no round: with `--strategy postcopy`, pages are evicted
            return
        left = shown.pages_total - shown.pages_done
        if not left:  # another round may follow
            return
        shown.eta_least_s = rounded(time_left_s(left, pages_per_s), 1)
        if pages_per_s and shown.dirty_bytes_per_s is not None:
            rest = rest_of_precopy(
                left,
                shown.pages_total,
                dirty_share=shown.dirty_bytes_per_s / PAGE_SIZE / pages_per_s,
                memory_pages=now.memory_pages,
                rounds=now.options.policy.max_rounds - shown.round,
                enough=now.options.policy.dirty_threshold,
            )
            shown.eta_s = rounded(time_left_s(rest, pages_per_s), 1)


def expected_freeze_ms(expected: PrecopyProgress, can_page: bool) -> float | None:
    """Return the shorter one of the expected freezes; ``None`` if none is known."""
    if not expected.bytes_per_s:
        return None
    if can_page and expected.fault_s:
        return min(expected.stop_and_copy_ms, expected.postcopy_ms)
    return expected.stop_and_copy_ms


def rest_of_precopy(
    left: int, total: int, *, dirty_share: float, memory_pages: int, rounds: int, enough: int
) -> int:
    """Return how many pages are expected to be sent until the migration is completed.

    A round of ``total`` pages has ``left`` pages to go, and ``rounds`` may follow.
    ``dirty_share``: the pages that the guest dirties while one page is sent.  ``enough``: so few
    pages are sent while the guest is suspended.  What the last round leaves is sent as well, by
    stop-and-copy or by postcopy.
    """
    rest, before = left, total
    for _round in range(max(rounds, 0)):
        dirty = min(round(before * dirty_share), memory_pages)
        rest += dirty
        if dirty <= enough or dirty >= before * CONVERGING:
            return rest
        before = dirty
    return rest + min(round(before * dirty_share), memory_pages)


def kept_line(entry: Kept) -> Json:
    """Return an entry of the journal whose migration was not resumed, with the keys of
    ``list``.
    """
    line = {
        "id": entry.session,
        "direction": "outgoing",
        "domain": entry.domain,
        "domid": None,
        "uuid": None,
        "ended_at": None,
        "peer": "",
        "strategy": "",
        "handed_over": False,
        "paused": False,
        "checkpoint_age_s": None,
        "phase": "",
        "outcome": "",
        **asdict(Progress(problem=entry.problem)),
    }
    del line["checkpoint_at"]
    return {**line, "unknown": [key for key, value in line.items() if not value]}
