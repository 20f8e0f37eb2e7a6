# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``xen-postcopy receiver``."""

from __future__ import annotations

from typing import Any

import click

from migrate.cli.daemons import daemon_options, run_daemon
from migrate.cli.options import receiver_socket
from migrate.lanes.ends import RECEIVER_PORT
from migrate.service.config import ReceiverConfig
from receiver.daemon import ReceiverDaemon


@click.command("receiver")
@daemon_options(ReceiverConfig.listen, "senders", receiver_socket)
def receiver_command(**options: Any) -> None:
    """Run the daemon at the destination of migrations.

    The receiver accepts guests and serves their page faults.

    SIGTERM ends the receiver when no guest depends on the receiver any more.  A second SIGTERM ends
    the receiver at once, and then vCPUs that touch a missing page wait.  SIGHUP ends the
    receiver like SIGTERM, but a further SIGHUP does nothing.
    """
    run_daemon("receiver", RECEIVER_PORT, ReceiverDaemon, **options)
