# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands ask the sender about guests: those of this host, and the memory of another
host.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

from migrate.control.client import Json
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms, connect
from migrate.lanes.ends import RECEIVER
from migrate.lanes.probe import OlderPeerError, free_bytes_of, greet, host_of
from sender.estimates import Estimates
from sender.preflight import check_devices, check_state
from xenbackend.contract import Domain, DomainInfo, DomainState, Hypervisor
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.find import find_domain
from xenbackend.pages import PAGE_SIZE


def guests_here(hypervisor: Hypervisor, estimates: Estimates, names: list[Any]) -> Json:
    """Return the guests of this host, and for each of the ``names`` the number of the domain that
    it means, or ``None``.  Called in a thread.

    Raises ``XenError`` for a name that means more than one domain.
    """
    domains = hypervisor.domains()
    named = {str(name): _number(domains, str(name)) for name in names}
    found = [_guest(hypervisor, estimates, info, _target(domains, info)) for info in domains]
    return {"guests": [guest for guest in found if guest is not None], "named": named}


def uuid_of(handle: bytes | None) -> str | None:
    """Return the UUID of a domain as people write it; ``None`` if it is not known."""
    return None if handle is None else str(uuid.UUID(bytes=handle))


def names_here(hypervisor: Hypervisor) -> Json:
    """Return the names of the domains of this host, for the completion in a shell.  Called in a
    thread.
    """
    found = hypervisor.domains()
    return {"domains": [{"name": one.name, "state": one.state.value} for one in found]}


def _number(domains: list[DomainInfo], name: str) -> int | None:
    try:
        return find_domain(domains, name).domid
    except NoSuchDomainError:
        return None


def _target(domains: list[DomainInfo], info: DomainInfo) -> str:
    """Return a text that means this domain in a request: the name of a guest may be the number or
    the UUID of another one.
    """
    texts = (str(uuid.UUID(bytes=info.handle)), str(info.domid), info.name)
    for text in texts:
        with contextlib.suppress(XenError):
            if find_domain(domains, text) is info:
                return text
    return texts[0]


def _guest(
    hypervisor: Hypervisor, estimates: Estimates, info: DomainInfo, target: str
) -> Json | None:
    """Return what is known of a guest; ``None`` if it has ended meanwhile.

    ``problem``: why it cannot be migrated now; empty if it can.  ``passes``: the problem ends by
    itself, because the guest is on its way to this host, or is being measured.  ``devices``: those
    that only a toolstack can move.
    """
    needed, problem, passes, devices = info.tot_pages, "", False, list[str]()
    try:
        with hypervisor.open(info.domid, info.handle) as domain:
            needed = domain.config().max_pages
            devices = domain.devices()
            if info.state in (DomainState.CRASHED, DomainState.SHUT_DOWN):
                raise MigrationError(f"{info.name} is {info.state.value}: it cannot be migrated")
            passes = _arrives(info, domain) or estimates.measures(info.domid)
            estimates.check_unmeasured(info.domid)
            check_state(domain)
            check_devices(domain, info.name)
    except NoSuchDomainError:
        return None
    except (MigrationError, XenError) as error:
        problem = str(error)
    return {
        "name": info.name,
        "domid": info.domid,
        "uuid": uuid_of(info.handle),
        "target": target,
        "state": info.state.value,
        "memory_bytes": info.tot_pages * PAGE_SIZE,
        "needed_bytes": needed * PAGE_SIZE,
        "devices": devices,
        "problem": problem,
        "passes": passes,
    }


def _arrives(info: DomainInfo, domain: Domain) -> bool:
    """Whether a migration to this host brings the guest, or pages that it lacks."""
    return info.state is DomainState.INCOMING or bool(info.paged_pages) or domain.has_pager()


async def room_at(address: tuple[str, int], terms: Terms) -> Json:
    """Return how much memory new guests can have at a destination.  Raises
    :class:`MigrationError`, also if the destination could not find that out.
    """
    lane = await connect(*address, terms)
    try:
        await greet(lane, terms)
        host = await host_of(lane, RECEIVER)
    except OlderPeerError as error:
        raise MigrationError(
            "{}:{} is of an older release, which cannot be asked for its memory: install the same "
            "release there; `xen-postcopy migrate` works without".format(*address)
        ) from error
    finally:
        lane.close()
    destination, free_bytes = "{}:{}".format(*address), free_bytes_of(host)
    if free_bytes is None:
        raise MigrationError(f"{destination}: {host.problem}")
    return {"destination": destination, "free_bytes": free_bytes}
