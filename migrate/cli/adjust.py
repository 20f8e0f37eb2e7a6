# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator changes at the sender while a migration runs: ``set``, ``postcopy-now``,
``pause``, ``resume``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from migrate.cli.figures import rate
from migrate.cli.migrations import migration_argument
from migrate.cli.options import changeable_options, sender_socket, socket_option, values_of
from migrate.cli.text import announce_wait, json_option, report
from migrate.control.client import ANSWER_S, ControlClient
from migrate.options import flag
from xenbackend.unix import STARTING_S

at_sender = socket_option(sender_socket, "the local sender")


def _ask(socket_path: Path, **request: Any) -> None:
    with ControlClient(
        socket_path, announce=announce_wait, wait_s=STARTING_S, answer_s=ANSWER_S
    ) as client:
        client.call(**request)


@click.command("set")
@migration_argument
@changeable_options
@at_sender
@json_option
def set_command(migration: str, socket_path: Path, as_json: bool, **given: Any) -> None:
    """Change options of a migration that is under way.

    The new values are used at once, and `show` has them.  A restarted sender keeps the caps.  An
    option that has no effect any more is refused: after precopy only the caps can be changed.

    \b
    Slow a migration down in working hours, and remove the cap in the evening:
        xen-postcopy set web --bandwidth 20M
        xen-postcopy set web --bandwidth none
    """
    values = values_of(given)
    if not values:
        options = ", ".join(flag(name) for name in given)
        raise click.UsageError(f"nothing to change: give at least one of {options}")
    _ask(socket_path, command="set", migration=migration, values=values)
    changes = (f"{flag(name)} {_in_words(name, value)}" for name, value in values.items())
    text = f"{migration}: the sender now uses {', '.join(changes)}"
    report(text, as_json, migration=migration, done="set", values=values)


def _in_words(name: str, value: Any) -> str:
    """Return a value of ``set`` as people read it."""
    if not value and name != "dirty_threshold":
        return "none"
    return rate(value) if name.endswith("bytes_per_s") else str(value)


@click.command("postcopy-now")
@migration_argument
@at_sender
@json_option
def postcopy_now_command(migration: str, socket_path: Path, as_json: bool) -> None:
    """End the precopy of a migration and switch over now."""
    _ask(socket_path, command="postcopy-now", migration=migration)
    text = f"{migration}: the sender ends precopy and switches over"
    report(text, as_json, migration=migration, done="postcopy-now")


@click.command("pause")
@migration_argument
@at_sender
@json_option
def pause_command(migration: str, socket_path: Path, as_json: bool) -> None:
    """Pause the copying of a migration, not the guest.

    In precopy the guest runs on here, and writes pages that have to be sent again.  In postcopy it
    runs on there: pages that it touches arrive as before, and no others.  The link stays open, time
    limits do not pass, and a restarted sender keeps the pause.  A switchover is not interrupted.

    `resume` continues, `cancel` takes the migration back before its handover.
    """
    _ask(socket_path, command="pause", migration=migration)
    text = f"{migration}: copying is paused until `resume`; what the guest waits for still arrives"
    report(text, as_json, migration=migration, done="pause")


@click.command("resume")
@migration_argument
@at_sender
@json_option
def resume_command(migration: str, socket_path: Path, as_json: bool) -> None:
    """Continue the copying of a migration after `pause`."""
    _ask(socket_path, command="resume", migration=migration)
    report(f"{migration}: the sender copies again", as_json, migration=migration, done="resume")
