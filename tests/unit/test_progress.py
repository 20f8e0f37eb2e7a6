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
