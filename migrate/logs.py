# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs: to systemd's journal with fields if it runs, otherwise lines on standard error.

Every line about a migration carries the migration's identifier, which is the same on both hosts.  A
migration's task, and each thread that it starts, inherits :data:`migration`.

    journalctl XEN_POSTCOPY_MIGRATION=1a61c3e7a5a7499eb46b82c6efb64463
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

JOURNAL_SOCKET = "/run/systemd/journal/socket"
STDERR = 2
MOST_BYTES = 128 * 1024
"""The largest record: the kernel takes no larger datagram."""
COMPLAIN_EVERY_S = 60.0
"""How often one :class:`Complaint` is logged."""
PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
"""syslog(3)'s."""

migration: ContextVar[str] = ContextVar("migration", default="")


class _WithMigration(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        about = migration.get()
        record.__dict__.update(migration=about, about=f"{about}: " if about else "")
        return True


class _Counted(logging.Filter):
    """Counts the records, by level."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.counts = {"warning": 0, "error": 0}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            with self._lock:
                self.counts["error" if record.levelno >= logging.ERROR else "warning"] += 1
        return True


_counted = _Counted()


def counted() -> dict[str, int]:
    """Return how many warnings and errors were logged since :func:`set_up`."""
    return dict(_counted.counts)


class OneLine(logging.Formatter):
    """Formats each message as one line.  A name or a reason that a message quotes can neither begin
    a new line nor move the cursor.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if not record.message.isprintable():
            record.message = "".join(
                c if c.isprintable() else repr(c)[1:-1] for c in record.message
            )
        return super().formatMessage(record)


class JournalHandler(logging.Handler):
    """systemd's native protocol: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>.

    A record that the journal does not take at once is lost: the caller may be the event loop.
    """

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(journal_entry(record, self.format(record))[:MOST_BYTES], self._path)


class LineHandler(logging.Handler):
    """Writes lines to standard error.  A line is dropped if it cannot be written at once, because a
    pipe may be full and a terminal may be stopped.
    """

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode(errors="backslashreplace")
        takes = select.poll()
        takes.register(STDERR, select.POLLOUT)
        with contextlib.suppress(OSError):
            # If a pipe is writable, it takes PIPE_BUF bytes at once.
            for at in range(0, len(line), select.PIPE_BUF):
                if not takes.poll(0):
                    return
                os.write(STDERR, line[at : at + select.PIPE_BUF])


def journal_entry(record: logging.LogRecord, message: str) -> bytes:
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(PRIORITIES.get(record.levelno, 6)),
        "SYSLOG_IDENTIFIER": "xen-postcopy",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "XEN_POSTCOPY_MIGRATION": getattr(record, "migration", ""),
    }
    entry = b""
    for name, value in fields.items():
        data = value.encode()
        if b"\n" in data:
            entry += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        elif data:
            entry += f"{name}=".encode() + data + b"\n"
    return entry


class Complaint:
    """A log message whose cause may occur again and again.  The message is logged the first time,
    and then at most once in :data:`COMPLAIN_EVERY_S`, or when ``about`` is another than before.
    """

    def __init__(self, log: Callable[..., None]):
        self._log = log
        self._logged_at = -COMPLAIN_EVERY_S
        self._about: object = None

    def log(self, text: str, *arguments: object, about: object = None, **options: object) -> None:
        """``options``: those of the method of the logger."""
        now = time.monotonic()
        if now - self._logged_at >= COMPLAIN_EVERY_S or about != self._about:
            self._logged_at, self._about = now, about
            self._log(text, *arguments, **options)


def abnormal_end(
    domain: str, phase: str, outcome: str, reason: str, counters: dict[str, Any]
) -> None:
    """Log the end of a migration that has not completed, as one record: the phase, the outcome, the
    reason, and the counters.  It is an error unless the outcome is ``cancelled``.
    """
    facts = json.dumps({"phase": phase, "outcome": outcome, "reason": reason, **counters})
    logging.getLogger(__name__).log(
        logging.INFO if outcome == "cancelled" else logging.ERROR,
        "the migration of %s has ended without completing: %s",
        domain or "a guest",
        facts,
    )


def set_up(*, verbose: bool) -> None:
    handler: logging.Handler
    if "JOURNAL_STREAM" in os.environ and os.path.exists(JOURNAL_SOCKET):
        handler = JournalHandler(JOURNAL_SOCKET)
        handler.setFormatter(OneLine("%(about)s%(message)s"))
    else:
        handler = LineHandler()
        handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(about)s%(message)s"))
    handler.addFilter(_WithMigration())
    handler.addFilter(_counted)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
