# SPDX-License-Identifier: GPL-2.0-or-later
"""Two connected ends in one process, over each kind of connection that a lane can have."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import socket
import ssl
from collections.abc import Iterator

import pytest
import trustme

from migrate.lanes import records
from migrate.lanes.tls import TlsSocket

NAME = "peer"


class Over(enum.Enum):
    """A kind of connection: over TLS, either OpenSSL is called by native code, or by Python."""

    PLAIN = "plain"
    CHECKED = "plain, with checksums of pages"
    NATIVE = "TLS"
    PYTHON = "TLS by Python"


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts of an end that is dialled and of one that dials."""
    authority = trustme.CA()
    made = []
    for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(kind)
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
        authority.issue_cert(NAME).configure_cert(context)
        made.append(context)
    made[0].num_tickets = 0
    return made[0], made[1]


def connected(*over: Over, tcp: bool = False) -> tuple[socket.socket | TlsSocket, ...]:
    """Return two connected ends.  ``over``: the kind of both, or of either."""
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            plain = (socket.create_connection(listener.getsockname()), listener.accept()[0])
    else:
        plain = socket.socketpair()
    if over[0] in (Over.PLAIN, Over.CHECKED):
        return plain
    made = []
    for sock, kind, context in zip(plain, (over[0], over[-1]), _contexts(), strict=True):
        sock.setblocking(False)
        made.append(_records(sock, context, by_python=kind is Over.PYTHON))
    waiting = [sock for sock, _made in made]
    while waiting:
        for sock in list(waiting):
            with contextlib.suppress(*records.WANTED):
                sock.do_handshake()
                waiting.remove(sock)
    return tuple(TlsSocket(sock, found) for sock, found in made)


@contextlib.contextmanager
def reused(number: int, fd: int) -> Iterator[None]:
    """Give the number of a descriptor that was closed to a copy of ``fd``."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    os.dup2(fd, number)
    try:
        yield
    finally:
        os.close(number)


def _records(
    sock: socket.socket, context: ssl.SSLContext, *, by_python: bool
) -> tuple[ssl.SSLSocket, records.Records]:
    is_server = context.protocol is ssl.PROTOCOL_TLS_SERVER

    def make() -> ssl.SSLSocket:
        return context.wrap_socket(
            sock,
            server_side=is_server,
            server_hostname=None if is_server else NAME,
            do_handshake_on_connect=False,
        )

    with pytest.MonkeyPatch.context() as patch:
        if by_python:
            patch.setattr(records, "lib", None)
        wrapped, found = records.made_by(make)
    assert isinstance(found, records.PythonRecords) == by_python
    return wrapped, found
