# SPDX-License-Identifier: GPL-2.0-or-later
"""The standard streams of a process: those without which it was started, and those whose encoding
lacks characters.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

NAMES = ("stdin", "stdout", "stderr")
STDOUT = "standard output"


def open_standard_streams() -> None:
    """Open ``/dev/null`` for each standard stream that is closed, and have the others escape what
    their encoding lacks.

    Otherwise the next socket or file of the process gets the stream's number, and lines of the log
    are written into it: into a connection to the hypervisor, to a peer, or into a journal.  Names
    of guests and reasons of peers may have any character, whatever the locale is.
    """
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:  # Python has found the stream closed
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have replaced it
            stream.reconfigure(errors="backslashreplace")


def write(stream: TextIO, text: str) -> None:
    """Write a text at once.  Raises ``OSError``, which names the stream, if a stream other than
    standard error cannot be written.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if stream is not sys.stderr:
            error.filename = STDOUT
            raise
        _drop_stderr()


def in_words(error: Exception) -> str:
    """Return the text of an error for people: of an ``OSError`` what could not be used, and why."""
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return str(error)
    if error.filename == STDOUT:
        return f"{STDOUT} cannot be written: {error.strerror}"
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _drop_stderr() -> None:
    """Have standard error lead nowhere from now on, because it cannot be written.  What Python has
    buffered would otherwise change the exit status.
    """
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 2)
    os.close(null)
