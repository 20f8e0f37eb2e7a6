# SPDX-License-Identifier: GPL-2.0-or-later
"""Each invariant (docs/invariants.md) is broken on purpose, and the checks must notice.

A check that cannot fail is useless.  Number 7 is broken in ``test_hostile_peers.py``.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError, PeerClosedError
from migrate.fastpath._fault import ffi
from migrate.options import Strategy
from migrate.protocol import messages as m
from receiver import postcopy
from receiver.outstanding import Actions, OutstandingPages
from receiver.pager import Pager
from receiver.restore import MemoryRestorer
from receiver.switchover import Switchover as Incoming
from sender.backlog import Backlog
from sender.dirty import DirtyLog
from sender.migration import OutgoingMigration
from sender.precopy import Precopy
from sender.push import PushLane
from sender.switchover import Switchover
from sender.transfer import Transfer
from tests.conftest import MIB
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link
from tests.support.waiting import WAIT_S
from xenbackend.contract import DomainState
from xenbackend.pages import NativePages, PfnArray
from xenbackend.ring import PagingRequest, PagingRing
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_nothing_is_noticed_when_nothing_is_broken(
    clean_hosts: World, name: str, strategy: Strategy
) -> None:
    outcome = await migrate(clean_hosts, busy(name), strategy)
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_receiver_that_answers_zeros_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 3."""
    load = SimulatedDomain.load
    monkeypatch.setattr(SimulatedDomain, "load", lambda self, pfns, pages: load(self, pfns, None))
    # The guest only reads, because a guest that writes soon overwrites all damage.
    spec = busy(name, write_permille=0)
    await migrate(clean_hosts, spec, Strategy.POSTCOPY)
    problems = " ".join((await verification(clean_hosts, spec)).problems)
    assert "pages differ" in problems
    assert "wrong values while it ran" in problems


async def test_a_receiver_that_answers_zeros_on_the_fast_path_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 3 on the path that nearly all faults take."""
    loaded: list[int] = []
    native_pages = SimulatedDomain.native_pages

    def with_another_load(self: SimulatedDomain) -> NativePages:
        @ffi.callback("int(void *, uint64_t, const void *)")  # type: ignore[untyped-decorator]
        def load(_domain: Any, pfn: int, _page: Any) -> int:
            loaded.append(pfn)
            return int(self.load(np.array([pfn], dtype=np.uint64), None)[0])

        kept.append(load)
        return replace(native_pages(self), load=int(ffi.cast("uintptr_t", load)))

    kept: list[Any] = []
    monkeypatch.setattr(SimulatedDomain, "native_pages", with_another_load)
    spec = busy(name, write_permille=0)
    await migrate(clean_hosts, spec, Strategy.POSTCOPY)
    assert loaded
    problems = " ".join((await verification(clean_hosts, spec)).problems)
    assert "pages differ" in problems
    assert "wrong values while it ran" in problems


async def test_pages_that_are_not_marked_missing_are_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 3: the receiver leaves old contents (here zeros) in place of
    outstanding pages.
    """
    monkeypatch.setattr(MemoryRestorer, "evict", lambda self, pfns: self._populate(pfns))
    await migrate(clean_hosts, busy(name))
    assert "wrong values while it ran" in " ".join(
        (await verification(clean_hosts, busy(name))).problems
    )


async def test_a_stale_page_that_comes_late_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 2: pages that the guest has written since are overwritten with
    what was sent.
    """
    kept: list[tuple[PfnArray, bytes]] = []
    load, finish = SimulatedDomain.load, Pager.finish

    def remember(self: SimulatedDomain, pfns: PfnArray, pages: Any) -> Any:
        if pages is not None:
            kept.append((pfns.copy(), bytes(pages)))
        return load(self, pfns, pages)

    async def write_again(self: Pager) -> None:
        for pfns, pages in kept:
            self._domain.write_pages(pfns, pages)
        await finish(self)

    monkeypatch.setattr(SimulatedDomain, "load", remember)
    monkeypatch.setattr(Pager, "finish", write_again)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None
    problems = " ".join((await verification(clean_hosts, busy(name))).problems)
    assert "wrong values while it ran" in problems or "pages differ" in problems


async def test_a_second_load_is_kept_from_doing_harm(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Invariant 2 holds even if a pager claims nothing, because the hypervisor does not load a
    present page.
    """

    def claim_all(self: OutstandingPages, pfns: PfnArray) -> Any:
        return np.ones(len(pfns), dtype=np.bool_)

    def accounted(self: OutstandingPages, pfns: PfnArray, results: Any) -> Actions:
        new = pfns[results == 0]
        return original(self, new, np.zeros(len(new), dtype=np.int32))

    original = OutstandingPages.accounted
    monkeypatch.setattr(OutstandingPages, "claim", claim_all)
    monkeypatch.setattr(OutstandingPages, "accounted", accounted)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_second_response_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 4: an answer that is owed to one vCPU goes to another that was
    answered already.
    """
    respond = PagingRing.respond
    mixed_up: list[PagingRequest] = []

    def respond_to_the_wrong_one(self: PagingRing, requests: list[PagingRequest]) -> None:
        if not mixed_up and requests and requests[0].vcpu_waits:
            mixed_up.append(requests[0])
            other = 1 - requests[0].vcpu
            requests = [PagingRequest(requests[0].pfn, other, 1, 0, 10), *requests[1:]]
        respond(self, requests)

    monkeypatch.setattr(PagingRing, "respond", respond_to_the_wrong_one)
    spec = busy(name)

    async def hold_the_push(outcome: Outcome, _link: Link) -> None:
        """Delay the push, because on a busy machine all pages may arrive before a vCPU runs and
        requests one.
        """
        while not mixed_up:
            outcome.migration.context.cap.spend(4 * MIB, time.monotonic())
            await trio.sleep(0.05)

    await migrate(clean_hosts, spec, meanwhile=hold_the_push)
    assert mixed_up
    assert await signs_of_a_wrong_answer(clean_hosts, spec)


async def signs_of_a_wrong_answer(world: World, spec: GuestSpec) -> str:
    """Return a sign that a vCPU was answered that did not wait, or that a waiting vCPU is never
    answered.
    """
    domain = world.destination.open(spec.name)
    await trio.sleep(0.2)
    report = domain.report()
    counts = [vcpu["count"] for vcpu in report["vcpu"]]
    await trio.sleep(0.2)
    stuck = [v for v, vcpu in enumerate(domain.report()["vcpu"]) if vcpu["count"] == counts[v]]
    domain.close()
    spurious = (
        f"{report['spurious_responses']} spurious responses" if report["spurious_responses"] else ""
    )
    return spurious + (f" vCPUs {stuck} stand still" if stuck else "")


async def test_a_response_before_the_page_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 4 on the slow path."""
    requests = OutstandingPages.requests

    def answer_first(self: OutstandingPages, batch: list[PagingRequest], now: float) -> Actions:
        actions = requests(self, batch, now)
        answered = [request for request, _since in actions.answer]
        actions.answer += [(request, now) for request in batch if request not in answered]
        self.pages.native.nr_waiting = 0
        return actions

    monkeypatch.setattr(SimulatedDomain, "native_pages", lambda self: None)
    monkeypatch.setattr(OutstandingPages, "requests", answer_first)
    await migrate(clean_hosts, busy(name))
    assert "premature responses" in " ".join((await verification(clean_hosts, busy(name))).problems)


async def test_a_ring_that_is_disabled_early_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 5."""
    start = SimulatedDomain.start

    def disable_and_start(self: SimulatedDomain) -> None:
        self.paging_disable()
        start(self)

    monkeypatch.setattr(SimulatedDomain, "start", disable_and_start)

    def crashed() -> bool:
        return [info.state for info in clean_hosts.destination.domains()] == [DomainState.CRASHED]

    with trio.CancelScope() as scope:

        async def meanwhile(_outcome: Outcome, _link: Link) -> None:
            while not crashed():
                await trio.sleep(0.01)
            scope.cancel()

        await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert scope.cancelled_caught
    domain = clean_hosts.destination.open(name)
    assert "nobody serves the paging ring" in domain.info().reason


async def test_a_dirty_page_that_is_forgotten_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 2: the last reading of log-dirty is lost."""
    log_dirty, suspend = SimulatedDomain.log_dirty, SimulatedDomain.suspend
    last: list[Any] = [np.uint8(0)]

    def forget(self: SimulatedDomain, *, clean: bool) -> Any:
        last[0] = log_dirty(self, clean=clean)
        return last[0] * 0 if self.info().state is DomainState.SUSPENDED else last[0]

    def suspend_after_writes(self: SimulatedDomain) -> None:
        """Suspend the guest when it has written pages that the last reading did not have.  A page
        of that reading may be sent after this write: in the round, or after the suspension.
        """
        deadline = time.monotonic() + WAIT_S
        while (
            self.log_dirty_is_on()
            and np.count_nonzero(log_dirty(self, clean=False) & ~last[0]) < 16
        ):
            assert time.monotonic() < deadline, "the guest does not write"
            time.sleep(0.001)
        suspend(self)

    monkeypatch.setattr(SimulatedDomain, "log_dirty", forget)
    monkeypatch.setattr(SimulatedDomain, "suspend", suspend_after_writes)
    # The guest passes over its memory in some seconds, so no reading has all of it.
    spec = busy(name, rate=500, working_set_bytes=12 * MIB)
    outcome = await migrate(clean_hosts, spec, Strategy.PRECOPY)
    assert outcome.error is None
    # The guest may have visited every page again; then it has read the old values itself.
    problems = " ".join((await verification(clean_hosts, spec)).problems)
    assert "pages differ" in problems or "wrong values while it ran" in problems


async def test_a_pinned_frame_that_is_missing_kills_the_guest(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariant 9."""
    monkeypatch.setattr(SimulatedDomain, "pinned", lambda self, pfns: np.empty(0, dtype=np.uint64))
    monkeypatch.setattr(
        DirtyLog, "hottest", lambda self, written, most: written[:0]
    )  # which they may be, too
    outcome = await migrate(clean_hosts, busy(name))
    assert "register_vcpu_info" in str(outcome.error)
    assert outcome.migration.ownership.handed_over
    assert clean_hosts.destination.open(name).info().state is DomainState.CRASHED


async def test_a_completion_that_is_not_so_is_not_believed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariants 6 and 8: the receiver sends ``complete`` while pages are missing.
    The sender asks which pages it really lacks.  ``complete`` arrives before the sender has pushed
    a page, so all of them are pushed on the second pair of lanes.
    """
    complete, report, decided = postcopy.complete, postcopy.report, Transfer._decided
    lies: list[int] = []
    reports: list[Incoming] = []

    async def report_later(switchover: Incoming) -> None:
        reports.append(switchover)
        if len(reports) == 1:
            await trio.sleep_forever()  # no report can follow ``complete``
        await report(switchover)

    async def lie(switchover: Incoming) -> None:
        if lies:
            await complete(switchover)
            return
        await switchover.handed_over.wait()
        lies.append(switchover.guest.pages.count)
        peer = switchover.context.peer
        if not peer.session.resumed:
            await peer.send(m.Resumed())
        await peer.send(postcopy.complete_message(switchover.context.statistics))

    async def decided_later(transfer: Transfer) -> None:
        await decided(transfer)
        if not transfer._context.statistics.rejoins:
            await transfer._context.signals.complete.wait()

    monkeypatch.setattr(postcopy, "complete", lie)
    monkeypatch.setattr(postcopy, "report", report_later)
    monkeypatch.setattr(Transfer, "_decided", decided_later)
    outcome = await migrate(clean_hosts, busy(name))
    assert lies[0] > 0
    assert outcome.error is None
    assert outcome.migration.context.statistics.rejoins >= 1
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_sender_that_loses_a_page_never_completes(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This test breaks invariants 6 and 8: a page that is not sent keeps both ends waiting, and no
    success is reported.

    The page is lost among the pushed pages and among those that are read ahead.  The guest does not
    touch the page, but three of its faults at equal distances can make the receiver fetch the page.
    """

    def losing(choose: Callable[[Backlog, Any], PfnArray]) -> Callable[[Backlog, Any], PfnArray]:
        def lose_one(self: Backlog, wanted: Any) -> PfnArray:
            chosen = choose(self, wanted)
            kept: PfnArray = chosen[chosen != 2500]
            return kept

        return lose_one

    for choose in (Backlog.next_batch, Backlog.ahead):
        monkeypatch.setattr(Backlog, choose.__name__, losing(choose))
    ended: list[Outcome] = []
    with trio.CancelScope() as scope:

        async def meanwhile(outcome: Outcome, _link: Link) -> None:
            while not (
                outcome.migration.ownership.handed_over
                and outcome.migration.progress.outstanding == 1
            ):
                await trio.sleep(0.01)
            await trio.sleep(0.5)  # time in which it could complete wrongly
            scope.cancel()

        ended.append(
            await migrate(clean_hosts, busy(name, working_set_bytes=4 * MIB), meanwhile=meanwhile)
        )
    assert scope.cancelled_caught, f"the migration ended, with {ended[0].error!r}"
    assert clean_hosts.source.open(name).info().state is DomainState.SUSPENDED


@pytest.mark.parametrize("phase", [Precopy, Switchover])
async def test_before_the_handover_any_failure_leaves_the_guest_at_the_source(
    clean_hosts: World, name: str, monkeypatch: Patch, phase: type[Precopy] | type[Switchover]
) -> None:
    """This tests the other half of invariant 1; and nothing is left over at the destination."""
    run: Any = phase.run

    async def fail(self: Any, *arguments: Any) -> Any:
        if phase is Precopy:
            await run(self, *arguments)
        else:
            await trio.to_thread.run_sync(self._suspend)
            await self._push.send(m.Suspended())
        raise MigrationError("the test says so")

    monkeypatch.setattr(phase, "run", fail)
    outcome = await migrate(clean_hosts, busy(name))
    assert "the test says so" in str(outcome.error)
    source = clean_hosts.source.open(name)
    assert source.info().state is DomainState.RUNNING
    before = source.report()["vcpu"][0]["count"]
    with trio.fail_after(WAIT_S):
        while source.report()["vcpu"][0]["count"] == before:
            await trio.sleep(0.01)
    assert clean_hosts.destination.domains() == []


@pytest.mark.parametrize("sending", ["send_all", "send_holes"])
async def test_cancelled_while_the_peer_takes_nothing_it_does_not_wait_for_that(
    clean_hosts: World, name: str, monkeypatch: Patch, sending: str
) -> None:
    """For precopy, the connection is ended after a moment."""
    stuck = trio.Event()

    def hang(self: PushLane, *_arguments: Any, **_options: Any) -> None:
        trio.from_thread.run_sync(stuck.set)
        ended = select.poll()
        ended.register(self.connection, 0)  # POLLHUP
        ended.poll(60_000)
        raise PeerClosedError("the connection was lost while sending")

    async def cancel(outcome: Outcome, _link: Link) -> None:
        await stuck.wait()
        outcome.migration.requests.cancel("by the test")

    monkeypatch.setattr(PushLane, sending, hang)
    strategy = Strategy.PRECOPY if sending == "send_all" else Strategy.POSTCOPY
    outcome = await migrate(clean_hosts, busy(name), strategy, meanwhile=cancel)
    assert "cancelled by the test" in str(outcome.error)
    assert clean_hosts.source.open(name).info().state is DomainState.RUNNING


@pytest.mark.parametrize("moment", ["suspended", "context", "handover"])
async def test_cancelled_while_the_guest_is_suspended_it_continues_at_one_end(
    clean_hosts: World, name: str, monkeypatch: Patch, moment: str
) -> None:
    """Invariant 1: ``cancel`` acts until the handover, and is too late afterwards."""
    too_late: list[str] = []
    migrations: list[OutgoingMigration] = []
    run, say = OutgoingMigration.run, PushLane.send_blocking

    async def note(self: OutgoingMigration) -> None:
        migrations.append(self)
        await run(self)

    def cancel_at(self: PushLane, message: m.Message) -> None:
        if message.type == moment:
            try:
                trio.from_thread.run_sync(migrations[0].requests.cancel, "the test says so")
            except MigrationError as error:
                too_late.append(str(error))
        say(self, message)

    monkeypatch.setattr(OutgoingMigration, "run", note)
    monkeypatch.setattr(PushLane, "send_blocking", cancel_at)
    spec = busy(name)
    outcome = await migrate(clean_hosts, spec)
    if moment == "handover":
        assert outcome.error is None and "too late to cancel" in too_late[0]
        assert (await verification(clean_hosts, spec)).ok
        return
    assert "the test says so" in str(outcome.error) and not too_late
    assert clean_hosts.source.open(name).info().state is DomainState.RUNNING
    assert clean_hosts.destination.domains() == []
