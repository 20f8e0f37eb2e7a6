# SPDX-License-Identifier: GPL-2.0-or-later
"""Rates, the time that is left, and what the daemons note of a migration's progress."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from migrate.options import MigrationOptions, PolicyOptions, Strategy
from migrate.outcomes import MOST_PHASES, RESCUED, outcome
from migrate.service.progress import Phases, Rate, time_left_s
from receiver.progress import Faults, IncomingProgress
from receiver.progress import Meter as IncomingMeter
from sender.policy import PrecopyProgress
from sender.progress import Meter, Now, Progress, expected_freeze_ms, rest_of_precopy

MIB = 2**20


def rates(samples: list[tuple[float, int]], least: int = 1) -> list[float | None]:
    rate, shown = Rate(least), []
    for now, count in samples:
        rate.add(now, count)
        shown.append(rate.per_s(now))
    return shown


# ---- rates ----
@pytest.mark.parametrize("period_s", [0.5, 1, 4, 7])
def test_the_rate_of_a_capped_sender_is_the_cap(period_s: float) -> None:
    """The sender sends 4 MiB at once and then waits.  Before, the rate was 0 B/s for most of that
    time, and a multiple of the truth at the beginning.
    """
    times = [quarter / 4 for quarter in range(240)]
    shown = rates([(-0.25, 0), *((now, 4 * MIB * int(now / period_s + 1)) for now in times)])
    known = [value for value in shown if value is not None]
    truth = 4 * MIB / period_s
    assert len(known) >= len(times) - 4 * period_s - 2
    assert all(0.8 * truth <= value <= 1.2 * truth for value in known), known


def test_messages_that_keep_a_lane_alive_are_no_steps() -> None:
    """The sender sends 4 MiB every two seconds, and an ``alive`` of 20 bytes every second."""
    times = [quarter / 4 for quarter in range(120)]
    counts = [4 * MIB * int(now / 2 + 1) + 20 * int(now + 0.5) for now in times]
    shown = rates([(-0.25, 0), *zip(times, counts, strict=True)], least=4096)
    assert all(value is None or value == pytest.approx(2 * MIB, rel=0.1) for value in shown)
    assert rates([(now, 20 * int(now)) for now in times], least=4096)[-1] == 0


def test_a_rate_follows_the_last_seconds() -> None:
    """10 MiB/s for ten seconds, and then 100 MiB/s."""
    counts = [10 * MIB * quarter // 4 for quarter in range(40)]
    counts += [counts[-1] + 100 * MIB * quarter // 4 for quarter in range(1, 20)]
    shown = rates([(quarter / 4, count) for quarter, count in enumerate(counts)])
    assert shown[39] == pytest.approx(10 * MIB, rel=0.01)
    assert shown[-1] == pytest.approx(100 * MIB, rel=0.01)


def test_a_rate_is_unknown_before_two_steps_and_zero_after_silence() -> None:
    shown = rates([(0.0, 0), (1.0, 0), (2.0, 500)])
    assert shown == [None] * 3
    assert rates([(0.0, 0), (4.0, 0)])[-1] == 0
    assert rates([(0.0, 0), (1.0, 500), (5.0, 500), (32.0, 500)]) == [None, None, None, 0]
    stopped = rates([(second / 4, min(second, 8) * 1000) for second in range(80)])
    assert stopped[8] == 4000 and stopped[-1] == 0
    falling = [value for value in stopped[8:] if value is not None]
    assert falling == sorted(falling, reverse=True)


def test_a_silence_is_no_part_of_the_rate_that_follows() -> None:
    """100 MiB/s, a pause or a lost link for two minutes, and 100 MiB/s again."""
    before = [(quarter / 4, 25 * MIB * quarter) for quarter in range(40)]
    begins, count = before[-1][0] + 120, before[-1][1]
    after = [(begins + quarter / 4, count + 25 * MIB * quarter) for quarter in range(40)]
    silence = [(before[-1][0] + second, count) for second in range(1, 120)]
    shown = rates([*before, *silence, *after])
    assert shown[len(before) - 1] == 100 * MIB and shown[len(before) + len(silence) - 1] == 0
    resumed = [rate for rate in shown[len(before) + len(silence) + 1 :] if rate is not None]
    assert len(resumed) >= 38 and set(resumed) == {100 * MIB}


def test_a_step_that_ends_a_silence_is_not_a_rate_alone() -> None:
    shown = rates([(0.0, 0), (0.25, 1000), (0.5, 2000), (60.0, 2000), (60.25, 2500), (60.5, 3500)])
    assert shown[3:] == [0, None, 4000]


def test_nothing_is_expected_from_a_rate_over_a_moment() -> None:
    rate = Rate()
    for now, count in ((0.0, 0), (0.2, 1), (0.4, 51)):
        rate.add(now, count)
    assert rate.per_s(0.4) == pytest.approx(250)
    assert rate.per_s(0.4, over_s=1.0) is None


def test_a_count_that_begins_anew_begins_a_new_rate() -> None:
    """The destination lacks more than it had reported: the link was lost with pages in transit."""
    shown = rates([(0.0, 0), (1.0, 1000), (2.0, 2000), (3.0, 500), (4.0, 600), (5.0, 700)])
    assert shown[2] == 1000
    assert shown[3:5] == [None, None]
    assert shown[5] == 100


def test_the_time_left_is_unknown_without_a_rate() -> None:
    assert time_left_s(0, None) == 0
    assert time_left_s(10, None) is None
    assert time_left_s(10, 0.0) is None
    assert time_left_s(10, 4.0) == 2.5


def test_a_phase_is_noted_once_and_the_oldest_are_forgotten() -> None:
    phases = Phases()
    for at, phase in enumerate(["precopy", "precopy", "switchover", "postcopy"]):
        phases.add(at, phase)
    assert [(one["phase"], one["at"]) for one in phases.began] == [
        ("precopy", 0), ("switchover", 2), ("postcopy", 3),
    ]  # fmt: skip
    for at in range(1000):
        phases.add(at, "interrupted")
        phases.add(at, "postcopy")
    assert len(phases.began) == MOST_PHASES


# ---- what is expected ----
@pytest.mark.parametrize(
    ("left", "total", "dirty_share", "rounds", "pages"),
    [
        (600, 1000, 0.0, 4, 600),
        (600, 1000, 0.5, 0, 600 + 500),  # the last round: what it leaves is sent as well
        (600, 1000, 0.5, 1, 600 + 500 + 250),
        (600, 1000, 0.5, 9, 600 + 500 + 250 + 125 + 62 + 31),  # so few need no further round
        (600, 1000, 0.9, 9, 600 + 900),  # precopy does not converge
        (600, 1000, 3.0, 9, 600 + 1000),  # no more than the whole memory is dirty
    ],
)
def test_the_rest_of_precopy_counts_what_the_guest_will_dirty(
    left: int, total: int, dirty_share: float, rounds: int, pages: int
) -> None:
    rest = rest_of_precopy(
        left, total, dirty_share=dirty_share, memory_pages=1000, rounds=rounds, enough=50
    )
    assert rest == pages


def test_the_expected_freeze_is_the_shorter_freeze_that_is_allowed() -> None:
    known = PrecopyProgress(2, True, 10_000, 20_000, 4096 * 1000.0, fault_s=0.0004)
    assert expected_freeze_ms(known, can_page=False) == 10_000
    assert expected_freeze_ms(known, can_page=True) == pytest.approx(157, abs=1)
    no_fault = PrecopyProgress(2, True, 10_000, 20_000, 4096 * 1000.0)
    assert expected_freeze_ms(no_fault, can_page=True) == 10_000
    assert expected_freeze_ms(PrecopyProgress(2, True, 9, 9, 0.0), can_page=True) is None


def now(at: float, phase: str, **values: object) -> Now:
    options = MigrationOptions(Strategy.HYBRID, PolicyOptions(max_rounds=2))
    fixed: dict[str, object] = {
        "is_paused": False, "started": 100.0, "finished": 0.0, "bytes_sent": 0, "pages_sent": 0,
        "pages_confirmed": 0, "memory_pages": 1000, "expected": None,
    }  # fmt: skip
    has_ended = phase in ("completed", "failed")
    return Now(at, phase, has_ended, options, **{**fixed, **values})  # type: ignore[arg-type]


def test_the_end_is_expected_only_when_the_dirty_rate_is_known() -> None:
    progress = Progress(round=1, pages_total=1000)
    meter = Meter(progress)
    for second in range(5):
        progress.pages_done = 100 * second
        sent = {"pages_sent": 100 * second, "bytes_sent": 409_600 * second}
        meter.measure(now(100.0 + second, "precopy", **sent))
    assert (progress.bytes_per_s, progress.elapsed_s) == (409_600, 4.0)
    assert (progress.eta_s, progress.eta_least_s) == (None, 6.0)
    progress.round, progress.dirty_bytes_per_s = 2, 10 * 4096
    meter.measure(now(104.0, "precopy", pages_sent=400, bytes_sent=409_600 * 4))
    assert progress.eta_s == 7.0  # 600 pages, and 100 that the guest dirties meanwhile


@pytest.mark.parametrize("phase", ["precopy", "postcopy"])
def test_no_end_is_expected_while_copying_is_paused(phase: str) -> None:
    """In postcopy pages that the guest touches arrive also in a pause."""
    progress = Progress(round=2, pages_total=1000, dirty_bytes_per_s=10 * 4096)
    meter = Meter(progress)
    for second in range(5):
        progress.pages_done, progress.outstanding = 100 * second, 1000 - 100 * second
        sent = {"pages_sent": 100 * second, "pages_confirmed": 100 * second}
        meter.measure(now(100.0 + second, phase, **sent))
        expected = progress.eta_s
        meter.measure(now(100.0 + second, phase, **sent, is_paused=True))
        assert (progress.eta_s, progress.eta_least_s) == (None, None)
    assert expected is not None


def test_an_end_fixes_the_time_and_leaves_no_rate() -> None:
    progress = Progress()
    meter = Meter(progress)
    for second in range(5):
        meter.measure(now(100.0 + second, "postcopy", bytes_sent=8000 * second))
    assert progress.bytes_per_s == 8000 and progress.faults_per_s is not None
    meter.measure(now(200.0, "completed", finished=105.0, bytes_sent=40_000))
    assert (progress.elapsed_s, progress.bytes_sent) == (5.0, 40_000)
    after = asdict(progress)
    assert all(after[key] is None for key in ("bytes_per_s", "eta_s", "faults_per_s"))


def test_a_receiver_expects_the_end_after_the_handover_only() -> None:
    progress = IncomingProgress("web")
    meter = IncomingMeter(progress, started=0.0)
    for second in range(5):
        meter.enter(second, 1000.0 + second, "precopy")
        meter.measure(second, "precopy", 8000 * second, None)
    assert progress.bytes_per_s == 8000
    before = asdict(progress)
    assert all(before[key] is None for key in ("eta_s", "pages_total", "faults"))
    for second in range(5, 10):
        progress.outstanding = 100 - 10 * (second - 5)
        meter.measure(second, "postcopy", 8000 * second, Faults(2 * second, 350, 9000))
    assert (progress.pages_done, progress.pages_total) == (40, 100)
    assert (progress.eta_s, progress.faults_per_s, progress.longest_wait_us) == (6.0, 2.0, 9000)
    meter.enter(10.0, 1010.0, "completed")
    progress.outstanding = 0
    meter.measure(99.0, "completed", 80_000, Faults(20, 350, 9000))
    after = asdict(progress)
    assert (after["elapsed_s"], after["pages_done"], after["bytes_per_s"]) == (10.0, 100, None)
    assert [one["phase"] for one in progress.phases] == ["precopy", "completed"]


def quiet(*looks: tuple[float, str, int, bool], outstanding: int = 9) -> list[float | None]:
    """Return what is shown at looks: time, phase, bytes on the push lane, and whether this end is
    busy.
    """
    progress, found = IncomingProgress("web", outstanding), []
    meter = IncomingMeter(progress, started=0.0)
    for at, phase, pushed, is_busy in looks:
        meter.copying(at, phase, pushed, is_busy=is_busy)
        found.append(progress.quiet_s)
    return found


def test_a_receiver_shows_for_how_long_nothing_was_copied() -> None:
    at = 1000.0
    for phase in ("precopy", "postcopy", "deciding"):
        found = quiet(*((at + second, phase, 10**6, False) for second in range(8)))
        assert found == [None] * 5 + [5.0, 6.0, 7.0]
    copied = ((at + second / 2, "postcopy", 4096 * (second // 8), False) for second in range(99))
    assert not any(quiet(*copied))


def test_messages_that_keep_the_push_lane_alive_are_no_copying() -> None:
    alive = ((1000.0 + second, "precopy", 30 * second, False) for second in range(600))
    assert quiet(*alive)[5:] == list(range(5, 600))


def test_nothing_is_expected_of_a_sender_that_waits_or_has_nothing_to_send() -> None:
    long = range(60)
    for phase, is_busy, outstanding in (
        ("precopy", True, 9), ("postcopy", False, 0), ("interrupted", False, 9),
        ("preflight", False, 0), ("completed", False, 0),
    ):  # fmt: skip
        looks = ((1000.0 + second, phase, 0, is_busy) for second in long)
        assert not any(quiet(*looks, outstanding=outstanding)), phase


def test_a_receiver_expects_no_end_from_the_pages_that_vcpus_wait_for() -> None:
    progress = IncomingProgress("web")
    meter = IncomingMeter(progress, started=0.0)
    expected = []
    for second in range(8):
        progress.outstanding = 100 - 10 * second
        meter.copying(second, "postcopy", 0, is_busy=False)
        meter.measure(second, "postcopy", 8000 * second, Faults(2 * second, 350, 9000))
        expected.append(progress.eta_s)
    assert expected[4] is not None and expected[5:] == [None] * 3


# ---- outcomes ----
@pytest.mark.parametrize(
    ("phase", "problem", "word"),
    [
        ("precopy", "", ""),
        ("", "a journal that was not resumed", ""),
        ("completed", "", "completed"),
        ("refused", "no paging", "refused"),
        ("failed", "the peer closed the connection", "failed"),
        ("failed", "cancelled by the operator", "cancelled"),
        ("failed", "the sender gave up: cancelled by the operator", "cancelled"),
        ("failed", RESCUED, "rescued"),
        ("failed", f"the sender gave up: {RESCUED}", "rescued"),
    ],
)
def test_cancelled_and_rescued_are_not_failed(phase: str, problem: str, word: str) -> None:
    assert outcome(phase, problem) == word
