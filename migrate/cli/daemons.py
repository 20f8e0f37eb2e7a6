# SPDX-License-Identifier: GPL-2.0-or-later
"""The long-running processes: ``simulated-host``, and what the commands ``sender`` and ``receiver``
share.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import click
import trio

from migrate import logs
from migrate.cli.options import (
    F,
    HostPort,
    Size,
    SocketPath,
    config_option,
    simulated_option,
    socket_option,
)
from migrate.service.config import (
    STATE_DIRECTORY,
    Config,
    load,
)
from migrate.service.history import History
from migrate.service.host import watch_credentials
from migrate.service.inhibitor import inhibit_shutdown
from migrate.service.journal import Journal
from migrate.service.lifecycle import end_with_owner
from migrate.service.values import Address
from migrate.tasks import kept_up, root_cause
from migrate.units import parse_address
from xenbackend.choose import open_hypervisor
from xenbackend.contract import Hypervisor


class Daemon(Protocol):
    @property
    def history(self) -> History: ...

    @property
    def started(self) -> trio.Event:
        """See :class:`migrate.metrics.serve.Daemon`."""

    async def run(self) -> None: ...

    def snapshots(self) -> Iterable[dict[str, Any]]:
        """See :class:`migrate.metrics.serve.Daemon`."""

    def guests_in_need(self) -> list[str]:
        """The names of the guests that need this daemon."""


verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log more.")


def run(main: Callable[[], Awaitable[None]], *, verbose: bool) -> None:
    end_with_owner()
    logs.set_up(verbose=verbose)
    try:
        trio.run(main, strict_exception_groups=True)  # not the default before trio 0.25
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the journal, from which a restarted daemon resumes its migrations.  "
    f"Default: {STATE_DIRECTORY}; with --simulated, a directory beside that socket.",
)


def daemon_options(listen: Address, who: str, socket_path: Callable[[], Path]) -> Callable[[F], F]:
    """The options of :func:`run_daemon`.  ``listen``: where the daemon listens by default, for
    ``who``.
    """
    at = "{}:{}".format(*listen)
    options = [
        click.option(
            "--listen",
            type=HostPort(listens=True),
            metavar="HOST:PORT",
            help=f"Where {who} connect to; port 0: any free one.  Default: {at}.",
        ),
        socket_option(socket_path, "this daemon, to be made", is_made=True),
        config_option,
        state_option,
        simulated_option,
        verbose_option,
    ]

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def run_daemon(
    end: str,
    default_port: int,
    make: Callable[[Hypervisor, Path, Config, Journal], Daemon],
    *,
    listen: str | None,
    socket_path: Path,
    config_path: Path | None,
    state: Path | None,
    simulated: Path | None,
    verbose: bool,
) -> None:
    """Run the daemon that ``make`` makes until it ends.  ``end``: ``sender`` or ``receiver``."""
    config = load(config_path)
    if listen is not None:
        section = replace(getattr(config, end), listen=parse_address(listen, default_port))
        config = replace(config, **{end: section})
        config.check_addresses()
    config.check_metrics(end, socket_path)
    directory = state or (STATE_DIRECTORY if simulated is None else Path(f"{simulated}.state"))
    daemon = make(open_hypervisor(simulated), socket_path, config, Journal(directory / end))
    metrics = None
    if config.metrics.is_on(end):
        from migrate.metrics.serve import Metrics

        metrics = Metrics(end, config.metrics, daemon)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            if metrics is not None:
                await nursery.start(metrics.serve)
            if simulated is None:
                about = "the lock against a shutdown of this host"
                nursery.start_soon(kept_up, about, inhibit_shutdown, end, daemon.guests_in_need)
            about = "the look at this host's certificate"
            nursery.start_soon(kept_up, about, watch_credentials, config)
            await daemon.run()
            nursery.cancel_scope.cancel()

    run(main, verbose=verbose)


@click.command("simulated-host")
@click.option(
    "--socket",
    "socket_path",
    type=SocketPath(),
    required=True,
    help="Where daemons and `simulated-guest` attach.",
)
@click.option(
    "--memory", type=Size(), default="8G", show_default=True, help="Memory that its guests share."
)
@click.option(
    "--no-populate-evicted", is_flag=True, help="A hypervisor without the batched hypercall."
)
@click.option("--no-paging", is_flag=True, help="A hypervisor built without memory paging.")
@click.option(
    "--drop-requests",
    is_flag=True,
    help="A hypervisor that releases paged-out pages, which Xen 4.17 does not.",
)
@click.option(
    "--track-physmap",
    is_flag=True,
    help="A hypervisor that logs given and taken pages, which Xen 4.17 does not.",
)
@verbose_option
def simulated_host_command(
    socket_path: Path,
    memory: int,
    no_populate_evicted: bool,
    no_paging: bool,
    verbose: bool,
    **behaviour: bool,
) -> None:
    """Run a simulated Xen.

    The process holds guests with memory, vCPUs and paging rings.
    """
    from migrate.control.server import listen_unix
    from migrate.service.lifecycle import notify, until_stopped
    from xenbackend.simulated.host import SimulatedHost

    if memory < 4096:
        raise click.UsageError("--memory: at least a page (4096)")
    host = SimulatedHost(
        memory, populate_evicted=not no_populate_evicted, paging=not no_paging, **behaviour
    )

    async def serve() -> None:
        async with listen_unix(socket_path, socket.SOCK_SEQPACKET) as listener:
            notify("READY=1")
            logging.getLogger(__name__).info("simulated host ready at %s", socket_path)
            await host.serve(listener)

    async def is_needed() -> bool:
        return False

    async def main() -> None:
        try:
            await until_stopped(serve, is_needed)
        finally:
            host.close()

    run(main, verbose=verbose)
