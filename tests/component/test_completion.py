# SPDX-License-Identifier: GPL-2.0-or-later
"""The last message of a migration, ``completed``: the lanes are lost, or the sender is killed,
before or after that message is sent.
"""

from __future__ import annotations

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.lanes.pairs import rejoining
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from sender.migration import OutgoingMigration
from sender.ownership import State
from sender.push import PushLane
from sender.transfer import Transfer
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, Patch
from tests.support.waiting import until_async as until
from xenbackend.contract import DomainState


@pytest.mark.parametrize("where", ["noticed", "at this end", "in the link"])
async def test_a_receiver_that_lacks_only_completed_gets_the_message(
    clean_hosts: World, name: str, monkeypatch: Patch, where: str
) -> None:
    """Otherwise its journal would keep an entry for ten minutes.  ``noticed``: the sender has
    noticed the end of its lane when it sends the message.
    """
    send, lost, links = PushLane.send, list[m.Message](), list[Link]()

    async def lose(self: PushLane, message: m.Message) -> None:
        if isinstance(message, m.Completed) and not lost:
            lost.append(message)
            if where == "in the link":
                links[0].stop()
                await send(self, message)
                links[0].cut()
                links[0].go()
                return
            self.connection.shut()
            if where != "noticed":
                await trio.sleep_forever()  # until the threads of the lanes notice
        await send(self, message)

    async def meanwhile(_outcome: Outcome, link: Link) -> None:
        links.append(link)

    monkeypatch.setattr(PushLane, "send", lose)
    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is None and lost
    assert outcome.arrivals.entries() == {}
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_sender_killed_after_completed_has_a_successor_that_destroys_the_source(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Found by killing at random: the receiver has rightly removed the session by then."""
    with monkeypatch.context() as patch:

        async def killed(self: Transfer) -> None:
            raise MigrationError("killed")

        patch.setattr(Transfer, "_finish", killed)
        outcome = await migrate(clean_hosts, busy(name))
    assert outcome.incoming.phase == "completed"
    assert clean_hosts.source.open(name).info().state is DomainState.SUSPENDED
    journal = Journal(clean_hosts.directory / "journal")
    facts = journal.entries()[outcome.migration.id]
    assert facts["step"] == "completing"
    lanes = DialledLanes(("127.0.0.1", 1), outcome.migration.id, Terms())
    successor = OutgoingMigration.of_predecessor(
        outcome.migration.id, clean_hosts.source, lanes, journal, facts
    )
    await successor.run()
    assert clean_hosts.source.domains() == []
    assert outcome.migration.id not in journal.entries()


@pytest.mark.parametrize("source", ["is left", "is destroyed"])
async def test_a_sender_killed_before_completed_has_a_successor_that_sends_it(
    clean_hosts: World, name: str, monkeypatch: Patch, source: str
) -> None:
    """Otherwise the receiver's journal would keep an entry for ten minutes.  The sender is killed
    before or after it has destroyed the source.
    """
    killed, is_over = trio.Event(), trio.Event()

    async def die(self: Transfer, push: PushLane) -> None:
        context = self._context
        await context.signals.complete.wait()
        await trio.to_thread.run_sync(context.ownership.enter, State.COMPLETING)
        context.close_lanes()
        killed.set()
        with trio.CancelScope(shield=True):
            await is_over.wait()

    async def succeed(outcome: Outcome) -> None:
        dead = outcome.migration
        (facts,) = dead.context.journal.entries().values()
        assert facts["step"] == "completing"
        if source == "is destroyed":
            clean_hosts.source.open(name).destroy()
        lanes = rejoining(dead.id, facts, {}, Terms())
        successor = OutgoingMigration.of_predecessor(
            dead.id, clean_hosts.source, lanes, dead.context.journal, facts
        )
        await successor.run()
        assert successor.phase == "completed" and clean_hosts.source.domains() == []
        await outcome.incoming.ended.wait()
        await successor.linger()
        await until(lambda: outcome.arrivals.entries() == {})

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await killed.wait()
        try:
            await succeed(outcome)
        finally:
            is_over.set()

    monkeypatch.setattr(Transfer, "_complete", die)
    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.incoming.phase == "completed"
    assert (await verification(clean_hosts, busy(name))).problems == []
