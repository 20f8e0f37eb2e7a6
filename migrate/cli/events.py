# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines of ``--watch --json``: what has changed, and what there is each second.  Sans-IO; time
is an argument.

Each line is one JSON object with ``event``:

- ``phase``: the migration has entered a phase.  ``at`` is when, as the daemon has noted it, so a
  phase that has passed between two questions is not missing.
- ``progress``: all that is known, after a change and each second.
- ``end``: the same with ``details``, once, as the last line about the migration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from migrate.outcomes import ENDED

EVERY_S = 1.0
NAMED = ("id", "domain", "direction")
CHANGES = (
    "phase", "problem", "round", "outcome", "handed_over", "paused", "unprotected", "checkpoints",
)  # fmt: skip
"""The keys whose changes are reported at once."""
Json = dict[str, Any]


class Events:
    """The events of one migration."""

    def __init__(self) -> None:
        self._last_phase: Json = {}
        """The last of the phases that were reported."""
        self._before: Json | None = None
        self._reported_at = 0.0
        self.has_ended = False

    def lines(self, now: float, at: float, answer: Json) -> Iterator[Json]:
        """Yield what is to be reported.  ``answer``: of ``list`` or ``show``; ``now``:
        time.monotonic(); ``at``: seconds since 1970.
        """
        if self.has_ended:
            return
        named = {key: answer.get(key) for key in NAMED}
        for one in self._new_phases(at, answer):
            yield {"event": "phase", "at": one["at"], **named, "phase": one["phase"]}
        rest = {key: value for key, value in answer.items() if key != "event"}
        changes = {key: answer.get(key) for key in CHANGES}
        if answer["phase"] in ENDED:
            self.has_ended = True
            yield {"event": "end", "at": round(at, 3), **rest}
        elif changes != self._before or now - self._reported_at >= EVERY_S:
            self._before, self._reported_at = changes, now
            rest.pop("details", None)
            yield {"event": "progress", "at": round(at, 3), **rest}

    def _new_phases(self, at: float, answer: Json) -> list[Json]:
        phases = answer.get("phases")
        if phases is None:  # an earlier release
            is_new = answer["phase"] != self._last_phase.get("phase")
            phases = [{"phase": answer["phase"], "at": round(at, 3)}] if is_new else []
        if self._last_phase in phases:
            phases = phases[phases.index(self._last_phase) + 1 :]
        self._last_phase = phases[-1] if phases else self._last_phase
        return list(phases)
