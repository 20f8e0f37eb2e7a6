# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shown of a migration, at each width, and what a terminal then has on its screen."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.cli.figures import (
    LESS_NEEDED,
    TITLES,
    Field,
    cells,
    columns,
    fit,
    in_full,
    progress_fields,
    table_of,
)
from migrate.cli.progress import ProgressDisplay, TableDisplay
from migrate.cli.terminal import Area, is_live
from migrate.units import display_width
from tests.support.screen import Screen

MIB = 2**20
WIDTHS = (60, 80, 200)
PRECOPY: dict[str, Any] = {
    "id": "0123456789abcdef", "direction": "outgoing", "domain": "web", "phase": "precopy",
    "problem": "", "round": 2, "pages_done": 80_000, "pages_total": 131_072, "outstanding": 0,
    "bytes_per_s": 118.2 * MIB, "eta_s": 4.2, "eta_least_s": 2.0, "faults": 0, "latency_us": 0,
    "dirty_bytes_per_s": 35_000_000, "expected_freeze_ms": 18.3, "elapsed_s": 12.0,
    "handed_over": False, "checkpoint_age_s": None, "unprotected": "", "faults_per_s": None,
    "longest_wait_us": None, "started_at": 1_700_000_000.0, "unknown": [],
}  # fmt: skip
"""The answer of a sender."""
POSTCOPY = PRECOPY | {
    "phase": "postcopy", "handed_over": True, "outstanding": 51_072, "faults": 1200, "eta_s": 2.1,
    "latency_us": 350, "faults_per_s": 412.0, "longest_wait_us": 12_345,
}  # fmt: skip


def shown(answer: dict[str, Any], width: int) -> str:
    return fit(progress_fields(answer), width - 1)


# ---- which figures, and how ----
@pytest.mark.parametrize(
    ("answer", "width", "line"),
    [
        (PRECOPY, 60, "web: precopy, round 2, 61%, 312/512 MiB, 118 MiB/s, ETA 5 s"),
        (
            PRECOPY,
            80,
            "web: precopy 2, 312/512 MiB, 118 MiB/s, ETA 5 s, dirty 33 MiB/s, freeze 18.3 ms",
        ),
        (
            PRECOPY,
            200,
            "web: precopy, round 2, [############--------], 61%, 312 of 512 MiB, 118 MiB/s, "
            "ETA 5 s, dirty 33 MiB/s, expected freeze 18.3 ms, elapsed 12 s",
        ),
        (POSTCOPY, 60, "web: postcopy, 61%, 312 of 512 MiB, 118 MiB/s, ETA 3 s"),
        (
            POSTCOPY,
            80,
            "web: postcopy, 312 of 512 MiB, 118 MiB/s, ETA 3 s, 412 faults/s, worst 12.3 ms",
        ),
        (
            POSTCOPY,
            200,
            "web: postcopy, [############--------], 61%, 312 of 512 MiB, 118 MiB/s, ETA 3 s, "
            "51072 pages outstanding, 412 faults/s, worst block 12.3 ms, fault 350 us, elapsed 12 "
            "s",
        ),
    ],
)
def test_the_line_has_what_fits(answer: dict[str, Any], width: int, line: str) -> None:
    assert shown(answer, width) == line


@pytest.mark.parametrize("width", WIDTHS)
def test_no_field_comes_or_goes_while_a_round_is_copied(width: int) -> None:
    forms = set()
    for done in range(0, 131_073, 1000):
        moving = PRECOPY | {"pages_done": done, "bytes_per_s": (110.2 + done / 10_000) * MIB}
        forms.add(re.sub(r"[ 0-9.#-]+", "#", shown(moving, width)))
    assert len(forms) == 1, forms


def test_a_long_name_leaves_room_for_figures() -> None:
    line = shown(PRECOPY | {"domain": "a" * 64}, 60)
    assert line.startswith("aaaaaaaaaaaaa...: precopy 2, ") and "MiB/s" in line


FORMS = st.lists(st.text("ab", min_size=1), min_size=1, max_size=3).map(
    lambda forms: sorted(forms, key=len, reverse=True)
)
FIELDS = st.lists(st.builds(Field, st.integers(0, 9), FORMS), min_size=1, max_size=8)


@given(FIELDS, st.integers(1, 80))
def test_a_line_fits_and_leaves_out_the_last_ranks_only(fields: list[Field], width: int) -> None:
    line = fit(fields, width)
    assert len(line) <= width
    if len(in_full(fields)) <= width:
        assert line == in_full(fields)


def test_the_end_is_unknown_or_has_a_lower_bound() -> None:
    first = PRECOPY | {"round": 1, "eta_s": None, "dirty_bytes_per_s": None}
    assert "ETA >2 s" in shown(first, 200)
    assert "ETA -" in shown(first | {"eta_least_s": None}, 200)


def test_a_pause_is_shown_instead_of_a_rate_and_an_end() -> None:
    line = shown(PRECOPY | {"paused": True}, 60)
    assert line == "web: precopy 2, 61%, 312 of 512 MiB, paused, dirty 33 MiB/s"
    assert "copying is paused" in shown(PRECOPY | {"paused": True}, 200)


def test_a_receiver_shows_a_silence_instead_of_a_rate() -> None:
    quiet = POSTCOPY | {"direction": "incoming", "quiet_s": 12.3, "eta_s": None}
    line = shown(quiet, 70)
    assert line.startswith("web: postcopy, 61%, 312 of 512 MiB, quiet for 12 s, ")
    assert "no background copying for 12 s" in shown(quiet, 200)
    reason = table_of([quiet], None, 1_700_000_000.0).split("\n")[1]
    assert "no page has arrived in the background for 12 s (pages that vCPUs wait for" in reason
    assert "`xen-postcopy show web` at the source" in reason


RECEIVER: dict[str, Any] = {
    "domain": "web", "phase": "precopy", "problem": "", "outstanding": 0, "pages_total": None,
    "pages_done": None, "bytes_received": 300 * MIB, "bytes_per_s": 118.2 * MIB, "eta_s": None,
    "elapsed_s": 4.0, "faults_per_s": None, "longest_wait_us": None, "faults": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (RECEIVER, "web: precopy, 300 MiB received, 118 MiB/s, ETA -, elapsed 4.0 s"),
        # A daemon of an earlier release.
        ({"phase": "precopy", "outstanding": 0}, "web: precopy"),
        ({"phase": "postcopy", "outstanding": 7}, "web: postcopy, 7 pages outstanding"),
        ({"phase": "postcopy", "outstanding": 0, "unknown": ["outstanding"]}, "web: postcopy"),
    ],
)
def test_what_an_end_does_not_have_is_not_shown(answer: dict[str, Any], line: str) -> None:
    """Before, 0 faults and 0 bytes a second were shown of a guest that had faults."""
    assert in_full(progress_fields({"domain": "web", "problem": "", **answer})) == line


def test_a_guest_that_is_not_protected_any_more_is_shown_as_one() -> None:
    answer = {"domain": "web", "phase": "postcopy", "problem": "", "outstanding": 1}
    answer |= {"checkpoint_age_s": 1.0, "unprotected": "disk full"}
    assert in_full(progress_fields(answer)) == (
        "web: postcopy, 1 page outstanding, protected as of 1.0 s ago, not protected any more"
    )


# ---- `list` ----
def test_a_narrow_terminal_has_fewer_columns() -> None:
    rows = [cells(POSTCOPY, 1_700_000_100.0)]
    assert columns(rows, None) == list(TITLES)
    assert set(TITLES) - set(columns(rows, 80)) == {"STARTED"}
    assert set(TITLES) - set(columns(rows, 10)) == set(LESS_NEEDED)
    for width in WIDTHS:
        (titles, row) = table_of([POSTCOPY], width, 1_700_000_100.0).split("\n")
        assert len(titles) <= width and len(row) <= width
    assert table_of([], 60, 0.0).split()[0] == "ID"


def test_a_reason_that_does_not_fit_is_below_its_row() -> None:
    reason = "the link to the other host was lost, and the next attempt is in 3 s"
    lines = [POSTCOPY, POSTCOPY | {"domain": "mail", "problem": reason}, POSTCOPY]
    for width in WIDTHS:
        head, web, mail, *below, last = table_of(lines, width, 1_700_000_100.0).split("\n")
        assert all(len(row) <= width for row in (head, web, mail, *below, last))
        assert web.split()[1] == last.split()[1] == "web" and mail.split()[1] == "mail"
        assert ("PROBLEM" in head) == (not below)
        assert reason in " ".join(" ".join((mail, *below)).split())


def test_columns_stay_below_each_other_after_wide_characters() -> None:
    lines = [POSTCOPY | {"domain": name} for name in ("\u4ed9\u53f0", "cafe\u0301", "mail")]
    rows = table_of(lines, None, 1_700_000_100.0).split("\n")[1:]
    assert len({display_width(row.partition("outgoing")[0]) for row in rows}) == 1
    assert display_width("\u4ed9\u53f0") == 4 and display_width("cafe\u0301") == 4


def test_a_cancelled_migration_is_not_listed_as_failed() -> None:
    ended = POSTCOPY | {"phase": "failed", "problem": "cancelled by the operator"}
    assert cells(ended, 0.0)["PHASE"] == "cancelled"
    assert cells(ended | {"outcome": "rescued"}, 0.0)["PHASE"] == "rescued"
    assert (cells(POSTCOPY, 0.0)["PHASE"], cells(POSTCOPY, 0.0)["DONE"]) == ("postcopy", "61%")
    assert cells(POSTCOPY | {"phase": "completed"}, 0.0)["DONE"] == "100%"


# ---- on a terminal ----
@pytest.fixture(params=[False, True], ids=["cuts", "reflows"])
def screen(request: pytest.FixtureRequest) -> Iterator[Screen]:
    with closing(Screen(200, reflows=request.param)) as made:
        yield made


def test_the_line_is_drawn_in_its_place_at_each_width(screen: Screen) -> None:
    print("before", file=screen.stream)
    display = ProgressDisplay(screen.stream)
    for width in (*WIDTHS, 60, 200):
        screen.resize(width)
        for answer in (PRECOPY, POSTCOPY):
            display.show(answer)
            assert screen.read() == ["before", shown(answer, width)]
    display.close()
    print("after", file=screen.stream)
    assert screen.read() == ["before", "after"]


def test_a_table_is_drawn_in_its_place_at_each_width(screen: Screen) -> None:
    print("before", file=screen.stream)
    display = TableDisplay(screen.stream)
    for width in (*WIDTHS, 60, 200):
        screen.resize(width)
        for count in (3, 1, 2):
            display.show([POSTCOPY] * count)
            assert len(screen.read()) == 1 + 1 + count
            assert screen.read()[0] == "before"
            assert all(len(row) < width for row in screen.read())
    display.close()
    print("after", file=screen.stream)
    assert screen.read() == ["before", "after"]


def test_a_table_that_is_too_long_is_cut_off(screen: Screen) -> None:
    TableDisplay(screen.stream).show([POSTCOPY] * 40)
    rows = screen.read()
    assert len(rows) == 12 and rows[-1] == "... and 30 more"


def test_a_low_terminal_has_what_is_under_way() -> None:
    with closing(Screen(80)) as screen:
        ended = [POSTCOPY | {"phase": "completed", "domain": f"old{n}"} for n in range(40)]
        TableDisplay(screen.stream).show([*ended, POSTCOPY | {"domain": "moving"}])
        rows = screen.read()
        assert "moving" in rows[1] and "old39" in rows[2]


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("lines", [1, 2])
def test_a_terminal_of_a_column_or_two_is_no_error(width: int, lines: int) -> None:
    with closing(Screen(width, lines)) as screen:
        waits = POSTCOPY | {"problem": "the link is lost"}
        TableDisplay(screen.stream).show([POSTCOPY, waits])
        for answer in (PRECOPY, POSTCOPY, waits):
            ProgressDisplay(screen.stream).show(answer)
        assert all(len(row) <= width for row in screen.read())


def test_a_line_is_cut_off_and_not_broken_if_the_terminal_has_become_narrower(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size was asked for before the terminal changed."""
    screen.resize(60)
    area = Area(screen.stream)
    monkeypatch.setattr(Area, "size", property(lambda _self: (199, 12)))
    area.draw(["x" * 150])
    assert [len(row) for row in screen.read()] == [60]
    area.draw(["y"])
    assert screen.read() == ["y"]


def test_a_reason_is_shown_in_full_once_on_a_terminal(screen: Screen) -> None:
    """The line is cut off at the edge of the terminal, and its end is what to do."""
    display = ProgressDisplay(screen.stream)
    display.show({**POSTCOPY, "phase": "interrupted"})
    reason = "cannot reach there; " + "a long reason; " * 15 + "repair the link"
    for attempt in range(3):
        display.show({**POSTCOPY, "phase": "interrupted", "problem": f"{reason}; {attempt}"})
    display.close()
    text = "".join(screen.read())
    assert text == f"web: interrupted: {reason}; 0"


def test_a_control_character_does_not_reach_the_terminal(screen: Screen) -> None:
    display = ProgressDisplay(screen.stream)
    display.show({**PRECOPY, "domain": "a\x1b[2Jb\n"})
    (row,) = screen.read()
    assert row.startswith("a\N{REPLACEMENT CHARACTER}[2Jb : precopy")


def test_a_terminal_that_obeys_nothing_gets_lines(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_live(screen.stream)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(screen.stream)


# ---- elsewhere ----
def test_lines_are_printed_for_each_stage_and_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pauses grow: an hour of precopy is not worth seven hundred lines."""
    seconds = 0.0
    monkeypatch.setattr("migrate.cli.progress.time.monotonic", lambda: seconds)
    stream = io.StringIO()
    display = ProgressDisplay(stream)
    for _quarter in range(4 * 3600):
        display.show(PRECOPY)
        seconds += 0.25
    display.show(POSTCOPY)
    lines = stream.getvalue().splitlines()
    assert lines[0] == in_full(progress_fields(PRECOPY))
    assert lines[-1] == in_full(progress_fields(POSTCOPY))
    assert 60 < len(lines) < 100
    assert not any("[" in line or "\x1b" in line for line in lines)
