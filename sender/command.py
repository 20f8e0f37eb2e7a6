# SPDX-License-Identifier: GPL-2.0-or-later
"""``xen-postcopy sender``."""

from __future__ import annotations

from typing import Any

import click

from migrate.cli.daemons import daemon_options, run_daemon
from migrate.cli.options import SENDER_SOCKET
from migrate.service.config import SENDER_PORT, SenderConfig
from sender.daemon import SenderDaemon


@click.command("sender")
@daemon_options(SenderConfig.listen, "the receivers of xl's migrations", SENDER_SOCKET)
def sender_command(**options: Any) -> None:
    """The daemon at the source: migrates what `migrate` and xl's helper ask for at its control
    socket.

    SIGTERM gives up migrations before their handover (their guests go on here), waits for those after
    it, and ends; a second one ends it at once.  SIGHUP does the same, but a further SIGHUP does nothing.
    """
    run_daemon("sender", SENDER_PORT, SenderDaemon, **options)
