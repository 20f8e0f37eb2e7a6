# SPDX-License-Identifier: GPL-2.0-or-later
"""A checkpoint (``--protect``) that is damaged or gone when it is needed.

The guest never continues with the registers of one instant and the memory of another.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.cli.world import World, loopback_world, start_sender, verify_migrated, wait_for_steps
from migrate.errors import GuestEndedError, MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.service.journal import Journal
from sender import rollback as sender_rollback
from sender.checkpoints import CheckpointStore
from sender.migration import OutgoingMigration
from sender.ownership import State
from sender.recovery import Recovery
from tests.conftest import MIB
from tests.support.daemons import kill, lines
from tests.support.inprocess import Outcome
from tests.support.links import Link
from tests.support.protected import EVERY_S, dies_after, protected, slow_guest, verified_at_source
from tests.support.waiting import until, until_async
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

Patch = pytest.MonkeyPatch


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: list[Callable[[Path], None]] = [Path.unlink, truncate, empty, flip, replace_by_directory]


def kept(hosts: World) -> list[Path]:
    return list((hosts.directory / "journal").glob("*.checkpoint"))


def checkpoint_file(hosts: World) -> Path:
    (found,) = kept(hosts)
    return found


@pytest.fixture
def hosts(clean_hosts: World) -> Iterator[World]:
    """The hosts of one test only, because a daemon removes no directory that is in the place of a
    checkpoint.
    """
    yield clean_hosts
    for left in kept(clean_hosts):
        left.rmdir() if left.is_dir() else left.unlink()


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_guest_never_continues_without_the_checkpoint_that_was_applied(
    hosts: World, name: str, damage: Callable[[Path], None]
) -> None:
    """The guest cannot continue even with --force.  The pages stay until an operator releases
    them.
    """

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await dies_after(2, hosts, decide=False)(outcome, link)
        damage(checkpoint_file(hosts))
        for force in (False, True):
            with pytest.raises(
                MigrationError, match="cannot continue here, even with --force: the checkpoint"
            ):
                await outcome.migration.requests.decide(here=True, force=force)
        assert [info.state for info in hosts.source.domains()] == [DomainState.SUSPENDED]
        await outcome.migration.requests.decide(here=False)

    outcome = await protected(hosts, slow_guest(name), meanwhile)
    assert isinstance(outcome.error, GuestEndedError)
    assert hosts.source.domains() == []


async def test_a_successor_remembers_that_a_checkpoint_was_applied(hosts: World, name: str) -> None:
    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await dies_after(1, hosts, decide=False)(outcome, link)
        checkpoint_file(hosts).unlink()
        journal = Journal(hosts.directory / "journal")
        facts = journal.entries()[outcome.migration.id]
        lanes = DialledLanes(("127.0.0.1", 1), outcome.migration.id, Terms())
        successor = OutgoingMigration.of_predecessor(
            outcome.migration.id, hosts.source, lanes, journal, facts
        )
        async with trio.open_nursery() as nursery:
            run = nursery.start_soon
            run(ignoring_the_end, successor)
            await until_async(
                lambda: bool(successor.progress.unprotected and successor.progress.problem)
            )
            with pytest.raises(MigrationError, match="cannot continue here, even with --force"):
                await successor.requests.decide(here=True, force=True)
            nursery.cancel_scope.cancel()
        await outcome.migration.requests.decide(here=False)

    await protected(hosts, slow_guest(name), meanwhile)


async def ignoring_the_end(migration: OutgoingMigration) -> None:
    with pytest.raises(GuestEndedError):
        await migration.run()


async def test_a_decision_that_cannot_be_carried_out_can_be_taken_otherwise(
    hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The file is damaged after the decision, when no page has left the source domain yet."""
    go_back, depopulate = CheckpointStore.go_back, SimulatedDomain.depopulate
    moved: list[Any] = []

    def damaged_by_then(self: CheckpointStore, to: Domain) -> None:
        path = checkpoint_file(hosts)
        if not path.is_dir():
            replace_by_directory(path)
        go_back(self, to)

    def noted(self: SimulatedDomain, pfns: Any) -> None:
        moved.append(pfns)
        depopulate(self, pfns)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        migration = outcome.migration
        await dies_after(2, hosts, decide=False)(outcome, link)
        monkeypatch.setattr(CheckpointStore, "go_back", damaged_by_then)
        monkeypatch.setattr(SimulatedDomain, "depopulate", noted)
        await migration.requests.decide(here=True)
        await until_async(
            lambda: migration.progress.problem.startswith("cannot go back to the last checkpoint")
        )
        assert "decide" in migration.progress.problem and migration.phase == "interrupted"
        with pytest.raises(MigrationError, match="decided here already"):
            await migration.requests.decide(here=True, force=True)
        await migration.requests.decide(here=False)

    monkeypatch.setattr(sender_rollback, "AGAIN_S", 0.05)
    outcome = await protected(hosts, slow_guest(name), meanwhile)
    assert moved == []
    assert outcome.migration.phase == "failed"
    assert "nothing of the guest is needed here" in outcome.migration.progress.problem
    assert hosts.source.domains() == []
    # The destination is owed this message.
    assert outcome.migration.ownership.state is State.PAGES_LOST


async def test_no_error_makes_the_way_back_a_dead_end(
    hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Also an error of ours leaves the guest to the operator's other decision."""

    def broken(_self: SimulatedDomain, _context: bytes) -> None:
        raise AttributeError("'list' object has no attribute 'items'")

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        migration = outcome.migration
        await dies_after(2, hosts, decide=False)(outcome, link)
        monkeypatch.setattr(SimulatedDomain, "set_context", broken)
        await migration.requests.decide(here=True)
        await until_async(
            lambda: migration.progress.problem.startswith(
                "cannot go back to the last checkpoint: internal error: AttributeError"
            )
        )
        assert migration.ownership.state is State.RETURNING
        await migration.requests.decide(here=False)

    monkeypatch.setattr(sender_rollback, "AGAIN_S", 0.05)
    outcome = await protected(hosts, slow_guest(name), meanwhile)
    assert outcome.migration.ownership.state is State.PAGES_LOST
    assert "nothing of the guest is needed here" in outcome.migration.progress.problem
    assert hosts.source.domains() == []


async def test_a_way_back_that_fails_can_still_succeed(
    hosts: World, name: str, monkeypatch: Patch
) -> None:
    """An error of the file system passes, and the guest continues."""
    go_back, failures = CheckpointStore.go_back, list[Domain]()

    def fail_once(self: CheckpointStore, to: Domain) -> None:
        if not failures:
            failures.append(to)
            raise OSError(errno.EIO, "Input/output error")
        go_back(self, to)

    monkeypatch.setattr(sender_rollback, "AGAIN_S", 0.01)
    monkeypatch.setattr(CheckpointStore, "go_back", fail_once)
    await protected(hosts, slow_guest(name), dies_after(1, hosts))
    assert len(failures) == 1
    assert verified_at_source(hosts.source, slow_guest(name)).problems == []


async def test_a_checkpoint_that_the_journal_cannot_note_is_not_applied(
    hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The guest is then not protected, and the source has the memory as it was at the
    suspension.
    """
    write = Journal.write

    def full(self: Journal, session: str, facts: dict[str, Any], *, needed: bool = True) -> None:
        if facts.get("applied"):
            raise MigrationError("cannot write the journal: No space left on device")
        write(self, session, facts, needed=needed)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: bool(outcome.migration.progress.unprotected))
        await dies_after(0, hosts, decide=False)(outcome, link)
        monkeypatch.undo()
        checkpoint_file(hosts).unlink()
        with pytest.raises(MigrationError, match="continues here from its suspension"):
            await outcome.migration.requests.decide(here=True)
        await outcome.migration.requests.decide(here=True, force=True)

    monkeypatch.setattr(Journal, "write", full)
    outcome = await protected(hosts, slow_guest(name), meanwhile)
    assert outcome.migration.progress.checkpoints == 0
    assert verified_at_source(hosts.source, slow_guest(name)).problems == []


@pytest.mark.parametrize("damage", [Path.unlink, truncate, replace_by_directory])
def test_a_checkpoint_that_cannot_be_read_costs_the_protection_only(
    damage: Callable[[Path], None],
) -> None:
    """The sender's successor reports that, joins the receiver again, and all memory arrives."""
    spec = GuestSpec(
        "guest",
        32 * MIB,
        2,
        workload="random",
        working_set_bytes=16 * MIB,
        zero_permille=100,
        rate=2000,
    )
    with loopback_world(256 * MIB) as world:
        with world.source.create_guest(spec.to_bytes()) as guest:
            wait_for_steps(guest, 100)
        client = world.control("sender")
        client.send(
            command="migrate", domain="guest", destination=f"127.0.0.1:{world.port}",
            strategy="postcopy", bandwidth=8 * MIB, checkpoint_every_s=EVERY_S,
        )  # fmt: skip
        client.answer()
        client.close()
        until(lambda: lines(world, "sender")[0]["checkpoints"] >= 1, "no checkpoints")
        kill(world, "sender")
        (path,) = world.directory.glob("**/*.checkpoint")
        damage(path)
        start_sender(world)
        until(
            lambda: lines(world, "sender")[0]["phase"] == "completed",
            "the migration is not completed",
        )
        line = lines(world, "sender")[0]
        assert "the checkpoint" in line["unprotected"] and str(path) in line["unprotected"]
        assert line["checkpoints"] == 0, "a later checkpoint lacks what the damaged one had"
        assert verify_migrated(world, spec)[0].problems == []


async def test_a_checkpoint_for_which_there_is_no_memory_costs_the_protection_only(
    hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The journal notes this for a successor.  No later checkpoint is kept, because the memory
    lacks this one.
    """

    def refuse(self: SimulatedDomain, pfns: Any, pages: Any) -> None:
        raise XenError("foreign write", errno.ENOMEM)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        # On a busy machine the guest writes no page between two checkpoints now and then.
        await until_async(lambda: any(f.stat().st_size > PAGE_SIZE for f in kept(hosts)))
        await dies_after(1, hosts, decide=False)(outcome, link)
        migration = outcome.migration
        source = migration.context.source
        assert source is not None and source.checkpoints is not None
        recovery = Recovery(migration.context, source)
        with monkeypatch.context() as patch:
            patch.setattr(SimulatedDomain, "write_pages", refuse)
            await trio.to_thread.run_sync(recovery.apply_checkpoint_again, source.checkpoints)
        assert "foreign write" in migration.progress.unprotected
        with pytest.raises(MigrationError, match="continues here from its last checkpoint"):
            await migration.requests.decide(here=True)
        await migration.requests.decide(here=True, force=True)

    await protected(hosts, slow_guest(name), meanwhile)
    assert verified_at_source(hosts.source, slow_guest(name)).problems == []
