# SPDX-License-Identifier: GPL-2.0-or-later
"""What follows migrations: drawn again on a terminal, printed now and then elsewhere, or printed as
events.
"""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

from migrate.cli.events import CHANGES, Events
from migrate.cli.figures import fit, in_full, progress_fields, table_of
from migrate.cli.terminal import Area, is_live
from migrate.cli.text import echo
from migrate.outcomes import ENDED
from migrate.streams import write
from migrate.units import printable

FIRST_PLAIN_S, LAST_PLAIN_S = 5.0, 60.0
"""The first and the longest pause between two lines elsewhere.  A pause is a tenth of the time so
far.
"""
SHOWN = (
    "precopy", "switchover", "deciding", "postcopy", "completing", "interrupted", "in doubt",
    "held", "lost",
)  # fmt: skip
"""The phases that are shown.  The others are short, or end in a message of their own."""


class Pauses:
    """The pauses after which a line that stays is printed again."""

    def __init__(self) -> None:
        self._began = self._printed = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        pause_s = min(max((now - self._began) / 10, FIRST_PLAIN_S), LAST_PLAIN_S)
        return now - self._printed > pause_s

    def printed(self) -> None:
        self._printed = time.monotonic()


class ProgressDisplay:
    """Shows the progress.  The caller passes each ``progress`` answer of the daemon to it; the
    answers of a receiver have fewer keys.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._area = Area(stream) if is_live(stream) else None
        self._stage: tuple[str, int, bool] | None = None
        self._pauses = Pauses()

    def show(self, p: dict[str, Any]) -> None:
        stage = (p["phase"], p.get("round", 0), bool(p["problem"]))
        if p["phase"] not in SHOWN:
            return
        is_new = stage != self._stage
        self._stage = stage
        if self._area is None:
            if is_new or self._pauses.is_due():
                self._print(p)
            return
        if is_new and p["problem"]:  # the line is cut off at the edge of the terminal
            self._area.clear()
            self._print(p)
        self._area.draw([fit(progress_fields(p), self._area.size.columns)])

    def close(self) -> None:
        if self._area is not None:
            self._area.clear()

    def _print(self, p: dict[str, Any]) -> None:
        self._pauses.printed()
        write(self._stream, printable(in_full(progress_fields(p))) + "\n")


class EventLines:
    """Prints the events of migrations, each as one JSON object on a line."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], Events] = {}
        self._silent = ""

    def show(self, lines: list[dict[str, Any]], silent: str = "") -> None:
        """``silent``: which daemons have not answered; printed on standard error."""
        if silent and silent != self._silent:
            echo(f"xen-postcopy: {silent}", err=True)
        self._silent = silent
        for line in lines:
            events = self._events.setdefault((line["id"], line["direction"]), Events())
            for event in events.lines(time.monotonic(), time.time(), line):
                echo(json.dumps(event))

    def close(self) -> None:
        """Do nothing: each line is complete."""


class TableDisplay:
    """Shows the table of ``list``: drawn again on a terminal; elsewhere again after a change, and
    now and then while a migration is under way.
    """

    def __init__(self, stream: TextIO):
        self._area = Area(stream) if is_live(stream) else None
        self._before: object = None
        self._printed = 0.0

    def show(self, lines: list[dict[str, Any]], silent: str = "") -> None:
        """``silent``: which daemons have not answered."""
        if self._area is not None:
            size = self._area.size
            # What does not fit is the end of the table: ended migrations, the oldest last.
            newest = list(reversed(lines))
            newest.sort(key=lambda line: line["phase"] in ENDED)
            rows = table_of(newest, size.columns, time.time()).split("\n")
            rows += [silent] if silent else []
            if len(rows) > size.lines:
                more = len(rows) - size.lines + 1
                rows[size.lines - 1 :] = [f"... and {more} more"]
            self._area.draw(rows)
            return
        changes = [silent, *({key: line.get(key) for key in ("id", *CHANGES)} for line in lines)]
        is_under_way = any(line["phase"] not in ENDED for line in lines)
        is_due = is_under_way and time.monotonic() - self._printed > FIRST_PLAIN_S
        if changes != self._before or is_due:
            self._before, self._printed = changes, time.monotonic()
            echo(table_of(lines, None, time.time()))
            echo(silent)

    def close(self) -> None:
        if self._area is not None:
            self._area.clear()
