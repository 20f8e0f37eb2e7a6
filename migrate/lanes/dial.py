# SPDX-License-Identifier: GPL-2.0-or-later
"""The end that dials: it opens both lanes and, after a loss, tries to open them again until it
succeeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import trio

from migrate.errors import MigrationError, PeerClosedError, ProtocolError, RefusedError
from migrate.lanes.connection import LaneConnection, Terms, connect
from migrate.protocol.messages import PROOF, Hello, Lane
from migrate.protocol.session import hello, is_answer, negotiate, rejoin_token

FIRST_RETRY_S = 0.1
QUICK_RETRY_S, QUICK_FOR_S = 2.0, 60.0
"""The longest pause between two attempts to dial, for the first minute after a loss: a guest may
wait, and its disks do not wait for longer than half a minute (``POSTCOPY_SILENCE_S``).
"""
LAST_RETRY_S = 10.0
"""The longest pause after that.  Each pause is twice as long as the one before it, unless a lane
has lasted longer than this limit in between.
"""


REJOINS_OF_ONE_LIFE = 2**20
"""More attempts than one daemon can make to resume one session: it would take 120 days.  Its
successor therefore adds this number to the first number of its predecessor.
"""
MAX_REJOINS = 2**32 - 1
"""A token has four bytes for the number."""
HINT = (
    "see the log of the daemon there: its configuration may have a [tls] section, and this host's "
    "has none, or its descriptors may be used up"
)
"""What to do about a peer that sends no hello, on a connection without TLS."""


class DialledLanes:
    """The lanes of one session, which this end dials.  ``token``: the token of the push lane, if
    the other end has given one.

    Each attempt to resume the session has a larger number than any attempt before it, because the
    other end accepts a number once.  ``rejoins`` is the number from which this daemon counts.  The
    numbers do not depend on the clock, because an administrator may set the clock back.

    ``proven``: the other end proves with each answer that it has the session's key.  Without the
    proof, another daemon at the same address could report which pages it lacks.
    """

    def __init__(
        self,
        address: tuple[str, int],
        session: str,
        terms: Terms,
        token: bytes = b"",
        *,
        rejoins: int = 0,
        proven: bool = False,
    ):
        self._address, self._session, self._token = address, session, token
        self._terms = terms
        self._key = b""
        self._first = self._rejoins = rejoins
        self._proven = proven
        self._pause_s = FIRST_RETRY_S
        self._dialled_at = math.inf
        """The time at which the last lane was opened; infinite while no lane is open."""
        self._quick_until = -math.inf
        self._hurried = trio.Event()

    @property
    def peer(self) -> str:
        return "{}:{}".format(*self._address)

    @property
    def dials(self) -> tuple[str, int]:
        return self._address

    def facts(self) -> dict[str, Any]:
        return {"dials": self._address, "rejoins": self._first, "proven": self._proven}

    async def push(self) -> LaneConnection:
        lane = await self._dial(Lane.PUSH, self._token)
        self._proven = PROOF in lane.capabilities
        return lane

    async def pull(self, token: bytes) -> LaneConnection:
        return await self._dial(Lane.PULL, token)

    def keep(self, key: bytes) -> None:
        self._key = key

    async def again(self, note: Callable[[str], None]) -> LaneConnection:
        if trio.current_time() - self._dialled_at > self._pause_s:
            self._pause_s = FIRST_RETRY_S
        if self._pause_s == FIRST_RETRY_S:
            self._quick_until = trio.current_time() + QUICK_FOR_S
        self._dialled_at = math.inf
        while True:
            with trio.move_on_after(self._pause_s):
                await self._hurried.wait()
            self._hurried = trio.Event()
            is_early = trio.current_time() < self._quick_until
            self._pause_s = min(self._pause_s * 2, QUICK_RETRY_S if is_early else LAST_RETRY_S)
            self._rejoins = min(self._rejoins + 1, MAX_REJOINS)
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
            if self._key and self._proven and not is_answer(self._key, token, theirs.token):
                raise ProtocolError(
                    f"the daemon that answers at {self.peer} is not the one of this migration: it "
                    "does not have the session's key"
                )
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
            raise PeerClosedError(f"{error}, instead of an answer to hello: {HINT}") from error
