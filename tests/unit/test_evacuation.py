# SPDX-License-Identifier: GPL-2.0-or-later
"""What an evacuation does next, and what is shown of it."""

from __future__ import annotations

import io
import sys
from contextlib import closing

import pytest

from migrate.cli.evacuate.command import Signals, asked, continuation, gone_before
from migrate.cli.evacuate.display import EvacuationDisplay
from migrate.cli.evacuate.planner import Begin, Measure, Planner, SetShare, Step
from migrate.cli.evacuate.shown import changes, facts, head, plan, progress, result, summary
from migrate.options import LEAST_BANDWIDTH
from migrate.units import display_width
from tests.support.evacuations import GIB, Played, estimate, here, line, named, over
from tests.support.screen import Screen


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


def test_a_pause_is_printed_once_with_the_command_that_ends_it() -> None:
    played, before = Played([here(1)]), dict[int, str]()
    played.measure()
    played.begin()
    assert len(list(changes(before, played.planner.guests))) == 1
    for more in ({"paused": True}, {"paused": True, "outstanding": 3}, {}):
        played.lines[1] = line(1, **more)
        played.seen()
        news = list(changes(before, played.planner.guests))
        assert news == (
            ["guest1: precopy: its copying is paused: `xen-postcopy resume guest1`"]
            if list(more) == ["paused"]
            else []
        )


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


def test_a_guest_that_was_cancelled_is_not_counted_as_failed() -> None:
    played = Played([here(1), here(2)], lines=[line(1), line(2)])
    played.end(1, "failed", "cancelled by an operator")
    played.end(2, "failed", "the link was lost")
    assert head(played.planner) == "0 of 2 guests gone, 1 failed, 1 cancelled"
    assert [result(guest) for guest in played.planner.guests] == ["cancelled", "failed"]


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


def test_a_named_guest_that_reboots_here_is_named_although_its_former_domain_has_ended() -> None:
    played = Played([here(1), here(2)], named={1})
    played.here = [here(2), here(5, "guest1", uuid="uuid1"), here(6)]
    played.seen()
    assert played.guest(1).step is Step.ENDED and played.planner.newcomers == ["guest1"]


def test_a_named_guest_that_has_gone_and_comes_back_meanwhile_is_named() -> None:
    played = Played([here(2)], named=set())
    played.planner.follow(line(1, "completed", uuid="uuid1"))
    played.here.append(here(5, "guest1", uuid="uuid1"))
    played.seen()
    assert played.steps() == {1: Step.GONE} and played.planner.newcomers == ["guest1"]


def test_a_migration_of_the_history_that_lacks_keys_is_followed() -> None:
    played = Played([here(2)], named=set())
    lacking = line(1, "completed")
    del lacking["domid"], lacking["strategy"]
    played.planner.follow(lacking)
    played.planner.seen(played.here, [lacking])
    assert [guest.step for guest in played.planner.guests] == [Step.GONE]


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
    assert [one["result"] for one in facts(played.planner, None)["guests"]] == [
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


def test_the_command_that_continues_names_the_guests_that_are_left_by_their_uuids() -> None:
    """A number means nothing any more when its guest has gone."""
    given = ["evacuate", "there", "--guest", "1", "--guest=guest2", "--json", "--guest", "guest3"]
    played = Played([here(1), here(2), here(3), here(4)], named={1, 2, 3})
    played.measure()
    played.begin()
    played.end(1)
    played.measure()
    played.begin()
    assert continuation(played.planner, given) == (
        "xen-postcopy evacuate --guest uuid2 --guest uuid3 there --json"
    )
    played.run()
    assert continuation(played.planner, given) == ""


def test_the_command_that_continues_with_all_guests_is_the_same() -> None:
    played = Played([here(1), here(2)])
    given = ["evacuate", "a there", "--parallel", "1"]
    assert continuation(played.planner, given) == "xen-postcopy evacuate 'a there' --parallel 1"


@pytest.mark.parametrize("name", ["guest1", "uuid1", "UUID1"])
def test_a_guest_that_has_gone_is_found_by_its_name_and_by_its_uuid(name: str) -> None:
    lines = [line(1, "completed", uuid="uuid1", id="earlier"), line(2, "completed", uuid=None)]
    lines += [line(1, "completed", uuid="uuid1"), line(1, "failed", uuid="uuid1", id="failed")]
    assert gone_before(lines, name) is lines[2]


# ---- a trial ----
def test_a_trial_measures_each_guest_and_moves_none() -> None:
    played = Played([here(1), here(2, gib=2), here(3)], lines=[line(3)], is_trial=True, parallel=1)
    assert named(played.measure("postcopy")) == [2]
    assert named(played.measure("precopy")) == [1]
    assert played.begin() == [] and played.planner.is_over
    assert played.steps() == {1: Step.PLANNED, 2: Step.PLANNED, 3: Step.MOVES}
    assert plan(played.planner, None, 1).split("\n") == [
        "GUEST           MEMORY  TO          STRATEGY  TOTAL  DOWNTIME  FROZEN",
        "guest2         2.0 GiB  there       postcopy  8.5 s      6 ms  120 ms",
        "guest1         1.0 GiB  there       precopy   8.5 s      6 ms  120 ms",
        "guest3         1.0 GiB  there:8013  hybrid        -         -       -",
        "2 of 3 guests  3.0 GiB                         17 s",
        "guest3: under way",
    ]
    found = facts(played.planner, 1)
    assert [one["domain"] for one in found["guests"]] == ["guest2", "guest1", "guest3"]
    assert {one["expected"]["total_s"] for one in found["guests"][:2]} == {8.5}
    assert found["total"] == {"guests": 2, "memory_bytes": 3 * GIB, "total_s": 17.0}


def test_a_trial_leaves_the_caps_of_running_migrations_as_they_are() -> None:
    played = Played([here(1)], lines=[line(2)], is_trial=True, bandwidth=100_000)
    first, *others = played.next()
    assert isinstance(first, Measure) and first.bandwidth == 50_000
    assert others == [] and played.guest(2).share is None


def test_guests_that_divide_a_cap_take_their_time_together() -> None:
    played = Played([here(n) for n in range(1, 5)], is_trial=True, bandwidth=10**8)
    while not played.planner.is_over:
        played.measure()
    assert facts(played.planner, 2)["total"]["total_s"] == 17.0
    assert facts(played.planner, 100)["total"]["total_s"] == 8.5
    assert plan(played.planner, 60, 2).split("\n")[-1].split()[:2] == ["4", "guests"]


def test_a_dry_run_in_which_nothing_would_go_has_no_sum() -> None:
    played = Played([here(1, problem="guest1 is crashed: " + "x " * 60)], is_trial=True)
    text = plan(played.planner, 60, 1).split("\n")
    assert text[1].split()[0] == "guest1" and text[2].startswith("guest1: guest1 is crashed")
    assert all(display_width(row) <= 60 for row in text)
    assert facts(played.planner, 1)["total"] == {"guests": 0, "memory_bytes": 0, "total_s": 0.0}


# ---- the question after an interruption ----
@pytest.mark.parametrize(
    ("typed", "choice"),
    [
        ("\n", "leave"), ("l\n", "leave"), ("C\n", "cancel"), ("wait\n", "wait"),
        ("x\nw\n", "wait"), ("", "leave"),
    ],
)  # fmt: skip
def test_the_question_explains_its_answers_and_takes_first_letters(
    typed: str, choice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = Played([here(1), here(2)], lines=[line(1)])
    for stream in (terminal := io.StringIO(typed), sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert asked(played.planner, Signals()) == choice
    output, told = capsys.readouterr()
    # An old click prints the last space by input(), to standard output.
    assert "Under way: guest1." in told and "What is to follow [L/c/w]:" in told
    assert "What is to follow [L/c/w]: " in told or output.startswith(" ")
    for letter, word in (("l", "leave"), ("c", "cancel"), ("w", "wait")):
        assert f"  {letter}, {word} " in told
    assert ("is none of l (leave), c (cancel), w (wait)" in told) is typed.startswith("x")


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
    assert rows[2].split()[0] == "guest-1" and "precopy" in rows[5]
    with closing(Screen(width, 12)) as screen:
        display = EvacuationDisplay(screen.stream)
        display.show(planner)
        seen = screen.read()
        assert len(seen) == 12 and seen[-1].startswith("... and ")
        assert seen[2].split()[0] == "guest-4" and "precopy" in seen[2]  # the first that moves
        display.close()
        assert screen.read() == []


@pytest.mark.parametrize("width", [1, 2])
def test_a_terminal_of_a_column_or_two_is_no_error(width: int) -> None:
    with closing(Screen(width, 12)) as screen:
        EvacuationDisplay(screen.stream).show(halfway())
        assert all(len(row) <= width for row in screen.read())
    assert summary(halfway(), width) and plan(halfway(), width, 1)


def test_all_tables_have_the_order_in_which_the_guests_go() -> None:
    sizes = {1: 1, 2: 3, 3: 2, 4: 4}
    played = Played([here(domid, gib=gib) for domid, gib in sizes.items()], lines=[line(7)])
    order = ["guest7", "guest4", "guest2", "guest3", "guest1"]
    for _turn in range(5):
        tables = (summary(played.planner, None), "\n".join(progress(played.planner, 200, 99)[1:]))
        for text in (*tables, plan(played.planner, None, 1)):
            assert [row.split()[0] for row in text.split("\n")[1:6]] == order
        played.measure()
        played.begin()
        for guest in played.planner.of(Step.MOVES)[:1]:
            played.end(guest.domid)


def test_the_summary_has_each_guest_with_its_end() -> None:
    text = summary(halfway(), None)
    assert len(text.split("\n")) == 21
    assert "is crashed: only a running guest can be migrated" in text
    assert text.count(" gone ") == 3


def test_elsewhere_a_line_is_printed_for_each_beginning_and_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
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
