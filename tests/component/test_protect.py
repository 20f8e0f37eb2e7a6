# SPDX-License-Identifier: GPL-2.0-or-later
"""``--protect``: the destination dies, and the guest continues at the source as it was at the last
checkpoint.
"""

from __future__ import annotations

import errno
import random
import time
from typing import Any

import msgpack
import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.options import Strategy
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from receiver import checkpoints, postcopy, switchover
from receiver.checkpoints import Checkpoints, Room
from receiver.ownership import State
from sender import checkpoints as sender_checkpoints
from sender import rollback as sender_rollback
from sender.checkpoints import CheckpointStore
from sender.migration import OutgoingMigration
from sender.toolstack import OwnToolstack, StaysHereError
from tests.conftest import MIB
from tests.support.guests import steps
from tests.support.inprocess import Outcome, verification
from tests.support.links import Link
from tests.support.protected import dies_after, options, protected, verified_at_source
from tests.support.protected import slow_guest as busy
from tests.support.waiting import until_async
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspension takes long on a busy machine.  The pause that follows is ten times as long
    otherwise.
    """
    monkeypatch.setattr(checkpoints, "MAX_SUSPENDED_SHARE", 0.5)


@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.HYBRID])
@pytest.mark.parametrize("workload", ["random", "hotset"])
async def test_a_protected_guest_arrives_like_any_other(
    clean_hosts: World, name: str, strategy: Strategy, workload: str
) -> None:
    spec = busy(name, workload=workload, rate=None)
    outcome = await protected(clean_hosts, spec, with_options=options(strategy))
    assert outcome.error is None
    result = outcome.migration.result()
    assert result["checkpoints"]["kept"] >= 1
    assert result["checkpoints"]["longest_pause_s"] > 0
    assert (await verification(clean_hosts, spec)).problems == []
    assert list((clean_hosts.directory / "journal").glob("*checkpoint*")) == []


async def test_a_guest_that_gives_memory_away_can_go_back(clean_hosts: World, name: str) -> None:
    """Log-dirty does not record that, so a page that is taken back would have old contents."""
    spec = busy(name, balloon_pages=2000, balloon_every=5)
    await protected(clean_hosts, spec, dies_after(3, clean_hosts))
    assert verified_at_source(clean_hosts.source, spec).problems == []


@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.HYBRID])
@pytest.mark.parametrize("count", [1, 3])
async def test_the_destination_dies_and_the_guest_continues_here(
    clean_hosts: World, name: str, strategy: Strategy, count: int
) -> None:
    spec, suspended = busy(name), list[int]()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: outcome.migration.ownership.handed_over)
        suspended.extend(vcpu["count"] for vcpu in clean_hosts.source.open(name).report()["vcpu"])
        await dies_after(count, clean_hosts)(outcome, link)

    outcome = await protected(clean_hosts, spec, meanwhile, options(strategy))
    assert "an operator has decided" in str(outcome.error)
    went_back = "the guest continues here, as it was when the last checkpoint was made"
    assert outcome.migration.progress.problem.startswith(went_back)
    assert [info.name for info in clean_hosts.source.domains()] == [name]
    (_old,) = [report for report in clean_hosts.source.history() if report["name"] == name]
    assert verified_at_source(clean_hosts.source, spec, suspended).problems == []
    assert list((clean_hosts.directory / "journal").glob("*checkpoint*")) == []


def has_moved(before: list[int], after: list[int], least: int = 1) -> bool:
    """Whether every vCPU has done at least so many steps."""
    return all(then + least <= now for then, now in zip(before, after, strict=True))


async def moves_at_the_destination(outcome: Outcome, hosts: World, least: int) -> None:
    """Wait until every vCPU has done ``least`` steps at the destination.  The push is delayed for
    much longer.

    On a busy machine a vCPU may not run for longer than two checkpoints take, or than the push
    takes.
    """
    await until_async(lambda: outcome.migration.ownership.handed_over)
    outcome.migration.context.cap.spend(1024 * MIB, time.monotonic())
    arrived = hosts.destination.open(outcome.migration.domain_name)
    before = steps(arrived)
    await until_async(lambda: has_moved(before, steps(arrived), least))


async def test_it_continues_from_the_checkpoint_and_not_from_the_suspension(
    clean_hosts: World, name: str
) -> None:
    """What the guest did at the destination before the checkpoint is not lost."""
    spec, positions = busy(name), list[list[int]]()
    start = SimulatedDomain.start

    def remember(self: SimulatedDomain) -> None:
        positions.append(steps(self))
        start(self)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await moves_at_the_destination(outcome, clean_hosts, 1)
        await dies_after(outcome.migration.progress.checkpoints + 2, clean_hosts)(outcome, link)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedDomain, "start", remember)
        await protected(clean_hosts, spec, meanwhile)
    at_the_handover, at_the_checkpoint = positions
    assert has_moved(at_the_handover, at_the_checkpoint)


async def test_before_the_first_checkpoint_it_continues_from_the_suspension(
    clean_hosts: World, name: str
) -> None:
    outcome = await protected(
        clean_hosts,
        busy(name),
        dies_after(0, clean_hosts, force=True),
        options(checkpoint_every_s=60.0),
    )
    assert outcome.migration.progress.checkpoints == 0
    assert verified_at_source(clean_hosts.source, busy(name)).problems == []


@pytest.mark.parametrize("broken", ["look", "context", "write"])
async def test_a_checkpoint_that_is_not_right_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch, broken: str
) -> None:
    """This shows that these tests can fail."""
    if broken == "look":
        look = Checkpoints._look

        def overlook(self: Checkpoints) -> Any:
            found = look(self)
            found[::2] = self._unconfirmed[::2] = False
            return found

        monkeypatch.setattr(Checkpoints, "_look", overlook)
    elif broken == "context":
        context = SimulatedDomain.context

        def of_another_instant(self: SimulatedDomain) -> bytes:
            vcpus, balloon_steps = msgpack.unpackb(context(self))
            for vcpu in vcpus if self._host is clean_hosts.destination else ():
                vcpu[0] += 20
            return bytes(msgpack.packb([vcpus, balloon_steps]))

        monkeypatch.setattr(SimulatedDomain, "context", of_another_instant)
    else:
        monkeypatch.setattr(CheckpointStore, "apply", lambda self: None)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await moves_at_the_destination(outcome, clean_hosts, 100)
        await dies_after(outcome.migration.progress.checkpoints + 2, clean_hosts)(outcome, link)

    await protected(clean_hosts, busy(name), meanwhile)
    problems = verified_at_source(clean_hosts.source, busy(name)).problems
    assert "pages differ" in " ".join(problems) or "wrong values" in " ".join(problems)


async def test_what_a_lost_link_took_along_comes_with_the_next_checkpoint(
    clean_hosts: World, name: str
) -> None:
    async def meanwhile(outcome: Outcome, link: Link) -> None:
        for _ in range(4):
            await until_async(lambda: outcome.migration.ownership.handed_over)
            await trio.sleep(random.uniform(0.02, 0.08))
            link.cut()
            outcome.migration.context.lanes.hurry()
        made = outcome.migration.progress.checkpoints
        await until_async(lambda: outcome.migration.phase == "postcopy")
        await dies_after(made + 1, clean_hosts)(outcome, link)

    spec = busy(name, 64 * MIB)  # each new pair of lanes begins with four
    outcome = await protected(clean_hosts, spec, meanwhile, options(bandwidth_bytes_per_s=4 * MIB))
    assert outcome.migration.progress.problem.startswith("the guest continues here")
    assert verified_at_source(clean_hosts.source, spec).problems == []


async def test_a_checkpoint_that_cannot_be_kept_costs_the_protection_only(
    clean_hosts: World, name: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: CheckpointStore) -> None:
        raise XenError("populate_physmap", errno.ENOMEM)

    monkeypatch.setattr(CheckpointStore, "_make_room", full)
    outcome = await protected(clean_hosts, busy(name))
    assert outcome.error is None
    assert outcome.migration.progress.checkpoints == 0
    assert sum("not protected any more" in message for message in caplog.messages) == 2, (
        "once at each end"
    )
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize("in_the_middle", [True, False])
async def test_checkpoints_leave_room_for_the_journal(
    clean_hosts: World, name: str, monkeypatch: Patch, in_the_middle: bool
) -> None:
    """A checkpoint that would fill the state directory is not kept, and its parts are removed at
    once.  The guest continues without protection.
    """
    size = 16 * sender_checkpoints.MARGIN_BYTES
    write, is_full = CheckpointStore._write, not in_the_middle

    def fills(
        self: CheckpointStore, message: m.Written | m.Checkpoint, payload: memoryview
    ) -> None:
        nonlocal is_full
        is_full = not in_the_middle or isinstance(
            message, m.Checkpoint
        )  # this part comes last in every checkpoint
        write(self, message, payload)

    monkeypatch.setattr(CheckpointStore, "_write", fills)
    monkeypatch.setattr(sender_checkpoints, "_room", lambda _path: (0 if is_full else size, size))
    monkeypatch.setattr(checkpoints, "LIVE_PAGES", 1)
    monkeypatch.setattr(checkpoints, "BATCH_PAGES", 8)
    outcome = await protected(clean_hosts, busy(name))
    assert outcome.error is None and outcome.migration.context.statistics.rejoins == 0
    assert outcome.migration.progress.checkpoints == 0
    assert (
        "64.0 MiB of its file system are kept free for the journal"
        in outcome.migration.progress.unprotected
    )
    assert list((clean_hosts.directory / "journal").glob("*checkpoint*")) == []
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize("call", ["suspend", "log_dirty_enable"])
async def test_a_guest_that_cannot_be_protected_continues_without(
    clean_hosts: World, name: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    original = getattr(SimulatedDomain, call)

    def refuse(self: SimulatedDomain) -> None:
        if self._host is not clean_hosts.source:
            raise XenError(call, errno.ETIMEDOUT)
        original(self)

    monkeypatch.setattr(SimulatedDomain, call, refuse)
    monkeypatch.setattr(checkpoints, "SUSPENDS_LATE_S", 0.1)
    outcome = await protected(clean_hosts, busy(name))
    monkeypatch.undo()
    assert outcome.error is None
    assert any(f"not protected any more: {call}" in message for message in caplog.messages)
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_guest_that_takes_its_time_to_suspend_is_asked_again(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    suspend, refusals = SimulatedDomain.suspend, list[Domain]()

    def refuse_twice(self: SimulatedDomain) -> None:
        if self._host is not clean_hosts.source and len(refusals) < 2:
            refusals.append(self)
            raise XenError("suspend", errno.ETIMEDOUT)
        suspend(self)

    monkeypatch.setattr(SimulatedDomain, "suspend", refuse_twice)
    monkeypatch.setattr(checkpoints, "LIVE_PAGES", 1)
    await protected(clean_hosts, busy(name), dies_after(1, clean_hosts))
    assert len(refusals) == 2
    assert verified_at_source(clean_hosts.source, busy(name)).problems == []


async def test_a_guest_that_cannot_be_resumed_yet_when_all_has_come_is_resumed_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Found by chaos: the migration was completed, and its guest stayed suspended."""
    resume, failed, outcomes = SimulatedDomain.resume, list[Domain](), list[Outcome]()

    def refuse(self: SimulatedDomain) -> None:
        if self._host is not clean_hosts.source and len(failed) < 3:
            if outcomes[0].incoming.requests.context.is_in(State.FINISHING):
                failed.append(self)
            raise XenError("resume", errno.EBUSY)
        resume(self)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        outcomes.append(outcome)

    monkeypatch.setattr(SimulatedDomain, "resume", refuse)
    monkeypatch.setattr(postcopy, "LAST_START_AGAIN_S", 0.01)
    outcome = await protected(clean_hosts, busy(name), meanwhile)
    assert outcome.error is None and len(failed) == 3
    assert outcome.incoming.phase == "completed" and outcome.incoming.progress.problem == ""
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize("link_lost", [True, False])
async def test_a_guest_that_cannot_be_resumed_yet_is_resumed_later(
    clean_hosts: World, name: str, monkeypatch: Patch, link_lost: bool
) -> None:
    """The guest is suspended only for as long as the error lasts, and is still protected."""
    resume, refusals = SimulatedDomain.resume, list[Domain]()

    def refuse(self: SimulatedDomain) -> None:
        if self._host is not clean_hosts.source and len(refusals) < 5:
            refusals.append(self)
            raise XenError("resume", errno.EBUSY)
        resume(self)

    monkeypatch.setattr(switchover, "LOOK_AGAIN_EVERY_S", 0.02)
    monkeypatch.setattr(SimulatedDomain, "resume", refuse)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: bool(refusals))
        if link_lost:
            link.down()
        await until_async(lambda: len(refusals) == 5)
        # Without a link a vCPU may wait for a missing page, so it need not make a step.
        with clean_hosts.destination.open(name) as target:
            await until_async(lambda: target.state() is DomainState.RUNNING)
        link.is_up = True
        if not link_lost:
            at_least = outcome.migration.progress.checkpoints + 1
            await until_async(lambda: outcome.migration.progress.checkpoints >= at_least)

    outcome = await protected(clean_hosts, busy(name), meanwhile)
    assert outcome.error is None and not outcome.migration.progress.unprotected
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_checkpoint_that_was_written_in_part_is_written_once_more(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The checkpoint was complete, and the guest continues from it."""
    write, failures = SimulatedDomain.write_pages, list[Domain]()

    def fail_once(self: SimulatedDomain, pfns: Any, pages: Any) -> None:
        if self._host is clean_hosts.source and not failures and len(pfns) > 1:
            failures.append(self)
            write(self, pfns[:1], pages)
            raise XenError("foreign write", errno.EIO)
        write(self, pfns, pages)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: bool(failures))
        await dies_after(0, clean_hosts, force=True)(outcome, link)

    monkeypatch.setattr(SimulatedDomain, "write_pages", fail_once)
    outcome = await protected(clean_hosts, busy(name), meanwhile)
    assert outcome.migration.progress.problem.startswith("the guest continues here")
    assert verified_at_source(clean_hosts.source, busy(name)).problems == []


async def test_the_way_back_is_tried_until_it_is_there(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """During the return the host has no memory; later it has."""
    populate, failures = SimulatedDomain.populate, list[Domain]()

    def now_and_then(self: SimulatedDomain, pfns: Any) -> None:
        if self._host is clean_hosts.source and len(failures) < 3 and len(pfns) > 500:
            failures.append(self)
            populate(self, pfns[: len(pfns) // 2])
            raise XenError("populate_physmap", errno.ENOMEM)
        populate(self, pfns)

    monkeypatch.setattr(sender_rollback, "AGAIN_S", 0.01)
    monkeypatch.setattr(SimulatedDomain, "populate", now_and_then)
    await protected(clean_hosts, busy(name), dies_after(2, clean_hosts))
    assert len(failures) == 3
    assert verified_at_source(clean_hosts.source, busy(name)).problems == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["made", "moving", "started", "let go"])
async def test_a_sender_that_dies_on_the_way_back_has_a_successor(
    clean_hosts: World, name: str, monkeypatch: Patch, at: str
) -> None:
    spec, journal = busy(name), Journal(clean_hosts.directory / "journal")
    go_back, depopulate, finish = (
        CheckpointStore.go_back,
        SimulatedDomain.depopulate,
        OwnToolstack.finish,
    )
    moved: list[Any] = []

    def go_back_and_die(self: CheckpointStore, to: Domain) -> None:
        if at == "made":
            raise Killed
        go_back(self, to)
        if at == "started":
            raise Killed

    def depopulate_and_die(self: SimulatedDomain, pfns: Any) -> None:
        depopulate(self, pfns)
        if len(pfns) > 500:
            moved.append(pfns)
            if at == "moving" and len(moved) == 2:
                raise Killed

    async def finish_and_die(self: OwnToolstack, domain: Domain) -> None:
        await finish(self, domain)
        if at == "let go":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "go_back", go_back_and_die)
        patch.setattr(SimulatedDomain, "depopulate", depopulate_and_die)
        patch.setattr(OwnToolstack, "finish", finish_and_die)
        with pytest.raises(BaseExceptionGroup):
            await protected(clean_hosts, spec, dies_after(2, clean_hosts))
    ((session, facts),) = [
        entry for entry in journal.entries().items() if entry[1]["domain"] == name
    ]
    lanes = DialledLanes(("127.0.0.1", 1), session, Terms())
    successor = OutgoingMigration.of_predecessor(session, clean_hosts.source, lanes, journal, facts)
    with pytest.raises(StaysHereError, match="as it was when the last checkpoint was made"):
        await successor.run()
    assert [info.state for info in clean_hosts.source.domains()] == [DomainState.RUNNING]
    assert verified_at_source(clean_hosts.source, spec).problems == []
    assert not journal.checkpoint(session).exists()


def test_precopy_has_nothing_to_protect() -> None:
    with pytest.raises(MigrationError, match="nothing to protect"):
        options(Strategy.PRECOPY)


async def test_a_checkpoint_copies_no_more_than_there_is_room_for(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The rest is sent without a copy while the guest is suspended, so that a slow link does not
    use up dom0's memory.
    """
    taken: list[bool] = []
    take = Room.take

    def counted(self: Room, pieces: list[memoryview]) -> list[memoryview] | None:
        copied = take(self, pieces)
        taken.append(copied is not None)
        return copied

    monkeypatch.setattr(Room, "take", counted)
    monkeypatch.setattr(checkpoints, "MAX_COPIED_PAGES", 64)
    monkeypatch.setattr(checkpoints, "BATCH_PAGES", 32)
    spec = busy(name)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await moves_at_the_destination(outcome, clean_hosts, 1)
        await until_async(lambda: {True, False} <= set(taken))
        await dies_after(outcome.migration.progress.checkpoints + 1, clean_hosts)(outcome, link)

    await protected(clean_hosts, spec, meanwhile, options(checkpoint_every_s=0.1))
    assert verified_at_source(clean_hosts.source, spec).problems == []
