# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to running daemons: ``migrate``, ``list``, ``postcopy-now``, ``cancel``, ``decide``,
...
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from migrate.cli.options import (
    RECEIVER_SOCKET,
    SENDER_SOCKET,
    STDOUT,
    HostPort,
    migration_request,
    socket_option,
    strategy_options,
)
from migrate.cli.progress import ProgressDisplay
from migrate.cli.text import echo
from migrate.control.client import ANSWER_S, ENDED, ControlClient
from migrate.errors import (
    DaemonGoneError,
    InterruptedMigrationError,
    MigrationError,
    SilentDaemonError,
    UnattendedMigrationError,
    UnknownMigrationError,
)
from xenbackend.unix import STARTING_S

WATCH_EVERY_S = 0.5


KNOWN = ("id", "domain", "peer", "strategy", "phase", "handed_over", "outstanding", "problem")
"""What ``--json`` has of a migration whose sender has ended."""


def follow_migration(client: ControlClient, request: dict[str, Any]) -> dict[str, Any]:
    """Request a migration, show its progress, and return its result.

    Ctrl-C before the handover takes the migration back; after the handover Ctrl-C leaves it to the
    daemons, and so does SIGTERM at any time unless the caller handles SIGTERM.  All of these raise
    :class:`InterruptedMigrationError`.
    """
    interrupted = False
    last: dict[str, Any] | None = None

    def on_interrupt(*_signal: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise InterruptedMigrationError(f"not waiting any longer; {left(request, last)}")
        interrupted = True
        client.say(command="cancel")

    def on_terminate(*_signal: object) -> None:
        raise InterruptedMigrationError(left(request, last))

    client.say(command="migrate", **request)
    display = ProgressDisplay(sys.stderr)
    try:
        with signals_handled(on_interrupt, on_terminate):
            for answer in client.answers():
                match answer["event"]:
                    case "progress":
                        last = answer
                        display.show(answer)
                    case "notice":
                        note = f"{answer['message']}\n{left(request, last)}"
                        raise InterruptedMigrationError(note)
        result: dict[str, Any] = answer["result"]
        return result
    except InterruptedMigrationError:
        raise
    except DaemonGoneError as error:
        error.progress = last
        raise
    except MigrationError as error:
        if interrupted:
            raise InterruptedMigrationError(f"{error}; the guest goes on at the source") from error
        raise in_words(request["domain"], error) from error
    finally:
        display.close()


@contextlib.contextmanager
def signals_handled(
    on_interrupt: Callable[..., None], on_terminate: Callable[..., None]
) -> Iterator[None]:
    """Call these at SIGINT, and at SIGTERM if nobody else handles SIGTERM."""
    handlers = {signal.SIGINT: on_interrupt}
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        handlers[signal.SIGTERM] = on_terminate
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def left(request: dict[str, Any], last: dict[str, Any] | None) -> str:
    """What becomes of a migration that this command does not follow any more, and what to do.
    ``last``: the last progress that the daemon has reported.
    """
    if last is None:
        return (
            f"the sender was asked to migrate {request['domain']}: `xen-postcopy list` shows "
            "what became of that"
        )
    name = last["id"][:8]
    follow = f"`xen-postcopy watch {name}` follows it"
    if not last["handed_over"]:
        follow += f", `xen-postcopy cancel {name}` takes it back before its switchover"
    return f"the migration of {last['domain']} continues in the daemons: {follow}"


CANCELLED = "cancelled: "
"""How the reason of a migration begins that somebody has cancelled."""


def in_words(domain: str, error: MigrationError) -> MigrationError:
    """The error of a migration: somebody's cancellation does not read as a failure."""
    reason = str(error)
    if not reason.startswith(CANCELLED):
        return error
    reason = reason.removeprefix(CANCELLED)
    return MigrationError(f"{domain} was not migrated: {reason}; the guest continues at its source")


def unattended(progress: dict[str, Any], json_path: Path | None) -> UnattendedMigrationError:
    """What is known of a migration whose sender has ended, and what to do."""
    name, start = progress["domain"], "start the sender again (systemctl start xen-postcopy-sender)"
    follow = f"xen-postcopy watch {progress['id'][:8]}"
    if progress["handed_over"]:
        what_now = (
            f"{name} runs at the destination ({progress['peer']}), and this host keeps the "
            f"{progress['outstanding']} pages that it lacks there: {start}, which sends them; "
            f"`{follow}` follows the migration"
        )
    else:
        what_now = (
            f"{name} is on this host, unless it was handed over in the moment after that: {start}, "
            f"which takes up what was left; `xen-postcopy list` then shows where {name} runs, and "
            f"`{follow}` follows the migration"
        )
    error = UnattendedMigrationError(
        f"the sender has ended during the migration of {name}, whose last known phase is "
        f"{progress['phase']}; {what_now}"
    )
    try:
        write_json(
            json_path,
            {"verified": None, **{key: progress.get(key) for key in KNOWN}},
            "what is known",
        )
    except MigrationError as unwritten:
        error.add_note(f"xen-postcopy: {unwritten}")
    return error


def write_json(
    path: Path | None,
    result: dict[str, Any],
    what: str = "the migration is completed, but its result",
) -> None:
    """Raises :class:`MigrationError`, which begins with ``what``, if the file cannot be written."""
    if path is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    try:
        if path == STDOUT:
            click.echo(text, nl=False)
        else:
            path.write_text(text)
    except OSError as error:
        raise MigrationError(f"{what} cannot be written to {path}: {error.strerror}") from error


def summary(result: dict[str, Any]) -> str:
    """A migration in words."""
    from migrate.units import human_bytes

    latency = result["fault_latency_us"]
    lines = [
        f"{result['domain']} migrated ({result['strategy']}): "
        f"{human_bytes(result['memory_bytes'])} in {result['total_s']:.2f} s, downtime "
        f"{result['downtime_s'] * 1000:.1f} ms",
        f"  precopy: {result['precopy']['rounds']} rounds, {result['precopy']['pages']} pages; "
        f"after the handover: {result['switchover']['missing_pages']} pages, "
        f"{result['push']['pages']} of them pushed and {result['pull']['pages']} pulled; "
        f"{result['zero_pages']} zero pages",
    ]
    if latency["count"]:
        lines.append(
            f"  {latency['count']} faults: median {latency['p50']:.0f} us, 99% below "
            f"{latency['p99']:.0f} us, longest {latency['max']:.0f} us"
        )
    made = result["checkpoints"]
    if made["kept"]:
        lines.append(
            f"  {made['kept']} checkpoints came back, {made['pages']} pages; the guest stood still "
            f"for them {made['pause_s'] * 1000:.0f} ms in all, "
            f"{made['longest_pause_s'] * 1000:.1f} ms at most"
        )
    return "\n".join(lines)


@click.command("migrate")
@click.argument("domain")
@click.argument("destination", type=HostPort())
@strategy_options
@click.option(
    "--take-log-dirty",
    is_flag=True,
    help="Where log-dirty is on for DOMAIN, switch it off first: only if no other program uses it "
    "any more.",
)
@socket_option(SENDER_SOCKET, "the local sender")
def migrate_command(
    domain: str,
    destination: str,
    json_path: Path | None,
    take_log_dirty: bool,
    socket_path: Path,
    **options: Any,
) -> None:
    """Migrate DOMAIN (a name, a domid or a UUID) to the receiver at DESTINATION (HOST or
    HOST:PORT).

    Ctrl-C before the switchover undoes everything, and the guest continues here.  After the
    switchover Ctrl-C ends this command only, and SIGTERM does so at any time: the migration
    continues in the daemons.  `watch` then follows the migration, and `cancel` undoes it before its
    switchover.
    """
    request = {
        "domain": domain, "destination": destination, "take_log_dirty": take_log_dirty,
        **migration_request(**options),
    }  # fmt: skip
    with ControlClient(socket_path, wait_s=STARTING_S) as client:
        try:
            result = follow_migration(client, request)
        except DaemonGoneError as error:
            if error.progress is None:
                raise
            raise unattended(error.progress, json_path) from error
    echo(summary(result), err=json_path == STDOUT)
    write_json(json_path, {"verified": None, **result})


sockets_option = click.option(
    "--socket", "socket_paths", type=click.Path(path_type=Path), multiple=True,
    default=[SENDER_SOCKET, RECEIVER_SOCKET], show_default=True,
    help="Control socket of a daemon; may be given several times.",
)  # fmt: skip


@dataclass
class Answers:
    """What several daemons have answered to one request."""

    results: list[dict[str, Any]] = field(default_factory=list)
    sockets: tuple[Path, ...] = ()
    """Of the daemons whose results these are."""
    silent: list[SilentDaemonError] = field(default_factory=list)

    def check_complete(self) -> None:
        """Raises :class:`SilentDaemonError` if a daemon has not answered."""
        if self.silent:
            raise SilentDaemonError("\n".join(map(str, self.silent)))


def _ask_all(
    socket_paths: tuple[Path, ...], *, answer_s: float | None = None, **request: Any
) -> Answers:
    """Ask the daemons that run.  Raises :class:`MigrationError` if none has a result.

    ``answer_s``: how long each may take, :data:`ANSWER_S` by default, 0 for no limit.
    """
    answer_s = ANSWER_S if answer_s is None else answer_s
    problems: list[MigrationError] = []
    answers = Answers()
    clients = []
    for path in socket_paths:
        try:
            clients.append((path, ControlClient(path, answer_s=answer_s)))
        except SilentDaemonError as error:
            answers.silent.append(error)
        except MigrationError:
            pass  # many hosts have one of them
    if not clients and not answers.silent:
        path = socket_paths[0]
        clients.append((path, ControlClient(path, wait_s=STARTING_S, answer_s=answer_s)))
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
        # The daemon that has the migration says most; one that is silent may have it.
        answering = [p for p in problems if not isinstance(p, UnknownMigrationError)]
        raise [*answering, *answers.silent, *problems][0]
    return answers


def problem(line: dict[str, Any]) -> str:
    """Why a migration has ended or waits, or why its guest is not protected any more."""
    if line["problem"]:
        return str(line["problem"]).removeprefix(CANCELLED)
    return line.get("unprotected", "") and f"not protected any more: {line['unprotected']}"


@click.command("list")
@sockets_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_command(socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """The migrations of the daemons on this host, running and ended."""
    answers = _ask_all(socket_paths, command="list")
    lines = [line for answer in answers.results for line in answer["migrations"]]
    if as_json:
        echo(json.dumps(lines, indent=2))
        answers.check_complete()
        return
    echo(f"{'ID':10}{'DOMAIN':20}{'DIRECTION':11}{'PHASE':13}{'OUTSTANDING':>11}  PROBLEM")
    for line in lines:
        echo(
            f"{line['id'][:8]:10}{line['domain']:20}{line['direction']:11}{line['phase']:13}"
            f"{line['outstanding']:>11}  {problem(line)}"
        )
    answers.check_complete()


@click.command("show")
@click.argument("migration")
@sockets_option
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that was measured.")
def show_command(migration: str, socket_paths: tuple[Path, ...], as_json: bool) -> None:
    """Show everything about MIGRATION (its id, the beginning of it, or its domain's name), from the
    daemons on this host.
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
        # What both have is measured at the end; until then the progress is newer.
        both = {**answer, **details} if answer["phase"] in ENDED else {**details, **answer}
        for key, value in {**dict.fromkeys((*answer, *details)), **both}.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, dict))
            if value not in ("", None):
                echo(f"{key.replace('_', ' '):22} {value}")
        echo("")
    answers.check_complete()


@click.command("watch")
@click.argument("migration")
@sockets_option
def watch_command(migration: str, socket_paths: tuple[Path, ...]) -> None:
    """Follow MIGRATION (its id, the beginning of it, or its domain's name) until it ends.

    Exit status 0 when it was completed, 1 when not.  Ctrl-C ends the watching only.
    """
    display = ProgressDisplay(sys.stderr)
    silent: list[SilentDaemonError] = []
    try:
        while True:
            answers = _ask_all(socket_paths, command="show", migration=migration)
            if answers.silent:
                for error in answers.silent:
                    echo(f"xen-postcopy: {error}", err=True)
                silent += answers.silent
                socket_paths = answers.sockets  # only who answers is asked further
            line = answers.results[0]
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
@click.argument("migration")
@socket_option(SENDER_SOCKET, "the local sender")
def postcopy_now_command(migration: str, socket_path: Path) -> None:
    """End the precopy of MIGRATION (its id or its domain's name) and switch over now."""
    with ControlClient(socket_path, wait_s=STARTING_S, answer_s=ANSWER_S) as client:
        client.call(command="postcopy-now", migration=migration)


@click.command("cancel")
@click.argument("migration")
@sockets_option
def cancel_command(migration: str, socket_paths: tuple[Path, ...]) -> None:
    """Cancel MIGRATION (its id or its domain's name) before its switchover.  The guest continues at
    its source.
    """
    _ask_all(socket_paths, command="cancel", migration=migration).check_complete()


@click.command("reconnect")
@click.argument("migration")
@sockets_option
def reconnect_command(migration: str, socket_paths: tuple[Path, ...]) -> None:
    """Have MIGRATION, which was interrupted, try at once to reach the other host.

    Without this command the daemon tries after a pause, which grows to ten seconds.
    """
    _ask_all(socket_paths, command="reconnect", migration=migration).check_complete()


@click.command("decide")
@click.argument("migration")
@click.argument("where", type=click.Choice(["here", "elsewhere"]))
@click.option("--yes", is_flag=True, help="Do not ask.  Needed where there is no terminal.")
@click.option("--force", is_flag=True, help="Also against what the other host has reported.")
@sockets_option
def decide_command(
    migration: str, where: str, yes: bool, force: bool, socket_paths: tuple[Path, ...]
) -> None:
    """State where the guest of MIGRATION runs, when the other host never comes back.

    After the link was lost each host waits for the other, because only the other host has the facts
    that this host lacks.  This command states the facts instead.  Never state "here" at both hosts:
    the guest would run twice, on the same disks.

    At the source (`interrupted`): "here" resumes the guest in the state in which the guest was
    suspended, or, after `migrate --protect`, in the state of the last checkpoint.  What the guest
    has done at the destination since then is lost.  "elsewhere" destroys what is left of the guest
    here.

    At the destination (`in doubt`): "here" lets the guest run; vCPUs that touch a missing page wait
    until the source is back.  "elsewhere" destroys what has arrived.
    """
    answers = _ask_all(socket_paths, command="show", migration=migration)
    for error in answers.silent:
        echo(f"xen-postcopy: {error}", err=True)
    shown = answers.results
    under_way = [line for line in shown if line["phase"] not in ENDED]
    if len(under_way) > 1:
        raise MigrationError("both daemons on this host have this migration: say which by --socket")
    meant = (under_way or shown)[0]["id"]
    decision = {"migration": meant, "here": where == "here", "force": force}
    for line in under_way:
        echo(
            f"{line['domain']} ({line['direction']}, {line['phase']}): "
            f"{line['problem'] or 'no problem'}"
        )
        echo(f"known of the other end: {line.get('known', 'nothing')}")
        _check_decision(answers.sockets, decision)
        if not yes and not sys.stdin.isatty():
            raise MigrationError(
                "this is asked for at a terminal, and there is none: --yes decides without being "
                "asked"
            )
        if not yes:
            click.confirm(f"Decide that {line['domain']} runs {where}?", abort=True)
    _ask_all(answers.sockets, answer_s=0, command="decide", **decision)


def _check_decision(sockets: tuple[Path, ...], decision: dict[str, Any]) -> None:
    """Raises :class:`MigrationError` for a decision that the daemon would refuse: nobody has to
    confirm it.
    """
    try:
        _ask_all(sockets, answer_s=0, command="check-decision", **decision)
    except MigrationError as error:
        if "unknown command" not in str(error):  # of a daemon of an earlier release
            raise
