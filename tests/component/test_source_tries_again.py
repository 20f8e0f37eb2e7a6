# SPDX-License-Identifier: GPL-2.0-or-later
"""At the source, a call on which a guest depends is tried again until it succeeds."""

from __future__ import annotations

import errno
import functools
from typing import Any

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.outcomes import RESCUED
from migrate.protocol import messages as m
from sender import context as sender_context
from sender import rollback as sender_rollback
from sender import toolstack as sender_toolstack
from sender.migration import OutgoingMigration
from sender.ownership import State
from sender.push import PushLane
from sender.toolstack import OwnToolstack, _resume
from tests.support.failing import fails
from tests.support.guests import continues_here_only
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.left import NoLanes
from tests.support.links import Link, cut_when, until_cut
from tests.support.protected import dies_after, protected, verified_at_source
from tests.support.protected import slow_guest as busy
from tests.support.states import in_state
from tests.support.waiting import until_async
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain

Patch = pytest.MonkeyPatch
LATE = "may still suspend"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sender_rollback, "AGAIN_S", 0.01)


UNEXPECTED = (BlockingIOError(errno.EAGAIN, "no process"), AttributeError("a bug"))
"""Errors that no backend should raise."""


@pytest.mark.parametrize("error", [None, *UNEXPECTED])
@pytest.mark.parametrize("call", ["resume", "log_dirty_disable", "rename"])
async def test_a_guest_that_cannot_continue_here_yet_continues_later(
    clean_hosts: World,
    name: str,
    monkeypatch: Patch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    error: Exception | None,
) -> None:
    """The link is cut before the handover."""
    links = cut_when(monkeypatch, PushLane, m.Context, before=True)
    if call == "rename":  # as under xl, which has given the domain another name
        resume = functools.partial(sender_toolstack._resume, name=name)
        monkeypatch.setattr(sender_toolstack, "_resume", resume)
    failed, limits = fails(monkeypatch, call, times=3, error=error), list[int]()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        limits.append(clean_hosts.source.open(name).reservation().max_pages)
        await until_cut(links, link)

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is not None and outcome.migration.phase == "failed"
    assert len(failed) == 3 and caplog.text.count("the guest cannot continue here yet: ") == 3
    assert "trying again" not in outcome.migration.progress.problem
    await continues_here_only(clean_hosts, name)
    with clean_hosts.source.open(name) as guest:
        assert not guest.log_dirty_is_on() and [guest.reservation().max_pages] == limits


async def test_a_guest_that_continues_here_is_resumed_once(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Log-dirty cannot be switched off yet.  Meanwhile another program may suspend the guest."""
    links = cut_when(monkeypatch, PushLane, m.Context, before=True)
    failed, resume, resumed = fails(monkeypatch, "log_dirty_disable", times=3), _resume, list[str]()

    def resume_and_count(domain: Domain, name: str = "") -> None:
        resumed.append(name)
        resume(domain, name)

    monkeypatch.setattr(sender_toolstack, "_resume", resume_and_count)
    outcome = await migrate(
        clean_hosts, busy(name), meanwhile=lambda _outcome, link: until_cut(links, link)
    )
    assert outcome.migration.phase == "failed" and len(failed) == 3
    assert len(resumed) == 1
    await continues_here_only(clean_hosts, name)


async def test_a_sender_that_ends_before_the_guest_continues_leaves_that_to_its_successor(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    failed = fails(monkeypatch, "resume", times=10**6)
    rollback, context = in_state(clean_hosts, name, State.SUSPENDED, xl=False)
    await trio.to_thread.run_sync(context.ownership.note)
    with trio.fail_after(20):
        async with trio.open_nursery() as sender:
            sender.start_soon(rollback.settle, MigrationError("a reason"))
            await until_async(lambda: len(failed) > 2)
            sender.cancel_scope.cancel()
    monkeypatch.undo()
    facts = context.journal.entries()[context.id]
    lanes: Any = NoLanes()
    successor = OutgoingMigration.of_predecessor(
        context.id, clean_hosts.source, lanes, context.journal, facts
    )
    with pytest.raises(MigrationError, match="the sender was ended in the middle"):
        await successor.run()
    await continues_here_only(clean_hosts, name)


@pytest.mark.parametrize("suspends", [True, False])
async def test_a_guest_that_suspends_after_its_migration_has_failed_is_resumed(
    clean_hosts: World, name: str, monkeypatch: Patch, suspends: bool
) -> None:
    suspend, suspended = SimulatedDomain.suspend, list[str]()

    def time_out(_self: SimulatedDomain) -> None:
        raise XenError("suspend", errno.ETIMEDOUT)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        if suspends:
            await until_async(lambda: LATE in outcome.migration.progress.problem)
            with clean_hosts.source.open(name) as guest:
                suspend(guest)
                suspended.append(name)

    monkeypatch.setattr(SimulatedDomain, "suspend", time_out)
    if not suspends:
        monkeypatch.setattr(sender_context, "SUSPENDS_LATE_S", 0.5)
    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is not None and outcome.migration.phase == "failed"
    assert LATE not in outcome.migration.progress.problem
    assert bool(suspended) is suspends
    await continues_here_only(clean_hosts, name)


async def test_a_guest_that_suspends_after_its_sender_was_killed_is_resumed_by_the_successor(
    clean_hosts: World, name: str
) -> None:
    _rollback, context = in_state(clean_hosts, name, State.SUSPENDED, xl=False)
    await trio.to_thread.run_sync(context.ownership.note)
    await trio.to_thread.run_sync(context.may_suspend_late)
    facts = context.journal.entries()[context.id]
    lanes: Any = NoLanes()
    successor = OutgoingMigration.of_predecessor(
        context.id, clean_hosts.source, lanes, context.journal, facts
    )

    async def suspend_late(guest: SimulatedDomain) -> None:
        await until_async(lambda: LATE in successor.progress.problem)
        guest.suspend()

    with clean_hosts.source.open(name) as guest, trio.fail_after(20):
        guest.resume()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(suspend_late, guest)
            with pytest.raises(MigrationError, match="the sender was ended in the middle"):
                await successor.run()
    await continues_here_only(clean_hosts, name)


@pytest.mark.parametrize("gone", [False, True], ids=["", "destroyed by another program"])
async def test_the_old_domain_of_a_guest_that_is_back_at_a_checkpoint_is_destroyed_later(
    clean_hosts: World, name: str, monkeypatch: Patch, gone: bool
) -> None:
    spec, failed, finish = busy(name), list[str](), OwnToolstack.finish

    async def finish_later(self: OwnToolstack, domain: Domain) -> None:
        nonlocal failed
        if gone:
            domain.destroy()
        elif not failed:
            failed = fails(monkeypatch, "destroy", times=3)
        await finish(self, domain)

    monkeypatch.setattr(OwnToolstack, "finish", finish_later)
    outcome = await protected(clean_hosts, spec, dies_after(1, clean_hosts))
    assert len(failed) == (0 if gone else 3)
    problem = outcome.migration.progress.problem
    assert problem.startswith(RESCUED) and "cannot be destroyed" not in problem
    assert [info.state for info in clean_hosts.source.domains()] == [DomainState.RUNNING]
    assert verified_at_source(clean_hosts.source, spec).problems == []


async def test_a_source_that_cannot_be_destroyed_yet_is_destroyed_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    failed = fails(monkeypatch, "destroy", times=3)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None and len(failed) == 3
    assert outcome.migration.progress.problem == "" and clean_hosts.source.domains() == []
    assert (await verification(clean_hosts, busy(name))).problems == []
