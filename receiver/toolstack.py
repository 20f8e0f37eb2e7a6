# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose the incoming domain is: who makes it, who lets it run, who ends it.

:class:`OwnToolstack`: ours.  :class:`XlToolstack`: libxl has made it, with its devices, and lends it to us through our helper.
When the helper has been told that everything is restored it ends, and libxl finishes its work; whether the guest then runs
here is xl's decision, which shows in the domain: it is unpaused, or destroyed.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import trio

from migrate.control.server import ControlConnection, LastAnswer
from xenbackend.contract import Domain, DomainConfig, Hypervisor, Preflight, ToolstackPorts
from xenbackend.errors import XenError


class Toolstack(Protocol):
    decides: bool
    """Whether the guest runs here; otherwise the sender does."""
    lends: int
    """The domid of the domain that it has made; -1: we make it."""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        """Raises ``XenError``."""

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        """The empty domain to restore into.  Raises ``XenError``."""

    async def restored(self, domain: Domain) -> None:
        """All but the missing pages is there, and these are served."""

    async def discard(self, domain: Domain, reason: str) -> None:
        """The guest does not come.  Raises ``XenError`` where something is left over."""

    async def failed(self, reason: str) -> None:
        """There is not even a domain."""


class OwnToolstack:
    decides, lends = False, -1

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        return hypervisor.preflight(config, paging=paging)

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        return hypervisor.create_incoming(config)

    async def restored(self, domain: Domain) -> None:
        pass

    async def discard(self, domain: Domain, reason: str) -> None:
        await trio.to_thread.run_sync(domain.destroy)

    async def failed(self, reason: str) -> None:
        pass


class XlToolstack:
    """``helper``: the connection of the helper, after its request; ``None``: it went away with our predecessor."""

    decides = True

    def __init__(self, domid: int, ports: ToolstackPorts, helper: ControlConnection | None = None):
        self.lends, self._ports = domid, ports
        self.last_answer = LastAnswer(helper)
        """The helper is told how it ended."""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        """Of the domain as libxl has made it; that there is memory for it libxl has seen to."""
        with hypervisor.open(self.lends) as domain:
            found = domain.preflight()
        return found if paging else Preflight((), found.populate_evicted)

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        domain = hypervisor.bind_incoming(self.lends, config, self._ports)
        try:
            domain.reserve(config.max_pages)
        except XenError:
            domain.close()
            raise
        return domain

    async def restored(self, domain: Domain) -> None:
        store_gfn, console_gfn = await trio.to_thread.run_sync(domain.toolstack_gfns)
        await self.last_answer.give("result", store_gfn=store_gfn, console_gfn=console_gfn)

    async def discard(self, domain: Domain, reason: str) -> None:
        """libxl destroys it when the helper has failed; nothing of ours is to keep it from going."""
        with contextlib.suppress(XenError):  # it had no ring, or is gone already
            await trio.to_thread.run_sync(domain.paging_disable)
        await trio.to_thread.run_sync(domain.close)
        await self.failed(reason)

    async def failed(self, reason: str) -> None:
        await self.last_answer.give("error", message=reason)
