# SPDX-License-Identifier: GPL-2.0-or-later
"""``restart-idle``: the end of an upgrade of this host's daemons."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from migrate.cli.text import echo, json_option
from migrate.control.client import ANSWER_S, RUN_DIRECTORY, ControlClient
from migrate.errors import MigrationError
from migrate.outcomes import ENDED
from xenbackend import release

DAEMONS = {
    "xen-postcopy-sender.service": Path(RUN_DIRECTORY, "sender.sock"),
    "xen-postcopy-receiver.service": Path(RUN_DIRECTORY, "receiver.sock"),
}
"""The control socket of each unit."""
SYSTEMD = Path("/run/systemd/system")


@click.command("restart-idle")
@json_option
def restart_idle_command(as_json: bool) -> None:
    """Restart the daemons of this host that no guest needs.

    The package does this when it was upgraded.  A daemon that guests need is not restarted, and is
    named with these guests: repeat the command when their migrations have ended.  A daemon that
    does not run is not started.  If this program was built for another Xen than the one that runs,
    as between the upgrade of a host and its restart, no daemon is restarted.
    """
    if problem := release.mismatch():
        text = f"no daemon was restarted, and each still runs its earlier release: {problem}"
        facts = [_facts(unit, problem=problem) for unit in DAEMONS]
        echo("\n".join(map(json.dumps, facts)) if as_json else text)
        return
    if not SYSTEMD.is_dir():  # as sd_booted(3) looks
        raise MigrationError("this host does not run systemd: restart its daemons by hand")
    for unit, path in DAEMONS.items():
        if not _runs(unit):
            continue
        guests, problem, text = [], "", f"{unit} was restarted"
        try:
            guests = guests_of(path)
        except MigrationError as error:
            problem = str(error)
            text = f"{unit} was not restarted, because it does not name its guests: {problem}"
        if guests:
            text = (
                f"{unit} was not restarted, because guests need it: {', '.join(guests)}.  It still "
                "runs the release with which it was started.  When `xen-postcopy list` shows that "
                "their migrations have ended: xen-postcopy restart-idle"
            )
        restarts = not guests and not problem
        if restarts and _systemctl("restart", unit):
            raise MigrationError(f"{unit} was not restarted: see systemctl status {unit}")
        found = _facts(unit, restarted=restarts, guests=guests, problem=problem)
        echo(json.dumps(found) if as_json else text)


def _facts(
    unit: str, *, restarted: bool = False, guests: Sequence[str] = (), problem: str = ""
) -> dict[str, Any]:
    """Return what has become of a unit, as JSON."""
    return {"unit": unit, "restarted": restarted, "guests": [*guests], "problem": problem}


def guests_of(path: Path) -> list[str]:
    """Return the guests that need the daemon which listens at ``path``, or whose migrations would
    be given up if the daemon were restarted.  Raises :class:`MigrationError`.
    """
    with ControlClient(path, answer_s=ANSWER_S) as client:
        status = client.call(command="status")
    if "guests" in status:
        return [str(name) for name in status["guests"]]
    # A daemon of 0.1.0 answers only for each migration.
    with ControlClient(path, answer_s=ANSWER_S) as client:
        lines = client.call(command="list")["migrations"]
    return [line["domain"] for line in lines if line["phase"] not in ENDED]


def _runs(unit: str) -> bool:
    return _systemctl("is-active", "--quiet", unit) == 0


def _systemctl(*arguments: str) -> int:
    try:
        return subprocess.run(["systemctl", *arguments], check=False).returncode
    except OSError as error:
        raise MigrationError(f"systemctl: {error.strerror}") from error
