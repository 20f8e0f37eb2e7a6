# SPDX-License-Identifier: GPL-2.0-or-later
"""A call that may succeed later is tried again, and an operator can decide meanwhile."""

from __future__ import annotations

import contextlib
import errno
from typing import Any

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.options import MigrationOptions, Strategy
from migrate.protocol import messages as m
from receiver import checkpoints, recovery
from receiver import context as receiver_context
from receiver.pager import Pager
from receiver.peer import Peer
from tests.conftest import MIB
from tests.support.daemons import check_whose_here
from tests.support.failing import fails
from tests.support.guests import continues_here_only
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, cut_when, until_cut
from tests.support.protected import protected
from tests.support.protected import slow_guest as busy
from tests.support.waiting import until_async
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.ring import PagingRing
from xenbackend.simulated.client import SimulatedDomain

Patch = pytest.MonkeyPatch
SLOW = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=16 * MIB)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: Patch) -> None:
    monkeypatch.setattr(receiver_context, "FIRST_START_AGAIN_S", 0.01)
    monkeypatch.setattr(receiver_context, "LAST_START_AGAIN_S", 0.02)


@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.PRECOPY])
@pytest.mark.parametrize("cut", [True, False])
async def test_a_guest_that_cannot_be_started_yet_is_started_later(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy, cut: bool
) -> None:
    failed = fails(monkeypatch, "start", times=5)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: bool(failed))
        if cut:
            link.cut()

    outcome = await migrate(clean_hosts, busy(name), strategy, meanwhile=meanwhile)
    assert outcome.error is None and len(failed) == 5
    assert outcome.incoming.progress.problem == ""
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), MemoryError(), OSError(errno.EMFILE, "no descriptor")]
)
async def test_a_guest_is_started_later_whatever_the_error_was(
    clean_hosts: World, name: str, monkeypatch: Patch, error: Exception
) -> None:
    """No error is a reason not to start a guest that was handed over."""
    start, failed = SimulatedDomain.start, list[str]()

    def fail_first(self: SimulatedDomain) -> None:
        if len(failed) < 3:
            failed.append("start")
            raise error
        start(self)
        if len(failed) < 4:  # once the error is raised after the start
            failed.append("started")
            raise error

    monkeypatch.setattr(SimulatedDomain, "start", fail_first)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None and len(failed) == 4
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_guest_that_never_starts_can_be_given_back(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """An operator decides at the destination, where the guest has not run, and then at the
    source.
    """
    failed = fails(monkeypatch, "start", times=10**6)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: len(failed) > 2)
        incoming, migration = outcome.incoming, outcome.migration
        assert "cannot be started yet" in incoming.progress.problem
        with pytest.raises(MigrationError, match="belongs here already"):
            await incoming.requests.decide(here=True)
        with pytest.raises(MigrationError, match="both ends are connected"):
            await migration.requests.decide(here=True)
        await incoming.requests.decide(here=False)

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    migration = outcome.migration
    assert outcome.incoming.phase == "failed"
    assert migration.phase == "interrupted"
    check_whose_here(migration.progress.problem)
    assert "at the destination that the guest does not run there" in migration.progress.problem
    assert "`xen-postcopy decide " in migration.progress.problem
    with pytest.raises(MigrationError, match="reconnecting does not help"):
        migration.requests.reconnect()
    await migration.requests.decide(here=True)
    assert migration.phase == "failed"
    assert outcome.error is not None
    monkeypatch.undo()
    await continues_here_only(clean_hosts, name)


async def test_of_two_decisions_at_once_one_is_carried_out(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The destination has given a final answer.  If both decisions took effect, the guest would be
    gone.
    """
    failed = fails(monkeypatch, "start", times=10**6)
    answers = dict[bool, str]()

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until_async(lambda: len(failed) > 2)
        await outcome.incoming.requests.decide(here=False)

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)

    async def decide(here: bool) -> None:
        try:
            await outcome.migration.requests.decide(here=here)
            answers[here] = "acts"
        except MigrationError as error:
            answers[here] = str(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(decide, True)
        nursery.start_soon(decide, False)

    monkeypatch.undo()
    (here,) = [here for here, answer in answers.items() if answer == "acts"]
    # The other decision came too early or too late.
    assert "already" in answers[not here] or "has ended" in answers[not here]
    assert [info.name for info in clean_hosts.source.domains()] == ([name] if here else [])


async def test_a_guest_that_is_gone_when_it_is_to_be_started_is_not_started_for_ever(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    def vanish(self: SimulatedDomain) -> None:
        self.destroy()
        raise XenError("start", errno.ESRCH)

    monkeypatch.setattr(SimulatedDomain, "start", vanish)
    outcome = await migrate(clean_hosts, busy(name))
    assert "ended at the destination" in str(outcome.error)
    assert outcome.incoming.phase == "failed"


@pytest.mark.parametrize("left", ["nothing", "a crashed domain"])
async def test_a_guest_that_ends_when_an_operator_starts_it_has_ended(
    clean_hosts: World, name: str, monkeypatch: Patch, left: str
) -> None:
    """The operator is answered, and the end of the migration agrees with the journal."""
    links = cut_when(monkeypatch, Peer, m.Ready, before=True, down=True)
    state = SimulatedDomain.state

    def fail(self: SimulatedDomain) -> None:
        if left == "nothing":
            self.destroy()
        else:
            monkeypatch.setattr(SimulatedDomain, "state", lambda _self: DomainState.CRASHED)
        raise XenError("start", errno.EINVAL)

    monkeypatch.setattr(SimulatedDomain, "start", fail)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until_async(lambda: outcome.incoming.phase == "in doubt")
        await until_async(lambda: outcome.migration.phase == "failed")
        incoming = outcome.incoming
        with pytest.raises(MigrationError, match=rf"{name} (crashed|was destroyed) at its start"):
            await incoming.requests.decide(here=True)
        await incoming.ended.wait()
        monkeypatch.setattr(SimulatedDomain, "state", state)
        assert incoming.phase == "failed"
        assert " at its start: " in incoming.progress.problem
        assert ("xl destroy" in incoming.progress.problem) is (left != "nothing")
        with pytest.raises(MigrationError, match="has ended"):
            await incoming.requests.decide(here=True)
        link.is_up = True
        outcome.migration.requests.reconnect()
        await until_async(lambda: incoming.id not in outcome.arrivals.entries())
        check_whose_here(outcome.migration.progress.problem)

    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=meanwhile)
    assert outcome.error is not None
    source = clean_hosts.source.open(name)
    assert source.state() is DomainState.RUNNING
    source.close()


async def test_a_reservation_that_cannot_be_given_back_yet_is_given_back_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The migration has ended exactly when it is shown as ended."""
    reserve, failed = SimulatedDomain.reserve, list[int]()

    def fail_first(self: SimulatedDomain, pages: int) -> None:
        if not pages and len(failed) < 3:
            failed.append(pages)
            raise XenError("claim_pages", errno.EBUSY)
        reserve(self, pages)

    monkeypatch.setattr(SimulatedDomain, "reserve", fail_first)
    monkeypatch.setattr(recovery, "CARRY_ON_AGAIN_S", 0.01)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None and len(failed) == 3
    assert outcome.incoming.phase == "completed" and outcome.incoming.has_ended
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize("call", ["pause", "unpause", "state"])
async def test_a_guest_that_cannot_be_paused_yet_is_paused_later(
    clean_hosts: World, name: str, monkeypatch: Patch, call: str
) -> None:
    """An operator has decided that the guest continues at its source, where it was wrongly given
    up.  The source is answered, and in the end the guest runs at one end only.
    """
    failed = list[str]()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        nonlocal failed
        await until_async(lambda: outcome.migration.context.entry.ran)
        target = clean_hosts.destination.open(name)
        link.down()
        await until_async(lambda: outcome.migration.phase == "interrupted")
        await outcome.migration.requests.decide(here=True, force=True)
        incoming = outcome.incoming
        if call == "pause":
            failed = fails(monkeypatch, call, times=5)
        link.is_up = True
        if call == "state":
            await until_async(lambda: incoming.phase == "held")
            failed = fails(monkeypatch, call, times=5)
        await until_async(lambda: "is paused here" in incoming.progress.problem)
        await until_async(lambda: target.info().state is DomainState.PAUSED)
        await until_async(
            lambda: outcome.migration.id not in outcome.migration.context.journal.entries()
        )
        if call == "unpause":
            failed = fails(monkeypatch, call, times=5)
        await incoming.requests.decide(here=True, force=True)
        await until_async(lambda: incoming.phase == "lost")
        assert target.info().state is DomainState.RUNNING
        target.destroy()
        await until_async(lambda: incoming.phase == "failed")

    outcome = await migrate(clean_hosts, busy(name), options=SLOW, meanwhile=meanwhile)
    assert len(failed) == 5
    assert "an operator has decided" in str(outcome.error)
    await continues_here_only(clean_hosts, name)


@pytest.mark.parametrize("word", ["recall", "abort"])
async def test_a_guest_whose_memory_has_all_come_is_paused_later(
    clean_hosts: World, name: str, monkeypatch: Patch, word: str
) -> None:
    """The migration is completed at the destination, and the source was not informed of that.

    ``abort`` comes from a sender whose journal has lost the handover.
    """
    links = cut_when(monkeypatch, Peer, m.Complete, before=True, down=True)
    failed = list[str]()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        nonlocal failed
        await until_cut(links, link)
        await outcome.incoming.ended.wait()
        assert outcome.incoming.phase == "completed"
        outcome.incoming.ended = end = trio.Event()  # the migration waits for this below
        await until_async(lambda: outcome.migration.phase == "interrupted")
        failed = fails(monkeypatch, "pause", times=5)
        await outcome.migration.requests.decide(here=True, force=True)
        await until_async(lambda: outcome.migration.phase == "failed")
        outcome.migration.context.entry.recall = word == "recall"
        link.is_up = True
        target = clean_hosts.destination.open(name)
        await until_async(lambda: target.info().state is DomainState.PAUSED)
        await until_async(lambda: outcome.incoming.phase == "failed")
        await until_async(
            lambda: outcome.migration.id not in outcome.migration.context.journal.entries()
        )
        target.destroy()
        end.set()

    await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert len(failed) == 5
    await continues_here_only(clean_hosts, name)


async def test_a_ring_that_cannot_be_given_up_yet_is_given_up_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    finish, failed = Pager.finish, list[Pager]()

    async def fail_first(self: Pager) -> None:
        if len(failed) < 3:
            failed.append(self)
            raise XenError("mem_paging_disable", errno.ENOMEM)
        await finish(self)

    monkeypatch.setattr(Pager, "finish", fail_first)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None and len(failed) == 3
    assert outcome.incoming.phase == "completed" and outcome.incoming.progress.problem == ""
    with clean_hosts.destination.open(name) as guest:
        assert not guest.has_pager()
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_guest_that_cannot_be_unpaused_when_its_ring_is_given_up_is_unpaused_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    failed = fails(monkeypatch, "unpause", times=3)
    outcome = await migrate(clean_hosts, busy(name))
    assert outcome.error is None and len(failed) == 3
    assert clean_hosts.destination.open(name).info().state is DomainState.RUNNING
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_page_that_cannot_be_read_yet_is_read_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """This is tested at the source, after the handover."""
    failed: list[str] = []
    look = SimulatedDomain.map_pages

    def fail_first(self: SimulatedDomain, pfns: Any) -> Any:
        suspended = self._host is clean_hosts.source and self.state() is DomainState.SUSPENDED
        if suspended and outcome_of[0].migration.ownership.handed_over and len(failed) < 3:
            failed.append("map")
            raise XenError("map", errno.EAGAIN)
        return look(self, pfns)

    outcome_of: list[Outcome] = []

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        outcome_of.append(outcome)
        monkeypatch.setattr(SimulatedDomain, "map_pages", fail_first)

    outcome = await migrate(clean_hosts, busy(name), options=SLOW, meanwhile=meanwhile)
    assert outcome.error is None and failed
    assert outcome.migration.context.statistics.rejoins >= 1
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_state_that_is_not_known_for_a_moment_ends_nothing(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    state, failed = SimulatedDomain.state, list[str]()

    def fail_now_and_then(self: SimulatedDomain) -> DomainState:
        if self._host is clean_hosts.destination and len(failed) < 2:
            failed.append("state")
            raise XenError("info", errno.EAGAIN)
        return state(self)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(lambda: outcome.migration.ownership.handed_over)
        monkeypatch.setattr(SimulatedDomain, "state", fail_now_and_then)

    outcome = await migrate(clean_hosts, busy(name), options=SLOW, meanwhile=meanwhile)
    assert outcome.error is None and outcome.migration.context.statistics.rejoins == 0
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.PRECOPY])
async def test_what_is_cancelled_at_the_destination_does_not_become_ready(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy
) -> None:
    """Found by chaos: the thread of the push lane sent ``ready`` nevertheless, and no end had the
    guest.
    """
    set_context, outcomes = SimulatedDomain.set_context, list[Outcome]()

    def cancel_meanwhile(self: SimulatedDomain, context: bytes) -> None:
        set_context(self, context)
        trio.from_thread.run_sync(outcomes[0].incoming.requests.ask_to_cancel)

    monkeypatch.setattr(SimulatedDomain, "set_context", cancel_meanwhile)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        outcomes.append(outcome)
        await until_async(lambda: outcome.migration.phase == "failed")

    outcome = await migrate(clean_hosts, busy(name), strategy, meanwhile=meanwhile)
    assert outcome.incoming.progress.problem == "cancelled by the operator of the destination"
    assert not outcome.migration.ownership.handed_over
    await continues_here_only(clean_hosts, name)


@pytest.mark.parametrize(
    "instant", ["finish", "_give_up"], ids=["before the pause", "while paused"]
)
async def test_a_guest_that_is_destroyed_when_all_has_come_ends_its_migration(
    clean_hosts: World, name: str, monkeypatch: Patch, instant: str
) -> None:
    """If the domain is gone, its ring is gone as well, and giving it up is not tried again for
    ever.
    """
    step = getattr(Pager, instant)

    def destroyed(self: Pager, *ring: PagingRing) -> object:
        with contextlib.suppress(NoSuchDomainError):
            clean_hosts.destination.open(name).destroy()
        return step(self, *ring)

    monkeypatch.setattr(Pager, instant, destroyed)
    outcome = await migrate(clean_hosts, busy(name), options=SLOW)
    assert outcome.error is None
    assert (
        outcome.incoming.has_ended
    )  # "completed", or "failed" if the end of the domain was noticed first


async def test_an_incoming_domain_that_cannot_be_destroyed_yet_is_destroyed_later(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The sender does not wait for that."""
    failed = fails(monkeypatch, "destroy", times=10**6)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until_async(lambda: outcome.migration.phase == "precopy")
        outcome.incoming.requests.ask_to_cancel()
        await until_async(lambda: len(failed) > 3 and outcome.migration.phase == "failed")
        assert "cannot be destroyed yet" in outcome.incoming.progress.problem
        assert not outcome.incoming.has_ended and len(clean_hosts.destination.domains()) == 1
        monkeypatch.undo()

    outcome = await migrate(clean_hosts, busy(name), Strategy.PRECOPY, meanwhile=meanwhile)
    cancelled = "cancelled by the operator of the destination"
    assert cancelled in outcome.migration.progress.problem
    assert outcome.incoming.phase == "failed" and outcome.incoming.progress.problem == cancelled
    assert outcome.incoming.id not in outcome.arrivals.entries()
    await continues_here_only(clean_hosts, name)


async def test_a_guest_that_suspends_late_when_all_has_come_is_resumed(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    suspend, asked = SimulatedDomain.suspend, list[Domain]()

    def time_out(self: SimulatedDomain) -> None:
        if self._host is clean_hosts.source:
            suspend(self)
            return
        asked.append(self)
        raise XenError("suspend", errno.ETIMEDOUT)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until_async(lambda: bool(asked))
        await until_async(lambda: "may still suspend" in outcome.incoming.progress.problem)
        with clean_hosts.destination.open(name) as guest:
            suspend(guest)
            await until_async(lambda: guest.state() is DomainState.RUNNING)
        monkeypatch.setattr(SimulatedDomain, "suspend", suspend)

    monkeypatch.setattr(SimulatedDomain, "suspend", time_out)
    outcome = await protected(clean_hosts, busy(name), meanwhile)
    assert outcome.error is None and len(asked) == checkpoints.ATTEMPTS
    assert outcome.incoming.phase == "completed" and outcome.incoming.progress.problem == ""
    assert (await verification(clean_hosts, busy(name))).problems == []
