# SPDX-License-Identifier: GPL-2.0-or-later
"""The message to a sender that was cut off, about the end of its migration, and for how long it is
kept.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import trio
import trio.testing

from migrate.errors import PeerClosedError, UnknownSessionError
from migrate.lanes.connection import LINGER_S
from migrate.protocol import messages as m
from migrate.protocol.session import Role, Session
from migrate.service.journal import Journal
from receiver.context import Context
from receiver.entry import Entry
from receiver.ownership import Ownership, State
from receiver.peer import Peer
from receiver.progress import IncomingProgress
from receiver.rollback import RECALLED_LINGER_DAYS, linger
from receiver.toolstack import OwnToolstack
from tests.support.left import NoLanes
from xenbackend.contract import Hypervisor
from xenbackend.errors import XenError

LAST = m.Complete(b"{}")


class Lane:
    """A lane on which the sender sends one message, and receives one."""

    received_at = 0.0
    bytes_received = 0

    def __init__(self, message: m.Message):
        self._message = message
        self.taken: list[m.Message] = []

    async def receive(self) -> tuple[m.Message, memoryview]:
        return self._message, memoryview(b"")

    async def send(self, message: m.Message) -> None:
        self.taken.append(message)

    def close(self) -> None:
        pass


class Lanes(NoLanes):
    def __init__(self, again: Callable[[], Lane]):
        self._again = again

    async def again(self, _note: object) -> Lane:
        await trio.sleep(60)
        return self._again()


class Refusing:
    """A hypervisor that can open no domain."""

    def open(self, _domid: int, _handle: object) -> NoReturn:
        raise XenError("getdomaininfo", errno.EBUSY)


def completed(journal: Journal, again: Callable[[], Lane]) -> Context:
    lanes: Any = Lanes(again)
    record, progress = Entry(journal, "session", lanes, owns_domain=False), IncomingProgress("web")
    ownership = Ownership(record.write, State.FINISHING)
    ownership.enter(State.COMPLETED)
    session = Session.of_predecessor(
        Role.RECEIVER, 64, handed_over=True, protected=False, entrusted=False
    )
    journal.write("session", {"step": "finishing"})
    return Context(
        cast(Hypervisor, Refusing()),
        OwnToolstack(),
        Peer(lanes, session),
        ownership,
        record,
        progress,
    )


def is_away() -> NoReturn:
    raise PeerClosedError("no answer")


async def test_a_sender_that_does_not_come_back_is_waited_for_for_a_while(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    journal = Journal(tmp_path)
    incoming = completed(journal, is_away)
    await linger(incoming, LAST, trio.lowlevel.checkpoint)
    assert trio.current_time() == pytest.approx(LINGER_S, abs=120)
    assert "did not come back, and may not have the outcome" in caplog.text
    assert journal.entries() == {} and incoming.ownership.phase == "completed"


async def test_of_a_sender_that_has_forgotten_nothing_else_is_reported(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The sender may or may not have received the end before."""
    caplog.set_level("INFO")

    def has_forgotten() -> NoReturn:
        raise UnknownSessionError("no such session")

    incoming = completed(Journal(tmp_path), has_forgotten)
    await linger(incoming, LAST, trio.lowlevel.checkpoint)
    assert "the sender does not have this migration any more: no such session" in caplog.text
    assert incoming.progress.problem == ""


async def test_a_guest_that_is_recalled_and_cannot_be_paused_is_reported_for_days(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    lane = Lane(m.Recall("an operator has decided at the source that it runs there"))
    incoming = completed(Journal(tmp_path), lambda: lane)
    await linger(incoming, LAST, trio.lowlevel.checkpoint)
    assert trio.current_time() == pytest.approx(RECALLED_LINGER_DAYS * 24 * 3600, rel=0.01)
    assert lane.taken == []  # the sender is not sent a wrong answer
    assert "web cannot be paused here" in incoming.progress.problem
    assert incoming.ownership.phase == "completed"


@pytest.mark.parametrize("is_silent", ["at once", "after the outcome"])
async def test_a_sender_that_falls_silent_is_dialled_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, is_silent: str
) -> None:
    """Without a limit the receiver waited until it forgot the session, and the sender never got the
    outcome.
    """

    class Silent(Lane):
        async def receive(self) -> tuple[m.Message, memoryview]:
            if is_silent == "at once" or self.taken:
                await trio.sleep_forever()
            return await super().receive()

    class Answering(Lane):
        async def receive(self) -> tuple[m.Message, memoryview]:
            return (m.Completed() if self.taken else m.Rejoin()), memoryview(b"")

    lanes = [Silent(m.Rejoin()), last := Answering(m.Rejoin())]
    journal = Journal(tmp_path)
    incoming = completed(journal, lambda: lanes.pop(0))
    await linger(incoming, LAST, trio.lowlevel.checkpoint)
    assert not lanes and last.taken == [LAST] and journal.entries() == {}
    assert trio.current_time() < LINGER_S / 2
