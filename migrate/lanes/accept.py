# SPDX-License-Identifier: GPL-2.0-or-later
"""The end that is dialled: it waits for the lanes of a session, and a listener assigns each
connection to its session.

The peer sends its hello first.  If the awaiting end has not noticed yet that its lanes are lost,
the new lane informs it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import trio

from migrate.errors import MigrationError, PeerClosedError, ProtocolError, UnknownSessionError
from migrate.lanes.connection import (
    CONNECT_TIMEOUT_S,
    EXPLANATION_S,
    STEP_TIMEOUT_S,
    LaneConnection,
    Terms,
)
from migrate.lanes.ends import RECEIVER, WRONG_END
from migrate.lanes.trial import Judge, Trials
from migrate.logs import Complaint
from migrate.protocol.messages import PREFLIGHT, TRIAL, Hello, Host, Lane, Refused, printable
from migrate.protocol.session import answer_token, hello, negotiate, number_of_rejoin

log = logging.getLogger(__name__)

MAX_STRANGERS = 1024
"""The most connections that may be open without a hello.  Each has about ten seconds to send it;
beyond this number the oldest connection is closed.
"""
MAX_STRANGERS_OF_ADDRESS = 256
"""The most connections from one address that may be open without a hello."""
LOOK_EVERY_S = 0.1
"""How often an end that awaits a lane checks whether the peer is still there."""


class AwaitedLanes:
    """The lanes of one session, which the peer dials.  ``token``: what the hello of the push lane
    must contain.  Each lane is accepted once, until the session asks for it again.
    """

    def __init__(self, token: bytes = b"", *, timeout_s: float = STEP_TIMEOUT_S):
        self._timeout_s = timeout_s
        self._push, self._pull = _AwaitedLane(), _AwaitedLane()
        self._push.expect(token)
        self._key = b""
        self._rejoins = 0
        self.peer = ""

    async def welcome(self, greeting: Hello) -> None:
        """Check the hello of a lane before the lane is accepted.  A new push lane of a session that
        can be resumed ends the lanes before it.

        Raises :class:`ProtocolError` for a lane that is not awaited or has a wrong token.
        """
        if greeting.lane == Lane.PUSH.value and self._key:
            number = number_of_rejoin(self._key, greeting.token)
            if number <= self._rejoins:
                raise ProtocolError(
                    "a push lane for a session that has its lanes, with a wrong or used token"
                )
            self._rejoins = number
            # This end may not have noticed yet that the old lanes are lost.
            self._push.end()
            self._pull.end()
            self._push.welcomed = greeting
            return
        awaited = self._of(greeting)
        with trio.move_on_after(CONNECT_TIMEOUT_S):  # its token may still be in transit
            await awaited.expected.wait()
        if not awaited.accepts(greeting.token):
            raise ProtocolError(
                f"a {greeting.lane} lane that is not awaited, or with a wrong or used token"
            )
        awaited.welcomed = greeting

    def answer(self, greeting: Hello) -> bytes:
        """Return the token of the answer to a hello.  The token is empty for the first lanes of a
        session.
        """
        return answer_token(self._key, greeting.token) if self._key else b""

    @property
    def dials(self) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"dials": None, "rejoins": 0, "proven": False}

    def arrived(self, greeting: Hello, lane: LaneConnection) -> bool:
        """Accept a lane after :meth:`welcome`.  Returns false if the lane is not awaited any more:
        a newer push lane was welcomed meanwhile, or the session has ended.
        """
        accepted = self._of(greeting).come_with(greeting, lane)
        if accepted:
            self.peer = lane.peer()
        return accepted

    def _of(self, greeting: Hello) -> _AwaitedLane:
        return self._pull if greeting.lane == Lane.PULL.value else self._push

    async def push(self) -> LaneConnection:
        return await self._come(self._push, "reach this end")

    async def pull(self, token: bytes) -> LaneConnection:
        self._pull.expect(token)
        return await self._come(self._pull, "open its pull lane", beside=self._push.taken)

    def keep(self, key: bytes) -> None:
        self._key = key

    async def again(self, note: Callable[[str], None]) -> LaneConnection:
        while True:
            await self._push.come.wait()
            with contextlib.suppress(PeerClosedError):  # a still newer lane has replaced this one
                return self._push.take()

    def hurry(self) -> None:
        pass

    def close(self) -> None:
        """Accept no more lanes, and close a lane that has arrived and was not taken."""
        for awaited in (self._push, self._pull):
            awaited.close()

    async def _come(
        self, awaited: _AwaitedLane, what: str, *, beside: LaneConnection | None = None
    ) -> LaneConnection:
        """Wait for a lane.  ``beside``: the peer's other lane, from which no thread receives
        meanwhile.  If that lane ends, the wait ends.
        """
        come = awaited.come
        with trio.move_on_after(self._timeout_s):
            while True:
                with trio.move_on_after(LOOK_EVERY_S):
                    await come.wait()
                    return awaited.take()
                if beside is not None and beside.is_over():
                    raise PeerClosedError(f"the peer closed the connection and did not {what}")
        raise PeerClosedError(f"the peer did not {what} within {self._timeout_s:g} s")


class _AwaitedLane:
    def __init__(self) -> None:
        self.expected, self.come = trio.Event(), trio.Event()
        self._lane: LaneConnection | None = None
        self.taken: LaneConnection | None = None
        self._token: bytes | None = None
        self.welcomed: Hello | None = None
        """The hello of the lane that may arrive."""

    def expect(self, token: bytes) -> None:
        self._token = token
        self.expected.set()

    def accepts(self, token: bytes) -> bool:
        """Whether the lane may have this token.  Each token is accepted once."""
        if self._token is None or not secrets.compare_digest(token, self._token):
            return False
        self._token = None
        return True

    def come_with(self, greeting: Hello, lane: LaneConnection) -> bool:
        """Take the lane if its hello was welcomed last.  Returns whether the lane was taken."""
        if self.welcomed is not greeting:
            return False
        self.welcomed, self._lane = None, lane
        self.come.set()
        return True

    def take(self) -> LaneConnection:
        if self._lane is None:
            raise PeerClosedError("the peer has opened a newer lane")
        lane, self.taken, self._lane, self.come = self._lane, self._lane, None, trio.Event()
        return lane

    def end(self) -> None:
        """End the lane, so that its user notices; another lane may arrive."""
        if self.taken is not None:
            self.taken.shut()
        if self._lane is not None:
            self._lane.close()
        for event in (self.come, self.expected):
            event.set()
        self._lane = self.taken = self._token = self.welcomed = None
        self.come, self.expected = trio.Event(), trio.Event()

    def close(self) -> None:
        self._token = self.taken = self.welcomed = None
        self.expected.set()
        if self._lane is not None:
            self._lane.close()
            self._lane = None


class Reception:
    """Assigns the connections of a daemon's listener.  ``find`` returns the session that a
    connection belongs to, or raises :class:`MigrationError`.  ``look`` returns what a connection is
    answered that asks about this host, and ``judge`` why this host could not take an offered guest.
    A sender takes no guest in, and has none.
    """

    def __init__(
        self,
        find: Callable[[Hello], AwaitedLanes],
        look: Callable[[], Awaitable[Host]],
        terms: Terms,
        judge: Judge | None = None,
    ):
        self._find, self._look, self._terms = find, look, terms
        self._judge = judge
        self._trials = Trials()
        self._strangers: dict[trio.CancelScope, str] = {}
        """The connections without a hello and their addresses, the oldest first."""
        self._of_address: dict[str, dict[trio.CancelScope, None]] = {}
        """The same connections by address."""
        self._crowded = Complaint(log.warning)

    async def receive(self, stream: trio.SocketStream) -> None:
        """Receive the hello of a connection and assign the connection to its session."""
        try:
            address = str(stream.socket.getpeername()[0])
        except OSError:  # the peer has closed the connection already
            stream.socket.close()
            return
        self._make_room(address)
        with stream.socket, trio.CancelScope() as stranger:
            self._strangers[stranger] = address
            self._of_address.setdefault(address, {})[stranger] = None
            try:
                await self._greet(stream, address, stranger)
            finally:
                self._forget(stranger)

    def _make_room(self, address: str) -> None:
        """Make room for one more connection from this address: close the oldest connection without
        a hello.  A peer sends its hello at once, so a crowd of silent connections does not keep a
        peer out.
        """
        if len(self._of_address.get(address, ())) >= MAX_STRANGERS_OF_ADDRESS:
            crowd: Collection[trio.CancelScope] = self._of_address[address]
            where = f" from {address}"
        elif len(self._strangers) >= MAX_STRANGERS:
            crowd, where = self._strangers, ""
        else:
            return
        self._crowded.log(
            "%d connections%s have not sent a hello: the oldest are closed",
            len(crowd),
            where,
        )
        oldest = next(iter(crowd))
        self._forget(oldest)
        oldest.cancel()

    def _forget(self, stranger: trio.CancelScope) -> None:
        address = self._strangers.pop(stranger, None)
        if address is not None:
            del self._of_address[address][stranger]
            if not self._of_address[address]:
                del self._of_address[address]

    async def _greet(
        self, stream: trio.SocketStream, address: str, stranger: trio.CancelScope
    ) -> None:
        try:
            lane = await LaneConnection.from_stream(stream, self._terms)
        except (MigrationError, OSError) as error:
            log.warning("connection refused: %s", error)
            return
        try:
            greeting = await lane.receive_hello()
            negotiate(greeting)
            if PREFLIGHT in greeting.requires:
                await self._serve_without_session(lane, greeting, address, stranger)
                lane.close()
                return
            awaited = self._find(greeting)
            await awaited.welcome(greeting)
            ours = hello(
                Lane(greeting.lane),
                greeting.session,
                awaited.answer(greeting),
                requires=self._terms.requires,
            )
            await lane.send(ours)
            lane.agree((ours, greeting))
            if not awaited.arrived(greeting, lane):
                lane.close()
        except (MigrationError, OSError) as error:
            log.warning("connection from %s refused: %s", lane.peer(), error)
            try:
                with contextlib.suppress(MigrationError), trio.move_on_after(EXPLANATION_S):
                    await lane.send(
                        Refused(printable(str(error)), isinstance(error, UnknownSessionError))
                    )
            finally:
                lane.close()
        except BaseException:
            lane.close()
            raise

    async def _serve_without_session(
        self, lane: LaneConnection, greeting: Hello, address: str, stranger: trio.CancelScope
    ) -> None:
        """Answer a peer that asks about this host, and that may try it.  Raises
        :class:`ProtocolError` for a trial at a sender.
        """
        is_trial = TRIAL in greeting.requires
        if is_trial and self._judge is None:
            raise ProtocolError(WRONG_END[RECEIVER])
        ours = hello(Lane(greeting.lane), greeting.session, requires=self._terms.requires)
        await lane.send(ours)
        lane.agree((ours, greeting))
        await lane.send(await self._look())
        if is_trial and self._judge is not None:
            async with self._trials.admitted(address):
                self._forget(stranger)  # the number of trials has a limit of its own
                await self._trials.serve(lane, self._judge)


async def listen_tcp(host: str, port: int) -> tuple[list[trio.SocketListener], int]:
    """Return the listeners and their port.  Raises :class:`MigrationError`."""
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise MigrationError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another address "
            "(--listen, or listen in the configuration)"
        ) from error
    return listeners, listeners[0].socket.getsockname()[1]
