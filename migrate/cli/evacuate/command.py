# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``evacuate``."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from migrate.cli.estimate import SECONDS, explained
from migrate.cli.evacuate.display import EvacuationDisplay
from migrate.cli.evacuate.planner import Guest, Planner, Step
from migrate.cli.evacuate.run import Evacuation, Sender
from migrate.cli.evacuate.shown import facts, head, obstacles, plan, summary
from migrate.cli.migrate import command_at, signals_handled
from migrate.cli.names import domains
from migrate.cli.options import (
    Cap,
    FirstLetters,
    HostPort,
    Number,
    WholeNumber,
    migration_request,
    policy_options,
    sender_socket,
    socket_option,
    take_log_dirty_option,
)
from migrate.cli.terminal import size_of
from migrate.cli.text import echo, json_option
from migrate.errors import InterruptedMigrationError, MigrationError
from migrate.outcomes import ENDED
from migrate.units import counted

PARALLEL = 2
MOST_PARALLEL = 100
CHOICES = {
    "leave": "end this command; the daemons continue these migrations",
    "cancel": "take those before their handover back, and wait for the others",
    "wait": "wait for these migrations, and begin no others",
}
"""What may follow for the migrations under way when the command is interrupted, the default
first.
"""


@click.command("evacuate")
@click.argument("destinations", metavar="DESTINATION...", nargs=-1, required=True, type=HostPort())
@click.option(
    "--guest", "names", multiple=True, metavar="DOMAIN", shell_complete=domains,
    help="A guest that is to go; may be given several times.  Default: all guests of this host.",
)  # fmt: skip
@click.option(
    "--parallel", type=WholeNumber(1, MOST_PARALLEL), default=PARALLEL, show_default=True,
    help="How many guests are measured or copied at once.",
)  # fmt: skip
@click.option(
    "--bandwidth", type=Cap(), metavar="BYTES/S",
    help="Cap on the background copying of all guests together; faults are not delayed.  Guests "
    "that are being copied have equal shares.  none: no cap, the default.",
)  # fmt: skip
@click.option(
    "--seconds", type=Number(0.1, 600), default=SECONDS, show_default=True,
    help="For how long each guest's writes are measured.",
)  # fmt: skip
@policy_options
@take_log_dirty_option("a guest")
@click.option(
    "--dry-run", is_flag=True,
    help="Migrate nothing.  Measure each guest, and print where it would go, and how.",
)  # fmt: skip
@json_option
@socket_option(sender_socket, "the local sender")
def evacuate_command(
    destinations: tuple[str, ...],
    names: tuple[str, ...],
    parallel: int,
    bandwidth: int | None,
    seconds: float,
    take_log_dirty: bool,
    dry_run: bool,
    as_json: bool,
    socket_path: Path,
    **options: Any,
) -> None:
    """Migrate all guests of this host to others.

    DESTINATION is HOST or HOST:PORT of a receiver.  Of several, each guest goes to the one with the
    most free memory, the largest guest first.  A guest that has no place, or that cannot be
    migrated now, is named before anything moves, and the others go.  A guest with devices needs
    its toolstack: see `xl migrate`.

    Each guest is measured as by `estimate`, and goes by the strategy that is recommended then.  A
    guest that fails before its handover runs on here.

    Ctrl-C begins no further migration.  Those under way continue in the daemons, unless they are
    cancelled at the question that follows.  The same command continues later: it follows what is
    under way, and guests that have gone are not here any more.

    Exit status 0 when all guests have gone, 1 when not, 3 when the sender has ended meanwhile, 130
    when interrupted.
    """
    request = migration_request("hybrid", False, None, **options)
    request["take_log_dirty"] = take_log_dirty
    sender = Sender(socket_path)
    planner = planned(
        sender,
        dict.fromkeys(destinations),
        names,
        parallel=parallel,
        bandwidth=bandwidth or None,
        is_trial=dry_run,
    )
    for line in obstacles(planner):
        echo(line.replace("\n", " "), err=True)
    display = EvacuationDisplay(sys.stderr, planner.of(Step.FAILED))
    evacuation = Evacuation(sender, planner, seconds, request, display)
    try:
        carry_out(evacuation)
    finally:
        at_once = parallel if bandwidth else 1  # with a cap, each was measured with its share
        report(planner, at_once if dry_run else None, as_json)
    check(planner, dry_run)


def planned(
    sender: Sender, destinations: dict[str, None], names: tuple[str, ...], **options: Any
) -> Planner:
    """Ask what there is to do.  Raises :class:`MigrationError` if a destination cannot be reached,
    or for a name that means no guest.
    """
    try:
        free_bytes = {name: sender.room(name) for name in destinations}
    except MigrationError as error:
        raise explained(error) from error
    here, lines = present(sender, names)
    missing = [name for name, domid in here["named"].items() if domid is None]
    gone = {line["id"]: line for line in (gone_before(lines, name) for name in missing)}
    named = {domid for domid in here["named"].values() if domid is not None} if names else None
    planner = Planner(free_bytes, here["guests"], lines, named=named, **options)
    for line in gone.values():
        planner.follow(line)
    return planner


def present(sender: Sender, names: tuple[str, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the guests of this host, and the migrations, of one moment.  A guest is suspended
    during its handover, so both are asked for again if a migration has ended between the answers:
    its guest has gone since, or runs again.  Raises :class:`MigrationError`.
    """
    lines = sender.migrations(of_predecessors=True)
    while True:
        before = ended(lines)
        try:
            here = sender.guests(names)
        except MigrationError as error:
            raise explained(error) from error
        lines = sender.migrations(of_predecessors=True)
        if ended(lines) == before:
            return here, lines


def ended(lines: list[dict[str, Any]]) -> set[str]:
    return {line["id"] for line in lines if line["phase"] in ENDED}


def gone_before(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the migration by which a guest of this name or UUID has left this host.  A number
    does not identify a guest that has gone, because numbers begin anew when a host boots.  Raises
    :class:`MigrationError`.
    """
    found = [
        line
        for line in lines
        # An earlier release did not note the UUID.
        if name == line["domain"] or name.lower() == line.get("uuid")
        if line["phase"] not in ("failed", "")
    ]
    if not found:
        raise MigrationError(f"domain {name!r}: there is no such domain on this host")
    return found[-1]


@dataclass
class Signals:
    """The signals so far.  They are noted, because an error that a handler raises in the middle of
    a request would be taken for the error of the request.
    """

    interrupts: int = 0
    terminated: bool = False
    is_asking: bool = False

    def on_interrupt(self, *_signal: object) -> None:
        self.interrupts += 1
        self._end_question()

    def on_terminate(self, *_signal: object) -> None:
        self.terminated = True
        self._end_question()

    def _end_question(self) -> None:
        if self.is_asking:
            raise KeyboardInterrupt

    def is_stopped(self, interrupts: int = 0) -> bool:
        """Whether there was a signal after so many interrupts."""
        return self.terminated or self.interrupts > interrupts


def carry_out(evacuation: Evacuation) -> None:
    """Run the evacuation.  Raises :class:`InterruptedMigrationError` if it was interrupted."""
    signals = Signals()
    with signals_handled(signals.on_interrupt, signals.on_terminate):
        evacuation.run(signals.is_stopped)
        if signals.is_stopped():
            evacuation.planner.stop()
            choice = "leave" if signals.terminated else asked(evacuation.planner, signals)
            if choice == "cancel":
                evacuation.cancel()
            if choice != "leave":
                evacuation.run(functools.partial(signals.is_stopped, signals.interrupts))
        evacuation.finish()
    if signals.is_stopped():
        raise InterruptedMigrationError(left(evacuation))


def asked(planner: Planner, signals: Signals) -> str:
    """Return one of :data:`CHOICES`: what is to follow an interruption."""
    moving = planner.of(Step.MOVES)
    if not moving or not sys.stdin.isatty() or not sys.stderr.isatty():
        return "leave"
    echo(f"No further migration begins.  Under way: {_names(moving)}.", err=True)
    for word, meaning in CHOICES.items():
        echo(f"  {word[0]}, {word:7} {meaning}", err=True)
    first, *others = (word[0] for word in CHOICES)
    question = f"What is to follow [{'/'.join([first.upper(), *others])}]"
    signals.is_asking = True
    try:
        choice: str = click.prompt(
            question, type=FirstLetters(CHOICES), default="leave", show_default=False, err=True
        )
    except (click.Abort, KeyboardInterrupt):
        return "leave"
    finally:
        signals.is_asking = False
    return choice


def _names(guests: Sequence[Guest]) -> str:
    return ", ".join(guest.name for guest in guests)


def left(evacuation: Evacuation) -> str:
    """Return what happens to the guests after an interruption, and what to do."""
    planner = evacuation.planner
    text = f"interrupted: {head(planner)}"
    if planner.of(Step.MOVES):
        shown = command_at(evacuation.sender.path, "list", "--watch")
        text += f"; the migrations under way continue in the daemons, and {shown} follows them"
    again = continuation(planner, sys.argv[1:])
    return f"{text}; `{again}` continues the evacuation" if again else text


def continuation(planner: Planner, given: Sequence[str]) -> str:
    """Return the command that continues an evacuation; empty if no guest is left for it.

    ``given``: the words of the command that was interrupted.  If they named guests, those that are
    left are named instead, by their UUIDs: a guest that has gone has no number any more.
    """
    remaining = [one for one in planner.guests if one.step not in (Step.GONE, Step.ENDED)]
    if not remaining:
        return ""
    first, *others = given
    if not planner.is_of_all:
        others = [*_names_as_options(remaining), *_without_guests(others)]
    return shlex.join(["xen-postcopy", first, *others])


def _names_as_options(guests: Sequence[Guest]) -> Iterator[str]:
    for guest in guests:
        yield from ("--guest", guest.uuid or guest.name)


def _without_guests(words: Sequence[str]) -> Iterator[str]:
    """Yield the words without the options ``--guest``."""
    left = iter(words)
    for word in left:
        if word == "--guest":
            next(left, None)
        elif not word.startswith("--guest="):
            yield word


def report(planner: Planner, trial: int | None, as_json: bool) -> None:
    """Print what has become of each guest.  ``trial``: see :func:`facts`."""
    if as_json:
        echo(json.dumps(facts(planner, trial), indent=2))
        return
    width = size_of(sys.stdout).columns if sys.stdout.isatty() else None
    if planner.guests:
        echo(summary(planner, width) if trial is None else plan(planner, width, trial))


def check(planner: Planner, dry_run: bool) -> None:
    """Raises :class:`MigrationError` if guests are still here, or would be."""
    failed = planner.of(Step.FAILED, Step.ARRIVES)
    total = counted(len(planner.guests), "guest")
    if failed:
        how = "cannot go" if dry_run else "did not go"
        raise MigrationError(f"{len(failed)} of {total} {how}: {_names(failed)}")
    if planner.newcomers:
        names = ", ".join(planner.newcomers)
        raise MigrationError(f"these guests have come to this host meanwhile: {names}")
    if not dry_run:
        echo(f"{total} gone" if planner.guests else "there is no guest on this host", err=True)
