# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon finds at its own host: what it answers a peer that asks, and its certificate."""

from __future__ import annotations

import logging

import trio

from migrate.errors import MigrationError
from migrate.lanes.certificate import Finding, findings
from migrate.lanes.connection import is_loopback
from migrate.protocol.messages import Host, Offer, printable
from migrate.service.config import Config, advertised
from migrate.service.values import Address
from xenbackend.contract import DomainConfig, Hypervisor
from xenbackend.errors import XenError

log = logging.getLogger(__name__)

EVERY_S = 86400.0
"""How often a daemon looks at its certificate."""


async def look_at_host(hypervisor: Hypervisor, config: Config, end: str) -> Host:
    """Return what this host could take in now, as the daemon ``end`` answers."""
    return await trio.to_thread.run_sync(_look, hypervisor, config, end)


def _look(hypervisor: Hypervisor, config: Config, end: str) -> Host:
    at = reachable_sender(config)
    sender = "" if at is None else "[{}]:{}".format(*at) if ":" in at[0] else "{}:{}".format(*at)
    try:
        found = hypervisor.preflight(None, paging=True)
        return Host(
            printable("; ".join(found.problems)),
            found.populate_evicted,
            hypervisor.free_bytes(),
            sender,
            end,
        )
    except XenError as error:
        return Host(printable(str(error)), "none", 0, sender, end)


def config_of(offer: Offer) -> DomainConfig:
    """Return the configuration of the empty domain for an offered guest."""
    return DomainConfig(offer.name, offer.nr_pfns, offer.max_pages, offer.vcpus, offer.platform)


def refusal(hypervisor: Hypervisor, offer: Offer) -> str:
    """Return why this host could not take a guest in now; empty if it could.  Changes nothing."""
    try:
        found = hypervisor.preflight(config_of(offer), paging=offer.paging)
    except XenError as error:
        return str(error)
    return "; ".join(found.problems)


def reachable_sender(config: Config) -> Address | None:
    """Return where receivers of other hosts dial this host's sender; ``None`` if it listens for
    this host only.  May ask a name server.
    """
    if is_loopback(config.sender.listen[0]) and not config.sender.address:
        return None
    return advertised(config.sender, config.sender.listen[1])


def credentials(config: Config) -> list[Finding]:
    """Return what is wrong with the certificate and the key of this host.  Raises
    :class:`MigrationError` if they cannot be used at all.  May ask a name server.
    """
    tls = config.tls.files
    if tls is None:
        return []
    at = reachable_sender(config)
    return findings(tls, None if at is None else at[0])


async def watch_credentials(config: Config) -> None:
    """Log what is wrong with the certificate and the key of this host, now and once a day.

    It does not end the daemon: guests may need the daemon, and renewed files are used without a
    restart.
    """
    while config.tls.files is not None:
        try:
            for finding in await trio.to_thread.run_sync(credentials, config):
                log.log(logging.ERROR if finding.is_fatal else logging.WARNING, finding.text)
        except MigrationError as error:
            log.error("%s", error)
        await trio.sleep(EVERY_S)
