# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of metrics, and their totals.  Sans-IO, and without the client library.

Each row is one figure of a migration: a number, or several numbers by a label, as ``show`` has
them.  :class:`Totals` adds the figures of ended migrations up, and so a counter does not shrink
when a migration ends.  ``docs/metrics.md`` has the rows as an operator sees them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from xenbackend.pages import PAGE_SIZE

PREFIX = "xen_postcopy_"
EACH = "migration_"
"""Follows the prefix in the name of a metric that has a series for each migration under way."""
OUTCOMES = ("completed", "failed", "cancelled", "rescued", "refused")
SUM = "sum"
"""The figure of a histogram that is not a bucket."""
FAULT_BOUNDS = tuple(2**power / 1e6 for power in range(4, 23))
"""The upper bounds of the buckets in seconds: 16 us to 4.2 s.  ``show`` has these powers of two."""
DOWNTIME_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
DURATION_BOUNDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)
Json = dict[str, Any]
Figures = Mapping[str, float]
"""Numbers by the value of the label, which is empty of a metric without a label.  Of a histogram:
by the bucket's upper bound as text, and :data:`SUM`.
"""
Place = Callable[[Json], float | None]
"""Returns a number of what ``show`` answers; ``None`` if the daemon does not have it."""


class Of(Enum):
    """Of which migrations there is a metric."""

    EACH = "each migration under way"
    BOTH = "each migration under way, and all together"
    ENDED = "all that have ended"


@dataclass(frozen=True)
class Numbers:
    """One number for each value of a label."""

    places: dict[str, Place]

    def __call__(self, shown: Json) -> Figures:
        found = {label: place(shown) for label, place in self.places.items()}
        return {label: value for label, value in found.items() if value is not None}


@dataclass(frozen=True)
class Histogram:
    bounds: tuple[float, ...]
    """The upper bounds of the buckets."""
    figures: Callable[[Json], Figures]

    def __call__(self, shown: Json) -> Figures:
        return self.figures(shown)


@dataclass(frozen=True)
class Metric:
    """``kind``: of OpenMetrics.  ``end``: the daemon that has the metric; empty: both have it."""

    name: str
    kind: str
    of: Of
    end: str
    meaning: str
    figures: Numbers | Histogram
    label: str = ""


def unit_of(name: str) -> str:
    """Return the unit that is the end of a metric's name; empty if there is none."""
    unit = name.rpartition("_")[2]
    return unit if unit in ("bytes", "seconds") else ""


# ---- figures ----
def at(*keys: str, scale: float = 1) -> Place:
    """Return the number at this place of what ``show`` answers."""

    def place(shown: Json) -> float | None:
        value: Any = shown
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        is_known = keys[-1] not in shown["unknown"] and isinstance(value, int | float)
        return value * scale if is_known else None

    return place


def one(*keys: str, scale: float = 1) -> Numbers:
    return Numbers({"": at(*keys, scale=scale)})


def by(**places: Place) -> Numbers:
    return Numbers(places)


def bucket(bounds: tuple[float, ...], value: float) -> str:
    """Return the upper bound of the bucket that has ``value``, as text."""
    return next((str(bound) for bound in bounds if value <= bound), str(math.inf))


def _fault_latency(shown: Json) -> Figures:
    details = shown["details"]
    found: Counter[str] = Counter()
    for below_us, count in details["fault_latency_us"]["histogram"].items():
        found[bucket(FAULT_BOUNDS, int(below_us) / 1e6)] += count
    # The waits of all vCPUs are the latencies of all faults.  Their sum, which is rounded, does not
    # shrink.
    return {**found, SUM: sum(details["vcpu_block_s"].values())}


def of_completed(bounds: tuple[float, ...], *keys: str) -> Histogram:
    """Return the histogram of the number at this place, of migrations that were completed."""
    place = at(*keys)

    def figures(shown: Json) -> Figures:
        value = place(shown)
        if shown["phase"] != "completed" or not value:
            return {}
        return {bucket(bounds, value): 1, SUM: value}

    return Histogram(bounds, figures)


COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"
METRICS = (
    Metric("sent_bytes", COUNTER, Of.BOTH, "sender",
        "everything that the sender put on its two connections, by `lane`: `push` or `pull`",
        by(push=at("details", "lanes", "push_bytes"), pull=at("details", "lanes", "pull_bytes")),
        label="lane"),
    Metric("sent_memory_bytes", COUNTER, Of.BOTH, "sender",
        "guest memory that was sent, zero pages included, by `reason`: `precopy`, `switchover` "
        "(while the guest was suspended), `push` (in the background afterwards), `fault`, "
        "`read_ahead`",
        by(
            precopy=at("details", "precopy", "pages", scale=PAGE_SIZE),
            switchover=at("details", "switchover", "pages", scale=PAGE_SIZE),
            push=at("details", "push", "pages", scale=PAGE_SIZE),
            fault=at("details", "answered", "fault_pages", scale=PAGE_SIZE),
            read_ahead=at("details", "answered", "ahead_pages", scale=PAGE_SIZE),
        ), label="reason"),
    Metric("zero_pages", COUNTER, Of.BOTH, "sender",
        "zero pages, which were sent without contents",
        one("details", "zero_pages")),
    Metric("rejoins", COUNTER, Of.BOTH, "sender",
        "how often the link was lost and the migration continued over another",
        one("details", "rejoins")),
    Metric("requested_pages", COUNTER, Of.BOTH, "receiver",
        "pages that the receiver has requested, by `reason`: `fault` or `read_ahead`",
        by(fault=at("details", "pull", "requests"), read_ahead=at("details", "pull", "ahead")),
        label="reason"),
    Metric("pulled_pages", COUNTER, Of.BOTH, "receiver",
        "pages that arrived because they were requested, before they were pushed",
        one("details", "pull", "pages")),
    Metric("dropped_pages", COUNTER, Of.BOTH, "receiver",
        "missing pages that the guest gave away",
        one("details", "dropped_pages")),
    Metric("checkpoints", COUNTER, Of.BOTH, "receiver",
        "checkpoints of protected guests that the source has kept",
        one("details", "checkpoints", "kept")),
    Metric("checkpoint_pause_seconds", COUNTER, Of.BOTH, "receiver",
        "for how long guests were suspended for checkpoints",
        one("details", "checkpoints", "pause_s")),
    Metric("fault_latency_seconds", HISTOGRAM, Of.BOTH, "receiver",
        "for how long vCPUs waited for missing pages; `_count` is the number of faults",
        Histogram(FAULT_BOUNDS, _fault_latency)),
    Metric("outstanding_pages", GAUGE, Of.BOTH, "",
        "pages that the destination lacks; the sender counts a page until it is acknowledged",
        one("outstanding")),
    Metric("waiting_requests", GAUGE, Of.BOTH, "receiver",
        "requests of the paging ring that wait for a page now",
        one("waiting")),
    Metric("memory_bytes", GAUGE, Of.EACH, "sender",
        "memory that the guest owned at the start",
        one("details", "memory_bytes")),
    Metric("dirty_bytes_per_second", GAUGE, Of.EACH, "sender",
        "the rate at which the guest dirtied memory in the last round of precopy",
        one("dirty_bytes_per_s")),
    Metric("expected_freeze_seconds", GAUGE, Of.EACH, "sender",
        "for how long the guest is expected to be frozen if precopy ends now",
        one("expected_freeze_ms", scale=1e-3)),
    Metric("round", GAUGE, Of.EACH, "sender",
        "the number of the round of precopy",
        one("round")),
    Metric("checkpoint_age_seconds", GAUGE, Of.EACH, "sender",
        "the age of the last checkpoint of a protected guest",
        one("checkpoint_age_s")),
    Metric("started_timestamp_seconds", GAUGE, Of.EACH, "",
        "when the migration began, in seconds since 1970",
        one("started_at")),
    Metric("downtime_seconds", HISTOGRAM, Of.ENDED, "sender",
        "for how long the guests of completed migrations were suspended",
        of_completed(DOWNTIME_BOUNDS, "details", "downtime_s")),
    Metric("downtime_seconds", GAUGE, Of.EACH, "sender",
        "for how long the guest was suspended; 0 before its switchover",
        one("details", "downtime_s")),
    Metric("duration_seconds", HISTOGRAM, Of.ENDED, "sender",
        "how long completed migrations took",
        of_completed(DURATION_BOUNDS, "details", "total_s")),
)  # fmt: skip


class Other(NamedTuple):
    """A metric that is not a figure of a migration.  ``labels``: besides ``end``, and those of a
    migration.
    """

    kind: str
    labels: tuple[str, ...]
    meaning: str


OTHERS = {
    "daemon_info": Other(INFO, ("version",), "1; `version` is the release of the daemon"),
    "daemon_started_timestamp_seconds": Other(GAUGE, (), "when the daemon was started"),
    "migrations": Other(GAUGE, ("phase",), "migrations under way, by phase"),
    "ended_migrations": Other(COUNTER, ("outcome",),
        "migrations that have ended since the daemon was started, by `outcome`: "
        + ", ".join(f"`{name}`" for name in OUTCOMES)),
    "log_messages": Other(COUNTER, ("level",),
        "what the daemon has logged, by `level`: `warning` or `error`"),
    "migration_info": Other(INFO, ("peer", "strategy", "phase"),
        "1 for each migration under way; a receiver has no `strategy`"),
}  # fmt: skip


def metrics_of(end: str) -> list[Metric]:
    """Return the metrics of ``sender`` or ``receiver``."""
    return [metric for metric in METRICS if metric.end in ("", end)]


@dataclass
class Totals:
    """The figures of the migrations of a daemon, added up.  ``end``: ``sender`` or ``receiver``."""

    end: str
    outcomes: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Counter[str]] = field(default_factory=dict)
    """The counters by the name of their metric."""

    def add_ended(self, shown: Json) -> None:
        """Add a migration that has ended, with what ``show`` answers of it."""
        self.outcomes[shown["outcome"]] += 1
        for metric in metrics_of(self.end):
            if metric.of is not Of.EACH and metric.kind != GAUGE:
                self._add(metric, shown)

    def add_under_way(self, shown: Json) -> None:
        """Add a migration that is under way, to a copy of the totals."""
        for metric in metrics_of(self.end):
            if metric.of is Of.BOTH:
                self._add(metric, shown)

    def _add(self, metric: Metric, shown: Json) -> None:
        self.figures.setdefault(metric.name, Counter()).update(metric.figures(shown))

    def copy(self) -> Totals:
        figures = {name: counter.copy() for name, counter in self.figures.items()}
        return Totals(self.end, self.outcomes.copy(), figures)


@dataclass
class Snapshot:
    """The state of a daemon.  ``totals``: of the migrations that have ended."""

    totals: Totals
    under_way: list[Json] = field(default_factory=list)
    """What ``show`` answers of each migration that is under way."""
