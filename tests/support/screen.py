# SPDX-License-Identifier: GPL-2.0-or-later
"""A terminal that is emulated, behind a pseudo-terminal that commands write to."""

from __future__ import annotations

import os
import pty
import select
import termios
from typing import TextIO

import pyte


class Screen:
    """A terminal of ``columns`` and ``lines``, and what is on it.

    ``reflows``: a line that no longer fits is broken into several rows, and the cursor stays where
    it was in the line, as in kitty, tmux and the terminals of GNOME.  Otherwise the line is cut
    off, as in xterm.
    """

    def __init__(self, columns: int, lines: int = 12, *, reflows: bool = False):
        self._reflows = reflows
        self._screen = pyte.Screen(columns, lines)
        self._emulator = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")
        termios.tcsetwinsize(slave, (lines, columns))

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)

    def read(self) -> list[str]:
        """Take over what was written, and return the rows that are not empty."""
        self.stream.flush()
        readable = select.poll()
        readable.register(self._master, select.POLLIN)
        while readable.poll(0):
            self._emulator.feed(os.read(self._master, 65536))
        return [row.rstrip() for row in self._screen.display if row.strip()]

    def resize(self, columns: int) -> None:
        self.read()
        rows = [row.rstrip() for row in self._screen.display]
        lines, (x, y) = self._screen.lines, (self._screen.cursor.x, self._screen.cursor.y)
        termios.tcsetwinsize(self.stream.fileno(), (lines, columns))
        self._screen.resize(lines, columns)
        if not self._reflows:
            return
        broken: list[str] = []
        for number, row in enumerate(rows):
            if number == y:
                at_column, at_row = x % columns, len(broken) + x // columns
            broken += [row[at : at + columns] for at in range(0, max(len(row), 1), columns)]
        self._screen.reset()
        self._screen.set_mode(pyte.modes.LNM)
        self._emulator.feed("\n".join(broken[:lines]).encode())
        self._screen.reset_mode(pyte.modes.LNM)
        self._screen.cursor_position(at_row + 1, at_column + 1)
