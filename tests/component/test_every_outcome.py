# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that can end a migration, in every state of the sender.

An error is raised before the sender acts on the error, and another task may change the state in
between.  So each pair leaves the guest at one end, or keeps its pages until somebody decides.
"""

from __future__ import annotations

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import GuestEndedError, MigrationError, PeerClosedError
from migrate.protocol import messages as m
from sender import toolstack
from sender.entry import read_entry
from sender.inbox import raise_end
from sender.ownership import DECIDED, ENDED, Link, State
from sender.rollback import error_of_decision
from sender.toolstack import StaysHereError
from tests.support.states import in_state
from tests.support.waiting import until_async
from xenbackend.contract import DomainState

ERRORS: dict[str, MigrationError] = {
    "the lanes are lost": PeerClosedError("lost"),
    "the destination fails": MigrationError("failed"),
    "the destination has given the guest up": StaysHereError("given up"),
    "the guest ended at the destination": GuestEndedError("ended"),
}
BEFORE = (State.OFFERING, State.COPYING, State.SUSPENDING, State.SUSPENDED)
AFTER = (State.HANDED_OVER, State.ALL_SENT)
CASES = [(xl, state) for xl in (False, True) for state in (*BEFORE, *AFTER)]
CASES.append((True, State.UNDECIDED))


@pytest.mark.sweep
@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize(
    ("xl", "state"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
@pytest.mark.parametrize("destroyed", [False, True], ids=["", "source destroyed"])
async def test_an_error_leaves_the_guest_at_one_end(
    clean_hosts: World,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    xl: bool,
    state: State,
    destroyed: bool,
) -> None:
    monkeypatch.setattr(toolstack, "XL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(toolstack, "UNKNOWN_XL_S", 0.1)
    rollback, context = in_state(clean_hosts, name, state, xl=xl)
    domain, error = context.source.domain, ERRORS[what]  # type: ignore[union-attr]
    if destroyed:
        domain.destroy()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            settling = trio.Event()

            async def settle() -> None:
                await rollback.settle(error)
                settling.set()

            nursery.start_soon(settle)
            if state is State.UNDECIDED and not destroyed:
                await until_async(lambda: rollback.is_waiting or settling.is_set())
                if rollback.is_waiting:
                    domain.resume()  # as xl does
            await settling.wait()
    ended = context.ownership.state in ENDED
    assert ended or context.ownership.link is Link.GIVEN_UP
    assert context.progress.problem
    here = [info.state for info in clean_hosts.source.domains() if info.name == name]
    if destroyed:
        assert here == [] and (ended or xl)  # under xl this process holds the pages
    elif state in BEFORE:
        assert ended and here == [DomainState.RUNNING]
    elif isinstance(error, GuestEndedError):
        assert ended and here == []
    elif state is State.UNDECIDED:
        assert ended and here == [DomainState.RUNNING]
    elif isinstance(error, StaysHereError):
        assert ended and here == []
    else:
        assert not ended and here == [DomainState.SUSPENDED]


@pytest.mark.parametrize("name_of_state", sorted(state.name for state in DECIDED))
async def test_a_decision_leaves_the_guest_at_one_end(
    clean_hosts: World, name: str, name_of_state: str
) -> None:
    state = State[name_of_state]
    rollback, context = in_state(clean_hosts, name, state, xl=False)
    await rollback.settle(error_of_decision(state))
    assert context.ownership.state in ENDED
    here = [info.state for info in clean_hosts.source.domains() if info.name == name]
    assert here == ([] if state is State.DECIDED_ELSEWHERE else [DomainState.RUNNING])


async def test_a_destination_that_has_reported_its_end_is_sent_no_message(
    clean_hosts: World, name: str
) -> None:
    """The journal has the report, so the same holds for a successor."""
    rollback, context = in_state(clean_hosts, name, State.HANDED_OVER, xl=False)
    with pytest.raises(MigrationError) as raised:
        raise_end(context, m.Failed("the guest was saved while pages were missing"))
    await rollback.settle(raised.value)
    (facts,) = (await trio.to_thread.run_sync(context.journal.entries)).values()
    assert read_entry(facts, has_checkpoint=False)[0].ended_there
    await trio.to_thread.run_sync(context.ownership.enter, State.DECIDED_ELSEWHERE)
    await rollback.settle(error_of_decision(State.DECIDED_ELSEWHERE))
    assert context.last_message is None and context.ownership.state is State.FAILED
    assert await trio.to_thread.run_sync(context.journal.entries) == {}
