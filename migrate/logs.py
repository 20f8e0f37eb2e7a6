# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs: to systemd's journal with fields, where it is there, otherwise lines on standard error.

Every line that is about a migration has its identifier, the same on both hosts, whoever writes it: whatever runs in a
migration's task, or in a thread that it started, inherits :data:`migration`.

    journalctl XEN_POSTCOPY_MIGRATION=1a61c3e7a5a7499eb46b82c6efb64463
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from contextvars import ContextVar
from typing import Any

JOURNAL_SOCKET = "/run/systemd/journal/socket"
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""syslog(3)'s."""

migration: ContextVar[str] = ContextVar("migration", default="")


class _WithMigration(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        about = migration.get()
        record.__dict__.update(migration=about, about=f"{about}: " if about else "")
        return True


class JournalHandler(logging.Handler):
    """systemd's native protocol: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>."""

    def __init__(self, path: str = JOURNAL_SOCKET):
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.connect(path)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.send(journal_entry(record, self.format(record)))
        except OSError:
            self.handleError(record)


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


def abnormal_end(domain: str, phase: str, reason: str, counters: dict[str, Any]) -> None:
    """The one record that an end leaves which is not a completion: where it came to be, why, and what was counted."""
    facts = json.dumps({"phase": phase, "reason": reason, **counters})
    logging.getLogger(__name__).error(
        "the migration of %s has ended without completing: %s", domain or "a guest", facts
    )


def set_up(*, verbose: bool) -> None:
    handler: logging.Handler
    if "JOURNAL_STREAM" in os.environ and os.path.exists(JOURNAL_SOCKET):
        handler = JournalHandler()
        handler.setFormatter(logging.Formatter("%(about)s%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(about)s%(message)s"))
    handler.addFilter(_WithMigration())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
