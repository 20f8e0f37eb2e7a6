# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests about migrations of running daemons: ``list``, ``show``, ``watch``, ``postcopy-now``,
``cancel``, ``reconnect``, ``decide``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from migrate.cli.migrate import STAYS, in_words
from migrate.cli.options import RECEIVER_SOCKET, SENDER_SOCKET, F, socket_option
from migrate.cli.progress import ProgressDisplay
from migrate.cli.text import echo, table
from migrate.control.client import ANSWER_S, CANCELLED, ENDED, ControlClient
from migrate.errors import MigrationError, SilentDaemonError, UnknownMigrationError
from xenbackend.unix import STARTING_S

WATCH_EVERY_S = 0.5


DEFAULT_SOCKETS = (SENDER_SOCKET, RECEIVER_SOCKET)
"""The sockets that are asked by default.  It is no error if no daemon listens at one of them,
because many hosts have one daemon only.
"""


sockets_option = click.option(
    "--socket", "socket_paths", type=click.Path(path_type=Path), multiple=True,
    help="Control socket of a daemon; may be given several times.  Default: those of the sender "
    f"and of the receiver in {SENDER_SOCKET.parent}, if they run.",
)  # fmt: skip
MIGRATION = """

    MIGRATION is the guest's name, or at least the first eight characters of the identifier.
"""


def migration_argument(function: F) -> F:
    """Give a command the argument MIGRATION, and explain it at the end of the command's help."""
    function.__doc__ = (function.__doc__ or "").rstrip() + MIGRATION
    return click.argument("migration")(function)


@dataclass
class Answers:
    """What several daemons have answered to one request."""

    results: list[dict[str, Any]] = field(default_factory=list)
    sockets: tuple[Path, ...] = ()
    """The sockets of the daemons whose results these are."""
    silent: list[MigrationError] = field(default_factory=list)
    """One error for each daemon that has not answered, or that was named and does not run."""

    def check_complete(self) -> None:
        """Raises :class:`SilentDaemonError` if an answer is missing."""
        if self.silent:
            raise SilentDaemonError("\n".join(map(str, self.silent)))


def _ask_all(
    socket_paths: tuple[Path, ...], *, answer_s: float | None = None, **request: Any
) -> Answers:
    """Ask the daemons at these sockets, or those of :data:`DEFAULT_SOCKETS` that run.  Raises
    :class:`MigrationError` if none has a result.

    ``answer_s``: how long each may take, :data:`ANSWER_S` by default, 0 for no limit.
    """
    answer_s = ANSWER_S if answer_s is None else answer_s
    problems: list[MigrationError] = []
    answers = Answers()
    clients = []
    asked = socket_paths or DEFAULT_SOCKETS
    absent: dict[Path, MigrationError] = {}
    for path in asked:
        try:
            clients.append((path, ControlClient(path, answer_s=answer_s)))
        except SilentDaemonError as error:
            answers.silent.append(error)
        except MigrationError as error:
            absent[path] = error
    if not clients and not answers.silent:
        path = asked[0]
        clients.append((path, ControlClient(path, wait_s=STARTING_S, answer_s=answer_s)))
        del absent[path]
    if socket_paths:
        answers.silent += absent.values()
    for path, client in clients:
        try:
            with client:
                answers.results.append(client.call(**request))
                answers.sockets += (path,)
        except SilentDaemonError as error:
            answers.silent.append(error)
        except MigrationError as error:
            problems.append(error)
    if not answers.results:
        # A daemon that has the migration has the most informative error.  A silent one may have it.
        answering = [p for p in problems if not isinstance(p, UnknownMigrationError)]
        raise [*answering, *answers.silent, *problems][0]
    return answers


def under_way_first(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers for one name in an order in which migrations that have ended are the last:
    a guest that has left this host may be on its way back.
    """
    return sorted(lines, key=lambda line: line["phase"] in ENDED)


def problem(line: dict[str, Any]) -> str:
    """Return why a migration has ended or waits, or why its guest is not protected any more."""
    if line["problem"]:
        return f"{line['problem']}{io_limit(line)}"
    return line.get("unprotected", "") and f"not protected any more: {line['unprotected']}"


def io_limit(line: dict[str, Any]) -> str:
    """Return when the guest's I/O to missing pages fails, as text; empty if that cannot happen."""
    left_s = line.get("io_fails_in_s")
    if left_s is None:
        return ""
    if left_s:
        return f"; its I/O to missing pages fails in {left_s:.0f} s"
    return "; its I/O to missing pages has failed: look for I/O errors in the guest"


def known(line: dict[str, Any], key: str) -> Any:
    """Return a value for people: "-" if the daemon does not have the value, which is 0 in JSON."""
    return "-" if key in line.get("unknown", ()) else line[key]


def in_a_line(value: Any) -> str:
    """Return a value of JSON as people read it; empty if there is nothing to show."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case dict():
            inner = {k: v for k, v in value.items() if not isinstance(v, dict)}
            return ", ".join(f"{k.replace('_', ' ')} {in_a_line(v)}" for k, v in inner.items())
        case _:
            return str(value)


@click.command("list")
@sockets_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_command(socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """List the migrations of the daemons on this host.

    OUTSTANDING: the pages that the destination lacks.  PROBLEM: why the phase is what it is, and
    usually what to do.  "-": the daemon does not have the value.
    """
    answers = _ask_all(socket_paths, command="list")
    lines = [
        line
        for answer in answers.results
        # A daemon of an earlier release does not have the key ``kept``.
        for line in (*answer["migrations"], *answer.get("kept", ()))
    ]
    if as_json:
        echo(json.dumps(lines, indent=2))
        answers.check_complete()
        return
    titles = ("ID", "DOMAIN", "DIRECTION", "PHASE", "OUTSTANDING", "PROBLEM")
    rows = [
        (
            line["id"][:8],
            *(known(line, key) for key in ("domain", "direction", "phase", "outstanding")),
            problem(line),
        )
        for line in lines
    ]
    echo(table(titles, rows, numbers="OUTSTANDING"))
    answers.check_complete()


@click.command("show")
@migration_argument
@sockets_option
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that was measured.")
def show_command(migration: str, socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """Show everything about a migration.

    Each daemon on this host that has the migration answers.
    """
    found = []
    answers = _ask_all(socket_paths, command="show", migration=migration)
    for answer in answers.results:
        del answer["event"]
        found.append(answer)
    if as_json:
        echo(json.dumps(found, indent=2))
        answers.check_complete()
        return
    for answer in found:
        details = answer.pop("details")
        # For a key that both have, the details are final at the end; before, the progress is newer.
        both = {**answer, **details} if answer["phase"] in ENDED else {**details, **answer}
        keys = dict.fromkeys((*answer, *details))
        keys.pop("unknown", None)
        for key in keys:
            value = in_a_line(known(both, key))
            if value:
                echo(f"{key.replace('_', ' '):22} {value}")
        echo("")
    answers.check_complete()


@click.command("watch")
@migration_argument
@sockets_option
def watch_command(migration: str, socket_paths: tuple[Path, ...]) -> None:
    """Follow a migration until it ends.

    The exit status is 0 if MIGRATION was completed, and 1 if not.  Ctrl-C ends this command only.
    """
    display = ProgressDisplay(sys.stderr)
    silent: list[MigrationError] = []
    try:
        while True:
            answers = _ask_all(socket_paths, command="show", migration=migration)
            if answers.silent:
                for error in answers.silent:
                    echo(f"xen-postcopy: {error}", err=True)
                silent += answers.silent
                socket_paths = answers.sockets  # daemons that have not answered are not asked again
            line = under_way_first(answers.results)[0]
            migration = line["id"]  # the guest's name may also be that of another migration
            if line["phase"] in ENDED:
                break
            display.show(line)
            time.sleep(WATCH_EVERY_S)
    finally:
        display.close()
    if line["problem"].startswith(CANCELLED):
        raise in_words(line["domain"], MigrationError(line["problem"]))
    if line["phase"] != "completed":
        raise MigrationError(f"{line['domain']}: {line['phase']}: {line['problem']}")
    echo(f"{line['domain']}: completed")
    if silent:
        raise MigrationError(
            "another daemon on this host did not answer, and may have something else to report"
        )


@click.command("postcopy-now")
@migration_argument
@socket_option(SENDER_SOCKET, "the local sender")
def postcopy_now_command(migration: str, socket_path: Path) -> None:
    """End the precopy of a migration and switch over now."""
    with ControlClient(socket_path, wait_s=STARTING_S, answer_s=ANSWER_S) as client:
        client.call(command="postcopy-now", migration=migration)
    echo(f"{migration}: the sender ends precopy and switches over", err=True)


@click.command("cancel")
@migration_argument
@sockets_option
def cancel_command(migration: str, socket_paths: tuple[Path, ...]) -> None:
    """Cancel a migration before its switchover.

    The guest continues at its source.
    """
    answers = _ask_all(socket_paths, command="cancel", migration=migration)
    echo(f"{migration}: cancelled; {STAYS}", err=True)
    answers.check_complete()


@click.command("reconnect")
@migration_argument
@sockets_option
def reconnect_command(migration: str, socket_paths: tuple[Path, ...]) -> None:
    """Have an interrupted migration reconnect at once.

    Without this command the daemon tries after a pause, which grows to ten seconds.
    """
    answers = _ask_all(socket_paths, command="reconnect", migration=migration)
    echo(f"{migration}: the daemon now tries to reach the other host", err=True)
    answers.check_complete()


@click.command("decide")
@migration_argument
@click.argument("where", type=click.Choice(["here", "elsewhere"]))
@click.option("--yes", is_flag=True, help="Do not ask.  Needed if there is no terminal.")
@click.option("--force", is_flag=True, help="Also against what the other host has reported.")
@sockets_option
def decide_command(
    migration: str, where: str, yes: bool, force: bool, socket_paths: tuple[Path, ...]
) -> None:
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
    answers = _ask_all(socket_paths, command="show", migration=migration)
    for error in answers.silent:
        echo(f"xen-postcopy: {error}", err=True)
    under_way = [line for line in answers.results if line["phase"] not in ENDED]
    if len(under_way) > 1:
        raise MigrationError("both daemons on this host have this migration: name one by --socket")
    meant = under_way_first(answers.results)[0]["id"]
    decision = {"migration": meant, "here": where == "here", "force": force}
    for line in under_way:
        why = f": {line['problem']}" if line["problem"] else ""
        echo(f"{line['domain']} ({line['direction']}, {line['phase']}){why}")
        echo(f"known of the other end: {line.get('known', 'nothing')}")
        _check_decision(answers.sockets, decision)
        if not yes and not sys.stdin.isatty():
            raise MigrationError(
                "the confirmation needs a terminal, and there is none: --yes decides without a "
                "confirmation"
            )
        if not yes:
            click.confirm(f"Decide that {line['domain']} runs {where}?", abort=True)
    _ask_all(answers.sockets, answer_s=0, command="decide", **decision)
    runs = "runs at this host" if where == "here" else "does not run at this host"
    echo(f"{migration}: decided that the guest {runs}", err=True)


def _check_decision(sockets: tuple[Path, ...], decision: dict[str, Any]) -> None:
    """Raises :class:`MigrationError` for a decision that the daemon would refuse, before anybody is
    asked to confirm it.
    """
    try:
        _ask_all(sockets, answer_s=0, command="check-decision", **decision)
    except MigrationError as error:
        if "unknown command" not in str(error):  # an earlier release does not have this command
            raise
