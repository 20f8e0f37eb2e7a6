# SPDX-License-Identifier: GPL-2.0-or-later
"""An operator decides at the sender while something else happens there: the decision acts or is
refused, and never forbids another decision; the destination is informed whoever was first.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import GuestEndedError, MigrationError
from migrate.options import Strategy
from migrate.protocol import messages as m
from migrate.service.config import Config
from migrate.service.journal import Journal
from sender import toolstack
from sender.daemon import SenderDaemon
from sender.migration import OutgoingMigration
from sender.ownership import Link as Lanes
from sender.ownership import State
from sender.recovery import Recovery
from sender.requests import TOO_LATE, Requests
from sender.rollback import Rollback
from tests.support.guests import busy, continues_here_only
from tests.support.inprocess import Outcome, migrate
from tests.support.left import NoLanes, left_by_a_sender
from tests.support.links import Link
from tests.support.states import in_state
from tests.support.waiting import until_async
from xenbackend.contract import DomainState

Patch = pytest.MonkeyPatch


class Lane:
    """A destination that receives the last message, and answers."""

    capabilities = frozenset({m.RECALL, m.LOST})

    def __init__(self, taken: list[m.Message]):
        self._taken = taken

    async def send(self, message: m.Message) -> None:
        self._taken.append(message)

    async def receive(self) -> tuple[m.Message, memoryview]:
        return m.Failed("told"), memoryview(b"")

    def close(self) -> None:
        pass


class DestinationIsBack(NoLanes):
    dials = ("destination", 8013)

    def __init__(self) -> None:
        self.taken: list[m.Message] = []

    async def again(self, _note: object) -> Lane:
        return Lane(self.taken)


async def test_a_decision_that_comes_too_late_can_be_made_again(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The destination's final answer has come, and its consequence has not been drawn yet."""
    settle, take_up = Rollback.settle, Recovery._resume_session
    settling, go_on, answered = trio.Event(), trio.Event(), trio.Event()
    is_final = False

    async def settle_later(self: Rollback, error: BaseException) -> None:
        settling.set()
        await go_on.wait()
        await settle(self, error)

    async def fail(self: Recovery, push: Any) -> None:
        if is_final:
            raise MigrationError("the destination cannot go on")
        await take_up(self, push)

    monkeypatch.setattr(Rollback, "settle", settle_later)
    monkeypatch.setattr(Recovery, "_resume_session", fail)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        nonlocal is_final
        migration = outcome.migration
        await until_async(lambda: migration.context.entry.ran)
        is_final = True
        link.cut()
        await settling.wait()

        async def decide() -> None:
            with pytest.raises(MigrationError, match=TOO_LATE):
                await migration.requests.decide(here=False)
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decide)
            await until_async(lambda: migration.requests.decision is not None)
            go_on.set()
        clean_hosts.destination.open(name).destroy()
        await until_async(lambda: migration.ownership.link is Lanes.GIVEN_UP)
        await migration.requests.decide(here=True, force=True)

    outcome = await migrate(clean_hosts, busy(name), Strategy.POSTCOPY, meanwhile=meanwhile)
    assert answered.is_set() and outcome.migration.phase == "failed"
    await continues_here_only(clean_hosts, name)


class Answers:
    """An operator's connection."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def answer(self, event: str, **_fields: object) -> None:
        self.events.append(event)


async def test_the_destination_is_informed_though_the_migration_ended_just_before_the_decision(
    clean_hosts: World, name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    make = functools.partial(in_state, clean_hosts, name, State.HANDED_OVER, xl=False)
    rollback, context = await trio.to_thread.run_sync(make)
    migration, lanes = OutgoingMigration(context), DestinationIsBack()
    context.lanes = cast(Any, lanes)
    migration.requests.rollback, context.ownership.link = rollback, Lanes.GIVEN_UP
    socket = tmp_path / "sender.sock"
    daemon = SenderDaemon(clean_hosts.source, socket, Config(), context.journal)
    daemon._admit(migration)
    check = Requests.check_decision

    async def end_first(self: Requests, **decision: bool) -> None:
        self.is_over = True
        daemon._active.discard(migration.id)
        await check(self, **decision)

    monkeypatch.setattr(Requests, "check_decision", end_first)
    connection = Answers()
    with trio.fail_after(20):
        async with trio.open_nursery() as daemon._nursery:
            request = {"command": "decide", "migration": name, "here": True}
            await daemon._handle(request, cast(Any, connection))
    assert connection.events == ["result"] and context.ownership.state is State.STAYED
    assert [type(message) for message in lanes.taken] == [m.Recall]


async def informs(
    successor: OutgoingMigration, lanes: DestinationIsBack, journal: Journal, last: type[m.Message]
) -> None:
    """Check that a successor sends its last message, and erases its entry then."""
    with trio.fail_after(20):
        await successor.linger()
    assert [type(message) for message in lanes.taken] == [last]
    assert successor.ownership.state is (State.FAILED if last is m.Lost else State.STAYED)
    assert await trio.to_thread.run_sync(journal.entries) == {}


async def test_a_guest_back_at_a_checkpoint_is_recalled_by_a_successor(
    clean_hosts: World, tmp_path: Path
) -> None:
    """The sender was killed when it had destroyed the old domain, and had not noted that yet."""
    lanes = DestinationIsBack()
    journal = Journal(tmp_path)
    successor = left_by_a_sender(clean_hosts.source, journal, "going back", lanes)
    with pytest.raises(MigrationError, match="when the last checkpoint"):
        await successor.run()
    assert "given up" in (await trio.to_thread.run_sync(journal.entries))["session"]["step"]
    await informs(successor, lanes, journal, m.Recall)


async def test_a_destination_is_informed_by_a_successor_that_nothing_is_left_for_its_guest(
    clean_hosts: World, tmp_path: Path
) -> None:
    """The sender was killed when it had destroyed the domain, and had not noted that yet."""
    lanes = DestinationIsBack()
    journal = Journal(tmp_path)
    successor = left_by_a_sender(clean_hosts.source, journal, "decided elsewhere", lanes)
    with pytest.raises(MigrationError, match="nothing of the guest is needed here"):
        await successor.run()
    assert successor.progress.problem.endswith("nothing of the guest is needed here")
    assert len(await trio.to_thread.run_sync(journal.entries)) == 1
    await informs(successor, lanes, journal, m.Lost)


@pytest.mark.parametrize(
    "state", [State.UNDECIDED, State.HANDED_OVER, State.DECIDED_ELSEWHERE], ids=lambda s: s.name
)
async def test_a_guest_that_xl_has_resumed_here_is_not_destroyed(
    clean_hosts: World, name: str, monkeypatch: Patch, state: State
) -> None:
    """xl resumed the guest a moment ago, and the sender has not seen that yet."""
    monkeypatch.setattr(toolstack, "UNKNOWN_XL_S", 0.1)
    make = functools.partial(in_state, clean_hosts, name, state, xl=True)
    rollback, context = await trio.to_thread.run_sync(make)
    assert context.source is not None
    context.source.domain.resume()
    await rollback.settle(GuestEndedError("the guest ended at the destination"))
    here = [info.state for info in clean_hosts.source.domains() if info.name == name]
    assert here == [DomainState.RUNNING] and context.ownership.has_ended
