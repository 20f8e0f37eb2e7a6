# SPDX-License-Identifier: GPL-2.0-or-later
"""The records of a TLS connection after its handshake, over a socket that does not block.

Native code sends and receives them by OpenSSL's own calls, without the interpreter lock
(``native/records.c``).  If Python has a copy of OpenSSL of its own, or the native module was not
built, Python's ``ssl`` module sends and receives.

An OpenSSL connection must not be used by two threads at once.  One thread at a time is therefore
inside OpenSSL, and no thread holds the lock while it waits for the network.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from migrate.fastpath.api import NativeRecords

try:
    from migrate.lanes._records import ffi, lib

    why_not = ""
except ImportError as error:
    ffi = lib = None
    why_not = f"{error}; it is built if libssl-dev is installed"

log = logging.getLogger(__name__)

WANTED = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Records(Protocol):
    """One thread may send while another receives."""

    def send(self, pieces: Sequence[memoryview]) -> None:
        """Send all of ``pieces``.  Raises ``BlockingIOError`` if the peer takes no bytes."""

    def receive(self, into: memoryview, flags: int) -> int:
        """Receive as a socket does.  Of ``flags``, only MSG_WAITALL and MSG_DONTWAIT have an
        effect.
        """

    def buffered(self) -> bool:
        """Whether bytes can be received although the descriptor may not be readable."""

    def send_timeout(self, seconds: float) -> None:
        """Limit the time for which the peer may take no bytes."""

    def stop_receiving(self) -> None:
        """Receive nothing from here on, as at the connection's end.  A thread that waits returns
        when the socket is shut down.  Sending stays possible, which OpenSSL forbids after it has
        read the end of a connection.
        """

    def close(self) -> None:
        """Use the socket no more, because it is about to be closed.  Each later call fails."""

    def error(self, number: int) -> OSError:
        """Return the error that native code has met, of which it has returned the errno."""

    def native(self) -> NativeRecords | None:
        """Return what native code needs in order to send and receive by itself."""


def made_by(make: Callable[[], ssl.SSLSocket]) -> tuple[ssl.SSLSocket, Records]:
    """Return the socket that ``make`` returns, and its records, which may be used when the
    handshake is done.  ``make`` may make no other TLS connection.
    """
    if lib is None or lib.records_watch():
        _explain(why_not)
        sock = make()
        return sock, PythonRecords(sock)
    sock = make()
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
    native = lib.records_take(sock.fileno(), is_tcp)
    if native == ffi.NULL:
        _explain("this Python has a copy of OpenSSL of its own")
        return sock, PythonRecords(sock)
    return sock, OpenSslRecords(native)


@functools.cache
def _explain(why: str) -> None:
    """Log once that native code is not used."""
    log.info("with TLS, migrations and faults take about twice the time here: %s", why)


class OpenSslRecords:
    """The records of a connection whose SSL object native code shares with Python."""

    def __init__(self, native: Any):
        self._native = ffi.gc(native, lib.records_free)

    def send(self, pieces: Sequence[memoryview]) -> None:
        if number := self._send(pieces):
            raise self.error(number)

    def receive(self, into: memoryview, flags: int) -> int:
        count = self._receive(into, flags)
        if count < 0:
            raise self.error(-count)
        return count

    # ``page_bytes`` in ``xenbackend/pages.py`` describes why no error is raised here.
    def _send(self, pieces: Sequence[memoryview]) -> int:
        buffers = [ffi.from_buffer(piece) for piece in pieces]
        vector = ffi.new("struct iovec[]", [(buffer, len(buffer)) for buffer in buffers])
        return -int(lib.records_send(self._native, vector, len(buffers)))

    def _receive(self, into: memoryview, flags: int) -> int:
        buffer = ffi.from_buffer(into, require_writable=True)
        return int(lib.records_receive(self._native, buffer, len(into), flags))

    def buffered(self) -> bool:
        return bool(lib.records_are_buffered(self._native))

    def send_timeout(self, seconds: float) -> None:
        lib.records_set_send_timeout(self._native, int(seconds * 1000))

    def stop_receiving(self) -> None:
        lib.records_stop_receiving(self._native)

    def close(self) -> None:
        lib.records_close(self._native)

    def error(self, number: int) -> OSError:
        if number != errno.EPROTO:
            return OSError(number, os.strerror(number))
        problem = lib.records_problem(self._native)
        text = "unknown" if problem == ffi.NULL else ffi.string(problem).decode()
        error = ssl.SSLError(number, text)
        error.reason = text.upper().replace(" ", "_")  # as Python's own has it
        return error

    def native(self) -> NativeRecords:
        calls = ("records_send", "records_receive", "records_are_buffered")
        return NativeRecords(
            self._native, *(int(ffi.cast("uintptr_t", ffi.addressof(lib, call))) for call in calls)
        )


class PythonRecords:
    """The records of a connection whose SSL object only Python can use."""

    def __init__(self, sock: ssl.SSLSocket):
        self._socket = sock
        self._lock = threading.Lock()
        self._send_timeout_s: float | None = None
        self._stopped = False

    def send(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            at = 0
            while at < len(piece):
                try:
                    with self._lock:
                        at += self._socket.send(piece[at:])
                except WANTED as error:
                    self._wait_for(event(error), self._send_timeout_s)

    def receive(self, into: memoryview, flags: int) -> int:
        received = 0
        while True:
            try:
                with self._lock:
                    count = 0 if self._stopped else self._socket.recv_into(into[received:])
            except WANTED as error:
                if flags & socket.MSG_DONTWAIT:
                    raise BlockingIOError from error
                self._wait_for(event(error), None)
                continue
            received += count
            if not count or received == len(into) or not flags & socket.MSG_WAITALL:
                return received

    def buffered(self) -> bool:
        with self._lock:
            return bool(self._socket.pending())

    def send_timeout(self, seconds: float) -> None:
        self._send_timeout_s = seconds

    def stop_receiving(self) -> None:
        with self._lock:
            self._stopped = True

    def close(self) -> None:
        """Do nothing: Python's socket has no descriptor any more when it has been closed."""

    def error(self, number: int) -> OSError:
        return OSError(number, os.strerror(number))

    def native(self) -> None:
        return None

    def _wait_for(self, wanted: int, timeout_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, wanted)
        if not poll.poll(None if timeout_s is None else timeout_s * 1000):
            raise BlockingIOError


def event(wanted: ssl.SSLError) -> int:
    """Return what has to happen to the socket before a call can be repeated: TLS may have to send
    in order to receive, and to receive in order to send.
    """
    return select.POLLOUT if isinstance(wanted, ssl.SSLWantWriteError) else select.POLLIN
