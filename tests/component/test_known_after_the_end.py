# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes known after the end of a migration is in the answers of its daemon, also when the
migration has left the daemon's memory, and after a restart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import UnknownSessionError
from migrate.protocol import messages as m
from migrate.service.config import Config
from migrate.service.history import History
from migrate.service.journal import Journal
from receiver.daemon import ReceiverDaemon
from receiver.peer import Peer
from sender.daemon import SenderDaemon
from tests.support.guests import continues_here_only
from tests.support.inprocess import Outcome, migrate
from tests.support.left import NAME, SESSION, NoLanes, left_by_a_sender
from tests.support.links import Link, cut_when, until_cut
from tests.support.protected import slow_guest as busy
from tests.support.waiting import WAIT_S, until_async
from xenbackend.contract import DomainState

Patch = pytest.MonkeyPatch
FORGOTTEN = "the destination has forgotten the migration: make sure that the guest does not run"


def paused(name: str) -> str:
    return (
        f"so {name} is paused here: destroy it (`xl destroy {name}`), or unpause it "
        f"(`xl unpause {name}`)"
    )


class Client:
    def __init__(self) -> None:
        self.result: dict[str, Any] = {}

    async def answer(self, _event: str, **fields: Any) -> None:
        self.result = fields


async def asked(daemon: SenderDaemon | ReceiverDaemon, **request: Any) -> dict[str, Any]:
    client = Client()
    await daemon._handle(request, cast(Any, client))
    return client.result


async def shown(daemon: SenderDaemon | ReceiverDaemon, name: str) -> dict[str, Any]:
    """Return what ``show`` answers, after a check that ``list`` answers the same."""
    found = await asked(daemon, command="show", migration=name)
    (line,) = (await asked(daemon, command="list"))["migrations"]
    assert {**line, **found} == found
    return found


def of_successor(journal: Journal) -> dict[str, Any]:
    """Return what the history has for the successors of a daemon."""
    history = History(journal.history())
    history.load()
    (line,) = history.lines(of_predecessors=True, but=())
    return line


# ---- the destination ----
async def test_a_guest_that_is_recalled_after_its_end_is_shown_as_paused_here(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Before, `list` had `completed` without a problem, while the guest ran at the source."""
    links = cut_when(monkeypatch, Peer, m.Complete, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await outcome.incoming.ended.wait()
        before = await shown(outcome.receiver, name)
        assert (before["phase"], before["problem"]) == ("completed", "")
        outcome.incoming.ended = end = trio.Event()  # the migration waits for this below
        await until_async(lambda: outcome.migration.phase == "interrupted")
        await outcome.migration.requests.decide(here=True, force=True)
        link.is_up = True
        journal = outcome.migration.context.journal
        await until_async(lambda: outcome.migration.id not in journal.entries())
        found = await shown(outcome.receiver, name)
        assert found["phase"] == "failed" and paused(name) in found["problem"]
        # A source whose answer was lost asks again, and the successor still has the session.
        assert outcome.arrivals.entries()[outcome.migration.id]["recalled"]
        line = of_successor(outcome.arrivals)
        assert line["ended_at"] == before["ended_at"]
        assert all(line[key] == found[key] for key in ("phase", "outcome", "problem"))
        end.set()

    await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    await check_successors(clean_hosts, name)
    clean_hosts.destination.open(name).destroy()
    await continues_here_only(clean_hosts, name)


async def check_successors(world: World, name: str) -> None:
    """Check that a restarted receiver shows the same, and leaves the guest as an operator has left
    it.
    """
    guest = world.destination.open(name)
    for state in (DomainState.PAUSED, DomainState.RUNNING):
        if state is DomainState.RUNNING:
            guest.unpause()
        journal = Journal(world.directory / "arrivals")
        daemon = ReceiverDaemon(world.destination, world.receiver_socket, Config(), journal)
        daemon.history.load()
        with trio.fail_after(WAIT_S):
            async with trio.open_nursery() as daemon._nursery:
                ((session, facts),) = (await trio.to_thread.run_sync(journal.entries)).items()
                daemon._resume_migration(session, facts)
                while (found := await shown(daemon, name))["phase"] != "failed":
                    assert found["phase"] in ("completing", "completed")
                    await trio.sleep(0.01)
                daemon._nursery.cancel_scope.cancel()
        assert paused(name) in found["problem"] and guest.state() is state
        assert of_successor(journal)["problem"] == found["problem"]


async def test_a_guest_that_was_recalled_and_unpaused_is_not_paused_again(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The answer to the source is lost, and an operator acts before the source asks again."""
    links = cut_when(monkeypatch, Peer, m.Complete, before=True, down=True)
    answered = list[bool]()
    acknowledge = Peer.acknowledge

    async def lose_first(self: Peer) -> None:
        answered.append(True)
        if len(answered) > 1:
            await acknowledge(self)
        else:
            await trio.to_thread.run_sync(clean_hosts.destination.open(name).unpause)

    monkeypatch.setattr(Peer, "acknowledge", lose_first)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await outcome.incoming.ended.wait()
        outcome.incoming.ended = end = trio.Event()
        await until_async(lambda: outcome.migration.phase == "interrupted")
        await outcome.migration.requests.decide(here=True, force=True)
        link.is_up = True
        journal = outcome.migration.context.journal
        await until_async(lambda: outcome.migration.id not in journal.entries())
        assert len(answered) == 2
        assert clean_hosts.destination.open(name).state() is DomainState.RUNNING
        assert "forgotten" not in outcome.migration.progress.problem
        end.set()

    await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    clean_hosts.destination.open(name).destroy()
    await continues_here_only(clean_hosts, name)


# ---- the source ----
class AllHasArrived:
    """A lane to a destination that lacks nothing."""

    capabilities = frozenset({m.LOST})

    async def send(self, _message: m.Message) -> None:
        pass

    async def receive(self) -> tuple[m.Message, memoryview]:
        return m.Failed(m.ALL_ARRIVED), memoryview(b"")

    def close(self) -> None:
        pass


class Destination(NoLanes):
    dials = ("destination", 8013)

    def __init__(self, *, has_forgotten: bool):
        self._has_forgotten = has_forgotten

    async def again(self, _note: object) -> AllHasArrived:
        if self._has_forgotten:
            raise UnknownSessionError("no such session")
        return AllHasArrived()


@pytest.mark.parametrize(
    ("step", "has_forgotten", "problem"),
    [
        (
            "handed over",
            False,
            "the source, and all of its pages are at the destination",
        ),
        ("going back", True, FORGOTTEN),
    ],
    ids=["nothing is lost", "forgotten"],
)
async def test_what_the_destination_answers_at_last_is_shown(
    clean_hosts: World, tmp_path: Path, step: str, has_forgotten: bool, problem: str
) -> None:
    """Before, `list` had lost pages of a guest that is whole, or did not have the warning."""
    journal = Journal(tmp_path)
    daemon = SenderDaemon(clean_hosts.source, tmp_path / "socket", Config(), journal)
    lanes = Destination(has_forgotten=has_forgotten)
    migration = left_by_a_sender(clean_hosts.source, journal, step, lanes)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as daemon._nursery:
            daemon._admit(migration)
            daemon._begin(migration)
    assert SESSION not in daemon._migrations
    found = await shown(daemon, NAME)
    assert problem in found["problem"] and "are lost" not in found["problem"]
    assert of_successor(journal)["problem"] == found["problem"]
