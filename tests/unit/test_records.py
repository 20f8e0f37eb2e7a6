# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of TLS by native code, and by Python where native code cannot be used: every byte arrives
once and in order, and each end of a connection is reported.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import select
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.lanes import records
from migrate.lanes.tls import TlsSocket, explain
from tests.support.sockets import Over, connected, reused
from tests.support.thorough import examples

BY = pytest.mark.parametrize("by", [Over.NATIVE, Over.PYTHON])
PAIRS = tuple(itertools.product((Over.NATIVE, Over.PYTHON), repeat=2))
WAIT_S = 60
FORGED = b"\x17\x03\x03\x00\x20" + bytes(32)
"""A record of TLS that the peer did not encrypt."""


@contextlib.contextmanager
def ends(*over: Over, tcp: bool = False, buffers: int = 0) -> Iterator[tuple[TlsSocket, TlsSocket]]:
    """Yield two connected ends.  ``buffers``: the size of buffers that the kernel is asked for."""
    here, there = connected(*over, tcp=tcp)
    assert isinstance(here, TlsSocket) and isinstance(there, TlsSocket)
    try:
        for end in (here, there) if buffers else ():
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        yield here, there
    finally:
        here.close()
        there.close()


def views(pieces: list[bytes]) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


def send_now(end: TlsSocket, size: int) -> None:
    end.sendmsg(views([bytes(size)]))


def send(end: TlsSocket, pieces: list[bytes]) -> threading.Thread:
    """Send in a thread.  An end that goes away is no error here."""

    def run() -> None:
        with contextlib.suppress(OSError):
            end.sendmsg(views(pieces))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def readable(end: TlsSocket) -> bool:
    waiting = select.poll()
    waiting.register(end, select.POLLIN)
    return bool(waiting.poll(0))


def received(end: TlsSocket, size: int, flags: int = socket.MSG_WAITALL) -> bytes:
    into = memoryview(bytearray(size))
    return bytes(into[: end.recv_into(into, size, flags)])


@settings(max_examples=examples(25))
@given(
    st.sampled_from(PAIRS),
    st.lists(st.integers(0, 100_000), min_size=1, max_size=8),
    st.lists(st.integers(1, 200_000), min_size=1, max_size=3),
    st.sampled_from([0, 4096, 65536]),
)
def test_every_byte_once_and_in_order(
    over: tuple[Over, Over], sizes: list[int], chunks: list[int], buffers: int
) -> None:
    randomness = random.Random(repr((sizes, chunks)))
    pieces = [randomness.randbytes(size) for size in sizes]
    sent = b"".join(pieces)
    # With one byte at a time the test would take a minute.
    turns = itertools.cycle(max(chunk, 3000) for chunk in chunks)
    with ends(*over, tcp=True, buffers=buffers) as (here, there):
        sender = send(here, pieces)
        found = b""
        while len(found) < len(sent):
            found += received(there, min(next(turns), len(sent) - len(found)))
        sender.join(WAIT_S)
        assert found == sent and not there.buffered()


@BY
def test_more_pieces_than_a_record_holds(by: Over) -> None:
    pieces = [os.urandom(1 + i % 97) for i in range(3000)]
    with ends(by) as (here, there):
        sender = send(here, pieces)
        assert received(there, sum(map(len, pieces))) == b"".join(pieces)
        sender.join(WAIT_S)


def test_a_page_behind_its_frame_is_one_record() -> None:
    """The peer then has the whole page when it wakes up."""
    with ends(Over.NATIVE) as (here, there):
        here.sendmsg(views([b"h" * 90, b"p" * 4096]))
        assert received(there, 16384, socket.MSG_DONTWAIT) == b"h" * 90 + b"p" * 4096


@BY
def test_what_is_left_of_a_record_is_buffered(by: Over) -> None:
    with ends(by) as (here, there):
        with pytest.raises(BlockingIOError):
            received(there, 1, socket.MSG_DONTWAIT)
        here.sendmsg(views([b"12345"]))
        assert received(there, 2, 0) == b"12" and there.buffered()
        assert received(there, 9, socket.MSG_DONTWAIT) == b"345" and not there.buffered()


@BY
def test_records_that_arrive_together_are_all_reported(by: Over) -> None:
    """OpenSSL may have read the second one with the first one, and the socket has nothing more."""
    with ends(by) as (here, there):
        for part in (b"1", b"2", b"3"):
            here.sendmsg(views([part]))
        for part in (b"1", b"2", b"3"):
            assert there.buffered() or readable(there)
            assert received(there, 9, socket.MSG_DONTWAIT) == part
        assert not there.buffered() and not readable(there)


@BY
def test_a_part_of_a_record_is_not_buffered(by: Over) -> None:
    """A thread that took it for a message would not wait for the rest, and use a processor."""
    with ends(by) as (here, there):
        here.sendmsg(views([b"whole"]))
        os.write(here.fileno(), FORGED[:20])
        assert received(there, 9, socket.MSG_DONTWAIT) == b"whole"
        assert not there.buffered()
        os.write(here.fileno(), FORGED[20:])
        assert there.buffered() or readable(there)
        with pytest.raises(ssl.SSLError):
            received(there, 9, socket.MSG_DONTWAIT)


@BY
@pytest.mark.parametrize("size", [5000, 40_000])
def test_a_connection_that_ends_gives_what_had_come(by: Over, size: int) -> None:
    """The peer sends no ``close_notify``, as lanes do not."""
    with ends(by) as (here, there):
        sender = send(here, [b"x" * size])
        assert received(there, size - 1) == b"x" * (size - 1)
        sender.join(WAIT_S)
        here.shutdown(socket.SHUT_RDWR)
        assert received(there, 8192) == b"x"
        assert received(there, 8192) == received(there, 8192, 0) == b""


@BY
def test_a_peer_that_says_goodbye_is_the_end_too(by: Over) -> None:
    with ends(by) as (here, there):
        here.sendmsg(views([b"last"]))
        with contextlib.suppress(ssl.SSLError):  # it waits for the other end's
            here._socket.unwrap()
        assert received(there, 8192) == b"last"
        assert received(there, 8192) == b""


@BY
def test_a_peer_that_has_gone_is_an_error_not_a_signal(by: Over) -> None:
    with ends(by) as (here, there):
        there.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError, ssl.SSLEOFError)):
            here.sendmsg(views([b"x" * (1 << 20)] * 16))


@BY
def test_a_connection_cut_from_outside_ends_both(by: Over) -> None:
    with ends(by) as (here, there):
        sender = send(here, [b"x" * (8 << 20)])
        found: list[bytes] = []
        receiver = threading.Thread(target=lambda: found.append(received(here, 9)))
        receiver.start()
        received(there, 1)  # the sender has begun
        here.shutdown(socket.SHUT_RDWR)
        for thread in (sender, receiver):
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert found == [b""]


@BY
def test_a_peer_that_takes_nothing_is_recognised_by_the_time_limit(by: Over) -> None:
    with ends(by) as (here, _there):
        here.send_timeout(0.05)
        with pytest.raises(BlockingIOError):
            here.sendmsg(views([b"x" * (8 << 20)]))


@BY
@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (FORGED, "decryption failed or bad record mac"),
        (b"GET / HTTP/1.0\r\n", "does not speak TLS"),
        (b"\x17\x03\x03\xff\xff" + bytes(100), "length too long"),
    ],
    ids=["a forged record", "plain text", "a record that is too long"],
)
def test_bytes_that_the_peer_did_not_encrypt_are_an_error(
    by: Over, sent: bytes, complaint: str
) -> None:
    """Whoever is between the two ends cannot make bytes that this end accepts."""
    with ends(by) as (here, there):
        here.sendmsg(views([b"good"]))
        assert received(there, 4) == b"good"
        os.write(here.fileno(), sent)
        with pytest.raises(ssl.SSLError) as raised:
            received(there, 8192)
        assert complaint in explain(raised.value)


def test_after_a_forged_record_each_call_says_why() -> None:
    """OpenSSL gives the reason once; then it reports the end of the connection."""
    with ends(Over.NATIVE) as (here, there):
        os.write(here.fileno(), FORGED)
        for call in (received, send_now, received):
            with pytest.raises(ssl.SSLError) as raised:
                call(there, 8192)
            assert "bad record mac" in explain(raised.value)


@BY
def test_a_peer_that_was_sent_a_forged_record_informs_this_end(by: Over) -> None:
    with ends(by) as (here, there):
        os.write(here.fileno(), FORGED)
        with pytest.raises(ssl.SSLError):
            received(there, 1)
        with pytest.raises(ssl.SSLError) as raised:
            received(here, 1)
        assert "alert bad record mac" in explain(raised.value)


@BY
def test_a_record_that_is_cut_short_is_the_end(by: Over) -> None:
    """The connection ends inside a record, of which nothing may be used."""
    with ends(by) as (here, there):
        here.sendmsg(views([b"whole"]))
        os.write(here.fileno(), b"\x17\x03\x03\x10\x00" + bytes(99))
        here.shutdown(socket.SHUT_RDWR)
        assert received(there, 8192, socket.MSG_WAITALL) == b"whole"
        assert received(there, 8192) == b""


@BY
def test_an_end_that_has_stopped_to_receive_can_send(by: Over) -> None:
    """A lane does so at its end, and then sends the outcome of the migration."""
    with ends(by) as (here, there):
        found: list[bytes] = []
        receiver = threading.Thread(target=lambda: found.append(received(here, 9)))
        receiver.start()
        here.shutdown(socket.SHUT_RD)
        receiver.join(WAIT_S)
        assert found == [b""] and received(here, 9, socket.MSG_DONTWAIT) == b""
        here.sendmsg(views([b"outcome"]))
        assert received(there, 7) == b"outcome"


@BY
def test_after_its_end_a_connection_does_not_use_its_descriptor_s_number(by: Over) -> None:
    """The number belongs to somebody else then, who keeps the bytes that arrive there."""
    theirs, other = socket.socketpair()
    with ends(by) as (here, there), theirs, other:
        there.sendmsg(views([b"unread"]))
        number = here.fileno()
        here.close()
        with reused(number, theirs.fileno()):
            other.send(b"for the new owner")
            assert not here.buffered()
            for call in (send_now, received):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    call(here, 17)
            assert theirs.recv(99) == b"for the new owner"
        theirs.close()
        assert other.recv(99) == b""


def test_both_ways_report_an_error_in_the_same_words() -> None:
    texts = []
    for by in (Over.NATIVE, Over.PYTHON):
        with ends(by) as (here, there):
            os.write(here.fileno(), FORGED)
            with pytest.raises(ssl.SSLError) as raised:
                received(there, 1)
            texts.append(explain(raised.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("over", PAIRS)
def test_both_directions_at_once(over: tuple[Over, Over]) -> None:
    """One thread sends while another receives, at either end."""
    data = os.urandom(2 << 20)
    with ends(*over) as two:
        found: dict[int, bytes] = {}

        def receive(number: int) -> None:
            found[number] = received(two[number], len(data))

        threads = [threading.Thread(target=receive, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        threads += [send(end, [data]) for end in two]
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert found == {0: data, 1: data}


def test_another_socket_s_connection_is_not_taken_over() -> None:
    """Native code must not send over an SSL object that somebody else uses."""
    one, other = socket.socketpair()
    context = ssl.create_default_context()
    with (
        one,
        other,
        contextlib.closing(
            context.wrap_socket(one, server_hostname="x", do_handshake_on_connect=False)
        ) as made_before,
    ):
        sock, found = records.made_by(lambda: made_before)
        assert sock is made_before and isinstance(found, records.PythonRecords)

        def make_two() -> ssl.SSLSocket:
            context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x")
            return made_before

        assert isinstance(records.made_by(make_two)[1], records.PythonRecords)


def test_it_is_said_once_that_native_code_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(records, "lib", None)
    monkeypatch.setattr(records, "why_not", "no such module")
    records._explain.cache_clear()
    caplog.set_level("INFO")
    context = ssl.create_default_context()
    for _ in range(2):
        with socket.socket() as sock:
            make = functools.partial(context.wrap_socket, sock, server_hostname="x")
            made, _records = records.made_by(make)
            made.close()
    assert caplog.text.count("no such module") == 1
