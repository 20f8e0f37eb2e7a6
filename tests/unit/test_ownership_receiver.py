# SPDX-License-Identifier: GPL-2.0-or-later
"""The receiver's states: each transition, in the table and in the models."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

import pytest

from migrate.errors import LocalProtocolError, MigrationError
from migrate.outcomes import ENDED
from receiver.ownership import INHERITED, OURS, TABLE, Link, Ownership, State, Undo
from tests.campaigns.model.check import MODEL, TOOLSTACK

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


# ---- the models ----
@dataclass(frozen=True)
class Modelled:
    """A model, with the states that each of its journals stands for, and the journal after each of
    its inline functions.
    """

    text: str
    states: dict[str, tuple[State, ...]]
    effects: dict[str, str]

    @property
    def receiver(self) -> str:
        text = self.text[self.text.index("inline discard") :]
        inlines, process, *_others = text.split("active proctype")
        return re.sub(r"(->|&&|\|\|)\s+", r"\1 ", inlines + process)

    def transitions(self) -> set[tuple[str, str]]:
        """Return the transitions of the receiver's journal."""
        found = set()
        for guard, action in re.findall(r":: (.*?) -> (.*?)(?=\n|:: )", self.receiver):
            for before in re.findall(r"r_journal == (\w+)", guard):
                for name, after in self.effects.items():
                    if f"{name}()" in action:
                        found.add((before, after))
                found |= {(before, after) for after in re.findall(r"r_journal = (\w+)", action)}
        return found


BOTH = {
    "NONE": (State.OFFERED, State.GIVEN_UP, State.COMPLETED, State.STOPPED),
    "MADE": (State.RESTORING,),
    "READY": (State.READY,),
    "OWN": (State.OWNS,),
    "FINISHING": (State.FINISHING,),
}
OWN_TOOLSTACK = Modelled(
    MODEL.read_text(),
    {**BOTH, "HELD": (State.HELD,)},
    {"prepare": "READY", "own": "OWN", "hold": "HELD", "discard": "NONE"},
)
"""No toolstack decides, and no page is lost."""
XL = Modelled(
    TOOLSTACK.read_text(),
    {**BOTH, "ENTRUSTED": (State.SERVING, State.RUNNING), "LOST": (State.LOST,)},
    {"lose": "LOST", "be_whole": "OWN", "discard": "NONE"},
)
"""No operator decides."""


@pytest.mark.parametrize("model", [OWN_TOOLSTACK, XL], ids=["own toolstack", "xl"])
def test_the_model_has_the_states_of_the_table(model: Modelled) -> None:
    assert set(re.findall(r"r_journal ==? (\w+)", model.text)) == set(model.states)
    for inline in re.split(r"^inline ", model.text, flags=re.MULTILINE)[1:]:
        body = inline.split("\n\n")[0]
        assigned = re.findall(r"\br_journal = (\w+)", body)
        if assigned and "r_journal ==" not in body:
            assert model.effects[inline.partition("(")[0]] == assigned[-1]
    declared = re.findall(r"^mtype = \{ (NONE[^}]*?) \};", model.text, re.MULTILINE)[0]
    assert {*re.split(r",\s+", declared)} >= {*model.states}


def test_every_state_in_which_the_receiver_has_the_guest_is_in_a_model() -> None:
    states = [*OWN_TOOLSTACK.states.values(), *XL.states.values()]
    modelled = {state for of_journal in states for state in of_journal}
    left_out = {State.MAYBE_READY, State.UNSTARTED, State.COMPLETING}
    assert {*OURS, State.MAYBE_READY, State.READY, State.SERVING} - modelled == left_out


@pytest.mark.parametrize("model", [OWN_TOOLSTACK, XL], ids=["own toolstack", "xl"])
def test_each_transition_of_the_model_is_one_of_the_table(model: Modelled) -> None:
    transitions = model.transitions()
    some = {OWN_TOOLSTACK.text: ("OWN", "HELD"), XL.text: ("ENTRUSTED", "LOST")}
    assert len(transitions) > 6 and some[model.text] in transitions
    others = {state for states in model.states.values() for state in states}
    for before, after in transitions:
        known = others if before != "NONE" else others - {State.RESTORING}
        reached = list(model.states[before])
        for state in reached:  # also over states that the model does not have
            reached += [
                then
                for then in TABLE[state].next
                if then not in reached and (then in model.states[after] or then not in known)
            ]
        assert set(reached) & set(model.states[after]), f"{before} -> {after}"


def test_a_guest_that_is_seen_to_run_changes_no_state_that_is_being_noted() -> None:
    """An operator decides against a guest that is being started at this moment."""
    ownership: Ownership

    def write(_step: str, _needed: bool) -> None:
        ownership.seen_to_run()

    ownership = Ownership(write, State.UNSTARTED)
    ownership.enter(State.DECIDED_ELSEWHERE)
    assert ownership.state is State.DECIDED_ELSEWHERE
    ownership.enter(State.GIVEN_UP)
