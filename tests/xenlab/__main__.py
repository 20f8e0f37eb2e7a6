# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.xenlab [--hypervisor KIND] COMMAND...``: run a command in the dom0 of a real Xen.

The command runs in the working tree, which is read-only there.  What it leaves in the folder $LAB_OUT comes back, with its
output and exit status, the consoles of guests, and the console of Xen and dom0.

    python -m tests.xenlab xl info
    python -m tests.xenlab --hypervisor debian --keep /tmp/lab -- xl list
    python -m tests.xenlab --build
    python -m tests.xenlab --tests
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.xenlab import machine, parts
from tests.xenlab.cache import LabError, directory, say

PYTEST = (
    "python3 -m pytest -p no:cacheprovider -o timeout=900 --durations=5 -rA --show-capture=no"
    " tests/test_conformance.py tests/xenlab/dom0"
)
MACHINES_AT_ONCE = 2


def run_tests(timeout_s: float) -> int:
    """Each test says on which hypervisors it belongs; returns the exit status.

    Two machines at a time: a test often waits for its guest.
    """
    parts.build()
    with ThreadPoolExecutor(MACHINES_AT_ONCE) as pool:
        running = {
            kind: pool.submit(machine.boot, kind, PYTEST, timeout_s=timeout_s, live=False) for kind in parts.MACHINES
        }
        failed = []
        for kind, machine_run in running.items():
            try:
                result = machine_run.result()
            except LabError as error:
                say(f"{kind}: {error}")
                failed.append(kind)
                continue
            print(f"---- {kind} ----\n{result.output}", flush=True)
            if result.status:
                failed.append(kind)
    say(f"tests failed on: {', '.join(failed)}" if failed else "all tests passed on every hypervisor")
    return int(bool(failed))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.xenlab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hypervisor", choices=parts.MACHINES, default=parts.HYPERVISORS[0])
    parser.add_argument("--timeout", type=float, default=3300.0, help="seconds for one machine (default 3300)")
    parser.add_argument(
        "--memory", type=int, default=machine.MEMORY_MIB, help="MiB of one machine (default %(default)s)"
    )
    parser.add_argument("--keep", type=Path, help=f"folder for results (default: a new one under {directory()}/runs)")
    parser.add_argument("--build", action="store_true", help="build every part, run nothing")
    parser.add_argument("--tests", action="store_true", help="run the lab's tests on each hypervisor")
    parser.add_argument("command", nargs="*", help="a shell command; put -- before options of its own")
    options = parser.parse_args()
    try:
        if options.build:
            parts.build()
            return
        if options.tests:
            sys.exit(run_tests(options.timeout))
        if not options.command:
            parser.error("a command, --build or --tests")
        result = machine.boot(
            options.hypervisor,
            " ".join(options.command),
            timeout_s=options.timeout,
            keep=options.keep,
            memory_mib=options.memory,
        )
    except LabError as error:
        sys.exit(f"xenlab: {error}")
    sys.exit(result.status)


if __name__ == "__main__":
    main()
