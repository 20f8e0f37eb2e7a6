# SPDX-License-Identifier: GPL-2.0-or-later
"""The rate that the progress display shows."""

from __future__ import annotations

from migrate.cli.progress import RATE_S, Rate


def test_a_rate_does_not_alternate_with_the_bursts_of_a_capped_sender() -> None:
    """Four answers a second; the sender sends 4000 bytes every second."""
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
