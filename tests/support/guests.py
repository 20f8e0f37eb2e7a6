# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests for tests of both ends in one process, and the checks of what they have done."""

from __future__ import annotations

from migrate.cli.world import World
from tests.conftest import MIB
from tests.support.waiting import until_async as until
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec


def steps(domain: SimulatedDomain) -> list[int]:
    return [vcpu["count"] for vcpu in domain.report()["vcpu"]]


async def continues_here_only(world: World, name: str) -> None:
    source = world.source.open(name)
    before = steps(source)
    await until(lambda: all(now > then for now, then in zip(steps(source), before, strict=True)))
    assert world.destination.domains() == []
    source.close()


RATE = 5000
"""The accesses of each vCPU in a second.  Without a limit, vCPUs would use the processors that the
tested code needs.
"""


def busy(name: str, **options: object) -> GuestSpec:
    """Return a guest that passes over all its memory again and again.  It touches missing pages,
    and soon reads damaged ones.
    """
    defaults: dict[str, object] = {
        "memory_bytes": 16 * MIB,
        "vcpus": 2,
        "working_set_bytes": 16 * MIB,
        "zero_permille": 0,
        "rate": RATE,
    }
    return GuestSpec(name, **{**defaults, **options})  # type: ignore[arg-type]
