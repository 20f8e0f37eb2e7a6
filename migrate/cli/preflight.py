# SPDX-License-Identifier: GPL-2.0-or-later
"""``preflight``: is this host, a guest on it, or another host fit for postcopy?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from migrate.cli.names import domains
from migrate.cli.options import HostPort, config_option, simulated_option
from migrate.cli.text import echo
from migrate.control.client import RUN_DIRECTORY, SOCKETS
from migrate.errors import MigrationError

UNDER_XL = (
    "under xl: when xl has destroyed a guest's source, the sender and its keeper (xen-keeper) have "
    "the missing pages; if both are killed, the pages are lost (`systemctl stop` waits until no "
    "page is missing)"
)


@dataclass(frozen=True)
class Found:
    """What was found about this host, or about a guest on it."""

    subject: str
    problems: list[str]
    warnings: list[str]
    populate_evicted: str
    limits: list[str]


@click.command("preflight")
@click.argument("domain", required=False, shell_complete=domains)
@click.option(
    "--peer",
    type=HostPort(),
    metavar="HOST[:PORT]",
    help="Try everything between this host and that one, line by line, instead of looking at this "
    "host.",
)
@click.option(
    "--ssh",
    is_flag=True,
    help="With --peer: check as well what `xl migrate` needs, here and over ssh at the peer.",
)
@config_option
@simulated_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def preflight_command(
    domain: str | None,
    peer: str | None,
    ssh: bool,
    config_path: Path | None,
    simulated: Path | None,
    as_json: bool,
) -> None:
    """Check whether a host is fit for postcopy.

    Without DOMAIN: can this host be the destination of a postcopy migration?  With DOMAIN, which is
    a name, a domid or a UUID: could that guest be paged here?

    With --peer: the name, the port, TLS in both directions, the release, the hypervisor and the
    free memory of the other host (with DOMAIN: does that guest fit?), its sender, and xl's helper.
    Run it on both hosts.

    Nothing is changed.  The exit status is 0 if all is well, and 1 if not, with one line for each
    reason.  Only the destination of a migration has to be able to page; the source need not.
    """
    if peer is not None:
        if simulated is not None and domain is None:
            raise click.UsageError(
                "--simulated: with --peer also give DOMAIN, a guest of that simulated host; "
                "without DOMAIN leave --simulated out, because the daemons are asked at their "
                f"sockets in {RUN_DIRECTORY} (or in ${SOCKETS})"
            )
        _try_peer(domain, peer, config_path, simulated, by_ssh=ssh, as_json=as_json)
        return
    if ssh:
        raise click.UsageError("--ssh: only with --peer")
    if config_path is not None and domain is not None:
        raise click.UsageError(
            "--config: not for DOMAIN, except with --peer: a guest here needs no configuration"
        )
    found = _this_host(config_path, simulated) if domain is None else _guest(domain, simulated)
    _show(found, as_json=as_json)


def _this_host(config_path: Path | None, simulated: Path | None) -> Found:
    from migrate.service.config import load
    from migrate.service.host import credentials
    from xenbackend.choose import open_hypervisor

    problems: list[str] = []
    warnings: list[str] = []
    hypervisor = open_hypervisor(simulated)
    try:
        found = hypervisor.preflight(None, paging=True)
    finally:
        hypervisor.close()
    try:
        for finding in credentials(load(config_path)):
            (problems if finding.is_fatal else warnings).append(finding.text)
    except MigrationError as error:
        problems.append(str(error))
    limits = [] if simulated else [UNDER_XL]
    problems = [*found.problems, *problems]
    return Found("this host", problems, warnings, found.populate_evicted, limits)


def _guest(domain: str, simulated: Path | None) -> Found:
    from xenbackend.choose import open_hypervisor
    from xenbackend.find import find_domain

    hypervisor = open_hypervisor(simulated)
    try:
        named = find_domain(hypervisor.domains(), domain)
        with hypervisor.open(named.domid, named.handle) as opened:
            found = opened.preflight()
    finally:
        hypervisor.close()
    limits = [] if simulated else [UNDER_XL]
    return Found(f"domain {domain}", list(found.problems), [], found.populate_evicted, limits)


def _show(found: Found, *, as_json: bool) -> None:
    from migrate.cli.peer import WAYS

    if as_json:
        shown = {key: value for key, value in asdict(found).items() if key != "subject"}
        echo(json.dumps({"ready": not found.problems, **shown}))
    else:
        for warning in found.warnings:
            echo(f"{found.subject}: warning: {warning}", err=True)
        for problem in found.problems:
            echo(f"{found.subject}: {problem}", err=True)
        if not found.problems:
            way = WAYS[found.populate_evicted]
            echo(f"{found.subject}: ready; pages are evicted {way}")
            for limit in found.limits:
                echo(limit)
    if found.problems:
        raise SystemExit(1)


def _try_peer(
    domain: str | None,
    peer: str,
    config_path: Path | None,
    simulated: Path | None,
    *,
    by_ssh: bool,
    as_json: bool,
) -> None:
    from migrate.cli.peer import PROBLEM, Check, Report, Wanted, try_all
    from migrate.lanes.ends import RECEIVER_PORT
    from migrate.service.config import load
    from migrate.units import parse_address

    def show(check: Check) -> None:
        if not as_json:
            line = f"{check.result:8}{check.what}: {check.text}"
            echo(line, err=check.result == PROBLEM)

    guest_bytes = None if domain is None else _memory_of(domain, simulated)
    wanted = Wanted(parse_address(peer, RECEIVER_PORT), load(config_path), by_ssh, guest_bytes)
    report = Report(show)
    try_all(wanted, report)
    if as_json:
        echo(
            json.dumps(
                {
                    "ready": not report.problems,
                    "peer": "{}:{}".format(*wanted.address),
                    "checks": [asdict(check) for check in report.checks],
                    "problems": report.problems,
                }
            )
        )
    if report.problems:
        raise SystemExit(1)


def _memory_of(domain: str, simulated: Path | None) -> int:
    """Return the memory that a guest needs at its destination, in bytes."""
    from xenbackend.choose import open_hypervisor
    from xenbackend.find import find_domain
    from xenbackend.pages import PAGE_SIZE

    hypervisor = open_hypervisor(simulated)
    try:
        named = find_domain(hypervisor.domains(), domain)
        with hypervisor.open(named.domid, named.handle) as opened:
            return opened.config().max_pages * PAGE_SIZE
    finally:
        hypervisor.close()
