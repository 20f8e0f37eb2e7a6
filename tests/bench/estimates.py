# SPDX-License-Identifier: GPL-2.0-or-later
"""The error of an estimate: what ``estimate`` expects of a guest, against what its migration then
takes.

The longest freeze of a simulated guest is its downtime, or the longest wait of a vCPU for one page.
A real guest waits for many pages before its programs run, and that is what is expected, so the
expected freeze of a guest that lacks pages is the longer one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from migrate.cli.world import World
from tests.bench.runs import CAP, Limits, median, migrate, row
from xenbackend.simulated.guest import GuestSpec

HALF_GIB = 2**29
SECONDS = 2.0
GUESTS = {
    "idle": GuestSpec("guest", HALF_GIB, 2, "idle"),
    "hotset, 5000/s": GuestSpec("guest", HALF_GIB, 2, "hotset", rate=2500),
    "random, 40000/s": GuestSpec("guest", HALF_GIB, 2, "random", rate=20_000),
    "random, full": GuestSpec("guest", HALF_GIB, 2, "random"),
}
STRATEGIES = ("precopy", "hybrid", "postcopy")


@dataclass
class Estimating:
    """Estimates just before the migration."""

    bandwidth: float | None
    found: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def beside(self, world: World) -> Iterator[None]:
        destination = f"127.0.0.1:{world.port}"
        self.found = world.ask(
            "sender", command="estimate", domain="guest", destination=destination, seconds=SECONDS,
            bandwidth=self.bandwidth,
        )  # fmt: skip
        yield


@dataclass(frozen=True)
class Compared:
    """What was expected of a migration, and what it took."""

    expected: dict[str, float]
    taken: dict[str, float]

    def ratio(self, key: str) -> float:
        return self.expected[key] / self.taken[key]


def compared(expected: dict[str, Any], result: dict[str, Any]) -> Compared:
    downtime_ms = result["downtime_s"] * 1000
    return Compared(
        {key: expected[key] for key in ("total_s", "downtime_ms", "freeze_ms")},
        {
            "total_s": result["total_s"],
            "downtime_ms": downtime_ms,
            "freeze_ms": max(downtime_ms, result["guest"]["max_us"] / 1000),
        },
    )


def estimates(_limits: Limits, runs: int) -> None:
    """Measure the error of estimates.  A ratio above 1: more was expected than was taken.

    There are 24 cases, and the error is taken over all of them: a fifth of the runs is enough.
    """
    all_found: list[Compared] = []
    for what, spec in GUESTS.items():
        for strategy in STRATEGIES:
            for bandwidth in (None, CAP):
                found = []
                for _ in range(max(1, runs // 5)):
                    before = Estimating(bandwidth)
                    result = migrate(
                        spec, beside=before.beside, strategy=strategy, bandwidth=bandwidth
                    )
                    found.append(compared(before.found["strategies"][strategy], result))
                all_found += found

                def of(key: str, found: list[Compared] = found) -> str:
                    expected, taken = (
                        median([getattr(one, side)[key] for one in found])
                        for side in ("expected", "taken")
                    )
                    return f"{expected:.3g} of {taken:.3g} {key.rpartition('_')[2]}"

                row(
                    f"{strategy}, {what}{', capped' if bandwidth else ''}",
                    median([one.ratio("total_s") for one in found]),
                    f"{of('total_s')}, downtime {of('downtime_ms')}",
                    f"freeze {of('freeze_ms')}",
                )
    for key in ("total_s", "downtime_ms"):
        errors = sorted(abs(one.ratio(key) - 1) for one in all_found)
        row(
            f"error of the estimate, {key}",
            None,
            f"median {median(errors):.0%}, 90% below {errors[len(errors) * 9 // 10]:.0%}",
            "",
        )
