# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured during precopy reaches the policy, and decides how precopy ends."""

from __future__ import annotations

import json

import pytest

from migrate.cli.world import World
from migrate.options import MigrationOptions, PolicyOptions, Strategy
from sender.policy import DefaultPolicy
from tests.conftest import MIB
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link
from tests.support.policies import Watched

DELAY_S = 0.01


@pytest.mark.parametrize("delay_s", [0.0, DELAY_S])
async def test_the_shorter_freeze_is_chosen_by_what_was_measured(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    monkeypatch.setattr(Watched, "asked", [])
    spec = busy(name, working_set_bytes=4 * MIB)
    options = MigrationOptions(Strategy.HYBRID, PolicyOptions(max_rounds=2, downtime_target_ms=1.0))

    async def slow(_outcome: Outcome, link: Link) -> None:
        link.delay_s = delay_s

    outcome = await migrate(clean_hosts, spec, options=options, decide_as=Watched, meanwhile=slow)
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []
    assert all(asked.bytes_per_s > 0 for asked in Watched.asked)
    assert all(0 < asked.round_trip_s < asked.fault_s for asked in Watched.asked)
    assert all(asked.fault_s > 2 * delay_s for asked in Watched.asked)  # there and back
    last = Watched.asked[-1]
    result = json.loads(json.dumps(outcome.migration.result()))
    assert result["expected"] == {
        "pages": last.dirty_pages,
        "bytes_per_s": round(last.bytes_per_s),
        "fault_us": round(last.fault_s * 1e6),
        "round_trip_us": round(last.round_trip_s * 1e6),
        "stop_and_copy_ms": pytest.approx(last.stop_and_copy_ms, abs=0.001),
        "postcopy_ms": pytest.approx(last.postcopy_ms, abs=0.001),
    }
    few = last.dirty_pages <= options.policy.dirty_threshold or last.stop_and_copy_ms <= 1.0
    sends_all = few or last.stop_and_copy_ms <= last.postcopy_ms
    assert (result["switchover"]["missing_pages"] == 0) is sends_all


async def test_without_rounds_nothing_is_expected(clean_hosts: World, name: str) -> None:
    outcome = await migrate(clean_hosts, busy(name), Strategy.POSTCOPY, decide_as=DefaultPolicy)
    assert outcome.error is None
    assert set(outcome.migration.result()["expected"].values()) == {0}
