# SPDX-License-Identifier: GPL-2.0-or-later
"""``preflight``: is this host, or a guest on it, fit for postcopy?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from migrate.cli.options import simulated_option
from migrate.cli.text import echo

WAYS = {
    "native": "in batches (the hypervisor has populate_evicted)",
    "fallback": "one by one (the hypervisor has no populate_evicted; xenbackend/hypervisor/ has "
    "it as a patch)",
    "none": "not at all",
}


UNDER_XL = (
    "under xl: when xl has destroyed a guest's source, the sender and its keeper (xen-keeper) have "
    "the missing pages; if both are killed, the pages are lost (`systemctl stop` waits until no "
    "page is missing)"
)


@click.command("preflight")
@click.argument("domain", required=False)
@simulated_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def preflight_command(domain: str | None, simulated: Path | None, as_json: bool) -> None:
    """Check whether this host is fit for postcopy.

    Without DOMAIN: can this host be the destination of a postcopy migration?  With DOMAIN, which is
    a name, a domid or a UUID: could that guest be paged here?

    Nothing is changed.  The exit status is 0 if it could, and 1 if not, with one line for each
    reason.  Only the destination of a migration has to be able to page; the source need not.
    """
    from xenbackend.choose import open_hypervisor
    from xenbackend.contract import find_domain

    hypervisor = open_hypervisor(simulated)
    try:
        if domain is None:
            found = hypervisor.preflight(None, paging=True)
        else:
            named = find_domain(hypervisor.domains(), domain)
            opened = hypervisor.open(named.domid, named.handle)
            found = opened.preflight()
            opened.close()
    finally:
        hypervisor.close()
    subject = "this host" if domain is None else f"domain {domain}"
    if as_json:
        echo(
            json.dumps(
                {
                    "ready": not found.problems,
                    "problems": found.problems,
                    "populate_evicted": found.populate_evicted,
                    "limits": [] if simulated else [UNDER_XL],
                }
            )
        )
    elif found.problems:
        for problem in found.problems:
            echo(f"{subject}: {problem}", err=True)
    else:
        echo(f"{subject}: ready; pages are evicted {WAYS[found.populate_evicted]}")
        if simulated is None:
            echo(UNDER_XL)
    if found.problems:
        raise SystemExit(1)
