# SPDX-License-Identifier: GPL-2.0-or-later
"""Every strategy with every workload, many times: ``python -m tests.campaigns.soak``, or ``make
soak``.

Each run is a whole ``xen-postcopy loopback`` at full size, verified byte for byte.  The first
failure is shown, and ends the program with status 1.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time

STRATEGIES = ("hybrid", "postcopy", "precopy")
HOLE = "3G"
"""The hole for devices that the guests of every second round have in their memory."""
WORKLOADS = ("random", "sequential", "hotset", "stride", "idle")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="how often each pair is run (default 20)"
    )
    parser.add_argument("--memory", default="1G", help="of the guest (default 1G)")
    parser.add_argument("--vcpus", default="2")
    options = parser.parse_args()
    start, done = time.monotonic(), 0
    for round_number in range(1, options.rounds + 1):
        for strategy, workload in itertools.product(STRATEGIES, WORKLOADS):
            command = [
                *(
                    sys.executable,
                    "-m",
                    "migrate.cli",
                    "loopback",
                    "--memory",
                    options.memory,
                    "--vcpus",
                    options.vcpus,
                ),
                *("--strategy", strategy, "--workload", workload, "--seed", str(round_number)),
                *(("--mmio-hole", HOLE) if round_number % 2 == 0 else ()),
            ]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=600, check=False
            )
            if result.returncode or "verified: all" not in result.stdout:
                print(
                    f"FAILED after {done} good runs: {' '.join(command[2:])}\n"
                    f"{result.stdout}{result.stderr}"
                )
                sys.exit(1)
            done += 1
        print(
            f"round {round_number}: {done} migrations verified in {time.monotonic() - start:.0f} s",
            flush=True,
        )
    print(f"{done} passed, 0 failed")


if __name__ == "__main__":
    main()
