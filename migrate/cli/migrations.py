# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests about migrations of running daemons: ``list``, ``show``, ``watch``, ``postcopy-now``,
``cancel``, ``reconnect``, ``decide``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from migrate.cli import names, shown
from migrate.cli.accepted import accepted, checked
from migrate.cli.events import EVERY_S
from migrate.cli.figures import how_it_is, table_of
from migrate.cli.migrate import STAYS, in_words
from migrate.cli.options import F, SocketPath, receiver_socket, sender_socket
from migrate.cli.progress import EventLines, ProgressDisplay, TableDisplay
from migrate.cli.terminal import size_of, wait_while_read
from migrate.cli.text import announce_wait, echo, json_option, report
from migrate.control.client import ANSWER_S, RUN_DIRECTORY, SOCKETS, ControlClient
from migrate.errors import (
    DaemonGoneError,
    MigrationError,
    SilentDaemonError,
    UnknownMigrationError,
)
from migrate.outcomes import ENDED, outcome
from xenbackend.unix import STARTING_S, again_until

WATCH_EVERY_S = 0.25


sockets_option = click.option(
    "--socket", "socket_paths", type=SocketPath(), multiple=True,
    help="Control socket of a daemon; may be given several times.  Default: those of the sender "
    f"and of the receiver in {RUN_DIRECTORY}, or in ${SOCKETS}, if they run.  The command waits up "
    f"to {STARTING_S:g} s for a daemon that is just starting.",
)  # fmt: skip
MIGRATION = """

    MIGRATION is the guest's name, or at least the first eight characters of the identifier.
"""


def migration_argument(function: F) -> F:
    """Give a command the argument MIGRATION, and explain it at the end of the command's help.  A
    shell completes the migrations under way.
    """
    return _with_argument(function, names.migrations_under_way)


def any_migration_argument(function: F) -> F:
    """The same for a command that is also about migrations that have ended."""
    return _with_argument(function, names.migrations)


def _with_argument(function: F, complete: Callable[..., Any]) -> F:
    function.__doc__ = (function.__doc__ or "").rstrip() + MIGRATION
    return click.argument("migration", shell_complete=complete)(function)


@dataclass
class Answers:
    """What several daemons have answered to one request."""

    results: list[dict[str, Any]] = field(default_factory=list)
    sockets: tuple[Path, ...] = ()
    """The sockets of the daemons whose results these are."""
    silent: list[MigrationError] = field(default_factory=list)
    """One error for each daemon that has not answered, or that was named and does not run."""

    def sockets_of(self, migration_id: str) -> tuple[Path, ...]:
        """Return the sockets of the daemons that have answered about this migration."""
        both = zip(self.sockets, self.results, strict=True)
        return tuple(path for path, result in both if result["id"] == migration_id)

    def check_complete(self) -> None:
        """Raises :class:`SilentDaemonError` if an answer is missing."""
        if self.silent:
            raise SilentDaemonError("\n".join(map(str, self.silent)))


def ask_all(
    socket_paths: tuple[Path, ...],
    *,
    answer_s: float | None = None,
    starting_s: float | None = None,
    **request: Any,
) -> Answers:
    """Ask the daemons at these sockets, and wait for one that is just starting.  By default ask the
    sender and the receiver of this host.  It is no error if one of them does not run, because many
    hosts have one daemon only.

    Raises :class:`MigrationError` if none has a result.

    ``answer_s``: how long each may take, :data:`ANSWER_S` by default, 0 for no limit.
    ``starting_s``: how long to wait for a daemon that starts, :data:`STARTING_S` by default.
    """
    answer_s = ANSWER_S if answer_s is None else answer_s
    starting_s = STARTING_S if starting_s is None else starting_s
    problems: list[MigrationError] = []
    absent: list[MigrationError] = []
    answers = Answers()
    asked = socket_paths or (sender_socket(), receiver_socket())

    def ask(path: Path, wait_s: float) -> None:
        # Each is asked as soon as it is connected: a daemon waits for a request for some seconds.
        try:
            client = ControlClient(path, wait_s=wait_s, answer_s=answer_s, announce=announce_wait)
        except SilentDaemonError as error:
            answers.silent.append(error)
            return
        except MigrationError as error:
            absent.append(error)
            return
        try:
            with client:
                answers.results.append(client.call(**request))
                answers.sockets += (path,)
        except SilentDaemonError as error:
            answers.silent.append(error)
        except MigrationError as error:
            problems.append(error)

    def ask_any() -> bool | None:
        """Ask those that run.  Returns true if none does."""
        absent.clear()
        for path in asked:
            ask(path, 0)
        return len(absent) == len(asked) or None

    if socket_paths:
        for path in asked:
            ask(path, starting_s)
        answers.silent += absent
    elif again_until(ask_any, starting_s, lambda: announce_wait(*asked)):
        problems.append(MigrationError("; ".join(map(str, absent))))
    if not answers.results:
        raise _why_none(problems, answers.silent, absent)
    return answers


def _why_none(
    problems: list[MigrationError], silent: list[MigrationError], absent: list[MigrationError]
) -> MigrationError:
    """Return why no daemon has a result.  A daemon that has the migration has the most informative
    error.  A silent one may have it, and so may one that does not run.
    """
    answering = [p for p in problems if not isinstance(p, UnknownMigrationError)]
    first = [*answering, *silent, *problems][0]
    if isinstance(first, UnknownMigrationError):
        return UnknownMigrationError("; ".join(map(str, [first, *absent])))
    return first


def _begun(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return when each migration has begun, by its identifier: at the end that was the last, and 0
    if neither end has the time.
    """
    found: dict[str, float] = {}
    for line in lines:
        started_at = checked("started_at", line.get("started_at")) or 0.0
        found[line["id"]] = max(found.get(line["id"], 0.0), started_at)
    return found


def latest_first(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers for one name in an order in which those under way are the first, and newer
    migrations precede older ones: a guest that has left this host may have come by a migration, or
    be on its way back.
    """
    begun_at = _begun(lines)
    return sorted(lines, key=lambda line: (line["phase"] in ENDED, -begun_at[line["id"]]))


def without_the_past(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers for one name without those of earlier migrations.  As at one daemon, those
    are meant that are under way, or else the newest.
    """
    meant = {line["id"] for line in lines if line["phase"] not in ENDED}
    if not meant:
        begun_at = _begun(lines)
        meant = {one for one, at in begun_at.items() if at == max(begun_at.values())}
    return [line for line in lines if line["id"] in meant]


@click.command("list")
@sockets_option
@click.option("--active", is_flag=True, help="Only those that are under way.")
@click.option("--all", "with_past", is_flag=True, help="Also those that ended before a restart.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--watch", is_flag=True,
    help="Again and again, until Ctrl-C.  With --json: a line for each change and each second.",
)  # fmt: skip
def list_command(
    socket_paths: tuple[Path, ...], active: bool, with_past: bool, as_json: bool, watch: bool
) -> None:
    """List the migrations of the daemons on this host.

    The migrations are in the order in which they began.  Without --active these are also the last
    100 of each daemon that have ended.

    DONE: how much of the round of precopy, or of the pages missing at the handover, is done.
    OUTSTANDING: the pages that the destination lacks.  PROBLEM: why the phase is what it is, and
    usually what to do.  "-": the daemon does not have the value.  A narrow terminal has fewer
    columns.
    """
    if active and with_past:
        raise click.UsageError("--active and --all exclude each other")
    if watch:
        _watch_all(socket_paths, as_json=as_json, active=active, with_past=with_past)
        return
    answers = ask_all(socket_paths, command="list", all=with_past)
    lines = _lines(answers, as_json)
    if active:
        lines = under_way(lines)
    if as_json:
        echo(json.dumps(lines, indent=2))
    else:
        width = size_of(sys.stdout).columns if sys.stdout.isatty() else None
        echo(table_of(lines, width, time.time()))
    answers.check_complete()


def _lines(answers: Answers, as_json: bool) -> list[dict[str, Any]]:
    """Return the lines of all daemons: for people what is accepted of them."""
    return [
        line if as_json else accepted(line)
        for answer in answers.results
        # A daemon of an earlier release does not have the key ``kept``.
        for line in (*answer["migrations"], *answer.get("kept", ()))
    ]


def under_way(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of migrations that have not ended."""
    return [line for line in lines if line["phase"] not in ENDED]


def _watch_all(
    socket_paths: tuple[Path, ...], *, as_json: bool, active: bool, with_past: bool
) -> None:
    """Show all migrations, or those that are under way, until the command is interrupted."""
    display = EventLines() if as_json else TableDisplay(sys.stdout)
    answers = ask_all(socket_paths, command="list", all=with_past)
    followed = set[str]()
    """The migrations whose events are shown to the end."""
    try:
        while True:
            lines = _lines(answers, as_json)
            if active and as_json:
                followed.update(line["id"] for line in under_way(lines))
                lines = [line for line in lines if line["id"] in followed]
            elif active:
                lines = under_way(lines)
            display.show(lines, "; ".join(map(str, answers.silent)))
            wait_while_read(sys.stdout, WATCH_EVERY_S if as_json else EVERY_S)
            try:
                answers = ask_all(socket_paths, starting_s=0, command="list", all=with_past)
            except MigrationError as error:  # the daemons may be started again
                answers = Answers(silent=[error])
    finally:
        display.close()


@click.command("show")
@any_migration_argument
@sockets_option
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that was measured.")
def show_command(migration: str, socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """Show everything about a migration.

    Each daemon on this host that has the migration answers.
    """
    answers = ask_all(socket_paths, command="show", migration=migration)
    found = [
        {key: answer[key] for key in answer if key != "event"}
        for answer in without_the_past(answers.results)
    ]
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        for answer in found:
            for line in shown.lines(accepted(answer), time.time()):
                echo(line)
            echo("")
    answers.check_complete()


@click.command("watch")
@migration_argument
@sockets_option
@click.option(
    "--json", "as_json", is_flag=True,
    help="One JSON object on a line for each change, and one each second.",
)  # fmt: skip
def watch_command(migration: str, socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """Follow a migration until it ends.

    The exit status is 0 if MIGRATION was completed, and 1 if not.  Ctrl-C ends this command only.
    """
    display, events = ProgressDisplay(sys.stderr), EventLines()
    silent: list[MigrationError] = []
    known: tuple[Path, ...] = ()
    try:
        while True:
            answers = _shown_again(socket_paths, known, migration)
            if answers.silent:
                for error in answers.silent:
                    echo(f"xen-postcopy: {error}", err=True)
                silent += answers.silent
                socket_paths = answers.sockets  # daemons that have not answered are not asked again
            line = latest_first(answers.results)[0]
            migration = line["id"]  # the guest's name may also be that of another migration
            known = answers.sockets_of(migration) or known
            if as_json:
                events.show([one for one in answers.results if one["id"] == migration])
            if line["phase"] in ENDED:
                break
            if not as_json:
                display.show(line)
            wait_while_read(sys.stdout, WATCH_EVERY_S)
    finally:
        display.close()
    if outcome(line["phase"], line["problem"]) == "cancelled":
        raise in_words(line["domain"], MigrationError(line["problem"]))
    if line["phase"] != "completed":
        raise MigrationError(f"{line['domain']}: {how_it_is(line)}: {line['problem']}")
    if not as_json:
        echo(f"{line['domain']}: completed")
    if silent:
        raise MigrationError(
            "another daemon on this host did not answer, and may have something else to report"
        )


def _shown_again(
    socket_paths: tuple[Path, ...], known: tuple[Path, ...], migration: str
) -> Answers:
    """Ask for a migration.  The daemons at ``known`` have had it: if no other daemon has it, they
    are waited for, because they may just be restarted.
    """
    try:
        return ask_all(socket_paths, command="show", migration=migration)
    except (UnknownMigrationError, DaemonGoneError):
        if not known:
            raise
        return ask_all(known, command="show", migration=migration)


@click.command("cancel")
@migration_argument
@sockets_option
@json_option
def cancel_command(migration: str, socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """Cancel a migration before its handover.

    The guest continues at its source.
    """
    answers = ask_all(socket_paths, command="cancel", migration=migration)
    report(f"{migration}: cancelled; {STAYS}", as_json, migration=migration, done="cancel")
    answers.check_complete()


@click.command("reconnect")
@migration_argument
@sockets_option
@json_option
def reconnect_command(migration: str, socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """Have an interrupted migration reconnect at once.

    Without this command the daemon tries after a pause, which grows to ten seconds.
    """
    answers = ask_all(socket_paths, command="reconnect", migration=migration)
    text = f"{migration}: the daemon now tries to reach the other host"
    report(text, as_json, migration=migration, done="reconnect")
    answers.check_complete()


@click.command("decide")
@migration_argument
@click.argument("where", type=click.Choice(["here", "elsewhere"]))
@click.option("--yes", is_flag=True, help="Do not ask.  Needed if there is no terminal.")
@click.option("--force", is_flag=True, help="Also against what the other host has reported.")
@sockets_option
@json_option
def decide_command(
    migration: str, where: str, yes: bool, force: bool, socket_paths: tuple[Path, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """State where a guest runs, if the other host is lost.

    After the link was lost each host waits for the other, because only the other host has the facts
    that this host lacks.  This command states the facts instead.  Never state "here" at both hosts:
    the guest would run twice, on the same disks.

    At the source (`interrupted`): "here" resumes the guest in the state in which the guest was
    suspended, or, after `migrate --protect`, in the state of the last checkpoint.  What the guest
    has done at the destination since then is lost.  "elsewhere" destroys what is left of the guest
    here.

    At the destination (`in doubt`): "here" lets the guest run; vCPUs that touch a missing page wait
    until the source is back.  "elsewhere" destroys what has arrived.

    At the destination (`held`: the guest runs at the source, by an earlier decision): "elsewhere"
    destroys what has arrived.  "here", with --force, lets the guest continue here without its
    missing pages.
    """
    answers = ask_all(socket_paths, command="show", migration=migration)
    for error in answers.silent:
        echo(f"xen-postcopy: {error}", err=True)
    under_way = [line for line in answers.results if line["phase"] not in ENDED]
    if len(under_way) > 1:
        raise MigrationError("both daemons on this host have this migration: name one by --socket")
    meant = latest_first(answers.results)[0]["id"]
    decision = {"migration": meant, "here": where == "here", "force": force}
    for line in under_way:
        why = f": {line['problem']}" if line["problem"] else ""
        echo(f"{line['domain']} ({line['direction']}, {line['phase']}){why}", err=as_json)
        echo(f"known of the other end: {line.get('known', 'nothing')}", err=as_json)
        _check_decision(answers.sockets, decision)
        if not yes and not sys.stdin.isatty():
            raise MigrationError(
                "the confirmation needs a terminal, and there is none: --yes decides without a "
                "confirmation"
            )
        if not yes:
            question = f"Decide that {line['domain']} runs {where}?"
            click.confirm(question, abort=True, err=as_json)
    ask_all(answers.sockets, answer_s=0, command="decide", **decision)
    runs = "runs at this host" if where == "here" else "does not run at this host"
    text = f"{migration}: decided that the guest {runs}"
    report(text, as_json, migration=migration, done="decide", where=where)


def _check_decision(sockets: tuple[Path, ...], decision: dict[str, Any]) -> None:
    """Raises :class:`MigrationError` for a decision that the daemon would refuse, before anybody is
    asked to confirm it.
    """
    try:
        ask_all(sockets, answer_s=0, command="check-decision", **decision)
    except MigrationError as error:
        if "unknown command" not in str(error):  # an earlier release does not have this command
            raise
