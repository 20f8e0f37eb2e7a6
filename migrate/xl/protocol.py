# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages from a save helper to libxl on its standard output, and the answers.  Sans-IO.

A message is its length (16 bits), its number (16 bits), and its fields one after another,
unaligned, in the host's byte order.  A string is its length with the terminating NUL (32 bits) and
its bytes.  Some messages are answered with one 32-bit integer on standard input.  Numbers and
fields are those of Xen 4.17 (tools/libs/light/libxl_save_msgs_gen.pl), which is not a public
interface.
"""

from __future__ import annotations

import struct
from enum import IntEnum

ANSWER = struct.Struct("=i")
MAX_TEXT = 16 * 1024
"""The longest string; a message's length has 16 bits."""


class Message(IntEnum):
    LOG = 1
    PROGRESS = 2
    SUSPEND = 3
    SWITCH_QEMU_LOGDIRTY = 7
    STATIC_DATA_DONE = 8
    RESTORE_RESULTS = 9
    COMPLETE = 10


class Level(IntEnum):
    """``xentoollog_level`` (xentoollog.h).  xl shows PROGRESS and above."""

    DEBUG = 1
    PROGRESS = 4
    INFO = 5
    NOTICE = 6
    WARN = 7
    ERROR = 8


def _message(number: Message, fields: bytes) -> bytes:
    body = struct.pack("=H", number) + fields
    return struct.pack("=H", len(body)) + body


def _string(text: str) -> bytes:
    # A path of the environment need not be UTF-8.
    data = text.encode(errors="backslashreplace")[:MAX_TEXT].replace(b"\0", b" ") + b"\0"
    return struct.pack("=I", len(data)) + data


def log(level: Level, text: str, *, context: str = "xen-postcopy", errno: int = -1) -> bytes:
    """A line that xl shows.  ``errno``: -1 for none.  libxl does not answer it."""
    return _message(
        Message.LOG,
        struct.pack("=II", level, errno & 0xFFFFFFFF) + _string(context) + _string(text),
    )


def progress(doing: str, done: int, total: int, *, context: str = "xen-postcopy") -> bytes:
    """libxl sends no answer."""
    return _message(
        Message.PROGRESS, _string(context) + _string(doing) + struct.pack("=QQ", done, total)
    )


def suspend() -> bytes:
    """Suspend the domain.  libxl answers 1 when the domain is suspended."""
    return _message(Message.SUSPEND, b"")


def switch_qemu_logdirty(domid: int, enable: bool) -> bytes:
    """Have the device model record what it writes.  libxl answers 0."""
    return _message(Message.SWITCH_QEMU_LOGDIRTY, struct.pack("=II", domid, enable))


def static_data_done(missing: int) -> bytes:
    """The CPU policy has been restored, except for ``missing``, which libxl has to provide.  libxl
    answers 0.
    """
    return _message(Message.STATIC_DATA_DONE, struct.pack("=I", missing))


def restore_results(store_gfn: int, console_gfn: int) -> bytes:
    """libxl sends no answer."""
    return _message(Message.RESTORE_RESULTS, struct.pack("=QQ", store_gfn, console_gfn))


def complete(result: int, errno: int) -> bytes:
    """The last message.  ``result``: 0, or -1 with ``errno``.  libxl answers 0; then the helper has
    to end with status 0.
    """
    return _message(Message.COMPLETE, struct.pack("=ii", result, errno))
