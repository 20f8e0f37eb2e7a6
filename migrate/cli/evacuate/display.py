# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of an evacuation: a table that is drawn again on a terminal, and lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from migrate.cli.evacuate.planner import Guest, Planner
from migrate.cli.evacuate.shown import changes, head, progress
from migrate.cli.progress import Pauses
from migrate.cli.terminal import Area, is_live
from migrate.streams import write
from migrate.units import printable


class EvacuationDisplay:
    """``printed``: the guests about which everything was printed before."""

    def __init__(self, stream: TextIO, printed: Iterable[Guest] = ()):
        self._stream = stream
        self._area = Area(stream) if is_live(stream) else None
        self._pauses = Pauses()
        self._before = {guest.domid: guest.step.value for guest in printed}

    def show(self, planner: Planner) -> None:
        if self._area is not None:
            size = self._area.size
            self._area.draw(progress(planner, size.columns, size.lines))
            return
        for line in changes(self._before, planner.guests):
            self._print(line)
        if self._pauses.is_due():
            self._print(head(planner))

    def _print(self, line: str) -> None:
        self._pauses.printed()
        write(self._stream, printable(line).replace("\n", " ") + "\n")

    def close(self) -> None:
        if self._area is not None:
            self._area.clear()
