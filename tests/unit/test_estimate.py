# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration is expected to take, from what was measured."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.cli.estimate import lines
from migrate.options import MigrationOptions, OnTimeout, PolicyOptions, Strategy
from sender.estimate import SWITCHOVER_S, Expected, Measured, expect, recommend
from sender.policy import Decision
from xenbackend.pages import PAGE_SIZE

GUEST = 131_072
"""The pages of a guest of 512 MiB."""
LINK = 125e6
IDLE = Measured(GUEST, 1.0, ((1.0, 10), (2.0, 10)), LINK, 0.0004, 0.0001)
BUSY = replace(IDLE, dirtied=((1.0, 60_000), (2.0, 90_000)))
FULL_S = GUEST * PAGE_SIZE / LINK
PRECOPY, HYBRID, POSTCOPY = (
    MigrationOptions(Strategy(name)) for name in ("precopy", "hybrid", "postcopy")
)


def all_of(measured: Measured, **policy: Any) -> list[Expected]:
    options = [
        replace(one, policy=replace(PolicyOptions(), **policy))
        for one in (PRECOPY, HYBRID, POSTCOPY)
    ]
    return [expect(measured, one) for one in options]


# ---- how many pages a guest dirties ----
def test_within_the_measurement_the_pages_are_those_that_were_counted() -> None:
    counted = [round(BUSY.dirty_pages(seconds)) for seconds in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert counted == [0, 30_000, 60_000, 75_000, 90_000]


def test_later_a_guest_dirties_the_same_share_of_what_it_has_not_dirtied() -> None:
    """A guest that writes a set of pages at random dirties W (1 - exp(-t / T)) of them."""
    of_set = [round(100_000 * (1 - math.exp(-at / 2.0))) for at in (1.0, 2.0, 4.0, 20.0)]
    measured = replace(BUSY, dirtied=((1.0, of_set[0]), (2.0, of_set[1])))
    assert abs(measured.dirty_pages(4.0) - of_set[2]) < 10
    assert abs(measured.dirty_pages(20.0) - of_set[3]) < 10


def test_a_guest_that_writes_each_page_once_dirties_all_of_its_memory_in_the_end() -> None:
    measured = replace(BUSY, dirtied=((1.0, 10_000), (2.0, 20_000)))
    assert measured.dirty_pages(4.0) == 40_000
    assert measured.dirty_pages(1000.0) == GUEST


def test_a_guest_that_writes_more_and_more_is_not_expected_to_accelerate() -> None:
    measured = replace(BUSY, dirtied=((1.0, 0), (2.0, 20_000)))
    assert measured.dirty_pages(3.0) == 60_000 - 20_000


def test_a_guest_that_has_ended_writing_dirties_no_further_pages() -> None:
    assert IDLE.dirty_pages(1000.0) == 10


def test_nothing_is_dirtied_if_nothing_was_measured() -> None:
    measured = replace(IDLE, dirtied=())
    assert measured.dirty_pages(10.0) == 0 and measured.dirty_bytes_per_s == 0


def test_the_dirty_rate_is_over_the_whole_measurement() -> None:
    assert BUSY.dirty_bytes_per_s == 45_000 * PAGE_SIZE


# ---- what a strategy takes ----
def test_an_idle_guest_is_sent_once_by_precopy() -> None:
    precopy, hybrid, postcopy = all_of(IDLE)
    for one in (precopy, hybrid):
        assert one.ends_by is Decision.STOP_AND_COPY and one.rounds == 1
        assert one.sent_pages == GUEST + 10 and one.missing_pages == 0
        assert one.freeze_s == one.downtime_s < SWITCHOVER_S + 0.002
        assert abs(one.total_s - FULL_S) < 0.1
    assert postcopy.rounds == 0 and postcopy.missing_pages == GUEST
    assert postcopy.freeze_s > postcopy.downtime_s


def test_a_busy_guest_is_frozen_for_the_whole_rest_by_precopy() -> None:
    precopy, hybrid, postcopy = all_of(BUSY)
    assert precopy.rounds == PolicyOptions.max_rounds
    assert precopy.freeze_s > 2.0 and precopy.total_s > 5 * 2.0
    assert hybrid.ends_by is postcopy.ends_by is Decision.POSTCOPY
    assert hybrid.rounds < precopy.rounds and hybrid.missing_pages < GUEST
    assert hybrid.freeze_s < 0.3 and postcopy.downtime_s < 0.01


def test_zero_pages_take_no_time_the_first_time() -> None:
    half = [one.total_s for one in all_of(replace(IDLE, content_share=0.5))]
    assert all(abs(total_s - FULL_S / 2) < 0.1 for total_s in half)


def test_a_migration_lasts_for_as_long_as_its_guest_waits_for_pages() -> None:
    """On a busy host a page alone takes so long that the faults slow the push down."""
    slow = replace(BUSY, fault_s=0.02)
    for one in all_of(slow):
        assert one.freeze_s <= one.total_s
    postcopy = expect(replace(slow, round_trip_s=0.0), POSTCOPY)
    assert postcopy.freeze_s - postcopy.downtime_s == 500 * 0.02 > FULL_S
    assert postcopy.total_s == postcopy.freeze_s


def test_a_cap_slows_copying_and_not_the_downtime() -> None:
    capped = expect(BUSY, replace(PRECOPY, bandwidth_bytes_per_s=LINK / 2))
    free = expect(BUSY, PRECOPY)
    assert capped.total_s > free.total_s * 1.5
    assert capped.freeze_s < free.freeze_s * 1.7  # more is dirty, and is sent without the cap
    after = expect(BUSY, replace(POSTCOPY, postcopy_bandwidth_bytes_per_s=LINK / 4))
    assert abs(after.total_s - 4 * FULL_S) < 0.1


@pytest.mark.parametrize(
    ("action", "ends_by"),
    [
        (OnTimeout.POSTCOPY, Decision.POSTCOPY),
        (OnTimeout.SUSPEND, Decision.STOP_AND_COPY),
        (OnTimeout.CANCEL, Decision.CANCEL),
    ],
)
def test_a_time_limit_ends_precopy_in_the_middle_of_a_round(
    action: OnTimeout, ends_by: Decision
) -> None:
    options = replace(HYBRID, policy=PolicyOptions(timeout_s=1.0, on_timeout=action))
    found = expect(BUSY, options)
    assert found.ends_by is ends_by and found.rounds == 1
    if action is OnTimeout.CANCEL:
        assert (found.total_s, found.downtime_s, found.freeze_s) == (1.0, 0.0, 0.0)
        assert found.sent_pages == round(GUEST / FULL_S)
    else:
        # A part was not sent within the time, and the guest has written 60,000 pages.
        assert found.sent_pages >= GUEST


def test_a_time_limit_that_is_not_reached_changes_nothing() -> None:
    assert expect(IDLE, replace(HYBRID, policy=PolicyOptions(timeout_s=60.0))) == expect(
        IDLE, HYBRID
    )


# ---- the recommendation ----
@pytest.mark.parametrize(
    ("measured", "policy", "best", "reason"),
    [
        (IDLE, {}, "precopy", "within the downtime target of 20 ms; this host is not needed"),
        (BUSY, {}, "postcopy", r"and precopy for 3\.\d s; hybrid takes longer in all"),
        (BUSY, {"downtime_target_ms": 1e4}, "precopy", "within the downtime target of 10000 ms"),
        (
            replace(IDLE, dirtied=((1.0, 200), (2.0, 200))), {"downtime_target_ms": 0.1},
            "precopy", "no other strategy freezes the guest for less time",
        ),
        # Hybrid leaves few pages, and postcopy all: the guest waits for fewer of them.
        (
            replace(BUSY, dirtied=((0.05, 6000), (1.0, 6000), (2.0, 6000))),
            {}, "hybrid", r"it freezes the guest for 11\d ms, and postcopy for 206 ms",
        ),
    ],
)  # fmt: skip
def test_the_best_strategy_has_its_reason(
    measured: Measured, policy: dict[str, Any], best: str, reason: str
) -> None:
    target_ms = policy.get("downtime_target_ms", PolicyOptions.downtime_target_ms)
    found, why = recommend(all_of(measured, **policy), target_ms)
    assert found.strategy.value == best
    assert re.search(reason, why), why
    assert "\n" not in why


@pytest.mark.parametrize("options", [PRECOPY, POSTCOPY], ids=["precopy", "postcopy"])
def test_the_only_possible_strategy_is_the_best_one(options: MigrationOptions) -> None:
    only = expect(BUSY, options)
    assert recommend([only], 20.0)[0] is only
    assert ("no other strategy" in recommend([only], 20.0)[1]) is (options is PRECOPY)


# ---- properties ----
@st.composite
def measurements(draw: st.DrawFn) -> Measured:
    pages = draw(st.integers(1, 2**28))
    times = sorted(draw(st.sets(st.floats(0.01, 100.0), max_size=5)))
    counts = sorted(draw(st.lists(st.integers(0, pages), min_size=len(times), max_size=len(times))))
    fault_s = draw(st.floats(1e-6, 1.0))
    return Measured(
        pages,
        draw(st.floats(0.0, 1.0)),
        tuple(zip(times, counts, strict=True)),
        draw(st.floats(1e3, 1e11)),
        fault_s,
        draw(st.sampled_from([0.0, fault_s / 2])),
    )


@given(measurements(), st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_more_time_never_dirties_fewer_pages(
    measured: Measured, seconds: float, further: float
) -> None:
    pages = measured.dirty_pages(seconds)
    assert 0 <= pages <= measured.dirty_pages(seconds + further) <= measured.memory_pages


@given(
    measurements(),
    st.sampled_from(Strategy),
    st.one_of(st.none(), st.floats(4096, 1e9)),
    st.one_of(st.none(), st.floats(0.001, 1e5)),
    st.sampled_from(OnTimeout),
)
def test_an_estimate_is_of_a_migration_that_there_can_be(
    measured: Measured,
    strategy: Strategy,
    cap: float | None,
    timeout_s: float | None,
    action: OnTimeout,
) -> None:
    if strategy is Strategy.PRECOPY and action is OnTimeout.POSTCOPY:
        timeout_s = None
    policy = PolicyOptions(timeout_s=timeout_s, on_timeout=action)
    found = expect(measured, MigrationOptions(strategy, policy, cap))
    assert 0 <= found.downtime_s <= found.freeze_s
    assert found.downtime_s <= found.total_s < math.inf
    assert found.freeze_s <= found.total_s * 1.0001
    assert 0 <= found.missing_pages <= measured.memory_pages
    assert 0 <= found.rounds <= policy.max_rounds
    if found.ends_by is Decision.CANCEL:
        assert found.total_s == pytest.approx(timeout_s)
    else:
        assert found.sent_pages >= measured.memory_pages
        # All of the guest crosses the link, and no faster than the link.
        least = measured.memory_pages * measured.content_share * PAGE_SIZE / measured.bytes_per_s
        assert found.total_s >= least * 0.999 - 1e-6
    assert (found.missing_pages > 0) is (found.ends_by is Decision.POSTCOPY)


@given(measurements())
def test_hybrid_is_never_expected_to_freeze_the_guest_for_longer_than_precopy(
    measured: Measured,
) -> None:
    precopy, hybrid, _postcopy = all_of(measured)
    assert hybrid.freeze_s <= precopy.freeze_s * 1.0001 + 1e-6


@given(measurements())
def test_no_strategy_is_much_better_than_the_best(measured: Measured) -> None:
    found = all_of(measured)
    best, _why = recommend(found, PolicyOptions.downtime_target_ms)
    shortest = min(one.freeze_s for one in found)
    within = best.freeze_s * 1000 <= PolicyOptions.downtime_target_ms
    assert within or best.freeze_s <= max(shortest * 1.1, shortest + 0.001) * 1.0001


@pytest.mark.parametrize(
    ("free_bytes", "text"), [(0, "0 B are free there"), (None, "what is free there is unknown")]
)
def test_memory_that_the_destination_has_not_found_out_is_unknown(
    free_bytes: int | None, text: str
) -> None:
    measured = {
        "memory_bytes": 2**30, "content_share": 1.0, "dirtied": [[1.0, 5]], "bytes_per_s": 1e9,
        "page_us": 90, "encrypted": True, "free_bytes": free_bytes,
    }  # fmt: skip
    found = {
        "domain": "web", "destination": "there:8013", "measured": measured, "devices": "",
        "strategies": {}, "recommended": None,
    }  # fmt: skip
    shown = list(lines(found))
    assert shown[1].split(None, 1)[1] == f"1.0 GiB, 0% of it zero; {text}"
