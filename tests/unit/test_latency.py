# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel measures of a connection."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator

from migrate.lanes.latency import round_trip_s, silence_s
from tests.support.waiting import until


@contextlib.contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection over loopback."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
        listener.accept()[0] as theirs,
    ):
        yield ours, theirs


def test_a_connection_over_loopback_has_a_short_round_trip() -> None:
    with connection() as (ours, theirs):
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"
        assert 0 < round_trip_s(ours.fileno()) < 1
        assert ours.fileno() >= 0  # it is still open


def test_the_silence_of_a_connection_ends_with_each_byte_that_arrives() -> None:
    with connection() as (ours, theirs):
        until(lambda: silence_s(ours.fileno()) > 0.3, "the silence is not measured")
        sent = time.monotonic()
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
        assert silence_s(ours.fileno()) <= time.monotonic() - sent + 0.02  # a tick of the kernel
        until(lambda: silence_s(ours.fileno()) > 0.3, "the silence is not measured anew")


def test_a_socket_that_is_not_tcp_has_no_measurements() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert round_trip_s(ours.fileno()) == 0
        assert silence_s(ours.fileno()) == math.inf
