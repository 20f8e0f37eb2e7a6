# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations from an earlier release to the one of this tree, and back: ``make compat``.

At each end the host, the daemon and the commands are those of one release, as processes.  A
migration is right if both daemons report its end, the guest runs at exactly one end, and
``simulated-guest verify`` of the release at that end finds every byte right.  Without the history
of the repository the campaign is skipped.  Its exit status is 1 if a migration is not right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from migrate.cli.world import start_receiver, start_sender
from migrate.errors import MigrationError
from migrate.outcomes import ENDED
from tests.campaigns.chaos.world import LostError
from tests.campaigns.compat.release import COMMITS, NoHistoryError, Release, earlier, today
from tests.campaigns.compat.world import ADDRESS, CompatWorld, compat_world
from tests.support.links import Link, LinkInThread
from tests.support.waiting import until

GUEST = "guest"
OPTIONS = ("--memory", "32M", "--vcpus", "2", "--working-set", "16M", "--rate", "2000")
SLOW = ("--bandwidth", "4M")
"""So that a phase lasts until the test has done its part in it."""
END_S = 90.0
FAILURES = (MigrationError, LostError, AssertionError, subprocess.TimeoutExpired)
Result = dict[str, Any]


@dataclass
class Trial:
    world: CompatWorld
    relay: LinkInThread

    def until(self, which: str, *phases: str) -> None:
        """Wait for a phase of a daemon."""
        until(
            lambda: self.world.line(which)["phase"] in phases,
            f"the {which} does not reach {' or '.join(phases)}",
            END_S,
        )


def cut_link(trial: Trial) -> None:
    trial.until("receiver", "postcopy")
    trial.relay.do(Link.cut)


def kill_sender(trial: Trial) -> None:
    trial.until("receiver", "postcopy")
    trial.world.kill("sender")
    trial.until("receiver", "interrupted")
    start_sender(trial.world)


def kill_receiver(trial: Trial) -> None:
    trial.until("receiver", "postcopy")
    trial.world.kill("receiver")
    trial.until("sender", "interrupted")
    start_receiver(trial.world, trial.world.port)


def cancel(trial: Trial) -> None:
    trial.until("sender", "precopy")
    trial.world.ask("sender", command="cancel", migration=GUEST)


def lose_destination(trial: Trial) -> None:
    """An operator lets the guest continue at the source, as it was at a checkpoint."""
    world = trial.world
    trial.until("sender", "postcopy")
    until(lambda: world.line("sender")["checkpoints"] > 1, "no checkpoint is kept", END_S)
    world.kill("receiver")
    world.guest("destination", "destroy", GUEST)
    trial.until("sender", "interrupted")
    world.ask("sender", command="decide", migration=GUEST, here=True)
    trial.until("sender", *ENDED)
    start_receiver(world, world.port)


@dataclass(frozen=True)
class Case:
    name: str
    options: tuple[str, ...]
    happens: Callable[[Trial], None] | None = None
    shows: Callable[[Result], object] = lambda _result: True
    """Returns whether the result of the migration shows what the case is about."""
    reconnects: bool = False
    """Whether both ends connect again.  If not, two lanes have to be enough: a message that one end
    does not understand costs the lanes, and the migration may complete over the next ones.
    """
    tls: bool = False
    where: str = "destination"
    """The host at which the guest is in the end."""


CASES = (
    Case("hybrid", ("--strategy", "hybrid")),
    Case(
        "postcopy",
        ("--strategy", "postcopy"),
        shows=lambda result: result["switchover"]["missing_pages"] and result["pull"]["pages"],
    ),
    Case(
        "precopy",
        ("--strategy", "precopy"),
        shows=lambda result: (
            result["precopy"]["pages"] and not result["switchover"]["missing_pages"]
        ),
    ),
    Case(
        "postcopy --protect",
        ("--strategy", "postcopy", "--protect", *SLOW),
        shows=lambda result: result["checkpoints"]["kept"],
    ),
    Case(
        "destination lost",
        ("--strategy", "postcopy", "--protect", *SLOW),
        lose_destination,
        reconnects=True,
        where="source",
    ),
    Case("link cut", ("--strategy", "postcopy", *SLOW), cut_link, reconnects=True),
    Case("link cut, TLS", ("--strategy", "postcopy", *SLOW), cut_link, reconnects=True, tls=True),
    Case("sender killed", ("--strategy", "postcopy", *SLOW), kill_sender, reconnects=True),
    Case("receiver killed", ("--strategy", "postcopy", *SLOW), kill_receiver, reconnects=True),
    Case("cancelled", ("--strategy", "hybrid", *SLOW), cancel, where="source"),
)


def check(trial: Trial, case: Case, result: Result | None) -> str:
    """Check the end of a case.  Returns what was verified.  Raises an error if the case ends in
    another way.
    """
    world = trial.world
    arrives = case.where == "destination"
    for which in ("sender", "receiver"):
        trial.until(which, *ENDED)
        line = world.line(which)
        if (line["phase"] == "completed") is not arrives:
            raise LostError(f"the {which} has {line['phase']}: {line['problem']}")
    if result is not None and not case.shows(result):
        raise LostError(f"the migration was not one of this case: {result}")
    connections = trial.relay.link.connections
    if connections < 4 if case.reconnects else connections != 2:
        raise LostError(f"the two ends have made {connections} connections")
    states = world.states(GUEST)
    if states != {case.where: "running"}:
        raise LostError(f"the guest is {states}")
    world.check_logs()
    world.check_alive()
    return world.guest(case.where, "verify", GUEST).strip()


def run(case: Case, source: Release, destination: Release) -> str:
    """Do one migration.  Returns what was verified.  Raises one of :data:`FAILURES`."""
    with (
        compat_world(source, destination, tls=case.tls) as world,
        LinkInThread((ADDRESS, world.port)) as relay,
    ):
        world.guest("source", "create", GUEST, *OPTIONS)
        written = world.directory / "result.json"
        command = source.start(
            "migrate", GUEST, f"{ADDRESS}:{relay.link.port}", "--json", str(written),
            "--socket", str(world.sender_socket), *case.options,
        )  # fmt: skip
        trial = Trial(world, relay)
        with command as migrate:
            try:
                if case.happens is not None:
                    case.happens(trial)
                migrate.communicate(timeout=END_S)
                if migrate.returncode and case.happens is None:
                    raise LostError(f"`migrate` has failed: {migrate.returncode}")
                result = None if migrate.returncode else json.loads(written.read_text())
                return check(trial, case, result)
            except FAILURES as error:
                migrate.kill()
                error.add_note(f"--- migrate ---\n{migrate.communicate()[0]}")
                for name, process in world.processes.items():
                    error.add_note(f"--- {name} ---\n{process.tail()}")
                raise
            finally:
                migrate.kill()


def ask(new: Release, old: Release, *, tls: bool) -> str:
    """Ask a host of an earlier release what it could take in.  Returns the answer.  Raises one of
    :data:`FAILURES` if it is not that the host could not be asked, or if a migration has begun.
    """
    with compat_world(new, old, tls=tls) as world:
        command = new.start(
            "preflight", "--peer", f"{ADDRESS}:{world.port}", "--json", "--config",
            str(world.config_file),
        )  # fmt: skip
        output, _none = command.communicate(timeout=END_S)
        (problem,) = json.loads(output)["problems"]
        if "older release, could not be asked" not in problem:
            raise LostError(output)
        if migrations := world.ask("receiver", command="list")["migrations"]:
            raise LostError(f"a migration has begun: {migrations}")
        world.check_alive()
    return str(problem)


def campaign(old: Release, new: Release) -> int:
    """Do all migrations.  Returns how many have failed."""
    failed = 0
    print(f"{'from':8}{'to':8}{'migration':22}{'seconds':>8}  outcome")

    def note(source: Release, destination: Release, name: str, done: Callable[[], str]) -> None:
        nonlocal failed
        begun = time.monotonic()
        try:
            outcome = done()
        except FAILURES as error:
            failed += 1
            outcome = "\n".join([f"FAILED: {error}", *getattr(error, "__notes__", ())])
        took = time.monotonic() - begun
        print(f"{source!s:8}{destination!s:8}{name:22}{took:8.1f}  {outcome}", flush=True)

    for source, destination in ((old, new), (new, old)):
        for case in CASES:
            note(source, destination, case.name, partial(run, case, source, destination))
    for tls, name in ((False, "preflight"), (True, "preflight, TLS")):
        note(new, old, name, partial(ask, new, old, tls=tls))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    failed = 0
    for version in COMMITS:
        try:
            old = earlier(version)
        except NoHistoryError as reason:
            print(f"skipped: {reason}")
            continue
        for release in (old, today()):
            release.check()
        failed += campaign(old, today())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
