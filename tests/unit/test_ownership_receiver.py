# SPDX-License-Identifier: GPL-2.0-or-later
"""The receiver's states: each transition, in the table and in the model."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from migrate.control.client import ENDED
from migrate.errors import LocalProtocolError, MigrationError
from receiver.ownership import INHERITED, OURS, TABLE, Link, Ownership, State, Undo

MODEL = Path(__file__).parents[1] / "campaigns/model/session.pml"
STEPS = {
    "making", "made", "suspended", "ready", "entrusted", "taken over", "finishing", "lost", "held",
    "decided elsewhere",
}  # fmt: skip
PHASES = {
    "preflight", "precopy", "switchover", "deciding", "postcopy", "completing", "interrupted",
    "in doubt", "held", "lost", "refused", "completed", "failed",
}  # fmt: skip


class Entries:
    """A journal that keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.fails = False

    def write(self, step: str, _needed: bool) -> None:
        if self.fails:
            raise MigrationError("the disk is full")
        self.steps.append(step)


def paths() -> dict[State, list[State]]:
    """Return the shortest way to each state, from OFFERED or from a predecessor's state."""
    found: dict[State, list[State]] = {State.OFFERED: [State.OFFERED]}
    for begin in INHERITED.values():
        found.setdefault(begin, [begin])
    reached = list(found)
    for state in reached:
        for then in TABLE[state].next:
            if then not in found:
                found[then] = [*found[state], then]
                reached.append(then)
    return found


PATHS = paths()


def at(state: State, journal: Entries) -> Ownership:
    """Return an ownership that has reached the state."""
    begin, *rest = PATHS[state]
    ownership = Ownership(journal.write, begin)
    for then in rest:
        ownership.enter(then)
    assert ownership.state is state
    return ownership


def test_every_state_can_be_reached() -> None:
    assert set(PATHS) == set(State)


@pytest.mark.parametrize("state", State)
def test_each_transition_is_noted_and_no_other_is_possible(state: State) -> None:
    for then in State:
        journal = Entries()
        ownership = at(state, journal)
        before = list(journal.steps)
        if then in TABLE[state].next or then is state:
            ownership.enter(then)
            assert ownership.state is then
            step = TABLE[then].step
            if step and step != TABLE[state].step:
                assert journal.steps == [*before, step]
        else:
            with pytest.raises(LocalProtocolError, match=f"{then.name} after {state.name}"):
                ownership.enter(then)
            assert ownership.state is state and journal.steps == before


@pytest.mark.parametrize("state", State)
def test_what_cannot_be_noted_does_not_happen(state: State) -> None:
    for then in TABLE[state].next:
        journal = Entries()
        ownership = at(state, journal)
        journal.fails = True
        if TABLE[then].step and TABLE[then].step != TABLE[state].step:
            with pytest.raises(MigrationError, match="full"):
                ownership.enter(then)
            assert ownership.state is state
        else:
            ownership.enter(then)


def test_a_failure_to_write_is_an_error_only_while_the_guest_can_stay() -> None:
    needed: list[tuple[str, bool]] = []
    ownership = Ownership(lambda step, must: needed.append((step, must)))
    for state in (State.MAKING, State.RESTORING, State.SUSPENDED, State.READY, State.OWNS):
        ownership.enter(state)
    assert needed == [
        ("making", True), ("made", True), ("suspended", True), ("ready", True),
        ("taken over", False),
    ]  # fmt: skip


def test_the_steps_and_the_phases_are_those_of_the_journal_and_of_the_manual() -> None:
    assert {row.step for row in TABLE.values()} - {""} == STEPS == set(INHERITED)
    assert {
        phase for row in TABLE.values() for phase in (row.phase, row.if_lost or row.phase)
    } == PHASES
    for row in TABLE.values():
        assert (
            (row.phase in ENDED) is ((row.if_lost or row.phase) in ENDED) is (row.undo is Undo.OVER)
        )


@pytest.mark.parametrize("state", OURS)
def test_a_guest_that_belongs_here_ends_here(state: State) -> None:
    """Invariant 1: only a guest that does not run here is given up."""
    for then in TABLE[state].next:
        if TABLE[then].undo not in (Undo.NOTHING, Undo.OVER):
            assert state in (State.UNSTARTED, State.HELD) and then is State.DECIDED_ELSEWHERE
        assert then is not State.GIVEN_UP


@pytest.mark.parametrize("state", State)
def test_a_successor_shows_what_is_known_and_keeps_what_was_promised(state: State) -> None:
    row = TABLE[state]
    if row.undo in (Undo.BY_DECISION, Undo.NOTHING):
        ownership = Ownership(Entries().write, INHERITED[row.step])
        assert ownership.needed and ownership.inherited
        assert ownership.row.restart is row.restart
        assert ownership.phase == (ownership.row.if_lost or ownership.row.phase)


@pytest.mark.parametrize("state", State)
def test_what_follows_from_the_owner(state: State) -> None:
    ownership, row = at(state, Entries()), TABLE[state]
    assert ownership.phase == (row.phase if ownership.link is Link.UP else row.if_lost or row.phase)
    assert ownership.has_ended is (row.undo is Undo.OVER)
    assert ownership.ours is (state in OURS)
    assert ownership.handed_over is (state in OURS and state is not State.RUNNING)


def test_a_fact_is_noted_with_the_step_once_there_is_one() -> None:
    journal = Entries()
    at(State.OFFERED, journal).note()
    assert journal.steps == []
    ownership = at(State.READY, journal)
    ownership.note()
    assert journal.steps[-1] == TABLE[State.READY].step


def test_the_phase_follows_the_link() -> None:
    ownership = Ownership(Entries().write)
    shown = [ownership.phase]
    for step in (
        State.MAKING, State.RESTORING, State.SUSPENDED, State.READY, Link.LOST, Link.BACK,
        State.OWNS, Link.UP,
    ):  # fmt: skip
        if isinstance(step, Link):
            ownership.link = step
        else:
            ownership.enter(step)
        shown.append(ownership.phase)
    assert shown == [
        "preflight", "preflight", "precopy", "switchover", "switchover", "in doubt", "in doubt",
        "interrupted", "postcopy",
    ]  # fmt: skip


@pytest.mark.parametrize("state", State)
def test_of_becoming_ready_and_being_cancelled_one_happens(state: State) -> None:
    ownership = at(state, Entries())
    can_be_cancelled = TABLE[state].undo is Undo.ANYTHING
    assert ownership.try_take_back("an operator") is can_be_cancelled
    assert ownership.taken_back == ("an operator" if can_be_cancelled else "")
    if state is State.SUSPENDED:
        assert not ownership.try_become_ready() and ownership.state is State.SUSPENDED
        ready = at(state, Entries())
        assert ready.try_become_ready() and not ready.try_take_back("an operator")


def test_while_ready_is_being_noted_nothing_is_cancelled() -> None:
    cancelled: list[bool] = []

    def write(step: str, _needed: bool) -> None:
        if step == "ready":
            cancelled.append(ownership.try_take_back("too late"))

    ownership = Ownership(write)
    for state in (State.MAKING, State.RESTORING, State.SUSPENDED):
        ownership.enter(state)
    assert ownership.try_become_ready() and cancelled == [False]


@pytest.mark.parametrize("state", State)
def test_what_xl_lets_run_runs(state: State) -> None:
    ownership = at(state, Entries())
    ownership.seen_to_run()
    expected = {State.SERVING: State.RUNNING, State.UNSTARTED: State.OWNS}
    assert ownership.state is expected.get(state, state)


def test_that_the_guest_runs_can_wait_until_the_journal_is_written() -> None:
    began, go_on = threading.Event(), threading.Event()

    def write(_step: str, _needed: bool) -> None:
        began.set()
        assert go_on.wait(20)

    ownership = Ownership(write, State.UNSTARTED)
    noting = threading.Thread(target=ownership.note)
    noting.start()
    assert began.wait(20)
    ownership.seen_to_run()
    seen = [ownership.state]
    waiting = threading.Thread(target=lambda: ownership.seen_to_run(wait=True))
    waiting.start()
    go_on.set()
    for thread in (noting, waiting):
        thread.join(20)
    assert [*seen, ownership.state] == [State.UNSTARTED, State.OWNS]


# ---- the model ----
OF_MODEL = {
    "NONE": (State.OFFERED, State.GIVEN_UP, State.COMPLETED, State.STOPPED),
    "MADE": (State.RESTORING,),
    "READY": (State.READY,),
    "OWN": (State.OWNS,),
    "FINISHING": (State.FINISHING,),
    "HELD": (State.HELD,),
}
"""The journal of the model's receiver.  The model has one page only, and no toolstack."""
EFFECTS = {"prepare": "READY", "own": "OWN", "hold": "HELD", "discard": "NONE"}
"""The journal after each of the model's inline functions."""


def of_model() -> set[tuple[str, str]]:
    """Return the transitions of the receiver's journal in the model."""
    receiver = MODEL.read_text().split("active proctype Receiver()")[1].split("active proctype")[0]
    found = set()
    receiver = re.sub(r"->\n\s+", "-> ", receiver)
    for guard, action in re.findall(r":: (.*?) -> (.*?)(?=\n|:: )", receiver):
        for before in re.findall(r"r_journal == (\w+)", guard):
            for name, after in EFFECTS.items():
                if f"{name}()" in action:
                    found.add((before, after))
            found |= {(before, after) for after in re.findall(r"r_journal = (\w+)", action)}
    return found


def test_the_model_has_the_states_of_the_table() -> None:
    text = MODEL.read_text()
    assert set(re.findall(r"r_journal ==? (\w+)", text)) == set(OF_MODEL)
    for inline in re.split(r"^inline ", text, flags=re.MULTILINE)[1:]:
        assigned = re.findall(r"\br_journal = (\w+)", inline.split("\n\n")[0])
        if assigned:
            assert EFFECTS[inline.partition("(")[0]] == assigned[-1]
    assert set(re.findall(r"^mtype = \{ (NONE.*?) \};", text, re.MULTILINE)[0].split(", ")) >= {
        *OF_MODEL
    }


def test_each_transition_of_the_model_is_one_of_the_table() -> None:
    transitions = of_model()
    assert len(transitions) > 6 and ("OWN", "HELD") in transitions
    others = {state for states in OF_MODEL.values() for state in states}
    for before, after in transitions:
        known = others if before != "NONE" else others - {State.RESTORING}
        reached = list(OF_MODEL[before])
        for state in reached:  # also over states that the model does not have
            reached += [
                then
                for then in TABLE[state].next
                if then not in reached and (then in OF_MODEL[after] or then not in known)
            ]
        assert set(reached) & set(OF_MODEL[after]), f"{before} -> {after}"


def test_a_guest_that_is_seen_to_run_changes_no_state_that_is_being_noted() -> None:
    """An operator decides against a guest that is being started at this moment."""
    ownership: Ownership

    def write(_step: str, _needed: bool) -> None:
        ownership.seen_to_run()

    ownership = Ownership(write, State.UNSTARTED)
    ownership.enter(State.DECIDED_ELSEWHERE)
    assert ownership.state is State.DECIDED_ELSEWHERE
    ownership.enter(State.GIVEN_UP)
