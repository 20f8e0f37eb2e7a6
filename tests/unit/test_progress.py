# SPDX-License-Identifier: GPL-2.0-or-later
"""The contents of the progress display."""

from __future__ import annotations

import io
from typing import Any

import pytest

from migrate.cli.progress import RATE_S, ProgressDisplay, Rate


def test_a_rate_does_not_alternate_with_the_bursts_of_a_capped_sender() -> None:
    """There are four answers a second, and the sender sends 4000 bytes once a second."""
    rate, shown = Rate(), []
    for quarter in range(1, 60):
        rate.add(quarter / 4, 4000 * (quarter // 4))
        shown.append(rate.bytes_per_s)
    steady = shown[round(RATE_S * 4) :]
    assert min(steady) >= 0.6 * 4000 and max(steady) <= 1.4 * 4000


def test_a_rate_falls_to_zero_when_nothing_is_sent_any_more() -> None:
    rate = Rate()
    for second in range(10):
        rate.add(second, min(second, 5) * 1000)
    assert rate.bytes_per_s == 0


def test_a_rate_of_one_answer_or_of_two_at_once_is_zero() -> None:
    rate = Rate()
    rate.add(1.0, 5)
    assert rate.bytes_per_s == 0
    rate.add(1.0, 9)
    assert rate.bytes_per_s == 0


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"phase": "precopy", "outstanding": 0}, "web: precopy\n"),
        ({"phase": "postcopy", "outstanding": 7}, "web: postcopy: 7 pages outstanding\n"),
    ],
)
def test_what_a_receiver_does_not_count_is_not_shown(answer: dict[str, Any], shown: str) -> None:
    """Before, 0 faults and 0 bytes a second were shown of a guest that had faults."""
    stream = io.StringIO()
    ProgressDisplay(stream).show({"domain": "web", "problem": "", **answer})
    assert stream.getvalue() == shown


def test_a_reason_is_shown_in_full_once_on_a_terminal() -> None:
    """The live line is cut off at the edge of the terminal, and its end is what to do."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = ProgressDisplay(stream)
    display.show({"domain": "web", "phase": "interrupted", "problem": "", "outstanding": 7})
    reason = "cannot reach there; " + "a long reason; " * 20 + "repair the link"
    for attempt in range(3):
        answer = {"domain": "web", "phase": "interrupted", "problem": f"{reason}; {attempt}"}
        display.show({**answer, "outstanding": 7})
    display.close()
    assert stream.getvalue().count(f"web: interrupted: {reason}; 0\n") == 1
    assert f"{reason}; 1\n" not in stream.getvalue()


def test_a_guest_that_is_not_protected_any_more_is_shown_as_one() -> None:
    stream = io.StringIO()
    answer = {"domain": "web", "phase": "postcopy", "problem": "", "outstanding": 1}
    ProgressDisplay(stream).show({**answer, "checkpoint_age_s": 1.0, "unprotected": "disk full"})
    shown = "web: postcopy: 1 page outstanding, protected as of 1.0 s ago, not protected any more\n"
    assert stream.getvalue() == shown
