# SPDX-License-Identifier: GPL-2.0-or-later
"""The sender's table of who owns the guest: each step, compared with the models that have been
searched.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.errors import LocalProtocolError, MigrationError
from sender.ownership import (
    DECIDED,
    ENDED,
    INHERITED,
    TABLE,
    Guest,
    Link,
    Ownership,
    Restart,
    State,
)
from tests.campaigns.model.check import MODEL, TOOLSTACK


@dataclass(frozen=True)
class Modelled:
    """A model.  ``journals``: the model's journal in each state.  ``actions``: what the model's
    sender does when it is started with a journal.  ``not_there``: steps that the model's toolstack
    does not have.
    """

    path: Path
    journals: dict[State, str]
    actions: dict[Restart, set[str]]
    not_there: tuple[tuple[State, State], ...] = ()
    besides: frozenset[str] = frozenset()
    """Journals of no state."""


BOTH = {
    State.OFFERING: "NONE",
    State.COPYING: "BEGUN",
    State.SUSPENDING: "BEGUN",
    State.SUSPENDED: "BEGUN",
    State.HANDED_OVER: "HANDED",
    State.ALL_SENT: "HANDED",
    State.GIVEN_UP: "GIVEN_UP",
    State.COMPLETED: "NONE",
    State.STAYED: "NONE",
    State.FAILED: "NONE",
}
RECALLING = "RECALLING"
"""The journal for GIVEN_UP after DECIDED_HERE.  The code notes that fact besides the step."""
OWN_TOOLSTACK = Modelled(
    MODEL,
    {
        **BOTH, State.COMPLETING: "HANDED", State.DECIDED_HERE: "DECIDED",
        State.RETURNING: "DECIDED",
    },
    {
        Restart.TAKE_BACK: {"give_up", "decide"},
        Restart.REJOIN: {"take_up_again", "settled"},
        Restart.DESTROY_SOURCE: {"take_up_again", "settled"},
        Restart.SEND_LAST_MESSAGE: {"tell"},
        Restart.NOTHING: {"migrate"},
    },
    besides=frozenset({RECALLING}),
)  # fmt: skip
"""No toolstack decides, no operator decides that the guest runs elsewhere, and the source domain is
not lost.
"""
XL = Modelled(
    TOOLSTACK,
    {
        **BOTH, State.UNDECIDED: "DECIDING", State.COMPLETING: "COMPLETING",
        State.PAGES_LOST: "HANDED",
    },
    {
        Restart.TAKE_BACK: {"give_up"},
        Restart.FOLLOW_TOOLSTACK: {"take_up_again"},
        Restart.REJOIN: {"take_up_again", "tell_loss"},
        Restart.DESTROY_SOURCE: {"finish"},
        Restart.SEND_LAST_MESSAGE: {"tell"},
        Restart.NOTHING: {"migrate"},
    },
    ((State.SUSPENDED, State.HANDED_OVER),),
)  # fmt: skip
"""xl decides, and no operator."""


class Notes:
    """A journal that keeps the steps in order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.needed: list[bool] = []
        self.fails = False

    def write(self, step: str, needed: bool) -> None:
        if self.fails and needed:
            raise MigrationError("no room")
        self.steps.append(step)
        self.needed.append(needed)

    def erase(self) -> None:
        self.steps.append("")

    def owner(self, state: State = State.OFFERING) -> Ownership:
        return Ownership(self.write, self.erase, state)


EDGES = [(state, then) for state, row in TABLE.items() for then in row.next]


@pytest.mark.parametrize(("state", "then"), EDGES)
def test_the_journal_has_the_step_before_anything_follows(state: State, then: State) -> None:
    notes = Notes()
    ownership = notes.owner(state)
    ownership.enter(then)
    assert ownership.state is then
    changes = TABLE[then].step != TABLE[state].step or not TABLE[then].step
    assert notes.steps == ([TABLE[then].step] if changes else [])


@pytest.mark.parametrize(("state", "then"), EDGES)
def test_a_step_that_cannot_be_noted_is_not_taken_if_a_successor_would_do_otherwise(
    state: State, then: State
) -> None:
    """The guest can stay here instead of being given away, and a decision can be made again."""
    notes = Notes()
    notes.fails = True
    ownership = notes.owner(state)
    can_stay = TABLE[state].guest in (Guest.RUNS_HERE, Guest.SUSPENDED_HERE)
    goes = then in (State.COPYING, State.SUSPENDING, State.UNDECIDED, State.HANDED_OVER)
    gives_away = can_stay and goes and (state, then) != (State.SUSPENDING, State.COPYING)
    if gives_away or then in DECIDED:
        with pytest.raises(MigrationError):
            ownership.enter(then)
        assert ownership.state is state
    else:
        ownership.enter(then)
        assert ownership.state is then


def test_every_other_step_is_refused() -> None:
    for state, row in TABLE.items():
        for then in set(State) - set(row.next):
            with pytest.raises(LocalProtocolError, match=f"{then.name} after {state.name}"):
                Notes().owner(state).enter(then)


def reachable(start: State, without: Container[State] = ()) -> set[State]:
    found, left = {start}, [start]
    while left:
        for then in TABLE[left.pop()].next:
            if then not in found and then not in without:
                found.add(then)
                left.append(then)
    return found


def test_each_state_is_reached_and_each_migration_can_end() -> None:
    assert reachable(State.OFFERING) == set(State)
    for state in State:
        assert reachable(state) & set(ENDED)


def test_a_guest_that_stays_is_not_elsewhere_after_the_end() -> None:
    for state in (State.GIVEN_UP, State.STAYED):
        ownership = Notes().owner(state)
        assert ownership.row.guest is Guest.RUNS_HERE
        assert not ownership.may_be_elsewhere and not ownership.is_suspended


def test_a_guest_that_was_handed_over_continues_here_only_by_a_decision() -> None:
    """Invariant 1."""
    for state in (State.HANDED_OVER, State.ALL_SENT, State.COMPLETING):
        assert State.GIVEN_UP not in reachable(state, DECIDED)


@pytest.mark.parametrize("first", ["keep", "hand over"])
@pytest.mark.parametrize("to", [State.HANDED_OVER, State.UNDECIDED])
def test_the_guest_stays_or_goes_and_never_both(first: str, to: State) -> None:
    ownership = Notes().owner(State.SUSPENDED)
    if first == "keep":
        assert ownership.try_keep() and not ownership.try_hand_over(to)
        assert ownership.state is State.SUSPENDED
        with pytest.raises(LocalProtocolError):
            ownership.enter(to)
    else:
        assert ownership.try_hand_over(to) and not ownership.try_keep()
        assert ownership.may_be_elsewhere


class SlowNotes:
    """A journal whose disk ends no write before the test allows that."""

    def __init__(self, state: State) -> None:
        self._writing, self._written = threading.Event(), threading.Event()
        self._fails = False
        self.ownership = Ownership(self._write, self._write, state)

    def _write(self, *_what: object) -> None:
        self._writing.set()
        assert self._written.wait(60)
        if self._fails:
            raise MigrationError("no room")

    @contextmanager
    def during(self, call: Callable[[], object], *, fails: bool = False) -> Iterator[None]:
        """Make the call in a thread, and have the block run while the call writes."""
        self._fails = fails

        def make() -> None:
            with suppress(MigrationError):
                call()

        thread = threading.Thread(target=make)
        thread.start()
        try:
            assert self._writing.wait(60)
            yield
        finally:
            self._written.set()
            thread.join(60)


def at_once(call: Callable[[], bool]) -> bool:
    """Return what the call returns, which must not wait."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(10)
    assert answers, "the call waits for the disk"
    return answers[0]


HERE = (Guest.RUNS_HERE, Guest.SUSPENDED_HERE)
NOT_HERE_ALONE = (Guest.UNDECIDED, Guest.THERE)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("state", "then"), EDGES)
def test_to_cancel_never_waits_for_the_disk(state: State, then: State, fails: bool) -> None:
    """The event loop cancels.  What follows is decided in that moment, and by the first of both."""
    slow = SlowNotes(state)
    ownership = slow.ownership
    leaves = TABLE[state].guest in HERE and TABLE[then].guest in NOT_HERE_ALONE
    if TABLE[then].step == TABLE[state].step != "":
        return  # nothing is written
    enter = ownership.try_hand_over if leaves else ownership.enter
    with slow.during(lambda: enter(then), fails=fails):
        kept = at_once(ownership.try_keep)
        assert kept is (TABLE[state].guest in HERE and not leaves)
        assert ownership.state is state
    assert ownership.state is (state if fails else then)
    assert not (kept and TABLE[ownership.state].guest in NOT_HERE_ALONE)
    if leaves:  # if the entry cannot be written, the guest stays, and can be kept
        assert ownership.try_keep() is fails
        assert not fails or not ownership.try_hand_over(then)


@pytest.mark.parametrize("state", [state for state in State if TABLE[state].step])
def test_to_cancel_does_not_wait_while_a_fact_is_noted(state: State) -> None:
    slow = SlowNotes(state)
    with slow.during(slow.ownership.note):
        assert at_once(slow.ownership.try_keep) is (TABLE[state].guest in HERE)


def test_a_guest_that_is_kept_in_the_last_moment_is_not_handed_over() -> None:
    """The cancellation comes while the entry before that of the handover is written."""
    slow = SlowNotes(State.COPYING)
    with slow.during(lambda: slow.ownership.enter(State.SUSPENDING)):
        assert at_once(slow.ownership.try_keep)
    slow.ownership.enter(State.SUSPENDED)
    assert not slow.ownership.try_hand_over(State.HANDED_OVER)
    assert slow.ownership.state is State.SUSPENDED


def test_what_is_shown_follows_from_the_state_and_the_lanes() -> None:
    shown = {
        (State.OFFERING, Link.LOST): "connecting",
        (State.OFFERING, Link.UP): "preflight",
        (State.UNDECIDED, Link.UP): "deciding",
        (State.UNDECIDED, Link.LOST): "interrupted",
        (State.UNDECIDED, Link.GIVEN_UP): "in doubt",
        (State.HANDED_OVER, Link.UP): "postcopy",
        (State.HANDED_OVER, Link.LOST): "interrupted",
        (State.HANDED_OVER, Link.GIVEN_UP): "interrupted",
        (State.GIVEN_UP, Link.LOST): "failed",
    }
    for (state, link), phase in shown.items():
        ownership = Notes().owner(state)
        ownership.link = link
        assert ownership.phase == phase


@pytest.mark.parametrize("state", State)
def test_what_follows_from_where_the_guest_is(state: State) -> None:
    ownership = Notes().owner(state)
    guest = TABLE[state].guest
    here = guest in (Guest.RUNS_HERE, Guest.SUSPENDED_HERE)
    assert ownership.may_be_elsewhere is not here
    undone = here or guest in (Guest.UNDECIDED, Guest.DECIDED_HERE)
    assert ownership.may_stay is (undone and state not in ENDED)
    runs = state in (State.OFFERING, State.COPYING)
    assert ownership.is_suspended is not (runs or state in ENDED)
    assert ownership.has_ended is (state in ENDED)
    assert ownership.peer_may_be_ready is (state is not State.OFFERING)  # also for a predecessor
    cut_off = guest in (Guest.UNDECIDED, Guest.THERE)
    for link in Link:
        ownership.link = link
        assert ownership.is_cut_off is (cut_off and link is not Link.UP)


def test_a_fact_is_noted_with_the_step_once_there_is_one() -> None:
    notes = Notes()
    ownership = notes.owner()
    ownership.note()
    assert notes.steps == []
    ownership.enter(State.COPYING)
    ownership.note(needed=True)
    assert notes.steps == [TABLE[State.COPYING].step] * 2 and notes.needed[-1]
    assert not ownership.peer_may_be_ready and not ownership.is_kept
    assert ownership.try_keep() and ownership.is_kept


def test_a_successor_finds_a_state_for_each_step() -> None:
    assert set(INHERITED) == {row.step for row in TABLE.values() if row.step}
    assert all(TABLE[state].step == step for step, state in INHERITED.items())


# ---- the models ----
@pytest.fixture(params=[OWN_TOOLSTACK, XL], ids=["own toolstack", "xl"])
def model(request: pytest.FixtureRequest) -> Modelled:
    modelled: Modelled = request.param
    return modelled


def sender_of(model: Modelled) -> str:
    """Return the sender's part of the model without the mutations."""
    command = ["cpp", "-P", "-DMUTATION=0", str(model.path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return text[text.index("byte cuts") : text.index("inline discard")]


def expanded(sender: str, text: str) -> str:
    """Return a text with the bodies of the inlines without arguments that it calls."""

    def body(called: re.Match[str]) -> str:
        found = re.search(rf"inline {called[1]}\(\) \{{(.*?)\}}\s*(?=inline|active)", sender, re.S)
        assert found, called[1]
        return expanded(sender, found[1])

    return re.sub(r"\b(\w+)\(\)", body, text)


def started(sender: str) -> Iterator[tuple[str, str]]:
    """Yield each journal that the sender may find, with what it then does."""
    loop = sender[sender.index("active proctype Sender") : sender.index("} unless")]
    for choice in loop.split("::"):
        guard, _, action = choice.partition("->")
        for journal in re.findall(r"s_journal == (\w+)", guard):
            yield journal, action


def test_a_started_sender_does_what_the_model_s_does(model: Modelled) -> None:
    found: dict[str, set[str]] = {}
    for journal, action in started(sender_of(model)):
        found.setdefault(journal, set()).update(re.findall(r"(\w+)\(\)", action))
    assert {*found} == {*model.journals.values(), *model.besides}
    for state, journal in model.journals.items():
        if state not in (State.COMPLETED, State.STAYED, State.FAILED):
            assert found[journal] & model.actions[TABLE[state].restart], (state, found[journal])
    for journal in model.besides:
        assert found[journal] == found["GIVEN_UP"] == {"tell"}


def test_each_step_is_one_that_the_model_takes(model: Modelled) -> None:
    """The end of a migration is excepted, because it can follow from several errors that the model
    leaves out.
    """
    taken = set()
    sender = sender_of(model)
    for journal, action in started(sender):
        order = [journal, *re.findall(r"s_journal = (\w+)", expanded(sender, action))]
        taken |= {(a, b) for at, a in enumerate(order) for b in order[at + 1 :]}
    for state, then in EDGES:
        if state not in model.journals or then not in model.journals:
            continue
        before, after = model.journals[state], model.journals[then]
        if after == "GIVEN_UP" and before == "DECIDED":
            after = RECALLING
        if before != after and after != "NONE" and (state, then) not in model.not_there:
            assert (before, after) in taken, (state, then)


def test_each_state_is_in_a_model() -> None:
    assert {*OWN_TOOLSTACK.journals, *XL.journals} == {*State} - {State.DECIDED_ELSEWHERE}
