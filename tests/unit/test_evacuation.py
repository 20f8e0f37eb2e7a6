# SPDX-License-Identifier: GPL-2.0-or-later
"""What an evacuation does next, and what is shown of it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.cli.evacuate.display import EvacuationDisplay
from migrate.cli.evacuate.placement import Wanted, place
from migrate.cli.evacuate.planner import (
    PATIENCE_S,
    Action,
    Ask,
    Begin,
    Guest,
    Measure,
    Planner,
    SetShare,
    Step,
)
from migrate.cli.evacuate.shown import facts, head, obstacles, plan, progress, summary
from migrate.options import LEAST_BANDWIDTH
from migrate.units import display_width
from tests.support.screen import Screen

GIB = 2**30
Json = dict[str, Any]


# ---- where guests go ----
def test_the_largest_guest_goes_where_the_most_memory_is() -> None:
    guests = [Wanted(1, 2), Wanted(2, 5), Wanted(3, 2)]
    assert place(guests, {"a": 10, "b": 6}) == {2: "a", 1: "b", 3: "a"}


def test_guests_are_packed_if_they_would_not_fit_otherwise() -> None:
    """The first guest takes the room of two others if it goes where the most memory is."""
    guests = [Wanted(1, 6), Wanted(2, 5), Wanted(3, 5)]
    assert place(guests, {"a": 10, "b": 6}) == {1: "b", 2: "a", 3: "a"}


def test_a_guest_does_not_go_where_it_was_refused() -> None:
    assert place([Wanted(1, 1, frozenset("a"))], {"a": 10, "b": 6}) == {1: "b"}
    assert place([Wanted(1, 1, frozenset("ab"))], {"a": 10, "b": 6}) == {}


@given(
    st.lists(st.integers(0, 20), max_size=8),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 60)),
)
def test_no_destination_is_given_more_than_it_has(sizes: list[int], rooms: dict[str, int]) -> None:
    guests = [Wanted(number, size) for number, size in enumerate(sizes)]
    placed = place(guests, rooms)
    for name, free in rooms.items():
        assert sum(sizes[key] for key, where in placed.items() if where == name) <= free
    left = {
        name: free - sum(sizes[k] for k, w in placed.items() if w == name)
        for name, free in rooms.items()
    }
    for number, size in enumerate(sizes):
        assert number in placed or all(size > free for free in left.values())


# ---- a sender that is played ----
def here(domid: int, name: str = "", *, gib: float = 1, **more: Any) -> Json:
    size = round(gib * GIB)
    return {
        "name": name or f"guest{domid}", "domid": domid, "uuid": f"uuid{domid}",
        "target": f"uuid{domid}", "state": "running", "memory_bytes": size, "needed_bytes": size,
        "devices": [], "problem": "", "passes": False, **more,
    }  # fmt: skip


def line(domid: int, phase: str = "precopy", **more: Any) -> Json:
    return {
        "id": f"{domid:08}abcdef", "domain": f"guest{domid}", "domid": domid, "peer": "there:8013",
        "direction": "outgoing", "strategy": "hybrid", "phase": phase, "problem": "",
        "paused": False, "handed_over": False, "pages_done": 50, "pages_total": 100,
        "bytes_per_s": 100 * 2**20, "eta_s": 7.0, "elapsed_s": 3.0, **more,
    }  # fmt: skip


def estimate(recommended: str | None = "hybrid", problem: str = "") -> Json:
    names = ("precopy", "hybrid", "postcopy")
    figures = {"total_s": 8.5, "downtime_ms": 6.0, "freeze_ms": 120.0, "problem": problem}
    return {
        "measured": {"bytes_per_s": 10**9, "page_us": 90, "round_trip_us": 20},
        "strategies": dict.fromkeys(names, figures),
        "recommended": recommended, "reason": "it freezes the guest for 120 ms",
    }  # fmt: skip


class Played:
    """An evacuation, and a sender that does what the planner wants."""

    def __init__(
        self,
        guests: list[Json],
        free: dict[str, int] | None = None,
        lines: Any = (),
        **options: Any,
    ):
        defaults: dict[str, Any] = {"named": None, "parallel": 2}
        self.here, self.lines = guests, {one["domid"]: one for one in lines}
        self.now = 100.0
        self._kept: list[Measure] = []
        self.planner = Planner(
            free or {"there": 100 * GIB}, guests, list(lines), **{**defaults, **options}
        )

    def guest(self, domid: int) -> Guest:
        (found,) = [one for one in self.planner.guests if one.domid == domid]
        return found

    def steps(self) -> dict[int, Step]:
        return {one.domid: one.step for one in self.planner.guests}

    def next(self) -> list[Action]:
        return list(self.planner.next(self.now))

    def to_measure(self) -> list[Measure]:
        """Return what the planner wants measured, now or while other things were done."""
        self._kept += [action for action in self.next() if isinstance(action, Measure)]
        found, self._kept = self._kept, []
        return found

    def seen(self, *, guests: bool = True) -> None:
        self.planner.seen(self.here if guests else None, list(self.lines.values()))

    def measure(self, recommended: str | None = "hybrid", problem: str = "") -> list[Guest]:
        """Measure all that the planner wants measured, and return these guests."""
        found = [action.guest for action in self.to_measure()]
        for guest in found:
            self.planner.measured(guest, estimate(recommended, problem))
        return found

    def begin(self) -> list[tuple[Guest, int | None]]:
        """Begin what the planner wants, and return the guests with their shares."""
        actions = self.next()
        self._kept += [action for action in actions if isinstance(action, Measure)]
        found = [action.guest for action in actions if isinstance(action, Begin)]
        for guest in found:
            self.lines[guest.domid] = line(guest.domid, strategy=guest.strategy)
            self.planner.begun(guest, self.lines[guest.domid])
        return [(guest, guest.share) for guest in found]

    def end(self, domid: int, phase: str = "completed", problem: str = "") -> None:
        self.lines[domid] = line(domid, phase, problem=problem)
        if phase == "completed":
            self.here = [one for one in self.here if one["domid"] != domid]
        self.seen()

    def run(self) -> None:
        """Let everything go well until it is over."""
        for _turn in range(1000):
            self.measure()
            self.begin()
            for guest in self.planner.of(Step.MOVES):
                self.end(guest.domid)
            self.seen()
            if self.planner.is_over:
                return
        raise AssertionError(self.steps())


def over(played: Played) -> bool:
    return played.planner.is_over


def named(guests: list[Guest]) -> list[int]:
    return [guest.domid for guest in guests]


# ---- the order of things ----
def test_all_guests_go_the_largest_first_and_not_more_at_once_than_the_limit() -> None:
    played = Played([here(1), here(2, gib=3), here(3, gib=2)])
    assert named(played.measure()) == [2]  # the link is measured once, with the first guest
    assert [guest.domid for guest, _share in played.begin()] == [2]
    assert named(played.measure()) == [3]
    played.begin()
    assert named(played.measure()) == []
    played.end(2)
    assert named(played.measure()) == [1]
    played.run()
    assert set(played.steps().values()) == {Step.GONE}
    assert not played.planner.newcomers


def test_when_the_link_is_known_several_guests_are_measured_at_once() -> None:
    played = Played([here(n) for n in range(1, 6)], parallel=3)
    played.measure()
    played.begin()
    first, second = played.to_measure()
    assert first.destination.link == second.destination.link
    assert first.destination.link == {"bytes_per_s": 10**9, "page_us": 90, "round_trip_us": 20}


def test_only_named_guests_go() -> None:
    played = Played([here(1), here(2), here(3)], named={3, 1})
    played.run()
    assert played.steps() == {1: Step.GONE, 3: Step.GONE}
    assert [one["domid"] for one in played.here] == [2]
    assert not played.planner.newcomers


def test_a_guest_goes_by_the_strategy_of_its_estimate() -> None:
    played = Played([here(1)])
    played.measure("postcopy")
    ((guest, _share),) = played.begin()
    assert guest.strategy == "postcopy" and guest.destination == "there"


def test_without_guests_there_is_nothing_to_do() -> None:
    played = Played([])
    assert played.planner.is_over and played.next() == []


# ---- the bandwidth ----
def test_the_bandwidth_is_divided_among_those_that_are_copied() -> None:
    played = Played([here(1), here(2), here(3)], bandwidth=100_000)
    (measure,) = played.next()
    assert isinstance(measure, Measure) and measure.bandwidth == 50_000
    played.planner.measured(measure.guest, estimate())
    assert [share for _guest, share in played.begin()] == [100_000]
    played.measure()
    first, second = played.next()
    assert isinstance(first, SetShare) and first.guest.domid == 1 and first.guest.share == 50_000
    assert isinstance(second, Begin) and second.guest.share == 50_000
    played.lines[2] = line(2)
    played.planner.begun(second.guest, played.lines[2])
    played.end(1)
    shares = [action for action in played.next() if isinstance(action, SetShare)]
    assert [(action.guest.domid, action.guest.share) for action in shares] == [(2, 100_000)]


def test_a_migration_that_copies_nothing_has_no_share_and_holds_up_nobody() -> None:
    played = Played([here(1), here(2)], bandwidth=100_000, parallel=1)
    played.measure()
    played.begin()
    for nothing in ({"phase": "interrupted"}, {"paused": True}):
        played.lines[1] = line(1, **nothing)
        played.seen()
        assert not played.guest(1).copies
    assert named(played.measure()) == [2]
    assert [share for _guest, share in played.begin()] == [100_000]
    played.lines[1] = line(1)
    played.seen()
    assert {a.guest.share for a in played.next() if isinstance(a, SetShare)} == {50_000}


def test_no_share_is_below_what_a_sender_accepts() -> None:
    played = Played([here(n) for n in range(1, 4)], bandwidth=LEAST_BANDWIDTH, parallel=3)
    played.measure()
    played.begin()
    played.measure()
    assert [share for _guest, share in played.begin()] == [LEAST_BANDWIDTH] * 2


# ---- what is under way already ----
def test_a_migration_that_is_under_way_is_followed() -> None:
    played = Played([here(1), here(2)], lines=[line(1), line(7, "completed")])
    assert played.steps() == {1: Step.MOVES, 2: Step.WAITS}
    assert played.guest(1).destination == "there:8013"
    played.end(1)
    assert played.guest(1).step is Step.GONE
    played.run()


def test_a_migration_of_an_operator_that_fails_is_named() -> None:
    """Its destination is none of this evacuation, and is not asked."""
    played = Played([here(1)], lines=[line(1)])
    played.end(1, "failed", "cancelled by an operator")
    assert played.guest(1).step is Step.FAILED and played.next() == []


def test_a_guest_whose_domain_a_toolstack_has_destroyed_is_followed() -> None:
    played = Played([here(1)], lines=[line(5, "postcopy")])
    assert played.steps() == {1: Step.WAITS, 5: Step.MOVES}
    assert 5 not in {
        one.domid for one in Played([here(1)], lines=[line(5)], named={1}).planner.guests
    }


def test_a_guest_that_another_evacuation_has_begun_is_followed() -> None:
    played = Played([here(1), here(2)])
    (measured,) = played.to_measure()
    played.planner.not_begun(measured.guest, "domain guest1 is being migrated already", played.now)
    played.lines = {1: line(1), 2: line(2, "completed")}
    played.here = played.here[:1]
    played.seen()
    assert played.steps() == {1: Step.MOVES, 2: Step.GONE}


def test_a_guest_that_is_still_arriving_is_waited_for() -> None:
    arrives = here(1, problem="guest1 has a pager, and 5 of its pages are not here", passes=True)
    played = Played([arrives])
    assert played.next() == [] and not played.planner.is_over
    assert "not ready" in "\n".join(progress(played.planner, 200, 24))
    played.here = [here(1)]
    played.seen()
    assert named(played.measure()) == [1]


def test_a_guest_that_comes_meanwhile_is_named_and_stays() -> None:
    """Two hosts that are evacuated to each other would send their guests back and forth."""
    played = Played([here(1)])
    played.here.append(here(9, "late"))
    played.run()
    assert played.planner.newcomers == ["late"]
    assert named(played.planner.guests) == [1]


def test_a_domain_with_the_number_of_one_that_has_gone_is_another_guest() -> None:
    played = Played([here(1)])
    played.here = [here(1, "other", uuid="another")]
    played.seen()
    assert played.guest(1).step is Step.ENDED and played.planner.newcomers == ["other"]


# ---- what goes wrong ----
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


# ---- interruptions ----
def test_after_a_stop_nothing_begins_and_what_is_under_way_is_followed() -> None:
    played = Played([here(1), here(2), here(3)])
    played.measure()
    played.begin()
    measured = played.measure()
    assert named(measured) == [2] and played.guest(2).step is Step.BEGINS
    played.planner.stop()
    assert played.guest(2).step is Step.WAITS
    assert played.next() == [] and not over(played)
    played.end(1)
    assert over(played)
    assert [one["result"] for one in facts(played.planner, False)["guests"]] == [
        "gone", "not begun", "not begun",
    ]  # fmt: skip


def test_a_measurement_that_ends_after_a_stop_begins_nothing() -> None:
    played = Played([here(1)])
    (measure,) = played.next()
    assert isinstance(measure, Measure)
    played.planner.stop()
    played.planner.measured(measure.guest, estimate())
    assert played.next() == [] and played.planner.is_over


def test_an_evacuation_is_continued_by_another_one() -> None:
    first = Played([here(n) for n in range(1, 6)])
    first.measure()
    first.begin()
    first.end(1)
    first.measure()
    first.begin()
    first.planner.stop()
    second = Played(first.here, lines=list(first.lines.values()))
    assert second.steps() == {2: Step.MOVES, 3: Step.MOVES, 4: Step.WAITS, 5: Step.WAITS}
    second.run()
    assert set(second.steps().values()) == {Step.GONE}


# ---- a trial ----
def test_a_trial_measures_each_guest_and_moves_none() -> None:
    played = Played([here(1), here(2, gib=2), here(3)], lines=[line(3)], is_trial=True, parallel=1)
    assert named(played.measure("postcopy")) == [2]
    assert named(played.measure("precopy")) == [1]
    assert played.begin() == [] and played.planner.is_over
    assert played.steps() == {1: Step.PLANNED, 2: Step.PLANNED, 3: Step.MOVES}
    rows = plan(played.planner, None).split("\n")
    assert rows[0].split() == [
        "GUEST", "MEMORY", "TO", "STRATEGY", "TOTAL", "DOWNTIME", "FROZEN", "PROBLEM",
    ]  # fmt: skip
    assert rows[1].split() == [
        "guest1",
        "1.0",
        "GiB",
        "there",
        "precopy",
        "8.5",
        "s",
        "6",
        "ms",
        "120",
        "ms",
    ]
    assert rows[3].endswith("under way")
    (expected,) = {one["expected"]["total_s"] for one in facts(played.planner, True)["guests"][:2]}
    assert expected == 8.5


# ---- what is shown ----
def halfway() -> Planner:
    guests = [here(n, f"guest-{n}") for n in range(1, 18)]
    guests += [
        here(18, "a" * 64),
        here(19, "7"),
        here(20, problem="guest20 is crashed: only a running guest can be migrated"),
    ]
    played = Played(guests)
    for _each in range(3):
        played.measure()
        played.begin()
        played.measure()
        played.begin()
        played.end(played.planner.of(Step.MOVES)[0].domid)
    played.measure()
    played.begin()
    return played.planner


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_the_terminal(width: int) -> None:
    planner = halfway()
    rows = progress(planner, width - 1, 100)
    of_all = "3 of 20 gone" if width == 60 else "3 of 20 guests gone"
    assert rows[0] == f"{of_all}, 1 failed, 2 under way, 14 to go, 200 MiB/s"
    assert all(display_width(row) < width for row in rows)
    assert rows[1].split()[0] == "GUEST" and "PHASE" in rows[1]
    assert "precopy" in rows[2]
    with closing(Screen(width, 12)) as screen:
        display = EvacuationDisplay(screen.stream)
        display.show(planner)
        seen = screen.read()
        assert len(seen) == 12 and seen[-1].startswith("... and ")
        display.close()
        assert screen.read() == []


def test_the_summary_has_each_guest_with_its_end() -> None:
    text = summary(halfway(), None)
    assert len(text.split("\n")) == 21
    assert "is crashed: only a running guest can be migrated" in text
    assert text.count(" gone ") == 3


def test_elsewhere_a_line_is_printed_for_each_beginning_and_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sys

    played = Played([here(1), here(2, problem="guest2 is crashed")])
    display = EvacuationDisplay(sys.stdout, played.planner.of(Step.FAILED))
    display.show(played.planner)
    played.measure()
    played.begin()
    display.show(played.planner)
    display.show(played.planner)
    played.end(1)
    display.show(played.planner)
    display.close()
    assert capsys.readouterr().out.splitlines() == [
        "guest1: to there, hybrid",
        "guest1: gone after 3.0 s",
    ]
