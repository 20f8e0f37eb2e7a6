"""How the two lanes of a session come about: one end dials, the other awaits.

Which end that is has nothing to do with who sends: asked for on the command line, the sender dials the receiver; under xl the
receiver, which alone learns of the other, dials the sender.  Both ends ask a :class:`Lanes` for the push lane first, and for
the pull lane when the preflight has given them the token for it.

The one that dials says hello first.  Behind a daemon's listener :func:`receive` finds out which session a connection is for.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Protocol

import trio

from migrate.errors import MigrationError, ProtocolError
from migrate.messages import Hello, Lane
from migrate.session import hello, negotiate
from migrate.transport import CONNECT_TIMEOUT_S, STEP_TIMEOUT_S, LaneConnection, connect

log = logging.getLogger(__name__)


class Lanes(Protocol):
    @property
    def peer(self) -> str:
        """The other end, for people; empty where it is not known yet."""

    async def push(self) -> LaneConnection:
        """Raises :class:`MigrationError` where it does not come about."""

    async def pull(self, token: bytes) -> LaneConnection:
        """As :meth:`push`; ``token`` is what the receiver gave for it."""


class DialledLanes:
    """``token``: what the push lane has to show, where the other end has given us one."""

    def __init__(self, address: tuple[str, int], session: str, token: bytes = b""):
        self._address, self._session, self._token = address, session, token

    @property
    def peer(self) -> str:
        return "{}:{}".format(*self._address)

    async def push(self) -> LaneConnection:
        return await self._dial(Lane.PUSH, self._token)

    async def pull(self, token: bytes) -> LaneConnection:
        return await self._dial(Lane.PULL, token)

    async def _dial(self, kind: Lane, token: bytes) -> LaneConnection:
        lane = await connect(*self._address)
        try:
            await lane.send(hello(kind, self._session, token))
            negotiate(await lane.receive_hello())
        except BaseException:
            lane.close()
            raise
        return lane


class AwaitedLanes:
    """``token``: what the push lane has to show.  Each lane comes once."""

    def __init__(self, token: bytes = b"", *, timeout_s: float = STEP_TIMEOUT_S):
        self._timeout_s = timeout_s
        self._push, self._pull = _AwaitedLane(), _AwaitedLane()
        self._push.expect(token)
        self.peer = ""

    async def arrived(self, greeting: Hello, lane: LaneConnection) -> None:
        """Raises :class:`ProtocolError` for a lane that is not awaited, or shows a wrong token."""
        awaited = self._pull if greeting.lane == Lane.PULL.value else self._push
        with trio.move_on_after(CONNECT_TIMEOUT_S):  # the token for it may be on its way still
            await awaited.expected.wait()
        if not awaited.take(greeting.token, lane):
            raise ProtocolError(f"a {greeting.lane} lane that nobody awaits, or with a wrong or used token")
        self.peer = lane.peer()

    async def push(self) -> LaneConnection:
        return await self._come(self._push, "reach this end")

    async def pull(self, token: bytes) -> LaneConnection:
        self._pull.expect(token)
        return await self._come(self._pull, "open its pull lane")

    def close(self) -> None:
        """No more lanes; one that came and was not asked for is closed."""
        for awaited in (self._push, self._pull):
            awaited.close()

    async def _come(self, awaited: _AwaitedLane, what: str) -> LaneConnection:
        with trio.move_on_after(self._timeout_s):
            await awaited.come.wait()
        if awaited.lane is None:
            raise MigrationError(f"the peer did not {what} within {self._timeout_s:g} s")
        lane, awaited.lane = awaited.lane, None
        return lane


class _AwaitedLane:
    def __init__(self) -> None:
        self.expected, self.come = trio.Event(), trio.Event()
        self.lane: LaneConnection | None = None
        self._token: bytes | None = None

    def expect(self, token: bytes) -> None:
        self._token = token
        self.expected.set()

    def take(self, token: bytes, lane: LaneConnection) -> bool:
        if self._token is None or not secrets.compare_digest(token, self._token):
            return False
        self._token, self.lane = None, lane
        self.come.set()
        return True

    def close(self) -> None:
        self._token = None
        self.expected.set()
        if self.lane is not None:
            self.lane.close()
            self.lane = None


async def receive(stream: trio.SocketStream, find: Callable[[Hello], AwaitedLanes]) -> None:
    """Take in a connection: ``find`` says whose it is, or raises :class:`MigrationError`."""
    lane = LaneConnection.from_stream(stream)
    try:
        greeting = await lane.receive_hello()
        await lane.send(hello(Lane(greeting.lane), greeting.session))
        negotiate(greeting)
        await find(greeting).arrived(greeting, lane)
    except MigrationError as error:
        log.warning("connection refused: %s", error)
        lane.close()
    except BaseException:
        lane.close()
        raise
