# SPDX-License-Identifier: GPL-2.0-or-later
"""Batches through a socket by native code: every byte arrives once and in order, however the kernel
divides them, and the end is reported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.lanes import bulk
from tests.support.thorough import examples


@contextlib.contextmanager
def connected(*, buffers: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield two connected TCP sockets.  ``buffers``: the size of buffers that the kernel is asked
    for.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        here = stack.enter_context(socket.create_connection(listener.getsockname()))
        there = stack.enter_context(listener.accept()[0])
        for end in (here, there):
            end.settimeout(None)
            if buffers:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        yield here, there


def transferred(pieces: list[bytes], chunks: list[int], *, buffers: int = 0) -> bytes:
    """Return what arrives if it is received in chunks of these sizes, in turn."""
    total = sum(map(len, pieces))
    into = memoryview(bytearray(total))
    with connected(buffers=buffers) as (here, there):
        sent: list[int] = []
        sender = threading.Thread(target=lambda: sent.append(bulk.send(here.fileno(), pieces)))
        sender.start()
        done, turn = 0, 0
        while done < total:
            count = bulk.receive(
                there.fileno(), into[done : done + chunks[turn % len(chunks)]], is_tcp=True
            )
            assert count > 0
            done, turn = done + count, turn + 1
        sender.join(30)
        assert sent == [0]
    return bytes(into)


@settings(max_examples=examples(40))
@given(
    st.lists(st.integers(1, 300_000), min_size=1, max_size=8),
    st.lists(st.integers(1, 700_000), min_size=1, max_size=3),
    st.sampled_from([0, 4096, 65536]),
)
def test_every_byte_once_and_in_order(sizes: list[int], chunks: list[int], buffers: int) -> None:
    randomness = random.Random(repr((sizes, chunks)))
    pieces = [randomness.randbytes(size) for size in sizes]
    # With one byte at a time the test would take a minute.
    chunks = [max(chunk, 5000) for chunk in chunks]
    assert transferred(pieces, chunks, buffers=buffers) == b"".join(pieces)


def test_more_pieces_than_a_system_call_takes() -> None:
    pieces = [os.urandom(1 + i % 97) for i in range(3000)]
    assert transferred(pieces, [1 << 20]) == b"".join(pieces)


def test_a_connection_that_ends_gives_what_had_come() -> None:
    with connected() as (here, there):
        here.sendall(b"x" * 5000)
        here.close()
        into = memoryview(bytearray(8192))
        assert bulk.receive(there.fileno(), into, is_tcp=True) == 5000
        assert bytes(into[:5000]) == b"x" * 5000
        assert bulk.receive(there.fileno(), into, is_tcp=True) == 0


def test_a_peer_that_has_gone_is_an_errno_not_a_signal() -> None:
    with connected() as (here, there):
        there.close()
        pieces = [
            memoryview(b"x" * (1 << 20))
        ] * 16  # the kernel's buffers may take the first bytes
        assert bulk.send(here.fileno(), pieces) in (errno.EPIPE, errno.ECONNRESET)


def test_a_connection_cut_from_outside_ends_both() -> None:
    with connected() as (here, there):
        ends: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: ends.append(bulk.send(here.fileno(), [b"x" * (64 << 20)]))
            ),
            threading.Thread(
                target=lambda: ends.append(
                    bulk.receive(here.fileno(), memoryview(bytearray(9)), is_tcp=True)
                )
            ),
        ]
        for thread in threads:
            thread.start()
        there.recv(1)  # the sender has begun
        here.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert sorted(ends) == [0, errno.EPIPE]


def test_a_peer_that_takes_nothing_is_recognised_by_the_socket_s_time_limit() -> None:
    with connected() as (here, _there):
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 50_000))
        assert bulk.send(here.fileno(), [b"x" * (64 << 20)]) == errno.EAGAIN


def test_what_is_not_tcp_works_as_well() -> None:
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(target=bulk.send, args=(here.fileno(), [b"ab" * 500_000]))
        sender.start()
        into = memoryview(bytearray(1_000_000))
        assert bulk.receive(there.fileno(), into, is_tcp=False) == 1_000_000
        sender.join(30)
        assert bytes(into) == b"ab" * 500_000
