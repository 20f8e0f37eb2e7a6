# SPDX-License-Identifier: GPL-2.0-or-later
"""What was recorded of a migration, as series over time.  Sans-IO: the answers of daemons to
``record`` go in.

What an end does not have is ``None``, and never 0.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_INTERVALS = 90
"""The most intervals of a series of rates."""
LEAST_INTERVAL_S = 0.1
"""A sender sends megabytes at once, so the rate of a shorter interval is that of the line."""
MOST_VCPUS = 16
"""The most vCPUs that are shown one by one: those that have waited longest."""
Answer = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values over time.  ``edges``: seconds since the start, one more than ``values`` if these hold
    from one edge to the next one.
    """

    edges: Floats
    values: Floats

    @property
    def is_empty(self) -> bool:
        return not len(self.values) or bool(np.all(np.isnan(self.values)))

    @property
    def most(self) -> float:
        return float(np.nanmax(self.values))


@dataclass(frozen=True)
class Phase:
    name: str
    begins: float
    """Seconds since the start."""
    ends: float


@dataclass(frozen=True)
class Mark:
    """What an operator asked for while the migration ran."""

    at: float
    """Seconds since the start."""
    asked: str
    values: Answer
    """The options that were changed, by the names of their fields."""


@dataclass(frozen=True)
class End:
    """One end's answer to ``record``."""

    answer: Answer

    @property
    def record(self) -> Answer:
        return self.answer.get("record") or {}

    @property
    def details(self) -> Answer:
        return self.answer.get("details") or {}

    @property
    def is_source(self) -> bool:
        return bool(self.answer["direction"] == "outgoing")

    def column(self, name: str) -> Floats:
        """Return the samples of a column; NaN if a value is unknown."""
        samples = self.record.get("samples", {})
        values = samples.get(name) or [None] * len(samples.get("at", ()))
        return np.array([np.nan if one is None else one for one in values], dtype=np.float64)

    def figure(self, *keys: str) -> Any:
        """Return a value of ``show``, first from what was measured; ``None`` if it is unknown."""
        if keys[0] in self.answer.get("unknown", ()):
            return None
        for where in (self.details, self.answer):
            found: Any = where
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                return found
        return None


class Recorded:
    """What is known of one migration, from one end or from both."""

    def __init__(self, answers: Sequence[Answer]):
        self.ends = [End(answer) for answer in answers]
        self.source = next((end for end in self.ends if end.is_source), None)
        self.destination = next((end for end in self.ends if not end.is_source), None)
        self.first = self.source or self.ends[0]
        """The end whose phases are shown: the source has all of them."""
        phases = self.first.answer.get("phases") or []
        began = [one["at"] for one in phases] + [*self.first.column("at")[:1]]
        started_at = self.first.answer.get("started_at")
        self.start: float = min(began, default=0.0) if started_at is None else started_at
        stamps = [*self.first.column("at")[-1:], *(one["at"] for one in phases[-1:])]
        ended_at = self.first.answer.get("ended_at")
        self.end: float = ended_at or max(stamps, default=self.start)

    @property
    def seconds(self) -> float:
        """The time from the start to the end, or to now; never 0."""
        return max(self.end - self.start, 1e-3)

    @property
    def phases(self) -> list[Phase]:
        """The phases, each until the next one."""
        began = [(str(one["phase"]), one["at"] - self.start) for one in self.first.answer["phases"]]
        ends = [*(at for _name, at in began), self.seconds][1:]
        phases = [
            Phase(name, max(at, 0.0), end) for (name, at), end in zip(began, ends, strict=True)
        ]
        return [one for one in phases if one.ends >= one.begins]

    @property
    def marks(self) -> list[Mark]:
        """What an operator asked the source for, in its order."""
        marks = None if self.source is None else self.source.record.get("marks")
        return [Mark(one["at"] - self.start, one["asked"], one["values"]) for one in marks or ()]

    @property
    def pauses(self) -> list[tuple[float, float]]:
        """The times from which and until which copying was paused.  A migration may end in a pause,
        and the beginning of one may have been recorded by a daemon that has died.
        """
        changes = [mark for mark in self.marks if mark.asked in ("pause", "resume")]
        found, began, is_paused = [], 0.0, bool(changes) and changes[0].asked == "resume"
        for mark in changes:
            if is_paused and mark.asked == "resume":
                found.append((began, mark.at))
            is_paused, began = mark.asked == "pause", mark.at
        return [*found, (began, self.seconds)] if is_paused else found

    def time_of(self, end: End) -> Floats:
        """Return the times of an end's samples, in seconds since the start.  The clocks of two
        hosts may differ by more than a phase takes; each end then has its own start.
        """
        at = end.column("at")
        start = self.start
        if end is not self.first and end.answer.get("started_at") is not None:
            own: float = end.answer["started_at"]
            start = own if abs(own - start) > CLOCKS_DIFFER_S else start
        return at - start

    def rate(self, end: End | None, column: str) -> Series | None:
        """Return the rate at which a count has grown, a second, over intervals of equal length;
        ``None`` if it is unknown.
        """
        return None if end is None else _rate(self.time_of(end), end.column(column))

    def values(self, end: End | None, column: str) -> Series | None:
        """Return the values of a column; ``None`` if it is unknown."""
        if end is None:
            return None
        found = Series(self.time_of(end), end.column(column))
        return None if found.is_empty else found

    def blocked(self) -> dict[int, Series]:
        """Return for each vCPU the share of time for which it has waited for pages: those that have
        waited longest, in the order of their numbers.
        """
        end = self.destination
        if end is None:
            return {}
        waits = end.record.get("samples", {}).get("vcpu_block_s", {})
        longest = sorted(waits, key=lambda vcpu: -waits[vcpu][-1])[:MOST_VCPUS]
        at = self.time_of(end)
        found = {}
        for vcpu in sorted(map(int, longest)):
            rate = _rate(at, np.maximum.accumulate(np.array(waits[str(vcpu)], dtype=np.float64)))
            if rate is not None:
                found[vcpu] = Series(rate.edges, np.clip(rate.values, 0.0, 1.0))
        return found

    def latencies(self) -> list[tuple[float, float, int]] | None:
        """Return the histogram of the latency of faults: the limits of each bucket in microseconds,
        and the number of faults in it.  ``None`` if it is unknown.
        """
        fine = None if self.destination is None else self.destination.record.get("latency_us")
        if fine:
            return [(low, high, count) for low, high, count in fine]
        for end in self.ends:
            powers = end.figure("fault_latency_us", "histogram")
            if powers is not None:
                return [(int(power) / 2, int(power), count) for power, count in powers.items()]
        return None

    @property
    def origins(self) -> Answer | None:
        """Where each page came from (``receiver/origins.py``); ``None`` if it is unknown."""
        return None if self.destination is None else self.destination.record.get("origins")

    def figure(self, *keys: str) -> Any:
        """Return a value of ``show`` from the end that has it; ``None`` if none has."""
        for end in self.ends:
            if (found := end.figure(*keys)) is not None:
                return found
        return None


CLOCKS_DIFFER_S = 0.5
"""If the two ends were started further apart than that by their clocks, the clocks differ."""


def cells_of(origins: Answer) -> NDArray[np.uint8]:
    """Return the origin of the page that each cell of the map shows."""
    return np.frombuffer(zlib.decompress(base64.b64decode(origins["map"])), dtype=np.uint8)


def _rate(at: Floats, counts: Floats) -> Series | None:
    known = ~np.isnan(counts)
    at, counts = at[known], counts[known]
    if len(at) < 2 or at[-1] <= at[0]:
        return None
    seconds = at[-1] - at[0]
    intervals = int(np.clip(seconds / LEAST_INTERVAL_S, 1, min(MOST_INTERVALS, len(at) - 1)))
    edges = np.linspace(at[0], at[-1], intervals + 1)
    return Series(edges, np.maximum(np.diff(np.interp(edges, at, counts)), 0) / np.diff(edges))
