# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's round trip of a connection."""

from __future__ import annotations

import socket

from migrate.lanes.latency import round_trip_s


def test_a_connection_over_loopback_has_a_short_round_trip() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
        listener.accept()[0] as theirs,
    ):
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"
        assert 0 < round_trip_s(ours.fileno()) < 1
        assert ours.fileno() >= 0  # it is still open


def test_a_socket_that_is_not_tcp_has_no_round_trip() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert round_trip_s(ours.fileno()) == 0
