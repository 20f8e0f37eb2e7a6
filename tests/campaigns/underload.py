# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests on a busy machine.

A test that passes alone and fails here assumes that something is quick, or that the test is alone.

Two copies of the tests run at once, so that a fixed port or a fixed path is used twice.  Beside
them stress-ng, if it is installed, keeps the CPUs and the disk busy.

    python -m tests.campaigns.underload              # all tests
    python -m tests.campaigns.underload --copies 6 -- tests/component/test_tls.py -x
                                                     # any arguments of pytest
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.checks.record import junit_results

BURNERS_PER_CORE = 4
WRITERS = 2
WITH_PARENT = ("setpriv", "--pdeathsig")
"""A command whose process gets a signal, which is named next, when this process is killed."""
LAST_LINES = 400
"""How much of the output of a failed copy is shown."""


@contextlib.contextmanager
def load(burners: int, directory: Path) -> Iterator[subprocess.Popen[bytes] | None]:
    """Keep the machine busy.  Yields the process that does, or None if stress-ng is missing."""
    if not burners or shutil.which("stress-ng") is None:
        print("no stress-ng: the copies of the tests are the only load", flush=True)
        yield None
        return
    burning = subprocess.Popen(
        [
            *WITH_PARENT,
            "TERM",
            "stress-ng",
            "--quiet",
            "--cpu",
            str(burners),
            "--hdd",
            str(WRITERS),
            "--hdd-bytes",
            "64M",
            "--temp-path",
            str(directory),
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        yield burning
    finally:
        burning.terminate()  # this ends its children
        burning.wait()


def run(copies: int, junit: Path, tests: Sequence[str]) -> list[int]:
    """Run the copies, and print the output of the failed ones.  Returns their exit statuses."""
    logs = [junit / f"copy-{number}.log" for number in range(1, copies + 1)]
    running = list[subprocess.Popen[bytes]]()
    try:
        for log in logs:
            command = [
                *WITH_PARENT,
                "KILL",
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
            ]
            command.append(f"--junitxml={log.with_suffix('.xml')}")
            with log.open("wb") as output:
                running.append(
                    subprocess.Popen(
                        [*command, *tests],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                    )
                )
        statuses = [copy.wait() for copy in running]
    finally:
        for copy in running:
            if copy.poll() is None:
                os.killpg(copy.pid, signal.SIGKILL)
                copy.wait()
    for log, status in zip(logs, statuses, strict=True):
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-LAST_LINES:] if status else lines[-1:]), flush=True)
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.underload", description="Run the tests on a busy machine."
    )
    parser.add_argument("--copies", type=int, default=2, help="how many at once (default: 2)")
    parser.add_argument(
        "--burners",
        type=int,
        default=BURNERS_PER_CORE * len(os.sched_getaffinity(0)),
        help=f"processes that compute (default: {BURNERS_PER_CORE} for each core)",
    )
    parser.add_argument(
        "--junit", type=Path, metavar="FOLDER", help="keep the JUnit XML and output of each copy"
    )
    parser.add_argument("tests", nargs="*", help="arguments of pytest (default: all tests)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="underload-") as scratch:
        junit: Path = options.junit or Path(scratch)
        junit.mkdir(parents=True, exist_ok=True)
        with load(options.burners, Path(scratch)) as burning:
            statuses = run(options.copies, junit, options.tests)
            idle = burning is not None and burning.poll() is not None
            average = os.getloadavg()[0]
        # A test that fails sometimes is one line, with the number of copies in which it failed.
        failed = Counter(
            re.sub(r"^copy-\d+: ", "", test.name)
            for test in junit_results(junit)
            if test.result in ("failed", "error")
        )
    for name, count in sorted(failed.items()):
        print(f"failed in {count} of {options.copies}: {name}")
    bad = sum(status != 0 for status in statuses)
    print(f"{options.copies} copies, {bad} failed, at a load of {average:.1f}")
    if idle:
        print("stress-ng ended before the tests did: this was no load")
    return 1 if idle or any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
