# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests for tests of both ends in one process: how they are made, and what they must have done."""

from __future__ import annotations

from migrate.cli.world import World
from tests.conftest import MIB
from tests.support.waiting import until_async as until
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec


def steps(domain: SimulatedDomain) -> list[int]:
    return [vcpu["count"] for vcpu in domain.report()["vcpu"]]


async def goes_on_here_only(world: World, name: str) -> None:
    source = world.source.open(name)
    before = steps(source)
    await until(lambda: all(now > then for now, then in zip(steps(source), before, strict=True)))
    assert world.destination.domains() == []
    source.close()


RATE = 5000
"""Accesses for each vCPU in a second.  Without a limit, vCPUs take the processor from everything
that is tested.
"""


def busy(name: str, **options: object) -> GuestSpec:
    """A guest that goes over all its memory again and again: it touches pages that are not there,
    and reads damage soon.
    """
    defaults: dict[str, object] = {
        "vcpus": 2,
        "working_set_bytes": 16 * MIB,
        "zero_permille": 0,
        "rate": RATE,
    }
    return GuestSpec(name, 16 * MIB, **{**defaults, **options})  # type: ignore[arg-type]
