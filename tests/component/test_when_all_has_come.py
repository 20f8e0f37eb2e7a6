# SPDX-License-Identifier: GPL-2.0-or-later
"""An error after all pages have arrived: the guest runs, and both ends end."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.options import Strategy
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from receiver import context as receiver_context
from receiver.ownership import State as DestinationState
from receiver.peer import Peer
from sender import migration as sender_migration
from sender.migration import OutgoingMigration
from sender.ownership import State
from sender.push import PushLane
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.left import left_by_a_sender
from tests.support.links import Link, cut_when, until_cut
from tests.support.waiting import WAIT_S, until_async
from xenbackend.contract import DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ECONNRESET, "reset"), RuntimeError("can't start new thread")],
    ids=["the lane is lost", "no thread"],
)
async def test_a_sender_that_cannot_send_the_last_message_has_completed(
    clean_hosts: World, name: str, monkeypatch: Patch, error: Exception
) -> None:
    """The destination may have removed the session, so the sender does not rejoin."""
    send = PushLane.send

    async def fail(self: PushLane, message: m.Message) -> None:
        if isinstance(message, m.Completed):
            raise error
        await send(self, message)

    monkeypatch.setattr(PushLane, "send", fail)
    outcome = await migrate(clean_hosts, busy(name), Strategy.POSTCOPY)
    assert outcome.error is None
    assert outcome.migration.ownership.state is State.COMPLETED
    assert clean_hosts.source.domains() == []


def successor_of(world: World, session: str, link: Link) -> OutgoingMigration:
    """Return the migration as a restarted sender has it.  It dials past the link, which is down."""
    journal = Journal(world.directory / "journal")
    facts = journal.entries()[session]
    lanes = DialledLanes(link.to, session, Terms(), rejoins=facts["rejoins"] + 1000)
    return OutgoingMigration.of_predecessor(session, world.source, lanes, journal, facts)


async def test_a_guest_that_starts_late_belongs_here_though_its_source_is_gone(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The guest's memory is complete, and `lost` has arrived from the sender's successor."""
    start = SimulatedDomain.start
    can_start = trio.Event()

    def try_to_start(self: SimulatedDomain) -> None:
        if not can_start.is_set():
            raise XenError("start", errno.EBUSY)
        start(self)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: outcome.migration.ownership.handed_over)
        incoming = outcome.incoming
        await until_async(
            lambda: (
                incoming.missing == 0
                and incoming.requests.context.is_in(DestinationState.UNSTARTED)
            )
        )
        link.down()
        await until_async(lambda: outcome.migration.phase == "interrupted")
        clean_hosts.source.open(name).destroy()
        successor = successor_of(clean_hosts, outcome.migration.id, link)
        with pytest.raises(MigrationError, match="are lost"):
            await successor.run()
        await successor.linger()
        assert successor.ownership.state is State.FAILED
        can_start.set()
        await until_async(lambda: incoming.phase == "completed")
        assert clean_hosts.destination.open(name).state() is DomainState.RUNNING
        outcome.migration.requests.scope.cancel()

    monkeypatch.setattr(SimulatedDomain, "start", try_to_start)
    monkeypatch.setattr(receiver_context, "FIRST_START_AGAIN_S", 0.05)
    monkeypatch.setattr(receiver_context, "LAST_START_AGAIN_S", 0.1)
    outcome = await migrate(clean_hosts, busy(name), Strategy.POSTCOPY, meanwhile=meanwhile)
    assert outcome.incoming.phase == "completed"


async def test_a_sender_whose_domain_is_gone_gets_the_answer_that_all_pages_have_arrived(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The destination has completed, its report was lost with the link, and it waits for the
    sender.  An earlier version did not answer `lost` and forgot the session, and the sender waited
    for a week.
    """
    links = cut_when(monkeypatch, Peer, m.Complete, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until_async(lambda: outcome.incoming.phase == "completed")
        await until_async(lambda: outcome.migration.phase == "interrupted")
        clean_hosts.source.open(name).destroy()
        successor = successor_of(clean_hosts, outcome.migration.id, link)
        with pytest.raises(MigrationError, match="are lost"):
            await successor.run()
        with trio.fail_after(WAIT_S):
            await successor.linger()
        assert successor.progress.problem == (
            f"the domain of {name} is gone at the source, and all of its pages are at the "
            "destination"
        )
        outcome.migration.requests.scope.cancel()

    outcome = await migrate(clean_hosts, busy(name), Strategy.POSTCOPY, meanwhile=meanwhile)
    assert outcome.incoming.phase == "completed"


async def test_a_guest_that_is_whole_is_started_though_the_handover_was_lost_with_its_source(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """An operator decides `elsewhere` at the source, and the destination is still in doubt."""
    links = cut_when(monkeypatch, PushLane, m.Handover, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until_async(lambda: outcome.incoming.phase == "in doubt")
        await until_async(lambda: outcome.migration.phase == "interrupted")
        await outcome.migration.requests.decide(here=False)
        await until_async(lambda: outcome.migration.phase == "failed")
        assert clean_hosts.source.domains() == []
        link.is_up = True

    outcome = await migrate(clean_hosts, busy(name), Strategy.PRECOPY, meanwhile=meanwhile)
    assert outcome.incoming.phase == "completed"
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_decision_is_refused_while_what_was_left_is_being_taken_up(
    clean_hosts: World, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Before, the operator waited for ever if the domain was gone in the end."""

    def refuse(*_arguments: Any) -> None:
        raise XenError("open", errno.EAGAIN)

    monkeypatch.setattr(type(clean_hosts.source), "open", refuse)
    monkeypatch.setattr(sender_migration, "AGAIN_S", 0.05)
    left = left_by_a_sender(clean_hosts.source, Journal(tmp_path), "handed over")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.run)
        await until_async(lambda: "cannot be resumed yet" in left.progress.problem)
        with pytest.raises(MigrationError, match=r"cannot be resumed yet: .*ask again"):
            await left.requests.decide(here=False)
        nursery.cancel_scope.cancel()
