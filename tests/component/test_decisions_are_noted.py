# SPDX-License-Identifier: GPL-2.0-or-later
"""A decision that the journal cannot have is not carried out: a successor of the daemon would lack
the decision, and would have the guest run at the other end as well.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError, PeerClosedError
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from sender.ownership import Link, State
from sender.push import PushLane
from tests.support.guests import busy, continues_here_only
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link as Between
from tests.support.links import Patch, cut_when, until_cut
from tests.support.states import in_state
from tests.support.waiting import until_async as until
from xenbackend.contract import DomainState

FULL = "No space left on device"


def full(monkeypatch: Patch, *steps: str) -> None:
    """Leave no room on the disk of the journals: for these steps, or for any."""
    write = Journal.write

    def fail(self: Journal, session: str, facts: dict[str, Any], *, needed: bool = True) -> None:
        if steps and facts["step"] not in steps:
            write(self, session, facts, needed=needed)
        elif needed:
            raise MigrationError(f"cannot write the journal: {FULL}")

    monkeypatch.setattr(Journal, "write", fail)


@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
async def test_a_migration_continues_if_a_decision_at_the_source_cannot_be_noted(
    clean_hosts: World, name: str, here: bool
) -> None:
    async def meanwhile(outcome: Outcome, link: Between) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.down()
        await until(lambda: outcome.migration.phase == "interrupted")
        with pytest.MonkeyPatch.context() as monkeypatch:
            full(monkeypatch)
            with pytest.raises(MigrationError, match=FULL):
                await outcome.migration.requests.decide(here=here, force=True)
        link.is_up = True

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_decision_can_be_made_again_when_there_is_room(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The disk becomes full between the check and the entry: the migration's task has ended."""
    links = cut_when(monkeypatch, PushLane, m.Handover, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Between) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.migration.phase == "interrupted")
        with pytest.MonkeyPatch.context() as patch:
            full(patch, "decided here")
            for _ in range(2):
                with pytest.raises(MigrationError, match=FULL):
                    await outcome.migration.requests.decide(here=True, force=True)
                assert outcome.migration.ownership.state is State.HANDED_OVER
        await until(lambda: outcome.migration.requests.is_over)
        assert await outcome.migration.requests.decide(here=True, force=True)
        link.is_up = True
        await outcome.migration.linger()

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert FULL in str(outcome.error)
    await continues_here_only(clean_hosts, name)


async def test_a_sender_waits_for_xl_on_if_a_decision_cannot_be_noted(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    rollback, context = in_state(clean_hosts, name, State.UNDECIDED, xl=True)
    monkeypatch.setattr("sender.toolstack.XL_TIMEOUT_S", 0.1)
    monkeypatch.setattr("sender.toolstack.UNKNOWN_XL_S", 0.1)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rollback.settle, PeerClosedError("lost"))
            await until(lambda: rollback.is_waiting)
            with pytest.MonkeyPatch.context() as patch:
                full(patch)
                for decision in (State.DECIDED_HERE, State.DECIDED_ELSEWHERE):
                    with pytest.raises(MigrationError, match=FULL):
                        await rollback.overrule(decision)
                    await until(lambda: rollback.is_waiting)
                    assert context.ownership.state is State.UNDECIDED
            context.toolstack.overrule()
            assert await rollback.overrule(State.DECIDED_HERE)
    assert context.ownership.has_ended
    (info,) = [info for info in clean_hosts.source.domains() if info.name == name]
    assert info.state is DomainState.RUNNING


async def test_a_domain_for_a_checkpoint_that_cannot_be_noted_is_not_left_over(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The sender tries again.  A second domain would otherwise be made for the same guest."""
    rollback, context = in_state(clean_hosts, name, State.DECIDED_HERE, xl=False)
    full(monkeypatch)
    with pytest.raises(MigrationError, match=FULL):
        await trio.to_thread.run_sync(rollback._new_domain)
    assert context.entry.facts()["successor"] is None and not context.entry.facts()["applied"]
    assert context.ownership.row.step == "decided here"
    (info,) = clean_hosts.source.domains()
    assert info.state is DomainState.SUSPENDED
    monkeypatch.undo()
    made = await trio.to_thread.run_sync(rollback._new_domain)
    assert context.entry.restored_domid == made.domid
    assert context.ownership.state is State.RETURNING
    assert context.ownership.link is not Link.UP


@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
async def test_a_migration_continues_if_a_decision_at_the_destination_cannot_be_noted(
    clean_hosts: World, name: str, monkeypatch: Patch, here: bool
) -> None:
    links = cut_when(monkeypatch, PushLane, m.Handover, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Between) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.incoming.phase == "in doubt")
        decide = functools.partial(outcome.incoming.requests.decide, here=here, force=True)
        with pytest.MonkeyPatch.context() as patch:
            full(patch)
            with pytest.raises(MigrationError, match=FULL):
                await decide()
        target = clean_hosts.destination.open(name)
        assert target.info().state is DomainState.INCOMING
        assert outcome.incoming.phase == "in doubt"
        assert not outcome.incoming._context.entry.decided
        link.is_up = True

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []
