# SPDX-License-Identifier: GPL-2.0-or-later
"""``estimate``: what a migration would take, by each strategy."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from migrate.cli.figures import rate
from migrate.cli.names import domains
from migrate.cli.options import (
    HostPort,
    Number,
    changeable_options,
    migration_request,
    sender_socket,
    socket_option,
    take_log_dirty_option,
)
from migrate.cli.terminal import size_of
from migrate.cli.text import announce_wait, echo, json_option, table
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.units import human_bytes, human_seconds, human_us
from xenbackend.unix import STARTING_S

SECONDS = 3.0
"""For how long a guest is measured."""
TITLES = ("STRATEGY", "TOTAL", "DOWNTIME", "FROZEN", "ROUNDS", "COPIED")
NUMBERS = "TOTAL DOWNTIME FROZEN ROUNDS COPIED"
Found = dict[str, Any]


def ask(socket: Path, **request: Any) -> Found:
    """Have the sender measure, and return the estimate.  Raises :class:`MigrationError`.  If this
    process ends meanwhile, so does the measurement.
    """
    try:
        with ControlClient(socket, announce=announce_wait, wait_s=STARTING_S) as client:
            found = client.call(command="estimate", **request)
    except MigrationError as error:
        raise explained(error) from error
    del found["event"]
    return found


def explained(error: MigrationError) -> MigrationError:
    """Return the error with what to do about it."""
    from migrate.cli.peer import remedied

    if "unknown command" in str(error):
        return MigrationError(
            "the sender that runs is of an older release, which makes no estimates: "
            "`xen-postcopy restart-idle` restarts it"
        )
    return MigrationError(remedied(str(error)))


def lines(found: Found) -> Iterator[str]:
    """Yield the estimate as text."""
    measured = found["measured"]
    zeros = round(100 - 100 * measured["content_share"])
    seconds, pages = measured["dirtied"][-1]
    free = measured["free_bytes"]
    yield f"{found['domain']} to {found['destination']}"
    yield from _wrapped(
        "memory",
        f"{human_bytes(measured['memory_bytes'])}, {zeros}% of it zero; "
        + (
            "what is free there is unknown"
            if free is None
            else f"{human_bytes(free)} are free there"
        ),
    )
    yield from _wrapped(
        "written", f"{human_bytes(pages * 4096)} in {human_seconds(seconds)}, each page once"
    )
    yield from _wrapped(
        "link",
        f"{rate(measured['bytes_per_s'])}, a page alone takes {human_us(measured['page_us'])}, "
        + ("TLS" if measured["encrypted"] else "not encrypted"),
    )
    if found["devices"]:
        yield from _wrapped("note", found["devices"])
    yield ""
    yield table(TITLES, [_row(*one) for one in found["strategies"].items()], numbers=NUMBERS)
    for strategy, expected in found["strategies"].items():
        if expected["problem"]:
            yield from _wrapped(strategy, f"not possible: {expected['problem']}")
    if found["recommended"]:
        yield f"recommended: {found['recommended']}: {found['reason']}"


def _row(strategy: str, expected: Found) -> tuple[str, ...]:
    """Return the cells of a strategy."""
    if expected["problem"]:
        return (strategy, *"-----")
    return (
        strategy,
        human_seconds(float(expected["total_s"])),
        human_us(expected["downtime_ms"] * 1000),
        human_us(expected["freeze_ms"] * 1000),
        str(expected["rounds"]),
        human_bytes(expected["sent_bytes"]),
    )


def _wrapped(title: str, text: str) -> list[str]:
    """Return a line with a title, broken at the edge of a terminal."""
    width = size_of(sys.stdout).columns if sys.stdout.isatty() else 10_000
    begin = f"  {title:9} "
    return textwrap.wrap(text, width, initial_indent=begin, subsequent_indent=" " * len(begin))


@click.command("estimate")
@click.argument("domain", shell_complete=domains)
@click.argument("destination", type=HostPort())
@click.option(
    "--seconds",
    type=Number(0.1, 600),
    default=SECONDS,
    show_default=True,
    help="For how long the guest's writes are measured.",
)
@changeable_options
@take_log_dirty_option("DOMAIN")
@json_option
@socket_option(sender_socket, "the local sender")
def estimate_command(
    domain: str,
    destination: str,
    seconds: float,
    take_log_dirty: bool,
    as_json: bool,
    socket_path: Path,
    **options: Any,
) -> None:
    """Estimate how long a migration would take.

    DOMAIN is the guest's name, domid or UUID.  DESTINATION is HOST or HOST:PORT of the receiver.

    The local sender connects with the destination as for a migration, and asks whether the
    destination would take the guest in.  The sender measures the link, which carries up to half a
    GiB for that, and then for some seconds which pages the guest writes.  Log-dirty is on meanwhile
    and slows the guest a little.  A guest that is being migrated cannot be measured.

    TOTAL: from the request to completion.  DOWNTIME: the guest is suspended.  FROZEN: the longest
    time for which its programs do not run; after a handover they wait for missing pages as well.

    Ctrl-C ends the measurement, and the sender switches log-dirty off.

    Exit status 0 if the guest could be migrated by one strategy at least, 1 if not, 130 when
    interrupted.
    """
    request = migration_request("hybrid", False, None, **options)
    request |= {"domain": domain, "destination": destination, "take_log_dirty": take_log_dirty}
    found = ask(socket_path, seconds=seconds, **request)
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            echo(line)
    if found["recommended"] is None:
        raise MigrationError(f"{found['domain']} cannot be migrated to {found['destination']}")
