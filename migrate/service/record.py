# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon records of a migration over time, for ``report``.  Sans-IO: time is an argument.

The memory is bounded, however long the migration takes.  When :data:`MOST_SAMPLES` were taken,
every second one is dropped, and the pause between two samples is doubled.  A sample has counts and
no rates, so the rate between any two samples that are left is right.  A migration of 40 seconds has
20 samples a second, and one of a quarter of an hour has one a second.

No decision depends on any of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""The format of :meth:`Record.taken`: another number if the meaning of a key changes."""
FIRST_PAUSE_S = 0.05
MOST_SAMPLES = 800
MOST_VCPUS = 128
"""The number of vCPUs, from 0 on, whose waits are recorded: the most that Xen gives a guest."""
MOST_STEPS = 32
MOST_MARKS = 100
"""The newest marks are kept."""
Json = dict[str, Any]
Value = float | None


class Samples:
    """Samples of the values in ``columns``, with the seconds for which each vCPU has waited."""

    def __init__(self, columns: Iterable[str]):
        self._columns = ("at", *columns)
        self._rows: list[tuple[tuple[Value, ...], NDArray[np.float32]]] = []
        """The values of each sample, and for how many seconds each vCPU had waited then."""
        self.pause_s = FIRST_PAUSE_S
        """The time from one sample to the next one, in seconds."""

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, at: float, values: Iterable[Value], waits: Mapping[int, float]) -> None:
        """Add a sample.  ``at``: seconds since 1970.  ``values``: one for each column; ``None``:
        unknown, or it does not apply.  ``waits``: for how many seconds each vCPU has waited so far.
        """
        if len(self._rows) == MOST_SAMPLES:
            del self._rows[1::2]
            self.pause_s *= 2
        known = {vcpu: s for vcpu, s in waits.items() if 0 <= vcpu < MOST_VCPUS}
        of_each = np.zeros(max(known, default=-1) + 1, dtype=np.float32)
        of_each[list(known)] = list(known.values())
        self._rows.append(((round(at, 3), *values), of_each))

    def taken(self) -> Json:
        """Return the values of each column, the oldest first, and the waits of each vCPU that has
        waited.
        """
        rows = list(self._rows)
        columns = zip(*[values for values, _waits in rows], strict=True) if rows else ()
        found: Json = {name: [] for name in self._columns}
        found |= {name: list(of) for name, of in zip(self._columns, columns, strict=False)}
        waits = [of_each for _values, of_each in rows]
        vcpus = range(max(map(len, waits), default=0))
        of_vcpus = {
            str(vcpu): [round(float(one[vcpu]), 6) if vcpu < len(one) else 0.0 for one in waits]
            for vcpu in vcpus
        }
        found["vcpu_block_s"] = {vcpu: values for vcpu, values in of_vcpus.items() if any(values)}
        return found


class Record:
    """What is recorded of one migration at one end.  ``columns``: the keys of the samples."""

    def __init__(self, columns: Iterable[str]):
        self.samples = Samples(columns)
        self.is_whole = True
        """No predecessor of this process has had the migration."""
        self._steps: list[tuple[str, float]] = []
        self._steps_are_over = False
        self._marks: deque[Json] = deque(maxlen=MOST_MARKS)
        self.origins: Json | None = None
        """Where each page came from (``receiver/origins.py``); ``None``: not known yet, or not at
        this end.
        """

    def begin_steps(self, now: float) -> None:
        """Begin the steps of the switchover, which a second attempt begins anew.  ``now``:
        time.monotonic().
        """
        self._steps, self._steps_are_over = [("", now)], False

    def end_step(self, step: str, now: float, *, is_last: bool = False) -> None:
        """Note that a step has ended at ``now`` (time.monotonic()).  Does nothing before the first
        one has begun, and after the last one: the other end may be quicker than the next line here.
        """
        if self._steps and not self._steps_are_over and len(self._steps) <= MOST_STEPS:
            self._steps.append((step, now))
            self._steps_are_over = is_last

    def steps(self) -> list[Json]:
        """Return the steps of the switchover in their order, with the seconds of each."""
        steps = list(self._steps)
        return [
            {"step": step, "s": round(max(now - before, 0.0), 6)}
            for (_, before), (step, now) in pairwise(steps)
        ]

    def mark(self, at: float, asked: str, values: Mapping[str, Any] | None = None) -> None:
        """Note what an operator has asked for.  ``at``: seconds since 1970.  ``asked``: the word of
        the request.  ``values``: of changed options, by the names of their fields.
        """
        self._marks.append({"at": round(at, 3), "asked": asked, "values": dict(values or {})})

    def taken(self) -> Json:
        """Return what was recorded so far."""
        return {
            "format": FORMAT,
            "is_whole": self.is_whole,
            "samples": self.samples.taken(),
            "steps": self.steps(),
            "marks": list(self._marks),
            "origins": self.origins,
        }
