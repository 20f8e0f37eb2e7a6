# SPDX-License-Identifier: GPL-2.0-or-later
"""The sender, as far as the lanes reach it: one pair of lanes after the other, and one session."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import trio

from migrate.errors import PeerClosedError
from migrate.lanes.connection import EXPLANATION_S, LaneConnection
from migrate.lanes.pairs import Lanes
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.session import Session


class Peer:
    """The sender.  A method that needs a lane raises :class:`PeerClosedError` if there is none."""

    def __init__(self, lanes: Lanes, session: Session):
        self.lanes = lanes
        self.session = session
        self._push: LaneConnection | None = None
        self._why_none = "the receiver was restarted"
        self.pull: LaneConnection | None = None
        """``None`` if there is no pull lane."""
        self.is_busy = False
        """What the last message on the push lane asks for is being done."""
        self._received_at = time.monotonic()
        self._bytes_received = self._bytes_pushed = 0
        """Over earlier lanes."""

    @property
    def push(self) -> LaneConnection:
        if self._push is None:
            raise PeerClosedError(self._why_none)
        return self._push

    @property
    def connections(self) -> list[LaneConnection]:
        return [lane for lane in (self._push, self.pull) if lane is not None]

    @property
    def received_at(self) -> float:
        """When bytes of the sender last arrived (time.monotonic())."""
        return max((lane.received_at for lane in self.connections), default=self._received_at)

    @property
    def bytes_received(self) -> int:
        """The number of bytes that were received from the sender so far."""
        return self._bytes_received + sum(lane.bytes_received for lane in self.connections)

    @property
    def bytes_pushed(self) -> int:
        """The number of bytes that were received on push lanes so far."""
        return self._bytes_pushed + (self._push.bytes_received if self._push is not None else 0)

    async def connect(self) -> None:
        self._push = await self.lanes.push()

    async def reconnect(self, note: Callable[[str], None]) -> None:
        """Wait for a new push lane, as :meth:`Lanes.again` does."""
        self._push = await self.lanes.again(note)

    async def open_pull_lane(self, token: bytes) -> None:
        self.pull = await self.lanes.pull(token)

    def close(self) -> None:
        self._received_at, self._bytes_received = self.received_at, self.bytes_received
        self._bytes_pushed = self.bytes_pushed
        for lane in self.connections:
            lane.close()
        self._push = self.pull = None
        self._why_none = "the connection was lost"

    # ---- the push lane ----
    async def send(self, message: m.Message) -> None:
        self.session.sent(message, Lane.PUSH)
        await self.push.send(message)

    def send_blocking(self, message: m.Message, payload: Sequence[memoryview] = ()) -> None:
        self.session.sent(message, Lane.PUSH)
        self.push.send_blocking(message, payload)

    async def receive(self) -> m.Message:
        message, _pages = await self.push.receive()
        self.session.received(message, Lane.PUSH)
        return message

    def receive_blocking(self) -> tuple[m.Message, memoryview]:
        message, payload = self.push.receive_blocking()
        self.session.received(message, Lane.PUSH)
        return message, payload

    async def acknowledge(self, about: str = "the outcome was received") -> None:
        """Answer the sender's last message, after which the sender forgets the session."""
        with contextlib.suppress(PeerClosedError):
            await self.push.send(m.Failed(about))
            await trio.sleep(EXPLANATION_S)
