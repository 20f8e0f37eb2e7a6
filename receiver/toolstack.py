# SPDX-License-Identifier: GPL-2.0-or-later
"""Who makes the incoming domain, who lets it run, and who ends it.

:class:`OwnToolstack`: the daemon, and the sender decides where the guest runs.

:class:`XlToolstack`: libxl has made the domain, with its devices, and lends it to the daemon
through the helper.  When the helper has received that everything is restored, the helper ends, and
libxl finishes its work.  Then xl decides whether the guest runs here, which shows in the domain: xl
unpauses or destroys the domain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from migrate.control.server import ControlConnection, LastAnswer
from migrate.errors import MigrationError, RemoteProtocolError
from migrate.protocol import messages as m
from xenbackend.contract import (
    Domain,
    DomainConfig,
    DomainState,
    Hypervisor,
    Preflight,
    ToolstackPorts,
)
from xenbackend.errors import XenError


class Toolstack(Protocol):
    lends: int
    """The domid of the domain that the toolstack has made; -1: the daemon makes one."""
    lent: bool
    """The domain is the toolstack's."""
    gone_before_it_ran: str
    """What it means if the domain goes before it has run."""
    io_limit_s: float | None
    """How long dom0 waits for a missing page that a request of the guest's disks or networks names.
    ``None``: the guest has no devices in dom0.
    """

    # ---- preflight ----
    def refuses(self, offer: m.Offer) -> str:
        """Why the toolstack cannot take part in what is offered; empty if it can."""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        """Raises ``XenError``."""

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        """The empty domain to restore into.  Raises ``XenError``."""

    # ---- who decides, and who starts ----
    def expect_entrust(self) -> None:
        """The sender leaves the decision to the toolstack.

        Raises :class:`RemoteProtocolError` if the toolstack makes none.
        """

    async def restored(self, domain: Domain) -> None:
        """All but the missing pages is there, and these are served."""

    async def while_undecided(self, watch: Callable[[], Awaitable[None]]) -> None:
        """While no lane is there and nothing is decided: ``watch`` the domain if it shows a
        decision.
        """

    def check_decision(self, name: str) -> None:
        """Raises :class:`MigrationError` if an operator decides with the toolstack's commands."""

    def start(self, domain: Domain) -> bool:
        """Start the guest, which was handed over.  Returns false if the toolstack starts it.
        Raises ``XenError``.
        """

    def has_started(self, state: DomainState) -> bool:
        """Whether the state of a predecessor's domain shows that the guest was handed over."""

    def may_have_been_starting(self, state: DomainState | None) -> bool:
        """Whether the state can be that of a guest whose start was cut short."""

    def completes_paused(self, capabilities: frozenset[str]) -> bool:
        """Whether a migration can complete before the guest runs, with a peer of these
        ``capabilities``.
        """

    abort_recalls: bool
    """A sender that aborts after the handover has its guest run."""

    # ---- the end ----
    async def discard(self, domain: Domain, reason: str) -> None:
        """The guest does not come.  Raises ``XenError`` if something is left over."""

    async def failed(self, reason: str) -> None:
        """There is not even a domain."""


GRANT_RETRY_S = 32.0
"""Linux tries for this time to use a grant of a page that is paged out, and gives the guest an I/O
error then (drivers/xen/grant-table.c: pauses of 1, 2, ... 256 ms).
"""


class OwnToolstack:
    io_limit_s: float | None = None
    lends, lent, abort_recalls = -1, False, True
    gone_before_it_ran = "its domain was destroyed"

    def refuses(self, offer: m.Offer) -> str:
        return ""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        return hypervisor.preflight(config, paging=paging)

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        return hypervisor.create_incoming(config)

    def expect_entrust(self) -> None:
        raise RemoteProtocolError("entrust: there is no toolstack here that would decide")

    async def restored(self, domain: Domain) -> None:
        pass

    async def while_undecided(self, watch: Callable[[], Awaitable[None]]) -> None:
        pass

    def check_decision(self, name: str) -> None:
        pass

    def start(self, domain: Domain) -> bool:
        domain.start()
        return True

    def has_started(self, state: DomainState) -> bool:
        return state is not DomainState.INCOMING

    def may_have_been_starting(self, state: DomainState | None) -> bool:
        return state is DomainState.PAUSED

    def completes_paused(self, capabilities: frozenset[str]) -> bool:
        return False

    async def discard(self, domain: Domain, reason: str) -> None:
        await trio.to_thread.run_sync(domain.destroy)

    async def failed(self, reason: str) -> None:
        pass


class XlToolstack:
    """``helper``: the connection of the helper, after its request; ``None``: the connection ended
    with a predecessor of this daemon.
    """

    lent, abort_recalls = True, False
    gone_before_it_ran = "xl gave the guest up here"
    io_limit_s: float | None = GRANT_RETRY_S

    def __init__(self, domid: int, ports: ToolstackPorts, helper: ControlConnection | None = None):
        self.lends, self._ports = domid, ports
        self.last_answer = LastAnswer(helper)
        """The helper is told how it ended."""

    def refuses(self, offer: m.Offer) -> str:
        if offer.checkpoint_ms:
            return "a guest that xl migrates cannot be protected: xl destroys the source"
        return ""

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

    def expect_entrust(self) -> None:
        pass

    async def restored(self, domain: Domain) -> None:
        store_gfn, console_gfn = await trio.to_thread.run_sync(domain.toolstack_gfns)
        await self.last_answer.give("result", store_gfn=store_gfn, console_gfn=console_gfn)

    async def while_undecided(self, watch: Callable[[], Awaitable[None]]) -> None:
        await watch()

    def check_decision(self, name: str) -> None:
        raise MigrationError(
            "there is nothing to decide here: xl does, and the daemon follows what xl does to "
            f"{name}; xl can destroy it"
        )

    def start(self, domain: Domain) -> bool:
        return False

    def has_started(self, state: DomainState) -> bool:
        return False

    def may_have_been_starting(self, state: DomainState | None) -> bool:
        return False

    def completes_paused(self, capabilities: frozenset[str]) -> bool:
        return m.PAUSED in capabilities

    async def discard(self, domain: Domain, reason: str) -> None:
        """libxl destroys the domain when the helper has failed; nothing of ours is to prevent
        that.
        """
        with contextlib.suppress(XenError):  # it had no ring, or is gone already
            await trio.to_thread.run_sync(domain.paging_disable)
        await trio.to_thread.run_sync(domain.close)
        await self.failed(reason)

    async def failed(self, reason: str) -> None:
        await self.last_answer.give("error", message=reason)
