# SPDX-License-Identifier: GPL-2.0-or-later
"""The small sans-IO parts of precopy: policy, bandwidth cap, statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrationError
from migrate.options import MigrationOptions, PolicyOptions, Strategy
from receiver.statistics import LatencyHistogram
from sender.bandwidth import BandwidthCap
from sender.policy import Decision, DefaultPolicy, PrecopyProgress

C, STOP, POST = Decision.CONTINUE, Decision.STOP_AND_COPY, Decision.POSTCOPY
GB = 1e9


@pytest.mark.parametrize(
    ("strategy", "progress", "decision"),
    [
        (Strategy.POSTCOPY, PrecopyProgress(0, True, 9999, 9999, 0.0), POST),
        (Strategy.HYBRID, PrecopyProgress(1, False, 9999, 9999, GB), C),
        (Strategy.HYBRID, PrecopyProgress(1, True, 50, 9999, 1.0), STOP),
        (Strategy.HYBRID, PrecopyProgress(1, True, 4000, 99999, GB), STOP),  # 16 ms
        (Strategy.HYBRID, PrecopyProgress(1, True, 40000, 99999, GB), C),
        (Strategy.HYBRID, PrecopyProgress(2, True, 79_999, 100_000, GB), C),
        (Strategy.HYBRID, PrecopyProgress(2, True, 80_000, 100_000, GB), POST),
        # Precopy does not converge.
        (Strategy.HYBRID, PrecopyProgress(2, True, 40000, 41000, GB), POST),
        (Strategy.HYBRID, PrecopyProgress(5, True, 40000, 99999, GB), POST),  # no round is left
        (Strategy.HYBRID, PrecopyProgress(1, False, 9999, 9999, GB, postcopy_asked=True), POST),
        (Strategy.PRECOPY, PrecopyProgress(4, True, 40000, 41000, GB), C),
        (Strategy.PRECOPY, PrecopyProgress(5, True, 40000, 41000, GB), STOP),
        (Strategy.PRECOPY, PrecopyProgress(1, False, 9999, 9999, GB, postcopy_asked=True), C),
    ],
)
def test_decisions(strategy: Strategy, progress: PrecopyProgress, decision: Decision) -> None:
    assert DefaultPolicy(strategy).decide(progress) is decision


@pytest.mark.parametrize(
    "options",
    [
        {"max_rounds": 0},
        {"max_rounds": 1.5},
        {"max_rounds": True},
        {"dirty_threshold": -1},
        {"dirty_threshold": math.nan},
        {"dirty_threshold": 0.5},
        {"downtime_target_ms": 0},
        {"downtime_target_ms": math.nan},
    ],
)
def test_senseless_options_are_named(options: dict[str, Any]) -> None:
    assert str(PolicyOptions(**options).problems()).startswith("--")


def test_a_request_of_another_program_is_held_to_the_same_limits() -> None:
    for what, options in {
        "--max-rounds 0": {"policy": PolicyOptions(max_rounds=0)},
        "bandwidth 0": {"bandwidth_bytes_per_s": 0},
        "bandwidth 4095": {"bandwidth_bytes_per_s": 4095},
        "bandwidth 1e-300": {"bandwidth_bytes_per_s": 1e-300},
        "bandwidth inf": {"bandwidth_bytes_per_s": math.inf},
        "bandwidth nan": {"bandwidth_bytes_per_s": math.nan},
        "checkpoints every 1e-06 s": {"checkpoint_every_s": 1e-6},
        "nothing to protect": {"strategy": Strategy.PRECOPY, "checkpoint_every_s": 1.0},
    }.items():  # fmt: skip
        with pytest.raises(MigrationError, match=what):
            MigrationOptions(**options)  # type: ignore[arg-type]


def test_options_at_their_limits_are_accepted() -> None:
    for options in (
        PolicyOptions(),
        PolicyOptions(1, 0, 0.001),
        PolicyOptions(1000, 10**9, 3_600_000),
    ):
        assert options.problems() is None


def test_the_cap_waits_for_what_was_sent_beyond_it_and_for_no_more() -> None:
    cap = BandwidthCap(1000.0)
    assert cap.spend(10, 1000.0) == 0.0  # 10 ms: so much may be sent at once
    assert cap.spend(990, 1000.0) == pytest.approx(0.95)
    assert cap.spend(10, 2000.0) == 0.0  # after an idle time


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=50), st.floats(1e3, 1e10))
def test_the_cap_holds_on_any_sizes(sizes: list[int], rate: float) -> None:
    cap, now = BandwidthCap(rate), 1000.0
    for size in sizes:
        now += cap.spend(size, now)
    assert sum(sizes) <= rate * (now - 1000.0 + 0.06) * 1.001


def test_without_a_cap_nothing_waits() -> None:
    assert BandwidthCap(None).spend(10**12, 0.0) == 0.0


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=300))
def test_quantiles_are_right_to_a_few_percent(seconds: list[float]) -> None:
    histogram = LatencyHistogram()
    for value in seconds:
        histogram.record(value)
    exact = sorted(seconds)[max(0, -(-len(seconds) // 2) - 1)] * 1e6
    assert histogram.quantile(0.5) == pytest.approx(exact, rel=0.04)
    summary = histogram.summary()
    assert sum(summary["histogram"].values()) == summary["count"] == len(seconds)
    assert summary["max"] == pytest.approx(max(seconds) * 1e6, abs=0.1)
