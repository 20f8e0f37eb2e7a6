# SPDX-License-Identifier: GPL-2.0-or-later
"""The small sans-IO parts of precopy: policy, bandwidth cap, statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrationError
from migrate.options import MigrationOptions, OnTimeout, PolicyOptions, Strategy
from receiver.statistics import LatencyHistogram
from sender.bandwidth import BandwidthCap
from sender.intake import Intake
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
        # 40000 pages take 164 ms.  500 faults of 0.3 ms take less, and faults of 0.4 ms take more.
        (Strategy.HYBRID, PrecopyProgress(5, True, 40000, 99999, GB, 0.0003), POST),
        (Strategy.HYBRID, PrecopyProgress(5, True, 40000, 99999, GB, 0.0004), STOP),
        (Strategy.HYBRID, PrecopyProgress(2, True, 40000, 41000, GB, 0.0004), C),  # as xl does
        (Strategy.HYBRID, PrecopyProgress(2, True, 9999, 9999, GB, 1.0, postcopy_asked=True), POST),
        (Strategy.HYBRID, PrecopyProgress(5, True, 51, 99, 0.0, 1.0), POST),  # an unknown rate
        # What a lab with emulated CPUs measured, for a light guest and for a busy one.
        (Strategy.HYBRID, PrecopyProgress(5, True, 1700, 1800, 2e7, 0.03), STOP),
        (Strategy.HYBRID, PrecopyProgress(5, True, 10_997, 11_737, 1.4e7, 0.022), STOP),
        # Half of 1 GiB on a link of 1 Gbit/s.
        (Strategy.HYBRID, PrecopyProgress(5, True, 131_072, 131_072, 1.17e8, 0.0004), POST),
        (Strategy.PRECOPY, PrecopyProgress(4, True, 40000, 41000, GB), C),
        (Strategy.PRECOPY, PrecopyProgress(5, True, 40000, 41000, GB), STOP),
        (Strategy.PRECOPY, PrecopyProgress(1, False, 9999, 9999, GB, postcopy_asked=True), C),
    ],
)
def test_decisions(strategy: Strategy, progress: PrecopyProgress, decision: Decision) -> None:
    assert DefaultPolicy(strategy).decide(progress) is decision


PROGRESS = st.builds(
    PrecopyProgress,
    st.integers(1, 6),
    st.just(True),
    st.integers(0, 2**28),
    st.integers(0, 2**28),
    st.floats(0.0, 1e11),
    st.floats(0.0, 10.0),
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
)


def at_the_end(progress: PrecopyProgress) -> Decision:
    last = replace(progress, round=PolicyOptions.max_rounds)
    return DefaultPolicy(Strategy.HYBRID).decide(last)


@given(PROGRESS, st.integers(0, 2**28))
def test_more_pages_never_lead_back_to_stop_and_copy(progress: PrecopyProgress, more: int) -> None:
    for decide in (DefaultPolicy(Strategy.HYBRID).decide, at_the_end):
        if decide(progress) is POST:
            assert decide(replace(progress, dirty_pages=progress.dirty_pages + more)) is POST


@given(PROGRESS, st.floats(1.0, 1e3))
def test_a_faster_link_or_slower_faults_never_lead_to_postcopy(
    progress: PrecopyProgress, factor: float
) -> None:
    if at_the_end(progress) is STOP:
        faster = replace(progress, bytes_per_s=progress.bytes_per_s * factor)
        slower = replace(progress, fault_s=progress.fault_s * factor)
        assert at_the_end(faster) is at_the_end(slower) is STOP


@given(PROGRESS)
def test_the_last_round_ends_in_the_shorter_freeze(progress: PrecopyProgress) -> None:
    options = PolicyOptions()
    few = progress.dirty_pages <= options.dirty_threshold
    if at_the_end(progress) is POST:
        assert progress.postcopy_ms < progress.stop_and_copy_ms
    elif not few and progress.stop_and_copy_ms > options.downtime_target_ms:
        assert progress.stop_and_copy_ms <= progress.postcopy_ms


@given(PROGRESS)
def test_before_the_last_round_stop_and_copy_is_short_in_any_case(
    progress: PrecopyProgress,
) -> None:
    """Otherwise another round may leave less, and xl would make that round."""
    options = PolicyOptions()
    if (
        progress.round < options.max_rounds
        and DefaultPolicy(Strategy.HYBRID).decide(progress) is STOP
    ):
        assert (
            progress.dirty_pages <= options.dirty_threshold
            or progress.stop_and_copy_ms <= options.downtime_target_ms
        )


def test_on_a_link_with_much_latency_the_push_ends_before_many_faults() -> None:
    """10 ms each way: the push takes 0.4 s, and vCPUs have waited for 0.21 s of it."""
    progress = PrecopyProgress(5, True, 32768, 32768, bytes_per_s=2**27 / 0.4, fault_s=0.021)
    assert at_the_end(progress) is STOP  # 500 faults would take 10 s
    far = replace(progress, round_trip_s=0.02)
    assert far.postcopy_ms == pytest.approx(0.5 * 1.05 * far.stop_and_copy_ms)
    assert at_the_end(far) is POST


def test_where_faults_take_the_cpu_from_the_push_a_short_round_trip_changes_nothing() -> None:
    """As in an emulated dom0."""
    progress = PrecopyProgress(5, True, 1700, 1700, bytes_per_s=1700 * 4096 / 0.3, fault_s=0.03)
    near = replace(progress, round_trip_s=0.001)
    assert near.postcopy_ms == progress.postcopy_ms
    assert at_the_end(near) is STOP


MIB = 2**20


def confirmed(intake: Intake, began: float, size: int, at: float) -> None:
    """A chunk that is confirmed before the next one begins."""
    intake.begin(began)
    assert intake.sent(size)
    assert intake.end()
    intake.passed(at)


def test_the_rate_is_unknown_before_a_chunk_is_confirmed() -> None:
    intake = Intake()
    intake.begin(1.0)
    assert intake.sent(MIB)
    assert intake.end()
    assert not intake.end()
    assert intake.bytes_per_s == 0.0


def test_pauses_between_chunks_do_not_count() -> None:
    intake = Intake()
    for second in range(1, 4):
        confirmed(intake, float(second), MIB, second + 0.1)
    assert intake.bytes_per_s == pytest.approx(10 * MIB)


def test_what_buffers_hold_counts_when_the_destination_has_loaded_it() -> None:
    intake = Intake()
    for began in (0.0, 0.01, 0.02):  # the buffers take three batches at once
        intake.begin(began)
        assert intake.sent(MIB) is (began == 0.0)  # one barrier is open at a time
        if began == 0.0:
            intake.end()
    intake.passed(1.0)
    intake.end()
    intake.passed(3.0)
    assert intake.bytes_per_s == pytest.approx(MIB)


@given(
    st.lists(
        st.tuples(st.integers(1, 64 * MIB), st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=1
    ),
    st.floats(1e4, 1e10),
)
def test_the_rate_of_a_steady_destination_is_found_whatever_is_sent_when(
    chunks: list[tuple[int, float, float]], rate: float
) -> None:
    """``chunks``: the size of each, the pause before it, and the time after which it is sent."""
    intake, now, free_at, passed = Intake(), 1000.0, 0.0, list[float]()
    for size, pause, _sending in chunks:
        now += pause
        intake.begin(now)
        intake.sent(size)
        assert intake.end()
        free_at = max(free_at, now) + size / rate
        passed.append(free_at)
        if len(passed) == 2:  # as many as are open in a round
            intake.passed(passed.pop(0))
            now = max(now, free_at - chunks[-1][0] / rate)
    for at in passed:
        intake.passed(at)
    assert intake.bytes_per_s == pytest.approx(rate, rel=0.01)


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


def test_a_cap_that_is_changed_keeps_what_was_sent_beyond_it() -> None:
    cap = BandwidthCap(1000.0)
    assert cap.spend(10_050, 1000.0) == pytest.approx(10.0)
    cap.change(2000.0, 1005.0)  # half is waited for
    assert cap.wait_s(1005.0) == pytest.approx(2.5)
    cap.change(500.0, 1005.0)
    assert cap.wait_s(1005.0) == pytest.approx(10.0)
    cap.change(None, 1005.0)
    assert cap.wait_s(1005.0) == 0.0
    cap.change(1000.0, 1006.0)
    assert cap.wait_s(1006.0) == 0.0


ON = {action: PolicyOptions(timeout_s=60.0, on_timeout=action) for action in OnTimeout}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("strategy", "action", "decision"),
    [
        (Strategy.HYBRID, OnTimeout.POSTCOPY, POST),
        (Strategy.HYBRID, OnTimeout.SUSPEND, STOP),
        (Strategy.HYBRID, OnTimeout.CANCEL, Decision.CANCEL),
        (Strategy.PRECOPY, OnTimeout.SUSPEND, STOP),
        (Strategy.PRECOPY, OnTimeout.CANCEL, Decision.CANCEL),
    ],
)
def test_precopy_ends_as_was_chosen_when_its_time_has_passed(
    strategy: Strategy, action: OnTimeout, decision: Decision, finished: bool
) -> None:
    policy = DefaultPolicy(strategy, ON[action])
    progress = PrecopyProgress(1, finished, 10**6, 10**7, GB, 0.001)
    assert policy.decide(replace(progress, elapsed_s=59.9)) is C
    assert policy.decide(replace(progress, elapsed_s=60.0)) is decision


def test_who_asks_for_postcopy_gets_it_whatever_follows_the_time_limit() -> None:
    asked = PrecopyProgress(1, False, 10**6, 10**7, GB, postcopy_asked=True, elapsed_s=60.0)
    assert DefaultPolicy(Strategy.HYBRID, ON[OnTimeout.CANCEL]).decide(asked) is POST


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
