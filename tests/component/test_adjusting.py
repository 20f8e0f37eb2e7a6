# SPDX-License-Identifier: GPL-2.0-or-later
"""An operator changes options of a migration, pauses its copying, or has limited its precopy."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import trio

from migrate.cli.world import World, wait_for_steps
from migrate.options import (
    LEAST_BANDWIDTH,
    NO_CAP,
    MigrationOptions,
    OnTimeout,
    PolicyOptions,
    Strategy,
)
from sender import adjustments
from sender.context import Context
from tests.conftest import MIB
from tests.support.guests import busy, continues_here_only
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link
from tests.support.policies import Watched
from tests.support.protected import slow_guest
from tests.support.waiting import until_async

HARDLY = LEAST_BANDWIDTH
"""With this cap the second batch would be sent a quarter of an hour after the first."""
LIMIT_S = 0.1
CANCELLED_BY_LIMIT = re.compile(
    rf"cancelled after \d+\.\d s of precopy, by its time limit of {LIMIT_S} s"
)


@pytest.fixture(autouse=True)
def _asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "asked", [])


async def copying(outcome: Outcome) -> Context:
    """Wait until the first pages of precopy have been sent."""
    context = outcome.migration.context
    await until_async(lambda: context.progress.pages_done > 0)
    return context


async def postcopy(outcome: Outcome) -> Context:
    await until_async(lambda: outcome.migration.phase == "postcopy")
    return outcome.migration.context


async def paused(context: Context) -> None:
    """Pause, and wait until the thread that copies has ended."""
    await adjustments.pause(context)
    await until_async(lambda: context.pause._over.statistics().tasks_waiting > 0)


async def runs_on(world: World, name: str, steps: int = 1000) -> None:
    with world.source.open(name) as guest:
        await trio.to_thread.run_sync(wait_for_steps, guest, steps)


# ---- a cap that is changed ----
@pytest.mark.parametrize("strategy", [Strategy.PRECOPY, Strategy.POSTCOPY])
async def test_a_thread_that_waits_for_the_cap_uses_the_new_one_at_once(
    clean_hosts: World, name: str, strategy: Strategy
) -> None:
    spec = slow_guest(name)
    options = MigrationOptions(strategy, bandwidth_bytes_per_s=HARDLY)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        if strategy is Strategy.POSTCOPY:
            context = await postcopy(outcome)
            await until_async(lambda: context.statistics.push_pages > 0)
        else:
            context = await copying(outcome)
        await adjustments.change(context, {"bandwidth_bytes_per_s": None})

    outcome = await migrate(clean_hosts, spec, options=options, meanwhile=meanwhile)
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []


async def test_a_migration_ends_with_its_last_page_and_does_not_wait_for_the_cap(
    clean_hosts: World, name: str
) -> None:
    """The guest touches all its memory.  The pages of its faults do not wait for the cap, but the
    push would have to wait for an hour before its next pages.
    """
    options = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=HARDLY)
    outcome = await migrate(clean_hosts, busy(name), options=options)
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_postcopy_has_a_cap_of_its_own_and_a_switchover_does_not_wait_for_that_of_precopy(
    clean_hosts: World, name: str
) -> None:
    spec = slow_guest(name)
    options = MigrationOptions(bandwidth_bytes_per_s=HARDLY, postcopy_bandwidth_bytes_per_s=NO_CAP)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await copying(outcome)
        outcome.migration.requests.postcopy_now()

    outcome = await migrate(clean_hosts, spec, options=options, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.migration.context.statistics.push_pages > 0
    assert (await verification(clean_hosts, spec)).problems == []


# ---- a pause ----
async def test_a_pause_of_precopy_is_no_part_of_what_the_policy_compares(
    clean_hosts: World, name: str
) -> None:
    spec = busy(name)
    options = MigrationOptions(
        Strategy.HYBRID,
        PolicyOptions(max_rounds=3, downtime_target_ms=0.001),
        bandwidth_bytes_per_s=8 * MIB,
    )
    sent, pause_s = 0, 0.0

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        nonlocal sent, pause_s
        context = await copying(outcome)
        await paused(context)
        sent, began = context.statistics.precopy_pages, time.monotonic()
        await runs_on(clean_hosts, name, 2000)
        assert outcome.migration.phase == "precopy"
        assert context.statistics.precopy_pages == sent
        await adjustments.change(context, {"bandwidth_bytes_per_s": None})
        pause_s = time.monotonic() - began
        await adjustments.resume(context)

    outcome = await migrate(
        clean_hosts, spec, options=options, decide_as=Watched, meanwhile=meanwhile
    )
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []
    stats = outcome.migration.context.statistics
    first = Watched.asked[0]
    assert first.round == 1
    assert first.previous_dirty_pages > spec.pages - sent  # with what was written in the pause
    assert all(asked.bytes_per_s > 0 for asked in Watched.asked)
    assert Watched.asked[-1].elapsed_s < stats.suspended - stats.started - pause_s


async def test_a_paused_migration_is_cancelled_like_any_other(
    clean_hosts: World, name: str
) -> None:
    options = MigrationOptions(bandwidth_bytes_per_s=8 * MIB)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await paused(await copying(outcome))
        outcome.migration.requests.ask_to_cancel()

    outcome = await migrate(clean_hosts, busy(name), options=options, meanwhile=meanwhile)
    assert str(outcome.error) == "cancelled by the operator"
    await continues_here_only(clean_hosts, name)


async def test_a_pause_before_the_first_page_holds_a_switchover_as_well(
    clean_hosts: World, name: str
) -> None:
    """With the strategy postcopy no round would be made."""
    spec = busy(name)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        context = outcome.migration.context
        await paused(context)
        await runs_on(clean_hosts, name)
        assert outcome.migration.phase == "precopy"
        await adjustments.resume(context)

    outcome = await migrate(clean_hosts, spec, Strategy.POSTCOPY, meanwhile=meanwhile)
    assert outcome.error is None and outcome.migration.context.statistics.rounds == 0
    assert (await verification(clean_hosts, spec)).problems == []


async def only_faults_are_served(context: Context) -> None:
    stats = context.statistics
    pushed, pulled = stats.push_pages, stats.pull_pages
    await until_async(lambda: stats.pull_pages > pulled + 20)
    assert stats.push_pages == pushed and context.pause.is_on


async def test_in_a_pause_of_postcopy_faults_are_served_and_nothing_is_pushed(
    clean_hosts: World, name: str
) -> None:
    spec = slow_guest(name)
    options = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=4 * MIB)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        context = await postcopy(outcome)
        await paused(context)
        await only_faults_are_served(context)
        link.cut()
        await until_async(lambda: context.statistics.rejoins == 1)
        await until_async(lambda: context.pause._over.statistics().tasks_waiting > 0)
        await only_faults_are_served(context)
        await adjustments.resume(context)

    outcome = await migrate(clean_hosts, spec, options=options, meanwhile=meanwhile)
    assert outcome.error is None and outcome.migration.context.statistics.rejoins == 1
    assert (await verification(clean_hosts, spec)).problems == []


async def test_a_guest_that_has_touched_all_of_its_memory_needs_no_end_of_the_pause(
    clean_hosts: World, name: str
) -> None:
    # Each page is a fault, which takes some 10 ms on a busy machine.
    guest = busy(name, workload="sequential")
    spec = replace(guest, memory_bytes=4 * MIB, working_set_bytes=4 * MIB)
    options = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=MIB)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await adjustments.pause(await postcopy(outcome))

    outcome = await migrate(clean_hosts, spec, options=options, meanwhile=meanwhile)
    assert outcome.error is None and outcome.migration.context.pause.is_on
    assert (await verification(clean_hosts, spec)).problems == []


# ---- a limit of precopy ----
def limited(strategy: Strategy, action: OnTimeout) -> MigrationOptions:
    return MigrationOptions(
        strategy,
        PolicyOptions(timeout_s=LIMIT_S, on_timeout=action),
        bandwidth_bytes_per_s=HARDLY,
        postcopy_bandwidth_bytes_per_s=NO_CAP,
    )


@pytest.mark.parametrize(
    ("strategy", "action"),
    [
        (Strategy.HYBRID, OnTimeout.POSTCOPY),
        (Strategy.HYBRID, OnTimeout.SUSPEND),
        (Strategy.PRECOPY, OnTimeout.SUSPEND),
    ],
)
async def test_when_its_time_has_passed_precopy_ends_as_was_chosen(
    clean_hosts: World, name: str, strategy: Strategy, action: OnTimeout
) -> None:
    spec = slow_guest(name)
    outcome = await migrate(clean_hosts, spec, options=limited(strategy, action))
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []
    stats = outcome.migration.context.statistics
    assert stats.suspended - stats.started >= LIMIT_S
    if action is OnTimeout.POSTCOPY:
        assert stats.missing_pages > 4 * stats.switchover_pages
    else:
        assert stats.missing_pages == 0 and stats.switchover_pages > spec.pages / 2


@pytest.mark.parametrize("strategy", [Strategy.HYBRID, Strategy.PRECOPY])
async def test_when_its_time_has_passed_a_migration_is_cancelled_if_that_was_chosen(
    clean_hosts: World, name: str, strategy: Strategy
) -> None:
    outcome = await migrate(clean_hosts, busy(name), options=limited(strategy, OnTimeout.CANCEL))
    assert CANCELLED_BY_LIMIT.fullmatch(str(outcome.error))
    await continues_here_only(clean_hosts, name)


async def test_the_time_does_not_pass_in_a_pause(clean_hosts: World, name: str) -> None:
    ended_at = 0.0

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        nonlocal ended_at
        context = outcome.migration.context
        await paused(context)
        await until_async(lambda: context.pause.seconds(time.monotonic()) > 4 * LIMIT_S)
        assert outcome.migration.phase == "precopy"
        ended_at = time.monotonic()
        await adjustments.resume(context)

    options = limited(Strategy.HYBRID, OnTimeout.CANCEL)
    outcome = await migrate(clean_hosts, busy(name), options=options, meanwhile=meanwhile)
    assert CANCELLED_BY_LIMIT.fullmatch(str(outcome.error))
    assert outcome.migration.context.statistics.finished > ended_at
