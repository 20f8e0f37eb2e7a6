# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that can reach an incoming migration, in every state of the receiver.

A guest that belongs here is never destroyed by an error: only its own end ends the migration.  A
transition that the table of states does not have is a failure in each case.
"""

from __future__ import annotations

import errno
import functools
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import trio

from migrate.cli.world import World, wait_for_steps
from migrate.errors import GuestEndedError, MigrationError, PeerClosedError, RemoteProtocolError
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from receiver import context as receiver_context
from receiver import migration as receiver_migration
from receiver import recovery, rollback
from receiver.guest import Guest, Holdings
from receiver.migration import IncomingMigration
from receiver.outstanding import OutstandingPages
from receiver.ownership import OURS, TABLE, State, Undo
from receiver.peer import Peer
from receiver.preflight import Begun
from receiver.recovery import Predecessor, Recovery
from receiver.restore import FrameLimit
from receiver.switchover import Switchover
from receiver.toolstack import OwnToolstack, XlToolstack
from tests.support.failing import fails
from tests.support.guests import busy
from tests.support.left import SESSION, NoLanes
from tests.support.waiting import until_async
from xenbackend.contract import Domain, DomainState, ToolstackPorts
from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain

Patch = pytest.MonkeyPatch
ERRORS: dict[str, Exception] = {
    "the lanes are lost": PeerClosedError("lost"),
    "the sender breaks the protocol": RemoteProtocolError("broken"),
    "the sender gives up": MigrationError("the sender gave up"),
    "the hypervisor fails": XenError("domctl", errno.EBUSY),
    "the host has no descriptor": OSError(errno.EMFILE, "too many files"),
    "a bug": KeyError("a bug"),
    "the guest has ended": GuestEndedError("ended"),
}
STATES = [state for state in State if TABLE[state].undo is not Undo.OVER]
RUNS = (State.RUNNING, State.OWNS, State.COMPLETING, State.FINISHING, State.LOST)
"""The states in which the guest may run here."""


class Beginning:
    """What is found at the beginning."""

    def __init__(self, guest: Guest):
        self._guest = guest

    async def begin(self) -> Begun:
        return Begun(self._guest, None)


class Case:
    """An incoming migration in a state, whose guest runs where the state allows that."""

    def __init__(self, world: World, directory: Path, name: str, state: State, *, xl: bool):
        spec, host = busy(name), world.destination
        model = host.create_guest(spec.to_bytes())
        config = model.config()
        if state in RUNS:
            wait_for_steps(model, 20)
            domain: Domain = host.open(model.domid)
        else:
            model.destroy()
            domain = host.create_incoming(config)
        model.close()
        self.journal = Journal(directory)
        lanes = cast(Any, NoLanes())
        tools = XlToolstack(domain.domid, ToolstackPorts(0, 0)) if xl else OwnToolstack()
        self.migration = IncomingMigration.of_offer(
            host, SESSION, lanes, self.journal, cast(Any, tools)
        )
        context = self.context = self.migration.requests.context
        context.progress.domain, context.entry.owns_domain = name, xl
        context.holdings.add_domain(domain)
        self.offer = m.Offer(
            name, config.nr_pfns, config.max_pages, 2, config.platform, True, bytes(32), 0
        )
        context.entry.offered(self.offer)
        context.entry.domid, context.entry.handle = domain.domid, domain.handle
        context.ownership._state = state
        if state is not State.OFFERED:
            context.entry.write(TABLE[state].step or "made", True)
        pages = OutstandingPages(config.nr_pfns)
        limit = FrameLimit(domain, (0, 0), context.note_raised)
        self.guest = Guest(self.offer, domain, None, pages, limit)
        self.migration._beginning = cast(Any, Beginning(self.guest))
        self._host, self._name = host, name

    def found(self) -> list[DomainState]:
        return [info.state for info in self._host.domains() if info.name == self._name]


CASES: list[tuple[State, bool]] = [
    (state, False) for state in STATES if state not in (State.SERVING, State.RUNNING)
]
CASES += [(state, True) for state in (State.RESTORING, State.READY, State.SERVING, State.RUNNING)]
CASES += [(state, True) for state in (State.OWNS, State.FINISHING, State.LOST)]


def show(value: object) -> str:
    return getattr(value, "name", "xl" if value is True else "")


@pytest.mark.sweep
@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize(("state", "xl"), CASES, ids=show)
@pytest.mark.parametrize("destroyed", [False, True], ids=["", "destroyed"])
async def test_an_error_ends_no_guest_that_belongs_here(
    clean_hosts: World,
    tmp_path: Path,
    name: str,
    monkeypatch: Patch,
    what: str,
    state: State,
    xl: bool,
    destroyed: bool,
) -> None:
    make = functools.partial(Case, clean_hosts, tmp_path, name, state, xl=xl)
    case, error = await trio.to_thread.run_sync(make), ERRORS[what]
    ownership, before = case.context.ownership, case.found()
    goes_on = trio.Event()
    attempts = [error]

    async def to_the_end(*_arguments: object) -> None:
        if attempts:
            raise attempts.pop()
        goes_on.set()
        await trio.sleep_forever()

    monkeypatch.setattr(IncomingMigration, "_to_the_end", to_the_end)
    monkeypatch.setattr(recovery, "CARRY_ON_AGAIN_S", 0)
    if destroyed:
        cast(Domain, case.context.holdings.domain).destroy()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(case.migration.run)
            await until_async(lambda: goes_on.is_set() or case.migration.ended.is_set())
            nursery.cancel_scope.cancel()
    has_gone_on, row = goes_on.is_set(), TABLE[state]
    if isinstance(error, GuestEndedError) and case.context.is_in(State.ENDED):
        assert case.found() == ([] if destroyed else before)
    elif state in OURS:
        assert has_gone_on and ownership.state is state
        assert case.found() == ([] if destroyed else before)
    elif row.undo is Undo.BY_DECISION and has_gone_on:
        assert type(error) is not MigrationError and ownership.state is state
        assert case.found() == ([] if destroyed else before)
    elif row.undo is Undo.BY_DECISION and destroyed:
        assert ownership.state is State.ENDED
    else:
        assert ownership.state is State.GIVEN_UP
        assert case.found() == (before if xl and not destroyed else [])
    assert (SESSION in case.journal.entries()) is bool(
        has_gone_on or ownership.state is State.ENDED
    )


async def made(world: World, directory: Path, name: str, state: State, *, xl: bool = False) -> Case:
    return await trio.to_thread.run_sync(
        functools.partial(Case, world, directory, name, state, xl=xl)
    )


@pytest.mark.parametrize(
    "state", [s for s in STATES if TABLE[s].undo is Undo.BY_DECISION or s in OURS]
)
async def test_a_pager_that_cannot_be_made_yet_is_made_later(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch, state: State
) -> None:
    """A receiver that is started anew, on a host that has no descriptor left."""
    case = await made(clean_hosts, tmp_path, name, state)
    before = case.found()
    attempts, goes_on = [1, 2], trio.Event()

    def make(*arguments: Any, **options: Any) -> Switchover:
        if attempts:
            attempts.pop()
            raise OSError(errno.EMFILE, "too many open files")
        return Switchover(*arguments, **options)

    async def to_the_end(*_arguments: object) -> None:
        goes_on.set()
        await trio.sleep_forever()

    monkeypatch.setattr(receiver_migration, "Switchover", make)
    monkeypatch.setattr(IncomingMigration, "_to_the_end", to_the_end)
    monkeypatch.setattr(recovery, "CARRY_ON_AGAIN_S", 0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(case.migration.run)
            await until_async(lambda: goes_on.is_set() or case.migration.ended.is_set())
            nursery.cancel_scope.cancel()
    assert case.context.ownership.state is state and case.found() == before


@pytest.mark.parametrize("state", OURS)
async def test_an_error_that_is_older_than_the_guest_s_start_does_not_destroy_it(
    clean_hosts: World, tmp_path: Path, name: str, state: State
) -> None:
    """`failed` acts on the state that there is, whatever the state was when the error came."""
    case = await made(clean_hosts, tmp_path, name, state)
    before = case.found()
    with pytest.raises(AssertionError):
        await rollback.failed(case.context, MigrationError("the sender gave up"), None)
    assert case.context.ownership.state is state and case.found() == before


@pytest.mark.parametrize("state", [State.UNSTARTED, State.HELD, State.READY])
async def test_a_guest_that_ends_while_an_operator_decides_has_ended(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch, state: State
) -> None:
    case = await made(clean_hosts, tmp_path, name, state)
    context, requests = case.context, case.migration.requests
    releasing, release = trio.Event(), Holdings.release
    answers: list[str] = []

    def slowly(self: Holdings) -> None:
        trio.from_thread.run_sync(releasing.set)
        waits, late = threading.Event(), 0
        while not (context.is_in(State.DECIDED_ELSEWHERE) or answers or late > 2000):
            waits.wait(0.001)
            late += 1
            if context.deciding.statistics().tasks_waiting:
                break
        release(self)

    async def to_the_end(*_arguments: object) -> None:
        raise GuestEndedError("its domain was destroyed")

    async def decide() -> None:
        await releasing.wait()
        try:
            await requests.decide(here=False)
            answers.append("acts")
        except MigrationError as error:
            answers.append(str(error))

    monkeypatch.setattr(Holdings, "release", slowly)
    monkeypatch.setattr(IncomingMigration, "_to_the_end", to_the_end)
    case.guest.domain.destroy()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(decide)
            nursery.start_soon(case.migration.run)
    assert case.migration.ended.is_set() and context.is_in(State.ENDED)
    assert "has ended" in answers[0]


class Lane:
    """A sender on a push lane."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, case: Case):
        self._case = case
        self.steps: list[str] = []
        """The journal's, when the sender was answered."""

    async def send(self, _message: m.Message) -> None:
        facts = await trio.to_thread.run_sync(self._case.journal.entries)
        self.steps.append(facts[SESSION]["step"])

    def close(self) -> None:
        pass


def connected(case: Case, monkeypatch: Patch, says: m.Message) -> tuple[Recovery, Lane]:
    """A guest whose sender has just connected again, and sends ``says``."""
    following = Recovery(Switchover(case.context, case.guest, inherits=True))
    lane = Lane(case)

    async def reconnect(self: Peer, _note: object) -> None:
        self._push = cast(Any, lane)

    async def receive(_self: Peer) -> m.Message:
        return says

    monkeypatch.setattr(Peer, "reconnect", reconnect)
    monkeypatch.setattr(Peer, "receive", receive)
    return following, lane


async def test_a_guest_that_is_not_to_run_here_is_not_started_any_more(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch
) -> None:
    """Its source has been answered, and runs it: a late start here would make a second one."""
    case = await made(clean_hosts, tmp_path, name, State.UNSTARTED)
    following, lane = connected(case, monkeypatch, m.Recall("it runs at the source"))
    starts: list[str] = []

    def start(_self: SimulatedDomain) -> None:
        starts.append(case.context.ownership.state.name)
        if case.context.is_in(State.UNSTARTED):
            raise XenError("start", errno.EBUSY)

    monkeypatch.setattr(SimulatedDomain, "start", start)
    monkeypatch.setattr(receiver_context, "FIRST_START_AGAIN_S", 0.01)
    monkeypatch.setattr(receiver_context, "LAST_START_AGAIN_S", 0.01)
    switchover = following.switchover
    assert not await trio.to_thread.run_sync(switchover.take_over)
    switchover.taken_over(started=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(switchover.keep_starting)
        await until_async(lambda: len(starts) > 2)
        with pytest.raises(MigrationError, match="it runs at the source"):
            await following.rejoin(PeerClosedError("lost"))
        nursery.cancel_scope.cancel()
    assert lane.steps == ["decided elsewhere"] and set(starts) == {"UNSTARTED"}
    await trio.to_thread.run_sync(case.context.holdings.release)


async def test_a_successor_starts_no_guest_that_an_operator_decides_about(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch
) -> None:
    """The decision waits for the start, and is then refused."""
    case = await made(clean_hosts, tmp_path, name, State.UNSTARTED)
    context, starting = case.context, trio.Event()
    switchover = Switchover(context, case.guest, inherits=True)
    case.migration._recovery = Recovery(switchover)
    decided: list[State] = []

    def start(_self: SimulatedDomain) -> None:
        trio.from_thread.run_sync(starting.set)
        asked = threading.Event()
        for _ in range(5000):
            if context.deciding.statistics().tasks_waiting or not context.is_in(State.UNSTARTED):
                break
            asked.wait(0.001)
        decided.append(context.ownership.state)

    monkeypatch.setattr(SimulatedDomain, "start", start)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            Predecessor(context, case.offer, "taken over").serve_inherited, switchover
        )
        await starting.wait()
        with pytest.raises(MigrationError, match="runs here"):
            await case.migration.requests.decide(here=False)
    assert decided == [State.UNSTARTED] and context.is_in(State.OWNS)
    await trio.to_thread.run_sync(context.holdings.release)


async def test_that_pages_are_lost_is_noted_before_the_source_is_answered(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch
) -> None:
    """A receiver that is killed in between would wait for ever for a source that has forgotten."""
    case = await made(clean_hosts, tmp_path, name, State.OWNS)
    following, lane = connected(case, monkeypatch, m.Lost("the source was destroyed"))
    case.guest.pages.add(np.array([5]))
    following.switchover.serve()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(following.rejoin, PeerClosedError("lost"))
        await until_async(lambda: bool(lane.steps))
        nursery.cancel_scope.cancel()
    assert lane.steps == ["lost"] and case.context.is_in(State.LOST)
    await trio.to_thread.run_sync(case.context.holdings.release)


@pytest.mark.parametrize("state", [State.READY, State.MAYBE_READY])
@pytest.mark.parametrize("missing", [False, True])
async def test_the_only_copy_of_a_guest_is_started_and_not_destroyed(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch, state: State, missing: bool
) -> None:
    """The handover did not arrive, and the operator of the source has decided `elsewhere`."""
    case = await made(clean_hosts, tmp_path, name, state)
    following, lane = connected(case, monkeypatch, m.Lost("an operator has decided"))
    starts: list[str] = []
    monkeypatch.setattr(SimulatedDomain, "start", lambda self: starts.append(self.info().name))
    if missing:
        case.guest.pages.add(np.array([5]))
        with pytest.raises(MigrationError, match="an operator has decided"):
            await following.rejoin(PeerClosedError("lost"))
        assert starts == [] and case.context.is_in(state)
    else:
        await following.rejoin(PeerClosedError("lost"))
        assert starts == [name] and case.context.is_in(State.OWNS)
        assert lane.steps == ["taken over"] and following.switchover.settled
    await trio.to_thread.run_sync(case.context.holdings.release)


async def test_a_successor_does_not_claim_that_a_guest_that_has_ended_never_ran(
    clean_hosts: World, tmp_path: Path, name: str
) -> None:
    """Under xl: the guest may have run here for hours before the daemon was killed.  A sender that
    waits for xl would have the guest continue from its suspension.
    """
    case = await made(clean_hosts, tmp_path, name, State.SERVING, xl=True)
    facts = (await trio.to_thread.run_sync(case.journal.entries))[SESSION]
    case.guest.domain.destroy()
    successor = IncomingMigration.of_predecessor(
        clean_hosts.destination, SESSION, cast(Any, NoLanes()), case.journal, facts
    )
    await successor.run()
    assert successor.requests.context.is_in(State.ENDED)
    assert isinstance(successor._last_message, m.Failed)
    assert "not known whether the guest ran" in successor._last_message.reason


async def test_what_cannot_be_destroyed_is_not_in_doubt_for_a_successor(
    clean_hosts: World, tmp_path: Path, name: str, monkeypatch: Patch
) -> None:
    """The sender has given up, and the guest runs at the source: nobody is to start it here.  The
    receiver ends before an attempt to destroy the domain has succeeded.
    """
    case = await made(clean_hosts, tmp_path, name, State.READY)
    with trio.fail_after(20), monkeypatch.context() as patch:
        patch.setattr(receiver_context, "FIRST_START_AGAIN_S", 0.01)
        failed = fails(patch, "destroy", times=10**6)
        async with trio.open_nursery() as receiver:
            error = MigrationError("the sender gave up")
            receiver.start_soon(rollback.failed, case.context, error, None)
            await until_async(lambda: len(failed) > 2)
            receiver.cancel_scope.cancel()
    assert "cannot be destroyed yet" in case.context.progress.problem and len(case.found()) == 1
    facts = (await trio.to_thread.run_sync(case.journal.entries))[SESSION]
    successor = IncomingMigration.of_predecessor(
        clean_hosts.destination, SESSION, cast(Any, NoLanes()), case.journal, facts
    )
    with trio.fail_after(20):
        await successor.run()
    assert case.found() == [] and successor.requests.context.is_in(State.GIVEN_UP)
