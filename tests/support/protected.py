# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations with --protect whose destination dies."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from migrate.cli.world import World, wait_for_steps
from migrate.options import MigrationOptions, PolicyOptions, Strategy
from tests.conftest import MIB
from tests.support.inprocess import Outcome, migrate
from tests.support.links import Link
from tests.support.waiting import until_async
from xenbackend.contract import DomainState
from xenbackend.simulated.client import SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import Verification, verify

Meanwhile = Callable[[Outcome, Link], Awaitable[None]]


EVERY_S = 0.02


def slow_guest(name: str, memory: int = 32 * MIB, **others: Any) -> GuestSpec:
    """Return a guest so slow that its memory does not arrive by faults before anything could be
    sent back.
    """
    defaults: dict[str, Any] = {
        "workload": "random",
        "working_set_bytes": 16 * MIB,
        "zero_permille": 0,
        "rate": 2000,
    }
    return GuestSpec(name, memory, 2, **{**defaults, **others})


def options(strategy: Strategy = Strategy.POSTCOPY, **others: Any) -> MigrationOptions:
    defaults = {"bandwidth_bytes_per_s": 16 * MIB, "checkpoint_every_s": EVERY_S}
    return MigrationOptions(strategy, PolicyOptions(max_rounds=2), **{**defaults, **others})


async def protected(
    hosts: World,
    spec: GuestSpec,
    meanwhile: Meanwhile | None = None,
    with_options: MigrationOptions | None = None,
) -> Outcome:
    return await migrate(hosts, spec, options=with_options or options(), meanwhile=meanwhile)


def dies_after(count: int, hosts: World, *, decide: bool = True, force: bool = False) -> Meanwhile:
    """The destination is gone for good after so many checkpoints, and an operator decides so.

    ``force``: with ``--force``, which is needed if the guest was not protected to its end.
    """

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_async(
            lambda: outcome.migration.ownership.handed_over and outcome.incoming.phase == "postcopy"
        )
        # The push waits: on a busy machine all may arrive before so many checkpoints are made.
        outcome.migration.context.cap.spend(1024 * MIB, time.monotonic())
        await until_async(lambda: outcome.migration.progress.checkpoints >= count)
        link.down()
        target = hosts.destination.open(outcome.migration.domain_name)
        await trio.to_thread.run_sync(target.destroy)
        await until_async(lambda: outcome.migration.phase == "interrupted")
        if decide:
            await outcome.migration.requests.decide(here=True, force=force)

    return meanwhile


def verified_at_source(
    host: SimulatedHypervisor, spec: GuestSpec, before: list[int] | None = None
) -> Verification:
    """Check the memory of a guest that runs at this host."""
    domain = host.open(spec.name)
    assert domain.state() is DomainState.RUNNING
    wait_for_steps(domain, 100)
    domain.suspend()
    result = verify(domain, spec, source_positions=before)
    domain.close()
    return result
