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
from pathlib import Path

from tests.xenlab import machine, parts
from tests.xenlab.cache import LabError, directory, say

PYTEST = "python3 -m pytest -p no:cacheprovider tests/xenlab/dom0"


def run_tests(timeout_s: float) -> int:
    """Each test says on which hypervisors it belongs; returns the exit status."""
    failed = []
    for kind in parts.HYPERVISORS:
        if machine.boot(kind, PYTEST, timeout_s=timeout_s).status:
            failed.append(kind)
    say(f"tests failed on: {', '.join(failed)}" if failed else "all tests passed on every hypervisor")
    return int(bool(failed))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.xenlab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hypervisor", choices=parts.HYPERVISORS, default=parts.HYPERVISORS[0])
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one machine (default 400)")
    parser.add_argument("--keep", type=Path, help=f"folder for results (default: a new one under {directory()}/runs)")
    parser.add_argument("--build", action="store_true", help="build every part, run nothing")
    parser.add_argument("--tests", action="store_true", help="run the lab's tests on each hypervisor")
    parser.add_argument("command", nargs="*", help="a shell command; put -- before options of its own")
    options = parser.parse_args()
    try:
        if options.build:
            parts.check_tools()
            for kind in parts.HYPERVISORS:
                parts.hypervisor(kind)
            for build in (parts.kernel, parts.dom0, parts.initramfs, parts.guest):
                build()
            return
        if options.tests:
            sys.exit(run_tests(options.timeout))
        if not options.command:
            parser.error("a command, --build or --tests")
        result = machine.boot(
            options.hypervisor, " ".join(options.command), timeout_s=options.timeout, keep=options.keep
        )
    except LabError as error:
        sys.exit(f"xenlab: {error}")
    sys.exit(result.status)


if __name__ == "__main__":
    main()
