# SPDX-License-Identifier: GPL-2.0-or-later
"""Trying another host without a migration, the end that is dialled.

The hello of the peer requires ``preflight`` and ``trial``.  After ``host`` this end answers

- ``offer`` by ``accepted`` or ``refused``, as the preflight of a migration would, and makes
  nothing;
- ``barrier`` by ``passed``, when all pages before it were written to memory that had not been used
  before, as a restore does.  Nothing is kept.

The peer ends the connection.  This end does so after :data:`TRIAL_S` or :data:`MOST_BYTES`.

Two peers that send pages at once would measure each other.  So a peer has its first message that is
no offer answered when it is the peer's turn, and begins to measure then.  A peer that takes long
keeps nobody out: the next one waits for :data:`TURN_S` at most, and measures beside it then.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import AsyncIterator, Callable

import trio

from migrate.errors import PeerClosedError, RemoteProtocolError
from migrate.lanes.connection import LaneConnection
from migrate.lanes.scheduling import run_in_thread
from migrate.protocol import messages as m

TRIAL_S = 30.0
MOST_BYTES = 2**30
TURN_S = 5.0
"""How long a peer waits for its turn to measure.  A measurement takes a second or two."""
MOST_TRIALS = 16
"""The most trials at once.  Each has a thread, and the memory of two batches of pages."""
MOST_TRIALS_OF_ADDRESS = 4
"""The most trials at once with one address.  Further ones wait, and other addresses do not."""

Judge = Callable[[m.Offer], str]
"""Returns why an offered guest could not be taken in here; empty if it could.  Called in a
thread.
"""


class Trials:
    """The trials of one listener."""

    def __init__(self) -> None:
        self._all = trio.CapacityLimiter(MOST_TRIALS)
        self._of_address: dict[str, trio.CapacityLimiter] = {}
        self._turn = trio.Lock()

    @contextlib.asynccontextmanager
    async def admitted(self, address: str) -> AsyncIterator[None]:
        """Wait until a trial with this address may begin.  A trial ends within :data:`TRIAL_S`."""
        limit = trio.CapacityLimiter(MOST_TRIALS_OF_ADDRESS)
        own = self._of_address.setdefault(address, limit)
        try:
            async with own, self._all:
                yield
        finally:
            if not own.borrowed_tokens:  # a waiting task gets a token at once
                self._of_address.pop(address, None)

    async def serve(self, lane: LaneConnection, judge: Judge) -> None:
        """Answer the peer until it ends the connection, or until the limits.  Raises
        :class:`RemoteProtocolError` for a message that does not belong to a trial.
        """
        trial = _Trial(lane, judge)
        with trio.move_on_after(TRIAL_S):
            if await run_in_thread(functools.partial(trial.answer, m.Offer), lane.shut):
                async with self._turn_of_one():
                    await run_in_thread(functools.partial(trial.answer, m.Message), lane.shut)

    @contextlib.asynccontextmanager
    async def _turn_of_one(self) -> AsyncIterator[None]:
        """Wait for the turn to measure, for :data:`TURN_S` at most."""
        with trio.move_on_after(TURN_S) as waiting:
            await self._turn.acquire()
        try:
            yield
        finally:
            if not waiting.cancelled_caught:
                self._turn.release()


class _Trial:
    """One trial.  Its method is called in a thread."""

    def __init__(self, lane: LaneConnection, judge: Judge):
        self._lane, self._judge = lane, judge
        self._received: tuple[m.Message, memoryview] | None = None
        """The message that is to be answered next."""

    def answer(self, kind: type[m.Message]) -> bool:
        """Answer messages of this kind.  Returns true when another one has come, which the next
        call answers, and false when the trial is over.  Raises as :meth:`Trials.serve`.
        """
        with contextlib.suppress(PeerClosedError):
            while self._lane.bytes_received < MOST_BYTES:
                message, payload = self._received or self._lane.receive_blocking()
                if not isinstance(message, kind):
                    self._received = message, payload
                    return True
                self._received = None
                self._answer(message, payload)
        return False

    def _answer(self, message: m.Message, payload: memoryview) -> None:
        match message:
            case m.Offer():
                problem = self._judge(message)
                refused = m.Refused(m.printable(problem), False)
                self._lane.send_blocking(refused if problem else m.Accepted("", b""))
            case m.Barrier():
                self._lane.send_blocking(m.Passed(message.number))
            case m.Pages():
                _write(payload)
            case _:
                raise RemoteProtocolError(f"{message.type} in a trial")


def _write(payload: memoryview) -> None:
    """Write pages to fresh memory, and give that memory back."""
    if payload:
        with mmap.mmap(-1, len(payload)) as fresh:
            fresh.write(payload)
