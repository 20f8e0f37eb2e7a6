# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations to which something happens at a random instant: ``make chaos``, or
``python -m tests.campaigns.chaos``.

A trial is a random guest, strategy and bandwidth between two pairs of processes, over a relay, and
one to three faults: a daemon killed or stopped, the link cut, silent, slow or damaging, a journal
that cannot be written, a peer that is none, a second migration, an operator's command
(``faults.py``, ``operators.py``).  The trial ends with the guest running in exactly one place,
verified byte for byte there, and with daemons that nobody but the campaign has ended.  A trial that
fails is printed with its seed; ``--seed`` with ``--trials 1`` plays it again, as far as threads do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from tests.campaigns.chaos.faults import FAULTS
from tests.campaigns.chaos.operators import OPERATORS
from tests.campaigns.chaos.trial import MIB, Trial
from tests.campaigns.chaos.world import LostError, chaos_world, respect_modes
from tests.support import zygote
from tests.support.links import link
from xenbackend.errors import XenError

HOST_BYTES = 512 * MIB
TRIALS_OF_A_WORLD = 25
WORLDS_WITHOUT_TLS = 2
"""Of three."""


async def campaign(first: int, trials: int, *, quiet: bool) -> int:
    """Returns how many have failed."""
    places: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    failed: list[int] = []
    start, seed = time.monotonic(), first
    while seed < first + trials:
        # By the seed, so that a trial that is played again has the same.
        number, left = divmod(seed, TRIALS_OF_A_WORLD)
        world_ends = min(first + trials, seed + TRIALS_OF_A_WORLD - left)
        with chaos_world(HOST_BYTES, tls=number % (WORLDS_WITHOUT_TLS + 1) == 0) as world:
            async with trio.open_nursery() as nursery:
                relay = await link(nursery, ("127.0.0.1", world.port))
                while seed < world_ends:
                    trial = Trial(seed, world, relay)
                    seed += 1
                    relay.damage(None)  # nothing may have come by to be damaged in the trial before
                    try:
                        where = await trial.run(FAULTS + OPERATORS)
                    except (LostError, MigrationError, XenError) as error:
                        failed.append(trial.seed)
                        print(f"FAILED: {trial}\n  {error}", flush=True)
                        for which in world.daemons:
                            print(f"--- {which} ---\n{world.processes[which].tail()}", flush=True)
                        break  # what is left of it is not the next one's
                    places[where] += 1
                    happened.update(fault.name for fault in trial.chosen)
                    happened.update(
                        {
                            "another guest beside": trial.beside is not None,
                            "carried out again": len(trial.again),
                        }
                    )
                    if not quiet:
                        print(f"{trial}: {where}", flush=True)
                nursery.cancel_scope.cancel()
        print(
            f"{seed - first} trials in {time.monotonic() - start:.0f} s: {places['destination']} guests arrived, "
            f"{places['source']} stayed, {places['destroyed']} were destroyed, {len(failed)} lost",
            flush=True,
        )
    print(
        "what happened: " + ", ".join(f"{name} {count}" for name, count in sorted(happened.items()))
    )
    if failed:
        print(f"failed seeds: {', '.join(map(str, failed))}")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50, help="how many (default 50)")
    parser.add_argument(
        "--seed", type=int, help="of the first; the next ones count on (default: of the clock)"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="only the failures, and a line now and then"
    )
    options = parser.parse_args()
    respect_modes()
    World.spawn = zygote.Popen  # so that no process outlives this one
    seed = options.seed if options.seed is not None else int(time.time()) % 10**6 * 1000
    print(f"chaos: {options.trials} trials, the first with seed {seed}", flush=True)
    sys.exit(1 if trio.run(lambda: campaign(seed, options.trials, quiet=options.quiet)) else 0)


if __name__ == "__main__":
    main()
