# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest or a destination fails during an evacuation, and the others do not notice."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.cli.evacuate import run
from migrate.cli.evacuate.command import planned
from migrate.cli.evacuate.display import EvacuationDisplay
from migrate.cli.evacuate.planner import MOST_ABSENCES, PATIENCE_S, Ask, Measure, Planner, Step
from migrate.cli.evacuate.run import Arrivals, Evacuation, Sender
from migrate.cli.evacuate.shown import changes, head, obstacles
from migrate.control.server import ControlConnection
from migrate.errors import (
    DaemonGoneError,
    MigrationError,
    SilentDaemonError,
    UnattendedMigrationError,
)
from migrate.tasks import task_group
from tests.support.control import begin
from tests.support.evacuations import GIB, Played, estimate, here, line, named
from tests.support.waiting import WAIT_S


def test_a_guest_that_cannot_go_is_known_before_anything_moves() -> None:
    problem = "guest2 is crashed: only a running guest can be migrated"
    played = Played([here(1), here(2, problem=problem), here(3, gib=200)])
    failed = {guest.domid: guest.problem for guest in played.planner.of(Step.FAILED)}
    assert failed == {
        2: problem,
        3: "no place for its 200.0 GiB: there has 99.0 GiB left for it",
    }
    played.run()
    assert played.guest(1).step is Step.GONE


def test_a_guest_of_a_toolstack_is_named_with_its_command() -> None:
    played = Played(
        [here(1, "my web", devices=["vbd"], problem="it has devices"), here(2)],
        {"[fe80::1]:8013": GIB},
    )
    assert list(obstacles(played.planner)) == [
        "my web cannot go: it has devices",
        "    LIBXL_SAVE_HELPER=/usr/bin/xen-postcopy-xl-helper xl migrate 'my web' fe80::1",
    ]
    two = Played([here(1, devices=["vif"], problem="it has devices")], {"a": GIB, "b": GIB})
    assert list(obstacles(two.planner))[1].endswith(" xl migrate guest1 HOST")


def test_a_migration_that_fails_does_not_stop_the_others() -> None:
    played = Played([here(1), here(2), here(3)], parallel=1)
    played.measure()
    played.begin()
    played.end(1, "failed", "the link was lost")
    (ask,) = played.next()
    assert isinstance(ask, Ask)
    played.planner.answered(ask.destination, 100 * GIB)
    played.run()
    assert played.steps() == {1: Step.FAILED, 2: Step.GONE, 3: Step.GONE}
    assert played.guest(1).problem == "the link was lost"


def test_a_guest_that_cannot_be_measured_is_tried_twice() -> None:
    played = Played([here(1)])
    for _attempt in range(2):
        (guest,) = [action.guest for action in played.to_measure()]
        played.planner.not_begun(guest, "log-dirty is on", played.now)
        for action in played.next():
            assert isinstance(action, Ask)
            played.planner.answered(action.destination, 100 * GIB)
        if guest.step is Step.WAITS:
            assert played.next() == []  # not at once
        played.now += 2
    assert guest.step is Step.FAILED and guest.problem == "log-dirty is on"


def test_a_guest_that_has_failed_here_is_followed_if_somebody_else_migrates_it() -> None:
    played = Played([here(1)])
    guest = played.guest(1)
    for _attempt in range(2):
        played.planner.not_begun(guest, "domain guest1 is being migrated already", played.now)
    assert played.steps() == {1: Step.FAILED}
    played.lines = {1: line(1)}
    played.seen()
    assert played.steps() == {1: Step.MOVES}
    played.end(1, "failed", "the link was lost")
    assert played.steps() == {1: Step.FAILED} and guest.problem == "the link was lost"


def test_a_guest_that_has_ended_meanwhile_is_no_failure() -> None:
    played = Played([here(1), here(2)])
    played.here = [here(1)]
    played.seen()
    assert played.guest(2).step is Step.ENDED
    assert "has ended" in played.guest(2).problem
    played.run()
    assert head(played.planner) == "2 of 2 guests gone"


def test_a_guest_that_crashes_before_its_turn_is_named() -> None:
    played = Played([here(1), here(2)])
    played.here = [here(1), here(2, problem="guest2 is crashed")]
    played.seen(guests=False)
    assert played.guest(2).step is Step.WAITS
    played.seen()
    assert played.guest(2).step is Step.ARRIVES
    played.seen()
    assert played.guest(2).step is Step.FAILED


def test_a_guest_that_was_suspended_for_a_moment_has_not_failed() -> None:
    """The migration of another evacuation has ended between two answers of the sender."""
    played = Played([here(1), here(2)])
    played.here = [here(1, problem="suspended"), here(2, problem="suspended")]
    played.lines = {1: line(1, "failed", problem="cancelled"), 2: line(2, "completed")}
    played.seen()
    assert played.steps() == {1: Step.ARRIVES, 2: Step.GONE}
    played.here = [here(1)]
    played.seen()
    assert played.guest(1).step is Step.WAITS


def test_an_older_migration_of_a_domain_with_the_same_number_does_not_count() -> None:
    played = Played([here(1)], lines=[line(1, "completed")])
    played.seen()
    assert played.guest(1).step is Step.WAITS


def test_a_migration_that_the_sender_has_forgotten_has_failed() -> None:
    played = Played([here(1)])
    played.measure()
    played.begin()
    played.lines = {}
    played.seen()
    assert played.guest(1).step is Step.FAILED
    assert "does not know" in played.guest(1).problem


def test_a_guest_that_one_destination_refuses_goes_to_another() -> None:
    played = Played([here(1)], {"a": 10 * GIB, "b": 5 * GIB})
    (guest,) = played.measure(None, "no paging there")
    assert guest.step is Step.WAITS and guest.refused == {"a": "no paging there"}
    assert named(played.measure()) == [1]
    ((guest, _share),) = played.begin()
    assert guest.destination == "b"


def test_a_guest_that_all_destinations_refuse_has_failed_with_their_reasons() -> None:
    played = Played([here(1)], {"a": 10 * GIB, "b": 5 * GIB})
    played.measure(None, "one reason")
    played.measure(None, "another reason")
    played.next()
    assert played.guest(1).step is Step.FAILED
    assert played.guest(1).problem == "no place for its 1.0 GiB: a: one reason; b: another reason"


def lose(played: Played) -> None:
    """Have destination ``a`` not answer for so long that it is not waited for any more."""
    for _second in range(round(PATIENCE_S) + 5):
        for action in played.next():
            if isinstance(action, Ask):
                assert action.destination.address == "a"
                played.planner.silent(action.destination, "a: no route", played.now)
            else:
                assert isinstance(action, Measure) and action.destination.address == "b"
        played.now += 1


@pytest.mark.parametrize("has_other", [True, False])
def test_a_destination_that_ends_in_the_middle(has_other: bool) -> None:
    """It is waited for at first; then what has not begun goes elsewhere, if there is a place."""
    free = {"a": 10 * GIB, **({"b": 2 * GIB} if has_other else {})}
    played = Played([here(1), here(2)], free, parallel=1)
    played.measure()
    played.begin()
    played.end(1, "failed", "the peer closed the connection")
    lose(played)
    assert played.guest(1).step is Step.FAILED
    if has_other:
        played.next()
        assert played.guest(2).step is Step.MEASURED and played.guest(2).destination == "b"
    else:
        assert played.guest(2).step is Step.FAILED
        assert played.guest(2).problem == "no place for its 1.0 GiB: a: a: no route"


def test_a_guest_that_is_measured_when_its_destination_is_lost_goes_elsewhere() -> None:
    played = Played([here(1), here(2)], {"a": 10 * GIB, "b": 5 * GIB}, parallel=1)
    (measured,) = played.to_measure()
    played.planner.destinations["a"].doubt()
    lose(played)
    played.planner.not_begun(measured.guest, "no route", played.now)
    (measured,) = played.to_measure()
    assert measured.destination.address == "b"


def test_a_destination_that_comes_back_is_used_again() -> None:
    played = Played([here(1), here(2)], parallel=1)
    played.measure()
    played.begin()
    played.end(1, "failed", "the peer closed the connection")
    (ask,) = played.next()
    assert isinstance(ask, Ask)
    played.planner.silent(ask.destination, "no route", played.now)
    assert played.next() == []  # it is asked again after a pause
    played.now += 3
    (ask,) = played.next()
    assert isinstance(ask, Ask)
    played.planner.answered(ask.destination, 100 * GIB)
    assert named(played.measure()) == [2]


def go_away(played: Played) -> None:
    """Have the destination go away during a measurement, and come back when it is asked again."""
    (measured,) = played.to_measure()
    played.planner.not_begun(measured.guest, "no route", played.now)
    (ask,) = played.next()
    assert isinstance(ask, Ask)
    played.planner.silent(ask.destination, "no route", played.now)
    played.now += 3
    for ask in played.next():
        assert isinstance(ask, Ask)
        played.planner.answered(ask.destination, 100 * GIB)


def test_a_destination_that_goes_away_again_and_again_is_given_up() -> None:
    played = Played([here(1), here(2)], parallel=1)
    for _time in range(MOST_ABSENCES + 1):
        assert not played.planner.is_over
        go_away(played)
    assert played.planner.is_over
    assert played.guest(1).problem == (
        "no place for its 1.0 GiB: there: it has gone away 6 times: no route"
    )


def test_absences_before_a_migration_has_begun_do_not_count_afterwards() -> None:
    played = Played([here(1), here(2)], parallel=1)
    for _time in range(MOST_ABSENCES):
        go_away(played)
    played.measure()
    played.begin()
    played.end(1)
    for _time in range(MOST_ABSENCES):
        go_away(played)
    played.run()
    assert set(played.steps().values()) == {Step.GONE}


def test_memory_that_a_migration_takes_is_not_given_twice() -> None:
    played = Played([here(1, gib=3), here(2, gib=3)], {"a": 4 * GIB})
    assert [guest.domid for guest in played.planner.of(Step.FAILED)] == [2]


def test_memory_of_a_guest_that_is_measured_is_not_given_to_another() -> None:
    played = Played([here(1, gib=3), here(2, gib=2)], {"a": 4 * GIB, "b": 3 * GIB})
    first, second = played.to_measure()
    assert (first.destination.address, second.destination.address) == ("a", "b")
    played.planner.measured(second.guest, estimate(None, "no paging there"))
    played.next()
    assert played.guest(2).step is Step.FAILED
    assert played.guest(2).problem == (
        "no place for its 2.0 GiB: a has 1.0 GiB left for it; b: no paging there"
    )


def test_a_destination_that_cannot_be_reached_is_no_fault_of_its_guests() -> None:
    """The attempts of guests that go elsewhere count."""
    played = Played([here(1, gib=3), here(2, gib=2)], {"a": 4 * GIB, "b": 3 * GIB})
    for measure in played.to_measure():
        played.planner.not_begun(measure.guest, "no route", played.now)
    played.planner.silent(played.planner.destinations["b"], "no route", played.now)
    assert (played.guest(1).attempts, played.guest(2).attempts) == (1, 0)


# ---- a sender that does not answer ----
@dataclass(frozen=True)
class FailingSender(Sender):
    """A sender with the migrations of ``played``, whose first answers are errors."""

    played: Played
    errors: list[MigrationError]

    def call(self, **request: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return {"guests": self.played.here, "migrations": list(self.played.lines.values())}


def looking(*errors: MigrationError) -> tuple[Played, Evacuation]:
    played = Played([here(1)], lines=[line(1)])
    sender = FailingSender(Path("sender.sock"), played, list(errors))
    return played, Evacuation(sender, played.planner, 0.1, {}, EvacuationDisplay(sys.stderr))


@pytest.mark.parametrize("kind", [DaemonGoneError, SilentDaemonError])
def test_a_sender_that_ends_or_hangs_in_an_answer_is_asked_again(
    kind: type[MigrationError],
) -> None:
    played, evacuation = looking(kind("in the middle"), kind("in the middle"))
    played.lines[1] = line(1, "completed")
    for _time in range(2):
        evacuation.look()
        assert played.guest(1).step is Step.MOVES
    evacuation.look()
    assert played.guest(1).step is Step.GONE


def test_a_sender_that_ends_in_each_answer_ends_the_evacuation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _played, evacuation = looking(*[DaemonGoneError("in the middle")] * 2)
    evacuation.look()
    monkeypatch.setattr(run, "SILENCE_S", -1.0)
    with pytest.raises(UnattendedMigrationError, match="guests are under way: guest1; start it"):
        evacuation.look()


# ---- a guest that is handed over while the command begins ----
@dataclass(frozen=True)
class ChangingSender(Sender):
    """``moments``: the guests and the migrations at successive times.  A moment ends between the
    answer that has its guests and the answer that has its migrations.
    """

    moments: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]

    def room(self, destination: str) -> int:
        return 100 * GIB

    def guests(self, names: tuple[str, ...] = ()) -> dict[str, Any]:
        guests, _lines = self.moments.pop(0) if len(self.moments) > 1 else self.moments[0]
        return {"guests": guests, "named": dict.fromkeys(names, 1 if guests else None)}

    def migrations(self, *, of_predecessors: bool = False) -> list[dict[str, Any]]:
        return self.moments[0][1]


SUSPENDED = [here(1, problem="guest1 is suspended: only a running guest can be migrated")]


@pytest.mark.parametrize("names", [(), ("guest1",)])
def test_a_guest_whose_handover_ends_while_the_command_begins_has_gone(
    names: tuple[str, ...],
) -> None:
    moments = [(SUSPENDED, [line(1, "handover")]), ([], [line(1, "completed")])]
    sender = ChangingSender(Path("sender.sock"), moments)
    planner = planned(sender, {"there": None}, names, parallel=2)
    assert {one.name: one.step for one in planner.guests} == dict.fromkeys(names, Step.GONE)


def test_a_guest_whose_handover_fails_while_the_command_begins_goes() -> None:
    moments = [
        (SUSPENDED, [line(1, "handover")]),
        ([here(1)], [line(1, "failed", problem="the destination died")]),
    ]
    planner = planned(ChangingSender(Path("sender.sock"), moments), {"there": None}, (), parallel=2)
    assert [one.step for one in planner.guests] == [Step.WAITS]


# ---- a guest that does not arrive ----
INCOMING = here(1, problem="guest1 has a pager, and 5 of its pages are not here", passes=True)


async def first_look(tmp_path: Path, *incoming: dict[str, Any]) -> Planner:
    """Return a planner of guest 1, which arrives, with the migrations of the receiver here."""

    async def answer(request: dict[str, Any], connection: ControlConnection) -> None:
        match request["command"]:
            case "guests":
                await connection.answer("result", guests=[INCOMING], named={})
            case "room":
                await connection.answer("result", free_bytes=100 * GIB)
            case "list":
                await connection.answer("result", migrations=[])

    async def answer_of_receiver(_request: dict[str, Any], connection: ControlConnection) -> None:
        await connection.answer("result", migrations=[*incoming])

    def plan() -> Planner:
        sender = Sender(tmp_path / "sender.sock")
        return planned(sender, {"there": None}, (), parallel=2)

    with trio.fail_after(WAIT_S):
        async with task_group() as tasks:
            await begin(tasks, tmp_path / "sender.sock", answer)
            if incoming:
                await begin(tasks, tmp_path / "receiver.sock", answer_of_receiver)
            found = await trio.to_thread.run_sync(plan)
            tasks.cancel_scope.cancel()
    return found


def arriving(phase: str, since_s: float = 0.0, **more: Any) -> dict[str, Any]:
    """Return what a receiver lists of the migration that brings guest 1."""
    began = {"phase": phase, "at": time.time() - since_s}
    return {"domid": 1, "phase": phase, "problem": "the reason", "phases": [began], **more}


@pytest.mark.parametrize("phase", ["in doubt", "interrupted"])
def test_a_link_may_come_back_for_a_while_whatever_the_clock_shows(phase: str) -> None:
    arrivals, line = Arrivals(), arriving(phase, since_s=3600)
    assert arrivals.not_arriving([line], 50.0) == {}
    assert arrivals.not_arriving([], 51.0) == {}  # the receiver is slow
    assert arrivals.not_arriving([line], 349.0) == {}
    assert list(arrivals.not_arriving([line], 350.0)) == [1]
    again = arriving(phase, since_s=-3600)
    assert arrivals.not_arriving([again], 700.0) == {}


@pytest.mark.parametrize("phase", ["lost", "held"])
async def test_a_guest_whose_memory_does_not_arrive_any_more_is_not_waited_for(
    tmp_path: Path, phase: str
) -> None:
    others = [{"domid": None, "phase": "", "problem": ""}, arriving("completed", domid=2)]
    planner = await first_look(tmp_path, *others, arriving(phase))
    (guest,) = planner.of(Step.FAILED)
    assert guest.problem == (
        f"the migration that brings it to this host is {phase}: see `xen-postcopy list`"
    )
    assert planner.is_over


@pytest.mark.parametrize(
    "incoming",
    [
        [], [arriving("postcopy")], [arriving("in doubt")], [arriving("interrupted")],
        [arriving("lost", domid=7)], [{"phase": "lost", "problem": "of an earlier release"}],
    ],
    ids=["no receiver", "postcopy", "in doubt", "interrupted", "another", "an earlier release"],
)  # fmt: skip
async def test_a_guest_whose_memory_may_still_arrive_is_waited_for(
    tmp_path: Path, incoming: list[dict[str, Any]]
) -> None:
    planner = await first_look(tmp_path, *incoming)
    (guest,) = planner.of(Step.ARRIVES)
    assert guest.problem == INCOMING["problem"] and not planner.is_over


async def test_a_guest_of_which_nothing_is_copied_is_waited_for_with_the_command(
    tmp_path: Path,
) -> None:
    planner = await first_look(tmp_path, arriving("postcopy", quiet_s=12.0))
    (guest,) = planner.of(Step.ARRIVES)
    assert not planner.is_over
    before = dict[int, str]()
    (line,) = changes(before, planner.guests)
    assert line == (
        "guest1: not ready: no page arrives at this host in the background: copying is paused "
        "(`xen-postcopy resume guest1` at its source ends that), its cap is low, or the sender "
        "there gets no CPU"
    )
    planner.seen([INCOMING | {"problem": "4 of its pages are not here"}], [])
    assert not guest.is_quiet and list(changes(before, planner.guests)) == []
