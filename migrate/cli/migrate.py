# SPDX-License-Identifier: GPL-2.0-or-later
"""``migrate``: ask the sender for a migration, follow it, and report its result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from migrate.cli.names import domains
from migrate.cli.options import (
    STDOUT,
    HostPort,
    migration_request,
    sender_socket,
    socket_option,
    strategy_options,
    take_log_dirty_option,
)
from migrate.cli.progress import ProgressDisplay
from migrate.cli.text import announce_wait, echo
from migrate.control.client import ControlClient
from migrate.errors import (
    DaemonGoneError,
    InterruptedMigrationError,
    MigrationError,
    UnattendedMigrationError,
)
from migrate.outcomes import outcome
from migrate.units import command
from xenbackend.unix import STARTING_S

KNOWN = ("id", "domain", "peer", "strategy", "phase", "handed_over", "outstanding", "problem")
"""The keys that ``--json`` has for a migration whose sender has ended."""


def follow_migration(client: ControlClient, request: dict[str, Any]) -> dict[str, Any]:
    """Request a migration, show its progress, and return its result.

    Ctrl-C before the handover takes the migration back; after the handover Ctrl-C leaves it to the
    daemons, and so does SIGTERM at any time.  All of these raise
    :class:`InterruptedMigrationError`.
    """
    interrupted = False
    last: dict[str, Any] | None = None

    def on_interrupt(*_signal: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise InterruptedMigrationError(
                f"not waiting any longer; {left(client.path, request, last)}"
            )
        interrupted = True
        client.send(command="cancel")

    def on_terminate(*_signal: object) -> None:
        raise InterruptedMigrationError(left(client.path, request, last))

    def take(answer: dict[str, Any]) -> None:
        nonlocal last
        if answer["event"] == "notice":
            note = f"{answer['message']}\n{left(client.path, request, last)}"
            raise InterruptedMigrationError(note)
        last = answer

    client.send(command="migrate", **request)
    try:
        with signals_handled(on_interrupt, on_terminate):
            return shown(client, take)
    except InterruptedMigrationError:
        raise
    except DaemonGoneError as error:
        error.progress = last
        raise
    except MigrationError as error:
        if interrupted:
            raise InterruptedMigrationError(f"{error}; {STAYS}") from error
        raise in_words(request["domain"], error) from error


def shown(
    client: ControlClient, take: Callable[[dict[str, Any]], None] = lambda _answer: None
) -> dict[str, Any]:
    """Show the progress of the migration that was requested, and return its result.  ``take`` is
    called with each answer before the result.
    """
    display = ProgressDisplay(sys.stderr)
    try:
        for answer in client.answers():
            if answer["event"] == "result":
                break
            take(answer)
            display.show(answer)
        result: dict[str, Any] = answer["result"]
        return result
    finally:
        display.close()


@contextlib.contextmanager
def signals_handled(
    on_interrupt: Callable[..., None], on_terminate: Callable[..., None]
) -> Iterator[None]:
    """Call these at SIGINT, and at SIGTERM unless that is ignored."""
    handlers = {signal.SIGINT: on_interrupt}
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        handlers[signal.SIGTERM] = on_terminate
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def command_at(socket: str | os.PathLike[str], *words: str) -> str:
    """Return :func:`command` for the sender at ``socket``."""
    named = [] if Path(socket) == sender_socket() else ["--socket", os.fspath(socket)]
    return command(*words, *named)


def left(
    socket: str | os.PathLike[str], request: dict[str, Any], last: dict[str, Any] | None
) -> str:
    """Return what happens to a migration that this command does not follow any more, and what to
    do.  ``socket``: the sender's.  ``last``: the last progress that the sender has reported.
    """
    if last is None:
        return (
            f"the sender was asked to migrate {request['domain']}: "
            f"{command_at(socket, 'list')} shows the result"
        )
    name = last["id"][:8]
    follow = f"{command_at(socket, 'watch', name)} follows it"
    if not last["handed_over"]:
        follow += f", {command_at(socket, 'cancel', name)} takes it back before its handover"
    return f"the migration of {last['domain']} continues in the daemons: {follow}"


STAYS = "the guest continues at the source"


def in_words(domain: str, error: MigrationError) -> MigrationError:
    """Return the error of a migration in words.  A cancellation does not read as a failure."""
    if outcome("failed", str(error)) != "cancelled":
        return error
    return MigrationError(f"{domain} was not migrated: {error}; {STAYS}")


def unattended(
    socket: Path, progress: dict[str, Any], json_path: Path | None
) -> UnattendedMigrationError:
    """Return what is known of a migration whose sender, at ``socket``, has ended, and the next
    step.
    """
    name, start = progress["domain"], "start the sender again (systemctl start xen-postcopy-sender)"
    follow = command_at(socket, "watch", progress["id"][:8])
    if progress["handed_over"]:
        what_now = (
            f"{name} runs at the destination ({progress['peer']}), and this host keeps the "
            f"{progress['outstanding']} pages that it lacks there: {start}, which sends them; "
            f"{follow} follows the migration"
        )
    else:
        what_now = (
            f"{name} is on this host, unless it was handed over after the last report: {start}, "
            f"which resumes the migration; {command_at(socket, 'list')} then shows where {name} "
            f"runs, and {follow} follows the migration"
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
    """Write the result.  Raises :class:`MigrationError`, which begins with ``what``, if the file
    cannot be written.
    """
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
    """Return a migration's result in words."""
    from migrate.units import counted, human_bytes, human_us

    latency, missing = result["fault_latency_us"], result["switchover"]["missing_pages"]
    pushed, pulled = result["push"]["pages"], result["pull"]["pages"]
    lines = [
        f"{result['domain']} migrated ({result['strategy']}): "
        f"{human_bytes(result['memory_bytes'])} in {result['total_s']:.2f} s, downtime "
        f"{human_us(result['downtime_s'] * 1e6)}",
        f"  precopy: {counted(result['precopy']['rounds'], 'round')}, "
        f"{counted(result['precopy']['pages'], 'page')}",
    ]
    if missing:
        twice = pushed + pulled - missing
        lines.append(
            f"  after the handover: {counted(missing, 'page')} missing, {pushed} pushed, "
            f"{pulled} pulled" + (f", {twice} of them by both ways" if twice > 0 else "")
        )
    lines.append(
        f"  sent: {human_bytes(result['bytes_sent'])}, {counted(result['zero_pages'], 'zero page')}"
    )
    expected = result.get("expected")  # a daemon of an older release does not send it
    if expected and expected["pages"]:
        stop_and_copy, postcopy = (  # 0: what the time depends on was not measured
            human_us(expected[key] * 1000) if expected[key] else "unknown"
            for key in ("stop_and_copy_ms", "postcopy_ms")
        )
        lines.append(
            f"  expected freeze for {counted(expected['pages'], 'page')}: stop-and-copy "
            f"{stop_and_copy}, postcopy {postcopy}"
        )
    if latency["count"]:
        lines.append(
            f"  {counted(latency['count'], 'fault')}: median {human_us(latency['p50'])}, 99% below "
            f"{human_us(latency['p99'])}, longest {human_us(latency['max'])}"
        )
    made = result["checkpoints"]
    if made["kept"]:
        lines.append(
            f"  {counted(made['kept'], 'checkpoint')} came back, {counted(made['pages'], 'page')}; "
            f"the guest was suspended for them {made['pause_s'] * 1000:.0f} ms in all, "
            f"{made['longest_pause_s'] * 1000:.1f} ms at most"
        )
    return "\n".join(lines)


def _try(socket: Path, request: dict[str, Any], json_path: Path | None) -> None:
    """Print the estimate of a migration.  Raises :class:`MigrationError` if it is not possible."""
    from migrate.cli.estimate import SECONDS, ask, lines

    found = ask(socket, seconds=SECONDS, **request)
    for line in lines(found):
        echo(line, err=json_path == STDOUT)
    write_json(json_path, {"strategy": request["strategy"], **found}, "the estimate")
    problem = found["devices"] or found["strategies"][request["strategy"]]["problem"]
    if problem:
        raise MigrationError(f"{found['domain']} cannot be migrated in this way: {problem}")


@click.command("migrate")
@click.argument("domain", shell_complete=domains)
@click.argument("destination", type=HostPort())
@strategy_options
@take_log_dirty_option("DOMAIN")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Migrate nothing.  Print what `estimate` prints, and end with an error if the guest could "
    "not be migrated in this way.",
)
@socket_option(sender_socket, "the local sender")
def migrate_command(
    domain: str,
    destination: str,
    json_path: Path | None,
    take_log_dirty: bool,
    dry_run: bool,
    socket_path: Path,
    **options: Any,
) -> None:
    """Migrate a guest to another host.

    DOMAIN is the guest's name, domid or UUID.  DESTINATION is HOST or HOST:PORT of the receiver.

    Ctrl-C before the handover undoes everything, and the guest continues here.  After the handover
    Ctrl-C ends this command only, and SIGTERM does so at any time: the migration continues in the
    daemons.  `watch` then follows the migration, and `cancel` undoes it before its handover.

    Exit status 0 when the migration was completed, 1 when not, 3 when the sender has ended
    meanwhile, 130 when interrupted.
    """
    request = {
        "domain": domain, "destination": destination, "take_log_dirty": take_log_dirty,
        **migration_request(**options),
    }  # fmt: skip
    if dry_run:
        _try(socket_path, request, json_path)
        return
    with ControlClient(socket_path, announce=announce_wait, wait_s=STARTING_S) as client:
        try:
            result = follow_migration(client, request)
        except DaemonGoneError as error:
            if error.progress is None:
                raise
            raise unattended(socket_path, error.progress, json_path) from error
    try:
        echo(summary(result), err=json_path == STDOUT)
    except OSError as error:
        about = "the migration is completed, but its summary cannot be printed"
        raise MigrationError(f"{about}: {error.strerror}") from error
    finally:
        write_json(json_path, {"verified": None, **result})
