# SPDX-License-Identifier: GPL-2.0-or-later
"""Many pages through a blocking socket in one call, without the interpreter lock
(``native/bulk.c``).

An error is returned, not raised, because a traceback would keep references to the buffers of the
native code.  ``page_bytes`` in ``xenbackend/pages.py`` describes the consequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from migrate.lanes._bulk import ffi, lib


def send(fd: int, pieces: Sequence[bytes | memoryview]) -> int:
    """Send the pieces one after the other.  Returns 0, or an errno; some bytes may have been sent
    then.
    """
    buffers = [ffi.from_buffer(piece) for piece in pieces]
    array = ffi.new("struct bulk_piece[]", [(buffer, len(buffer)) for buffer in buffers])
    return -int(lib.bulk_send(fd, array, len(buffers)))


def receive(fd: int, into: memoryview, *, is_tcp: bool) -> int:
    """Receive until ``into`` is full or the connection ends.  Returns the number of bytes, or a
    negative errno.
    """
    return int(
        lib.bulk_receive(fd, ffi.from_buffer(into, require_writable=True), len(into), is_tcp)
    )
