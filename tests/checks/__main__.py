# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges this tree: ``python -m tests.checks gate``, or ``make gate``; and ``everything``.

``gate`` is what a change must pass before it lands; ``everything`` adds what takes more than an
hour, and is run before a release.  Stages run beside each other, as many as there are cores.  A
table of stages and one of the slowest tests come last.  The record of ``everything`` is kept in
``docs/results``; ``show`` prints the tables of a record again, and ``show --figures`` the figures
that its stages have printed.

``everything --again`` runs what the last run has not passed or not reached, if the commits differ
only in tests and documents.  The record then has the outcomes of both runs, with the commit of each
and the earlier verdicts of a stage that ran twice.

``gate`` leaves out a stage that has passed with the same files and tools, if its result follows
from these alone; the table then has the commit on which the stage ran.  ``--only`` runs it.

Exit status: 0 if every stage passed, 1 if one failed, 2 for wrong options, 130 if interrupted, and
128 + N if ended by signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tests.checks import unchanged
from tests.checks.record import Outcome, Record, continued, figures, read, tables
from tests.checks.runner import Runner, end_orphans
from tests.checks.stages import TIERS, Stage

TREE = Path(__file__).parents[2]
LOGS = Path("build/checks")
RESULTS = Path("docs/results")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def show(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)


def show_record(path: Path | None, *, with_figures: bool) -> None:
    """Print a record as its run printed it, or its figures.  Without one, ends with status 1."""
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
    print(figures(outcomes) or "no figures" if with_figures else tables(outcomes))


def last_run(record: Record) -> tuple[dict[str, Any], list[Outcome]]:
    """Return the last run that this record can continue.  Ends with status 1 if there is none."""
    runs = []
    for path in (*LOGS.glob("*.json"), *RESULTS.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            runs.append(read(path))
    mine = [run for run in runs if record.continues(run[0])]
    if not mine:
        sys.exit("there is no earlier run of this product, without uncommitted changes")
    return max(mine, key=lambda run: str(run[0]["started"]))


def options() -> argparse.Namespace:
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
    parser.add_argument(
        "--again",
        action="store_true",
        help="leave out what the last run of the same product has passed",
    )
    parser.add_argument(
        "--figures", action="store_true", help="with show: the figures that the stages have printed"
    )
    parser.add_argument("--list", action="store_true", help="name the stages and run none")
    parser.add_argument(
        "--cores", type=int, default=len(os.sched_getaffinity(0)),
        help="how many stages run beside each other (default: the machine's cores, %(default)s)",
    )  # fmt: skip
    given = parser.parse_intermixed_args()
    if given.tier == "show":
        return given
    if given.record is not None:
        parser.error("a record can be shown, not run")
    names = [stage.name for stage in TIERS[given.tier]]
    for name in (*(given.only or ()), *given.skip):
        if name not in names:
            parser.error(f"no stage {name!r} in {given.tier}: there are {', '.join(names)}")
    if given.cores < 1:
        parser.error("--cores must be at least 1")
    if not chosen(given):
        parser.error("--only and --skip leave no stage")
    return given


def chosen(given: argparse.Namespace) -> list[Stage]:
    return [
        stage
        for stage in TIERS[given.tier]
        if stage.name not in given.skip and (given.only is None or stage.name in given.only)
    ]


def lock() -> IO[str]:
    """Return the lock of this tree's checks.  Ends with status 1 if another run has the lock."""
    LOGS.parent.mkdir(exist_ok=True)
    held = (LOGS.parent / ".checks.lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(
            "another run of these checks is under way in this tree: wait for its end, or use "
            "another clone"
        )
    return held


def run(given: argparse.Namespace) -> None:
    """Run the stages, print the tables and write the record.  Ends the program."""
    record = Record(given.tier, datetime.now(UTC).isoformat(timespec="seconds"))
    head, earlier = last_run(record) if given.again else ({}, [])
    passed = {outcome.name for outcome in earlier if outcome.passed}
    stages = [stage for stage in chosen(given) if stage.name not in passed]
    if given.tier == "gate" and given.only is None:
        known = {stage: found for stage in stages if (found := unchanged.earlier(stage))}
        for stage, outcome in known.items():
            show(f"{stage.name}: passed on {outcome.commit[:10]} with the same files and tools")
        stages = [stage for stage in stages if stage not in known]
        earlier = [*earlier, *known.values()]
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    started = time.monotonic()
    runner = Runner(LOGS, cores=given.cores, show=show)

    def end(number: int, _frame: object) -> None:
        runner.interrupted_by = (
            # If it were raised here, it could come between the start of a stage and its record.
            number
        )

    for number in ENDING:
        signal.signal(number, end)
    try:
        runner.run(stages)
    except SystemExit:
        print(f"interrupted; the logs so far are in {LOGS}", file=sys.stderr)
        raise
    finally:
        outcomes = continued(earlier, str(head.get("commit", "")), runner.outcomes)
        unchanged.note(stages, runner.outcomes, record.commit)
        seconds = time.monotonic() - started
        whole = {outcome.name for outcome in outcomes} >= {one.name for one in TIERS[given.tier]}
        path = (RESULTS if given.tier == "everything" and whole else LOGS) / record.name
        try:
            record.write(path, outcomes, seconds)
        except OSError as error:
            sys.exit(f"cannot write the record {path}: {error.strerror}")
    print(f"\n{given.tier}: {seconds:.0f} s; the logs are in {LOGS}\n")
    print(tables(outcomes), flush=True)
    print(f"record: {path}", file=sys.stderr)
    sys.exit(int(not all(outcome.passed for outcome in outcomes)))


def main() -> None:
    given = options()
    os.chdir(TREE)
    if given.tier == "show":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ``show | head``
        show_record(given.record, with_figures=given.figures)
    elif given.list:
        for stage in TIERS[given.tier]:
            print(f"{stage.name:<14} {stage.subject}\n{'':<14}   {' '.join(stage.command)}")
    else:
        with lock():
            end_orphans()
            run(given)


if __name__ == "__main__":
    main()
