# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges this tree: ``python -m tests.checks gate``, or ``make gate``; and ``everything``.

``gate`` is what a change must pass before it lands; ``everything`` adds what takes more than an
hour, and is run before a release.  Stages run beside each other, as many as there are cores.  A
table of stages and one of the slowest tests come last.  The record of ``everything`` is kept in
``docs/results``; ``show`` prints the tables of a record again.

Exit status: 0 if every stage passed, 1 if one failed, 2 for wrong options, 130 if interrupted, and
128 + N if ended by signal N.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.checks.record import Record, read, tables
from tests.checks.runner import Runner, end_orphans
from tests.checks.stages import TIERS

TREE = Path(__file__).parents[2]
LOGS = Path("build/checks")
RESULTS = Path("docs/results")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def show(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)


def show_record(path: Path | None) -> None:
    """Print a record as its run printed it.  Ends with status 1 if there is none."""
    try:
        newest = max(
            RESULTS.glob("*.json"), default=None, key=lambda found: read(found)[0]["started"]
        )
        if path is None and newest is None:
            sys.exit(f"there is no record in {RESULTS}: make everything makes one")
        head, outcomes = read(path or newest or RESULTS)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot show {path or RESULTS}: {error}")
    machine, result = head["machine"], "passed" if head["passed"] else "failed"
    print(
        f"{head['tier']} of {head['commit']}, {head['started']}, {head['seconds']:.0f} s: {result}"
    )
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python "
        f"{machine['python']}\n"
    )
    print(tables(outcomes))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tier", choices=[*TIERS, "show"])
    parser.add_argument(
        "record", nargs="?", type=Path, help="what to show (default: the newest in docs/results)"
    )
    parser.add_argument(
        "--only", action="append", metavar="STAGE", help="run this stage; can be repeated"
    )
    parser.add_argument(
        "--skip", action="append", metavar="STAGE", default=[], help="leave this stage out"
    )
    parser.add_argument("--list", action="store_true", help="name the stages and run none")
    parser.add_argument(
        "--cores", type=int, default=len(os.sched_getaffinity(0)),
        help="how many stages run beside each other (default: the machine's cores, %(default)s)",
    )  # fmt: skip
    options = parser.parse_args()
    os.chdir(TREE)
    if options.tier == "show":
        show_record(options.record)
        return
    if options.record is not None:
        parser.error("a record can be shown, not run")
    stages = TIERS[options.tier]
    names = [stage.name for stage in stages]
    for name in (*(options.only or ()), *options.skip):
        if name not in names:
            parser.error(f"no stage {name!r} in {options.tier}: there are {', '.join(names)}")
    if options.cores < 1:
        parser.error("--cores must be at least 1")
    if options.list:
        for stage in stages:
            print(f"{stage.name:<14} {stage.subject}\n{'':<14}   {' '.join(stage.command)}")
        return
    chosen = [
        stage for stage in stages
        if stage.name not in options.skip and (options.only is None or stage.name in options.only)
    ]  # fmt: skip
    if not chosen:
        parser.error("--only and --skip leave no stage")
    LOGS.parent.mkdir(exist_ok=True)
    lock = (LOGS.parent / ".checks.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(
            "another run of these checks is under way in this tree: wait for its end, or use "
            "another clone"
        )
    end_orphans()
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    record = Record(options.tier, datetime.now(UTC).isoformat(timespec="seconds"))
    started = time.monotonic()
    runner = Runner(LOGS, cores=options.cores, show=show)

    def end(number: int, _frame: object) -> None:
        runner.interrupted_by = (
            # If it were raised here, it could come between the start of a stage and its record.
            number
        )

    for number in ENDING:
        signal.signal(number, end)
    try:
        outcomes = runner.run(chosen)
    except SystemExit:
        print(f"interrupted; the logs so far are in {LOGS}", file=sys.stderr)
        raise
    seconds = time.monotonic() - started
    print(f"\n{options.tier}: {seconds:.0f} s; the logs are in {LOGS}\n")
    print(tables(outcomes), flush=True)
    whole = len(chosen) == len(stages)
    path = (RESULTS if options.tier == "everything" and whole else LOGS) / record.name
    try:
        record.write(path, outcomes, seconds)
    except OSError as error:
        sys.exit(f"cannot write the record {path}: {error.strerror}")
    print(f"record: {path}", file=sys.stderr)
    sys.exit(int(not all(outcome.passed for outcome in outcomes)))


if __name__ == "__main__":
    main()
