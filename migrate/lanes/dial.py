# SPDX-License-Identifier: GPL-2.0-or-later
"""The end that dials: it opens both lanes, and opens them again after a loss until it gets through."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import trio

from migrate.errors import MigrationError, PeerClosedError, RefusedError
from migrate.lanes.connection import LaneConnection, Terms, connect
from migrate.protocol.messages import Hello, Lane
from migrate.protocol.session import hello, negotiate, rejoin_token

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 10.0
"""Each attempt to dial again waits twice as long as the one before it, up to this, where no lane has held longer than that."""


class DialledLanes:
    """``token``: what the push lane has to show, where the other end has given us one."""

    def __init__(self, address: tuple[str, int], session: str, terms: Terms, token: bytes = b""):
        self._address, self._session, self._token = address, session, token
        self._terms = terms
        self._key = b""
        self._rejoins = 0
        self._pause_s = FIRST_RETRY_S
        self._dialled_at = math.inf
        """When the last lane came about, until it is found lost."""
        self._hurried = trio.Event()

    @property
    def peer(self) -> str:
        return "{}:{}".format(*self._address)

    @property
    def dials(self) -> tuple[str, int]:
        return self._address

    async def push(self) -> LaneConnection:
        return await self._dial(Lane.PUSH, self._token)

    async def pull(self, token: bytes) -> LaneConnection:
        return await self._dial(Lane.PULL, token)

    def keep(self, key: bytes) -> None:
        self._key = key

    async def again(self, note: Callable[[str], None]) -> LaneConnection:
        if trio.current_time() - self._dialled_at > self._pause_s:
            self._pause_s = FIRST_RETRY_S
        self._dialled_at = math.inf
        while True:
            with trio.move_on_after(self._pause_s):
                await self._hurried.wait()
            self._hurried = trio.Event()
            self._pause_s = min(self._pause_s * 2, LAST_RETRY_S)
            # Larger than any before, also after one's predecessor's.
            self._rejoins = max(self._rejoins + 1, int(time.time()))
            try:
                lane = await self._dial(Lane.PUSH, rejoin_token(self._key, self._rejoins))
                self._dialled_at = trio.current_time()
                return lane
            except RefusedError:
                raise
            except MigrationError as error:
                note(f"{error}; trying again in {self._pause_s:g} s")

    def hurry(self) -> None:
        self._pause_s = FIRST_RETRY_S
        self._hurried.set()

    async def _dial(self, kind: Lane, token: bytes) -> LaneConnection:
        lane = await connect(*self._address, self._terms)
        try:
            ours = hello(kind, self._session, token, requires=self._terms.requires)
            await lane.send(ours)
            theirs = await self._answer(lane)
            negotiate(theirs)
            lane.agree((ours, theirs))
        except BaseException:
            lane.close()
            raise
        return lane

    async def _answer(self, lane: LaneConnection) -> Hello:
        try:
            return await lane.receive_hello()
        except RefusedError:
            raise
        except PeerClosedError as error:
            if self._terms.tls is not None:
                raise
            hint = "has it a [tls] section in its configuration, and this host none?"
            raise PeerClosedError(f"{error}, instead of an answer to hello: {hint}") from error
