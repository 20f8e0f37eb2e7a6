# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``xen-postcopy sender``."""

from __future__ import annotations

from typing import Any

import click

from migrate.cli.daemons import daemon_options, run_daemon
from migrate.cli.options import sender_socket
from migrate.lanes.ends import SENDER_PORT
from migrate.service.config import SenderConfig
from sender.daemon import SenderDaemon


@click.command("sender")
@daemon_options(SenderConfig.listen, "the receivers of xl's migrations", sender_socket)
def sender_command(**options: Any) -> None:
    """Run the daemon at the source of migrations.

    The sender migrates what `migrate` and xl's helper ask for at its control socket.

    On SIGTERM the sender gives up the migrations that are before their handover (their guests
    continue here), waits for the others, and ends.  A second SIGTERM ends the sender at once.
    SIGHUP does the same as SIGTERM, and a second SIGHUP does nothing.
    """
    run_daemon("sender", SENDER_PORT, SenderDaemon, **options)
