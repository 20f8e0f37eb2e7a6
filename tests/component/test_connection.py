# SPDX-License-Identifier: GPL-2.0-or-later
"""The beginning of a lane, and the end of a lane whose peer receives nothing; each failure has an
error of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
import trio
import trio.testing

from migrate.errors import MigrationError, PeerClosedError
from migrate.lanes import connection as transport
from migrate.lanes.accept import AwaitedLanes, Reception
from migrate.lanes.connection import LaneConnection, Terms, connect
from migrate.lanes.dial import DialledLanes
from migrate.lanes.tls import Tls
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.session import hello, rejoin_token
from tests.support.certificates import HOST, files
from tests.support.links import no_look
from tests.support.sockets import Over, connected, reused
from tests.support.waiting import WAIT_S

__all__ = ["files"]
PAGES = memoryview(bytes(512 * 4096))


@contextlib.asynccontextmanager
async def ends(
    tls: Tls | None = None, terms: Terms = Terms()
) -> AsyncIterator[tuple[LaneConnection, LaneConnection]]:
    """Yield both ends of a lane."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    made: list[LaneConnection] = []
    terms = replace(terms, tls=tls)

    async def accept() -> None:
        made.append(
            LaneConnection(theirs if tls is None else await tls.accepted(theirs, 10), terms)
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        dialled = LaneConnection(
            ours if tls is None else await tls.connected(ours, HOST, 10), terms
        )
    with contextlib.closing(dialled), contextlib.closing(made[0]):
        yield dialled, made[0]


def fill(lane: LaneConnection) -> None:
    """Send until the buffers of the kernel hold no further byte."""
    with contextlib.suppress(BlockingIOError), socket.socket(fileno=os.dup(lane.fileno())) as sock:
        while True:
            sock.send(bytes(65536), socket.MSG_DONTWAIT)


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_peer_that_takes_nothing_is_given_up(
    encrypted: bool, files: Callable[..., Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane is not used again, because a part of a frame may have been sent."""
    monkeypatch.setattr(transport, "STEP_TIMEOUT_S", 1)
    message = m.Pages(np.arange(512, dtype=np.uint64))
    async with ends(files() if encrypted else None) as (ours, _theirs):
        with pytest.raises(PeerClosedError, match="the peer has taken nothing for 1 s"):
            await trio.to_thread.run_sync(ours.send_blocking, message, [PAGES])
        with pytest.raises(PeerClosedError, match="the connection was lost while sending"):
            ours.send_blocking(m.Alive())


@pytest.mark.parametrize("over", [Over.PLAIN, Over.NATIVE, Over.PYTHON])
async def test_a_thread_that_comes_after_the_end_uses_no_other_s_descriptor(over: Over) -> None:
    """A task that is cancelled leaves the thread of its call behind.  The thread may begin when the
    lane has been closed, and its descriptor's number belongs to somebody else.
    """
    here, there = connected(over)
    theirs, other = socket.socketpair()
    lane = LaneConnection(here, Terms())
    with contextlib.closing(there), theirs, other:
        number = lane.fileno()
        lane.close()
        with reused(number, theirs.fileno()):
            with trio.fail_after(WAIT_S):
                with pytest.raises(PeerClosedError):
                    await lane.send(m.Alive())
                with pytest.raises(PeerClosedError):
                    await lane.receive()
        theirs.close()
        assert other.recv(99) == b""


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (frames.encode(m.Ready().header()), "the peer began with ready instead of hello"),
        (
            frames.encode(replace(hello(Lane.PUSH, "s"), lane="pish").header()),
            "the peer asked for a lane 'pish'",
        ),
        (
            frames.encode(m.Pages(np.arange(512, dtype=np.uint64)).header(), [PAGES]),
            "began with pages",
        ),
        (b"", "the peer sent nothing for 0.1 s: see whether xen-postcopy listens there"),
    ],
)
async def test_what_is_no_hello_is_refused(
    sent: bytes, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT_S", 10 if sent else 0.1)
    async with ends() as (ours, theirs):
        ours._socket.send(sent)  # type: ignore[union-attr]
        with pytest.raises(MigrationError, match=complaint):
            await theirs.receive_hello()


async def test_an_end_sends_often_enough_for_a_peer_with_a_shorter_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "ALIVE_EVERY_S", 0.01)
    async with ends(terms=Terms(silence_s=3600)) as (ours, _theirs), trio.open_nursery() as nursery:
        nursery.start_soon(ours.keep_alive)
        with trio.fail_after(60):
            while ours.bytes_sent < 3 * len(frames.encode(m.Alive().header())):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("offers", [True, False])
async def test_a_silent_peer_is_dead_earlier_while_a_guest_waits(
    monkeypatch: pytest.MonkeyPatch, offers: bool
) -> None:
    """A peer of an earlier release sends less often, so the longer limit counts for that peer."""
    monkeypatch.setattr(transport, "ALIVE_EVERY_S", 0.01)
    terms = Terms(silence_s=3600, postcopy_silence_s=0.05)
    async with ends(terms=terms) as (ours, theirs):
        names = (m.ALIVE_EACH_SECOND,) if offers else ()
        ours.agree([m.Hello(1, 1, "push", "s", b"", (), names, "")] * 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.keep_alive, lambda: True)
            if offers:
                silent = pytest.raises(PeerClosedError, match=r"nothing for 0\.05 s")
                with trio.fail_after(60), silent:
                    await ours.receive()
            else:
                with trio.fail_after(60):
                    while ours.bytes_sent < 30 * len(frames.encode(m.Alive().header())):
                        await trio.sleep(0.01)
                assert not theirs.is_over()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_silent_peer_is_dead_also_while_an_alive_waits_for_room(
    encrypted: bool, files: Callable[..., Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer has taken nothing since the buffers were filled, and no call is in progress then."""
    monkeypatch.setattr(transport, "ALIVE_EVERY_S", 0.01)
    tls = files() if encrypted else None
    async with ends(tls, Terms(silence_s=0.5)) as (ours, _theirs):
        fill(ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.keep_alive)
            silent = pytest.raises(PeerClosedError, match=r"nothing for 0\.5 s")
            with trio.fail_after(WAIT_S), silent:
                await ours.receive()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("over", [Over.PLAIN, Over.NATIVE, Over.PYTHON])
async def test_a_peer_whose_payload_arrives_slowly_is_not_silent(
    over: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call receives the whole payload, and lasts for twice as long as a peer may be silent."""
    monkeypatch.setattr(transport, "ALIVE_EVERY_S", 0.01)
    limit_s = 1.5
    message = m.Pages(np.arange(64, dtype=np.uint64))
    frame = memoryview(frames.encode(message.header(), [PAGES[: 64 * 4096]]) + PAGES[: 64 * 4096])
    there, ours = connected(over, tcp=True)

    def send_slowly() -> None:
        at, ends_at = 0, time.monotonic() + 2 * limit_s
        while time.monotonic() < ends_at:
            at += there.sendmsg([frame[at : at + 256]])
            time.sleep(limit_s / 100)
        while at < len(frame):
            at += there.sendmsg([frame[at:]])

    with (
        contextlib.closing(there),
        contextlib.closing(LaneConnection(ours, Terms(silence_s=limit_s))) as lane,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.keep_alive)
            nursery.start_soon(trio.to_thread.run_sync, send_slowly)
            with trio.fail_after(WAIT_S):
                received, payload = await lane.receive()
            assert isinstance(received, m.Pages) and len(payload) == 64 * 4096
            nursery.cancel_scope.cancel()


async def test_a_host_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's queue of connections is full, and accepts no more."""
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT_S", 0.1)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
        port = listener.getsockname()[1]

        async def fill() -> None:
            for _ in range(10):
                stack.enter_context(contextlib.closing(await connect(HOST, port, Terms())))

        with pytest.raises(PeerClosedError, match=f"no answer from {HOST}:{port} within"):
            await fill()


async def test_a_peer_that_does_not_shake_hands_is_given_up(files: Callable[..., Tls]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with (
        theirs,
        pytest.raises(
            PeerClosedError, match=r"did not answer within 0.1 s: see whether it speaks TLS"
        ),
    ):
        await files().connected(ours, HOST, 0.1)


async def test_another_host_is_not_reached_without_encryption() -> None:
    with pytest.raises(
        MigrationError, match=r"192.0.2.1 is another host, and connections are not encrypted"
    ):
        await connect("192.0.2.1", 1, Terms())


KEY = b"k" * 32


async def welcomed(awaited: AwaitedLanes, number: int) -> m.Hello:
    """Return the hello of a push lane that resumes the session, after its welcome."""
    greeting = hello(Lane.PUSH, "session", rejoin_token(KEY, number))
    await awaited.welcome(greeting)
    return greeting


async def test_an_older_lane_that_arrives_late_does_not_replace_a_newer_one() -> None:
    awaited = AwaitedLanes()
    awaited.keep(KEY)
    async with ends() as (older, newer):
        first, second = await welcomed(awaited, 1), await welcomed(awaited, 2)
        assert awaited.arrived(second, newer)
        assert not awaited.arrived(first, older)
        assert await awaited.again(lambda _note: None) is newer
        assert not awaited.arrived(second, older)  # each hello is for one lane


async def test_a_pull_lane_of_an_earlier_pair_is_none_of_the_next_pair() -> None:
    awaited = AwaitedLanes()
    awaited.keep(KEY)
    async with ends() as (push, pull), trio.open_nursery() as nursery:
        await welcomed(awaited, 1)
        awaited._pull.expect(b"token")
        greeting = hello(Lane.PULL, "session", b"token")
        await awaited.welcome(greeting)
        assert awaited.arrived(await welcomed(awaited, 2), push)
        nursery.start_soon(awaited.pull, b"the next token")
        await trio.testing.wait_all_tasks_blocked()
        assert not awaited.arrived(greeting, pull)
        nursery.cancel_scope.cancel()


async def test_a_lane_of_a_session_that_has_ended_meanwhile_is_closed() -> None:
    class Ending(AwaitedLanes):
        def answer(self, greeting: m.Hello) -> bytes:
            self.close()  # the session ends while the hello is being answered
            return super().answer(greeting)

    awaited = Ending()
    reception = Reception(lambda _greeting: awaited, no_look, Terms())
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(
            functools.partial(trio.serve_tcp, reception.receive, 0, host=HOST)
        )
        port = listener.socket.getsockname()[1]
        lane = await DialledLanes((HOST, port), "session", Terms()).push()
        with contextlib.closing(lane):
            assert await trio.to_thread.run_sync(lane.is_over, WAIT_S)
        nursery.cancel_scope.cancel()
