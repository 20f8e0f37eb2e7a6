# SPDX-License-Identifier: GPL-2.0-or-later
"""Many migrations through one pair of daemons, at once and one after the other: ``make many``.

Each guest is verified byte for byte.  The memory, descriptors and threads of the daemons before and
after are printed.  The exit status is 1 if a guest is damaged, or if descriptors or threads are
left over.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

from migrate.cli.world import World, loopback_world, wait_for_steps
from migrate.lanes.connection import LINGER_S
from tests.support import zygote
from tests.support.resources import descriptors, holds
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import verify

MIB = 2**20
SLACK = 8
"""How many more descriptors and threads a daemon may have than before: trio keeps idle threads for
ten seconds.
"""
SETTLE_S = 30.0
"""The longest time until the daemons hold nothing of migrations that have ended."""


def spec(number: int) -> GuestSpec:
    return GuestSpec(f"guest{number}", 2 * MIB, 1, workload="random", seed=number, rate=2000)


def migrate(world: World, number: int, problems: list[str]) -> None:
    guest = world.source.create_guest(spec(number).to_bytes())
    wait_for_steps(guest, 20)
    guest.close()
    try:
        strategy = ("hybrid", "postcopy", "precopy")[number % 3]
        world.ask(
            "sender",
            command="migrate",
            domain=f"guest{number}",
            destination=f"127.0.0.1:{world.port}",
            strategy=strategy,
        )
        with world.destination.open(f"guest{number}") as target:
            wait_for_steps(target, 20)
            target.suspend()
            problems += [
                f"guest{number}: {problem}" for problem in verify(target, spec(number)).problems
            ]
            target.destroy()
    except Exception as error:
        problems.append(f"guest{number}: {error!r}")


def entries(world: World) -> list[Path]:
    """Return the journals' entries.  A receiver whose lanes were lost at the end keeps its entry,
    until its sender has dialled again or ``LINGER_S`` has passed.
    """
    return [*world.directory.glob("*.state/*/*.json")]


def settled(world: World, before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return what the daemons hold when no migration is in progress any more."""
    lingers_until = time.monotonic() + LINGER_S
    deadline = time.monotonic() + SETTLE_S
    while True:
        if entries(world) and time.monotonic() < lingers_until:
            deadline = time.monotonic() + SETTLE_S
        now = {which: holds(world, which) for which in before}
        left = [
            n[what] - before[w][what] for w, n in now.items() for what in ("descriptors", "threads")
        ]
        if max(left) <= SLACK or time.monotonic() > deadline:
            return now
        time.sleep(0.5)


def check(
    name: str,
    world: World,
    before: dict[str, dict[str, int]],
    after: dict[str, dict[str, int]],
    problems: list[str],
) -> None:
    for which in before:
        print(
            f"  {which}: "
            + ", ".join(
                f"{what} {before[which][what]} -> {after[which][what]}" for what in before[which]
            )
        )
        for what in ("descriptors", "threads"):
            if after[which][what] > before[which][what] + SLACK:
                problems.append(
                    f"{name}: the {which} has {after[which][what]} {what}, before "
                    f"{before[which][what]} (descriptors: {descriptors(world, which)})"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--one-by-one", type=int, default=1000)
    options = parser.parse_args()
    World.spawn = zygote.Popen  # so that no process outlives this one
    problems: list[str] = []
    with loopback_world(1024 * MIB) as world:
        for number in range(20):  # to load what is loaded on first use
            migrate(world, number, problems)
        before = settled(world, {which: holds(world, which) for which in ("sender", "receiver")})
        start = time.monotonic()
        threads = [
            threading.Thread(target=migrate, args=(world, 1000 + n, problems))
            for n in range(options.at_once)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(
            f"{options.at_once} at once: {time.monotonic() - start:.1f} s, {len(problems)} "
            "problems",
            flush=True,
        )
        check("at once", world, before, settled(world, before), problems)
        before, start = settled(world, before), time.monotonic()
        for number in range(options.one_by_one):
            migrate(world, 10_000 + number, problems)
        print(
            f"{options.one_by_one} one after the other: {time.monotonic() - start:.1f} s, "
            f"{len(problems)} problems",
            flush=True,
        )
        check("one by one", world, before, settled(world, before), problems)
    if problems:
        sys.exit("\n".join(problems[:20]))


if __name__ == "__main__":
    main()
