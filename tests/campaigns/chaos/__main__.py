# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations with faults at random instants: ``make chaos``, or ``python -m
tests.campaigns.chaos``.

A trial is a random guest, strategy and bandwidth between two pairs of processes, over a relay, and
one to three faults: a daemon killed or stopped, the link cut, silent, slow or damaging, a journal
that is damaged or cannot be written, a hostile peer, a second migration, an operator's command or
decision, a pause (``faults.py``, ``left.py``, ``operators.py``, ``decisions.py``,
``adjusting.py``).  The trial ends with the
guest running in exactly one place, where every byte is verified, and with daemons that only the
campaign has ended.  A trial that fails is printed with its seed; ``--seed`` with ``--trials 1``
repeats it, except for the timing of threads.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter

import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from tests.campaigns.chaos import course
from tests.campaigns.chaos.adjusting import ADJUSTING
from tests.campaigns.chaos.decisions import DECISIONS
from tests.campaigns.chaos.faults import FAULTS
from tests.campaigns.chaos.left import LEFT
from tests.campaigns.chaos.operators import OPERATORS
from tests.campaigns.chaos.trial import MIB, Fault, Trial
from tests.campaigns.chaos.world import LostError, chaos_world, respect_modes
from tests.campaigns.chaos.xl import XlTrial
from tests.support import zygote
from tests.support.links import link
from xenbackend.errors import XenError

ALL = FAULTS + LEFT + OPERATORS + DECISIONS + ADJUSTING
HOST_BYTES = 512 * MIB
TRIALS_OF_A_WORLD = 25
NOBODY = ("127.0.0.1", 1)
XL_EVERY = 5
"""One of so many trials is a migration under xl (``xl.py``)."""
WORLDS_WITHOUT_TLS = 2
"""The number of worlds without TLS, of three."""


async def campaign(
    first: int,
    trials: int,
    faults: list[Fault],
    silence_s: float,
    *,
    xl_every: int,
    quiet: bool,
) -> int:
    """Run trials, one of ``xl_every`` under xl (0: none).  Returns how many have failed."""
    places: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    failed: list[int] = []
    start, seed = time.monotonic(), first
    while seed < first + trials:
        # By the seed, so that a repeated trial has the same world.
        number, left = divmod(seed, TRIALS_OF_A_WORLD)
        tls = number % (WORLDS_WITHOUT_TLS + 1) == 0
        world_ends = min(first + trials, seed + TRIALS_OF_A_WORLD - left)
        async with trio.open_nursery() as nursery:
            lanes = await link(nursery, NOBODY)
            with chaos_world(HOST_BYTES, tls=tls, silence_s=silence_s, lanes=lanes.port) as world:
                relay = await link(nursery, ("127.0.0.1", world.port))
                while seed < world_ends:
                    under_xl = xl_every and seed % xl_every == 0
                    trial = XlTrial(seed, world, lanes) if under_xl else Trial(seed, world, relay)
                    seed += 1
                    relay.damage(None)  # the trial before may not have used its damage
                    try:
                        if isinstance(trial, XlTrial):
                            where = await trio.to_thread.run_sync(trial.run)
                        else:
                            where = await course.run(trial, faults)
                    except (LostError, MigrationError, XenError, AssertionError) as error:
                        failed.append(seed - 1)
                        print(f"FAILED: {trial}\n  {error}", flush=True)
                        for which in world.daemons:
                            print(f"--- {which} ---\n{world.processes[which].tail()}", flush=True)
                        break  # what is left of this trial must not reach the next one
                    places[where] += 1
                    happened.update(trial.happened)
                    if not quiet:
                        print(f"{trial}: {where}", flush=True)
            nursery.cancel_scope.cancel()
        print(
            f"{seed - first} trials in {time.monotonic() - start:.0f} s: {places['destination']} "
            f"guests arrived, {places['source']} stayed, {places['destroyed']} were destroyed, "
            f"{len(failed)} lost",
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
        "--silence", type=float, default=3, help="silence_s of the daemons; more on a busy machine"
    )
    parser.add_argument("--only", action="append", help="a fault by its name; may be repeated")
    parser.add_argument("--xl", action="store_true", help="only migrations under xl")
    parser.add_argument(
        "--quiet", action="store_true", help="only the failures, and a line now and then"
    )
    options = parser.parse_args()
    respect_modes()
    World.spawn = zygote.Popen  # so that no process outlives this one
    seed = options.seed if options.seed is not None else int(time.time()) % 10**6 * 1000
    print(f"chaos: {options.trials} trials, the first with seed {seed}", flush=True)
    faults = [fault for fault in ALL if fault.name in (options.only or [fault.name])]
    if not faults:
        parser.error(f"--only: one of {', '.join(sorted({fault.name for fault in ALL}))}")
    xl_every = 1 if options.xl else 0 if options.only else XL_EVERY
    run = functools.partial(
        campaign, seed, options.trials, faults, options.silence, xl_every=xl_every,
        quiet=options.quiet,
    )  # fmt: skip
    sys.exit(1 if trio.run(run) else 0)


if __name__ == "__main__":
    main()
