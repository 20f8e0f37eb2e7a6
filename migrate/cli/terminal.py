# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines at the end of a terminal's output that are drawn again and again.

The cursor rests at the beginning of the first line.  A terminal that becomes narrower breaks lines
into several rows, and the cursor stays where its line begins.  So the next drawing begins there,
and erases what is behind it, whatever the terminal has made of the lines.  Lines that are too long
are cut off by the terminal, because its size may change while a line is written.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Sequence
from typing import TextIO

from migrate.streams import write
from migrate.units import printable

CUT_OFF, WRAP = "\x1b[?7l", "\x1b[?7h"
"""Have the terminal cut lines off at its edge, and break them again (DECAWM)."""
ERASE_LINE, ERASE_BELOW = "\x1b[K", "\x1b[J"


def is_live(stream: TextIO) -> bool:
    """Whether lines can be drawn again on the stream."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def size_of(stream: TextIO) -> os.terminal_size:
    """Return the size of the stream's terminal; 80 columns and 24 lines if it is not known."""
    try:
        found = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        found = os.terminal_size((0, 0))
    return os.terminal_size((found.columns or 80, found.lines or 24))


def wait_while_read(stream: TextIO, seconds: float) -> None:
    """Wait so long.  Raises ``BrokenPipeError`` at once if the reader of the stream has ended, as
    ``head`` does: the next line may come much later.
    """
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file: a program has replaced the stream
        time.sleep(seconds)
        return
    ended = select.poll()
    ended.register(number, 0)  # a pipe without a reader has POLLERR
    if any(events & select.POLLERR for _fd, events in ended.poll(seconds * 1000)):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Area:
    """The last lines of a terminal."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn = False

    @property
    def size(self) -> os.terminal_size:
        """The columns and lines that :meth:`draw` may use.  The last column stays free, unless
        it is the only one: behind it nothing could be erased.
        """
        columns, lines = size_of(self._stream)
        return os.terminal_size((max(columns - 1, 1), lines))

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines instead of those before.  What is too much is cut off."""
        columns, most = self.size
        shown = [printable(line).replace("\n", " ")[:columns] for line in lines[:most]]
        text = f"{ERASE_LINE}\n".join(shown)
        up = f"\x1b[{len(shown) - 1}A" if len(shown) > 1 else ""
        self._drawn = True  # before the writing, which Ctrl-C may interrupt
        self._write(f"{CUT_OFF}{text}{ERASE_BELOW}\r{up}{WRAP}")

    def clear(self) -> None:
        """Remove the lines.  What is printed afterwards takes their place."""
        if self._drawn:
            self._write(f"\r{ERASE_LINE}{ERASE_BELOW}")
            self._drawn = False

    def _write(self, text: str) -> None:
        write(self._stream, text)
