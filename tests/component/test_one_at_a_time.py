# SPDX-License-Identifier: GPL-2.0-or-later
"""Each domain has one migration, and log-dirty has one user.  A migration undoes only what it has
done itself.
"""

from __future__ import annotations

import contextlib
import errno
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.cli.world import World, start_receiver, start_sender, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.options import MigrationOptions, Strategy
from migrate.service.journal import Journal
from receiver.checkpoints import Checkpoints
from receiver.statistics import PagerStatistics
from sender.migration import OutgoingMigration
from sender.rollback import Rollback
from sender.toolstack import OwnToolstack
from tests.conftest import MIB
from tests.support.daemons import (
    SLOW,
    begin,
    boot,
    copying,
    journal,
    kill,
    lines,
    phase,
    states,
    until_taken_up,
    world,
)
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link
from tests.support.protected import dies_after, options, protected, verified_at_source
from tests.support.protected import slow_guest as busy
from tests.support.waiting import until, until_async
from tests.support.xl import Xl, xl
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

__all__ = ["world", "xl"]
Patch = pytest.MonkeyPatch
SLOW_HYBRID = MigrationOptions(Strategy.HYBRID, bandwidth_bytes_per_s=16 * MIB)


def refused(world: World, domain: str, complaint: str, which: str = "sender", **more: Any) -> None:
    with pytest.raises(MigrationError, match=complaint), world.control(which) as client:
        client.call(command="migrate", domain=domain, destination=f"127.0.0.1:{world.port}", **more)


def arrives(world: World, spec: GuestSpec) -> None:
    until(
        lambda: phase(world, "sender") == phase(world, "receiver") == "completed",
        "it does not complete",
    )
    result, _view = verify_migrated(world, spec)
    assert result.problems == []


# ---- one migration ----
@pytest.mark.parametrize("strategy", ["precopy", "postcopy"])
def test_a_guest_that_is_under_way_is_refused_by_whatever_it_is_named(
    world: World, strategy: str
) -> None:
    spec = boot(world)
    (there,) = world.source.domains()
    begin(world, "guest", strategy=strategy)
    until(lambda: phase(world, "sender") == strategy, "it does not begin")
    for name in ("guest", str(there.domid), str(uuid.UUID(bytes=there.handle))):
        refused(world, name, "is being migrated already")
    assert len(lines(world, "sender")) == 1
    if strategy == "precopy":
        world.ask("sender", command="cancel", migration="guest")
        until(lambda: phase(world, "sender") == "failed", "it is not cancelled")
        with world.source.open("guest") as guest:
            wait_for_steps(guest, 50)
        begin(world, "guest", bandwidth=256 * MIB)
    arrives(world, spec)


def sender_there(world: World) -> str:
    """Return the socket of a sender at the destination."""
    state = world.directory / "onward.state"
    world.start(
        "onward", "sender", "--listen", "127.0.0.1:0", "--socket",
        str(world.directory / "onward.sock"), "--config", str(world.config_file), "--state",
        str(state), "--simulated", str(world.directory / "destination.sock"),
    )  # fmt: skip
    return "onward"


@pytest.mark.parametrize("protect", [True, False])
def test_a_guest_whose_memory_has_not_arrived_goes_nowhere_else(
    world: World, protect: bool
) -> None:
    """Neither the guest's pager nor its log-dirty is touched."""
    spec, onward = boot(world), sender_there(world)
    begin(world, "guest", bandwidth=SLOW // 2, checkpoint_every_s=0.02 if protect else None)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    refused(world, "guest", "has a pager, and [0-9]+ of its pages are not here", onward)
    refused(world, "guest", "has a pager", onward, take_log_dirty=True)
    if protect:
        kept = lines(world, "sender")[0]["checkpoints"]
        until(lambda: lines(world, "sender")[0]["checkpoints"] > kept + 2, "no further checkpoints")
    assert lines(world, "sender")[0]["unprotected"] == ""
    arrives(world, spec)


def test_a_guest_s_name_comes_in_once(world: World) -> None:
    """A guest of the same name, from any host, waits for the end of the other migration."""
    boot(world)
    begin(world, "guest", strategy="precopy")
    until(lambda: phase(world, "receiver") == "precopy", "it does not begin")
    with world.source.open("guest") as guest:
        guest.rename("other")
    boot(world, "guest", seed=9)
    refused(world, "guest", "a guest named 'guest' is incoming already")
    assert states(world, "guest") == {"source": ["running"], "destination": ["incoming"]}


def test_a_domain_is_restored_into_once(xl: Xl) -> None:
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = "postcopy"
    assert xl.run() == ((0, 0), (0, 0))
    ports = {"store": 1, "console": 2}
    with pytest.raises(MigrationError, match="is being restored already"):
        xl.world.ask(
            "receiver", command="restore", session="another", address=["127.0.0.1", 1], token="00",
            domid=xl.destination.domid, ports=ports,
        )  # fmt: skip
    xl.go()
    xl.wait_for("completed", "completed")


@pytest.mark.parametrize("why", ["log-dirty", "pager", "suspended"])
def test_xl_does_not_migrate_a_guest_that_somebody_else_is_at_work_on(
    xl: Xl, why: str, tmp_path: Path
) -> None:
    """The stock helper is not used either, because it takes log-dirty away from another user."""
    ring = None
    match why:
        case "log-dirty":
            xl.source.log_dirty_enable()
        case "pager":
            ring = xl.source.paging_enable()
        case "suspended":
            xl.source.suspend()
    xl.save.start()
    xl.save.wait()
    assert xl.save.result == (-1, errno.EBUSY)
    assert {"log-dirty": "log-dirty is on", "pager": "has a pager", "suspended": "is suspended"}[
        why
    ] in xl.save.log
    assert xl.world.ask("sender", command="list")["migrations"] == []
    assert xl.source.log_dirty_is_on() == (why == "log-dirty")
    if ring is not None:
        ring.close()


# ---- log-dirty ----
def test_log_dirty_that_nobody_owns_is_refused_and_can_be_taken(world: World) -> None:
    spec = boot(world)
    with world.source.open("guest") as guest:
        guest.log_dirty_enable()
        refused(world, "guest", "--take-log-dirty of `migrate`")
        assert guest.log_dirty_is_on() and guest.state() is DomainState.RUNNING
    begin(world, "guest", bandwidth=256 * MIB, take_log_dirty=True)
    arrives(world, spec)


@pytest.mark.parametrize("decided", [True, False])
def test_a_sender_s_own_log_dirty_is_switched_off_by_its_successor(
    world: World, decided: bool
) -> None:
    boot(world)
    begin(world, "guest", strategy="postcopy" if decided else "precopy")
    until(
        lambda: phase(world, "receiver") == "postcopy" if decided else copying(world),
        "it does not begin",
    )
    kill(world, "sender")
    if decided:
        kill(world, "receiver")
        world.destination.open("guest").destroy()
    start_sender(world)
    if decided:
        until_taken_up(world)
        assert phase(world, "sender") == "interrupted"
        world.ask("sender", command="decide", migration="guest", here=True, force=True)
    until(lambda: phase(world, "sender") == "failed", "it does not end")
    with world.source.open("guest") as guest:
        assert not guest.log_dirty_is_on()
        wait_for_steps(guest, 50)


async def test_log_dirty_that_is_switched_off_in_precopy_ends_the_migration(
    clean_hosts: World, name: str
) -> None:
    """The record of log-dirty would lack what the guest has written since, but look valid."""

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: outcome.migration.progress.round == 1)
        with clean_hosts.source.open(name) as other:
            other.log_dirty_disable()

    outcome = await migrate(clean_hosts, busy(name), options=SLOW_HYBRID, meanwhile=meanwhile)
    assert "another program has switched log-dirty off" in str(outcome.error)
    assert verified_at_source(clean_hosts.source, busy(name)).problems == []
    assert clean_hosts.destination.domains() == []


async def test_log_dirty_that_another_one_enabled_first_is_left_alone(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Another program enables log-dirty between our check and our call."""
    enable = SimulatedDomain.log_dirty_enable
    others: list[Domain] = []

    def too_late(self: SimulatedDomain) -> None:
        if not others:
            others.append(clean_hosts.source.open(name))
            enable(clean_hosts.source.open(name))
        enable(self)

    monkeypatch.setattr(SimulatedDomain, "log_dirty_enable", too_late)
    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID)
    assert "log-dirty is on already" in str(outcome.error)
    assert others[0].log_dirty_is_on()
    others[0].log_dirty_disable()


@pytest.mark.parametrize("back", [True, False])
async def test_protection_whose_log_dirty_is_taken_ends_and_both_ends_report_it(
    clean_hosts: World, name: str, caplog: pytest.LogCaptureFixture, back: bool
) -> None:
    """The checkpoints that were kept before are valid, and the guest can return to them."""
    spec = busy(name)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: outcome.migration.progress.checkpoints >= 2)
        outcome.migration.context.cap.spend(1024 * MIB, time.monotonic())
        with clean_hosts.destination.open(name) as other:
            other.log_dirty_disable()
        await until_async(lambda: bool(outcome.migration.progress.unprotected))
        kept = outcome.migration.progress.checkpoints
        assert outcome.incoming.progress.unprotected == outcome.migration.progress.unprotected
        with clean_hosts.destination.open(name) as other:
            await trio.to_thread.run_sync(wait_for_steps, other, 50)
            other.log_dirty_enable()  # log-dirty belongs to another program now
            link.cut()
            await until_async(lambda: outcome.migration.context.statistics.rejoins == 1)
            await until_async(lambda: outcome.migration.phase == "postcopy")
            assert other.log_dirty_is_on()
        assert outcome.migration.progress.checkpoints == kept
        if back:
            await dies_after(0, clean_hosts, force=True)(outcome, link)
        else:
            outcome.migration.context.cap = type(outcome.migration.context.cap)(None)
            link.cut()

    outcome = await protected(clean_hosts, spec, meanwhile)
    assert sum("not protected any more" in message for message in caplog.messages) == 2, (
        "once at each end"
    )
    if back:
        assert "as it was when the last checkpoint was made" in outcome.migration.progress.problem
        assert verified_at_source(clean_hosts.source, spec).problems == []
    else:
        assert outcome.error is None
        assert (await verification(clean_hosts, spec)).problems == []
        with clean_hosts.destination.open(name) as other:
            assert other.log_dirty_is_on(), (
                "it was not switched off by a migration that did not own it any more"
            )


# ---- a migration undoes only what it has done ----
async def test_a_guest_that_somebody_else_suspends_meanwhile_stays_suspended(
    clean_hosts: World, name: str
) -> None:
    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: outcome.migration.progress.round == 1)
        with clean_hosts.source.open(name) as other:
            other.suspend()

    outcome = await migrate(clean_hosts, busy(name), options=SLOW_HYBRID, meanwhile=meanwhile)
    assert "is suspended, but not by this migration" in str(outcome.error)
    with clean_hosts.source.open(name) as guest:
        assert guest.state() is DomainState.SUSPENDED and not guest.log_dirty_is_on()


async def test_a_suspension_that_was_refused_is_somebody_else_s(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    original = SimulatedDomain.suspend

    def too_late(self: SimulatedDomain) -> None:
        original(self)
        original(self)

    monkeypatch.setattr(SimulatedDomain, "suspend", too_late)
    outcome = await migrate(clean_hosts, busy(name))
    assert "the domain is suspended" in str(outcome.error)
    with clean_hosts.source.open(name) as guest:
        assert guest.state() is DomainState.SUSPENDED


def test_a_successor_resumes_no_guest_that_somebody_else_has_suspended(world: World) -> None:
    boot(world)
    begin(world, "guest", strategy="precopy")
    until(lambda: copying(world), "it does not begin")
    kill(world, "sender")
    with world.source.open("guest") as guest:
        guest.suspend()
        start_sender(world)
        until(lambda: phase(world, "sender") == "failed", "it does not end")
        assert guest.state() is DomainState.SUSPENDED


class Killed(BaseException):
    pass


async def test_a_successor_resumes_the_guest_that_its_predecessor_has_suspended(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    original = OwnToolstack.suspend

    def suspend_and_die(self: OwnToolstack, domain: Domain) -> None:
        original(self, domain)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OwnToolstack, "suspend", suspend_and_die)
        patch.setattr(Rollback, "settle", died)
        with pytest.raises(BaseExceptionGroup):
            await migrate(clean_hosts, busy(name))
    journal = Journal(clean_hosts.directory / "journal")
    ((session, facts),) = [
        entry for entry in journal.entries().items() if entry[1]["domain"] == name
    ]
    assert facts["step"] == "suspending"
    with clean_hosts.source.open(name) as guest:
        assert guest.state() is DomainState.SUSPENDED
        lanes = DialledLanes(("127.0.0.1", 1), session, Terms())
        successor = OutgoingMigration.of_predecessor(
            session, clean_hosts.source, lanes, journal, facts
        )
        with pytest.raises(MigrationError, match="ended in the middle of this migration"):
            await successor.run()
        assert guest.state() is DomainState.RUNNING and not guest.log_dirty_is_on()
    journal.erase(session)


async def died(self: object, error: BaseException) -> None:
    """End as a process that is killed."""


@pytest.mark.parametrize("stop", ["pause", "suspend"])
def test_the_successor_of_a_receiver_has_no_guest_continue_that_somebody_else_has_stopped(
    world: World, stop: str
) -> None:
    spec = boot(world)
    with guest_of_a_killed_receiver(world) as guest:
        getattr(guest, stop)()
        before = guest.state()
        start_receiver(world, world.port)
        until(lambda: phase(world, "receiver") == "postcopy", "the migration does not continue")
        values = {"bandwidth_bytes_per_s": None}
        world.ask("sender", command="set", migration="guest", values=values)
        until(lambda: phase(world, "receiver") == "completed", "its memory does not come")
        assert guest.state() is before and before is not DomainState.RUNNING
        (guest.unpause if stop == "pause" else guest.resume)()
    arrives(world, spec)


@pytest.mark.parametrize("stop", ["pause", "suspend"])
def test_a_guest_that_a_killed_receiver_has_stopped_continues_however_late_xen_allows_that(
    world: World, stop: str
) -> None:
    spec = boot(world)
    with guest_of_a_killed_receiver(world) as guest:
        stopped = journal(world, "receiver").with_suffix(".stopped")
        stopped.touch()
        getattr(guest, stop)()
        before = guest.state()
        guest.refuse("unpause", "resume")
        start_receiver(world, world.port)
        until(lambda: "EBUSY" in lines(world, "receiver")[0]["problem"], "Xen refuses nothing")
        assert stopped.exists() and guest.state() is before and before is not DomainState.RUNNING
        guest.refuse()
        until(lambda: guest.state() is DomainState.RUNNING, "the guest does not continue")
    arrives(world, spec)


@contextlib.contextmanager
def guest_of_a_killed_receiver(world: World) -> Iterator[SimulatedDomain]:
    """Migrate the guest with checkpoints, kill the receiver between two of them, and yield the
    guest at the destination.
    """
    begin(world, "guest", bandwidth=MIB, checkpoint_every_s=0.02)
    until(lambda: lines(world, "sender")[0]["checkpoints"] > 1, "no checkpoints")
    with world.destination.open("guest") as guest:
        kill_between_checkpoints(world, guest)
        yield guest


def kill_between_checkpoints(world: World, guest: SimulatedDomain) -> None:
    """Kill the receiver, but not while it makes a checkpoint, which it notes before it stops the
    guest.
    """
    state = world.directory / "destination.sock.state/receiver"
    for _again in range(100):
        kill(world, "receiver")
        if guest.state() is DomainState.RUNNING and not list(state.glob("*.stopped")):
            return
        start_receiver(world, world.port)
        until(lambda: phase(world, "receiver") == "postcopy", "the migration does not continue")
    pytest.fail("the migration never continues")


async def test_a_receiver_that_dies_in_a_checkpoint_has_a_successor_that_has_the_guest_continue(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The guest does not wait for the sender."""
    stopped: list[Path] = []
    context = SimulatedDomain.context

    def look(self: SimulatedDomain) -> bytes:
        if self._host is clean_hosts.destination:
            stopped.extend((clean_hosts.directory / "arrivals").glob("*.stopped"))
        return context(self)

    monkeypatch.setattr(SimulatedDomain, "context", look)
    outcome = await protected(clean_hosts, busy(name), None, options())
    assert outcome.error is None and stopped
    assert list((clean_hosts.directory / "arrivals").glob("*.stopped")) == []


def test_what_cannot_be_noted_is_not_begun(boot: Any, tmp_path: Path) -> None:
    _spec, domain = boot()

    def suspend(stopped: Path) -> None:
        made = Checkpoints(
            domain, 1, lambda *_: None, PagerStatistics(), stopped, lambda _why: None
        )
        made._suspend()

    with pytest.raises(XenError, match="cannot note it") as error:
        suspend(tmp_path / "missing" / "stopped")
    assert error.value.errno == errno.ENOENT
    assert domain.state() is DomainState.RUNNING
    domain.suspend()
    with pytest.raises(XenError, match="the domain is suspended"):
        suspend(tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
