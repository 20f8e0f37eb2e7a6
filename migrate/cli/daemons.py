# SPDX-License-Identifier: GPL-2.0-or-later
"""``simulated-host``, ``sender``, ``receiver``: the long-running processes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import trio

from migrate import logs
from migrate.cli.options import RECEIVER_SOCKET, SENDER_SOCKET, F, Size, simulated_option, socket_option
from migrate.lanes.connection import parse_address
from migrate.service.config import (
    CONFIG_FILE,
    RECEIVER_PORT,
    SENDER_PORT,
    STATE_DIRECTORY,
    Address,
    ReceiverConfig,
    SenderConfig,
    load,
)
from migrate.service.lifecycle import end_with_owner
from migrate.tasks import root_cause

verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log more.")


def _run(verbose: bool, main: Any) -> None:
    end_with_owner()
    logs.set_up(verbose=verbose)
    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The configuration.  Default: {CONFIG_FILE}, if there is one.",
)


state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Directory for the journal, from which a restarted daemon resumes its migrations.  Default: {STATE_DIRECTORY}; "
    "with --simulated beside that socket.",
)


def _state(state: Path | None, simulated: Path | None) -> Path:
    return state or (STATE_DIRECTORY if simulated is None else Path(f"{simulated}.state"))


def listen_option(default: Address, who: str) -> Callable[[F], F]:
    at = "{}:{}".format(*default)
    return click.option(
        "--listen", metavar="HOST:PORT", help=f"Where {who} connect to; port 0: any free one.  Default: {at}."
    )


@click.command("sender")
@listen_option(SenderConfig.listen, "the receivers of xl's migrations")
@socket_option(SENDER_SOCKET, "this daemon, to be made")
@config_option
@state_option
@simulated_option
@verbose_option
def sender_command(
    listen: str | None,
    socket_path: Path,
    config_path: Path | None,
    state: Path | None,
    simulated: Path | None,
    verbose: bool,
) -> None:
    """The daemon at the source: migrates what `migrate` and xl's helper ask for at its control socket.

    SIGTERM gives up migrations before their handover (their guests go on here), waits for those after
    it, and ends; a second one ends it at once.
    """
    from migrate.service.journal import Journal
    from sender.daemon import SenderDaemon
    from xenbackend.choose import open_hypervisor

    config = load(config_path)
    if listen is not None:
        config = replace(config, sender=replace(config.sender, listen=parse_address(listen, SENDER_PORT)))
        config.check_addresses()
    journal = Journal(_state(state, simulated) / "sender")
    _run(verbose, SenderDaemon(open_hypervisor(simulated), socket_path, config, journal).run)


@click.command("receiver")
@listen_option(ReceiverConfig.listen, "senders")
@socket_option(RECEIVER_SOCKET, "this daemon, to be made")
@config_option
@state_option
@simulated_option
@verbose_option
def receiver_command(
    listen: str | None,
    socket_path: Path,
    config_path: Path | None,
    state: Path | None,
    simulated: Path | None,
    verbose: bool,
) -> None:
    """The daemon at the destination: takes guests in and serves their page faults.

    SIGTERM ends it when no guest depends on it any more; a second one ends it at once, and then vCPUs that
    touch a missing page stand still.
    """
    from migrate.service.journal import Journal
    from receiver.daemon import ReceiverDaemon
    from xenbackend.choose import open_hypervisor

    config = load(config_path)
    if listen is not None:
        config = replace(config, receiver=replace(config.receiver, listen=parse_address(listen, RECEIVER_PORT)))
        config.check_addresses()
    journal = Journal(_state(state, simulated) / "receiver")
    _run(verbose, ReceiverDaemon(open_hypervisor(simulated), socket_path, config, journal).run)


@click.command("simulated-host")
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    required=True,
    help="Where daemons and `simulated-guest` attach.",
)
@click.option("--memory", type=Size(), default="8G", show_default=True, help="Memory that its guests share.")
@click.option("--no-populate-evicted", is_flag=True, help="A hypervisor without the batched hypercall.")
@click.option("--no-paging", is_flag=True, help="A hypervisor built without memory paging.")
@click.option("--drop-requests", is_flag=True, help="One that lets go of paged-out pages, which Xen 4.17 does not.")
@click.option("--track-physmap", is_flag=True, help="One that logs given and taken pages, which Xen 4.17 does not.")
@verbose_option
def simulated_host_command(
    socket_path: Path, memory: int, no_populate_evicted: bool, no_paging: bool, verbose: bool, **behaviour: bool
) -> None:
    """A simulated Xen: a process that holds guests with memory, vCPUs and paging rings."""
    from migrate.control.server import listen_unix
    from migrate.service.lifecycle import notify, until_stopped
    from xenbackend.simulated.host import SimulatedHost

    if memory < 4096:
        raise click.UsageError("--memory: at least a page (4096)")
    host = SimulatedHost(memory, populate_evicted=not no_populate_evicted, paging=not no_paging, **behaviour)

    async def serve() -> None:
        async with listen_unix(socket_path, socket.SOCK_SEQPACKET) as listener:
            notify("READY=1")
            logging.getLogger(__name__).info("simulated host ready at %s", socket_path)
            await host.serve(listener)

    async def main() -> None:
        try:
            await until_stopped(serve, trio.lowlevel.checkpoint)
        finally:
            host.close()

    _run(verbose, main)
