# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``report``, and what ``loopback --report`` shares with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.migrations import (
    any_migration_argument,
    ask_all,
    latest_first,
    sockets_option,
)
from migrate.cli.options import STDOUT, ResultFile
from migrate.cli.text import json_option, report
from migrate.errors import MigrationError
from migrate.outcomes import ENDED

if TYPE_CHECKING:
    from migrate.cli.world import World

ENDS = ("sender", "receiver")
END_S = 5.0


def check_installed() -> None:
    """Raises :class:`MigrationError` if the pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MigrationError(
            f"a report needs Python's matplotlib ({error}): apt install python3-matplotlib, or pip "
            "install 'xen-postcopy[report]'"
        ) from error


def write_report(path: Path, text: str) -> None:
    """Write the report of one migration, in the encoding that it declares.  Raises ``OSError``."""
    data = text.encode()
    if path == STDOUT:
        click.echo(data, nl=False)
    else:
        path.write_bytes(data)


def answers_of(world: World, migration: str) -> list[dict[str, Any]]:
    """Return what both ends have recorded of a migration that was completed.  The receiver ends it
    a moment after the sender.
    """
    ends_at = time.monotonic() + END_S
    while True:
        answers = [world.ask(end, command="record", migration=migration) for end in ENDS]
        ended = all(answer["phase"] in ENDED for answer in answers)
        if ended or time.monotonic() > ends_at:
            return answers
        time.sleep(0.01)


@click.command("report")
@any_migration_argument
@click.option(
    "-o", "--output", type=ResultFile(), required=True, metavar="FILE",
    help="The file; -: standard output.",
)  # fmt: skip
@sockets_option
@json_option
def report_command(
    migration: str, output: Path, socket_paths: tuple[Path, ...], as_json: bool
) -> None:
    """Write a document with pictures of a migration.

    FILE is a single HTML file, which a browser shows without a network: the phases with the rates,
    the steps of the downtime, the latency of faults, the block time of each vCPU, and how each page
    of the guest came.  A migration under way is shown as it is now.

    Each daemon on this host that has the migration answers.  The source has the rates and the
    downtime, and the destination has the rest.  What the daemons on this host do not have is shown
    as unknown: make a report at the other host as well.
    """
    if as_json and output == STDOUT:
        raise click.UsageError("--json and --output - would both write to standard output")
    check_installed()
    from migrate.cli.report.accepted import accepted
    from migrate.cli.report.sections import report_of_accepted

    answers = ask_all(socket_paths, command="record", migration=migration)
    found = [accepted(answer) for answer in answers.results]
    # The guest's name may be that of several migrations.
    newest = latest_first(found)[0]
    write_report(output, report_of_accepted([one for one in found if one["id"] == newest["id"]]))
    where = "on standard output" if output == STDOUT else f"in {output}"
    text = f"{newest['domain']}: the report is {where}"
    report(text, as_json, migration=newest["id"], file=str(output))
    answers.check_complete()
