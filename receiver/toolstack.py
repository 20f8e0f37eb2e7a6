# SPDX-License-Identifier: GPL-2.0-or-later
"""Who makes, starts and ends the incoming domain.

:class:`OwnToolstack`: the daemon does, and the sender decides where the guest runs.

:class:`XlToolstack`: libxl has made the domain, with its devices, and lends it to the daemon
through the helper.  When everything is restored, the helper ends, and libxl finishes its work.
Then xl decides whether the guest runs here, and unpauses or destroys the domain.  The daemon reads
the decision from the state of the domain.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from migrate.control.server import ControlConnection, LastAnswer
from migrate.errors import MigrationError, RemoteProtocolError
from migrate.protocol import messages as m
from migrate.units import xl_command
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
    """What depends on the toolstack.  The methods that do nothing in :class:`OwnToolstack` are for
    a toolstack with a program of its own, or one that decides where the guest runs.

    ``receiver/daemon.py`` uses ``last_answer`` of :class:`XlToolstack` besides, for the helper.
    """

    domid: int
    """The domid of the domain that the toolstack has made; -1 if the daemon makes one."""
    owns_domain: bool
    """The domain belongs to the toolstack."""
    gone_before_it_ran: str
    """The reason that is shown if the domain is destroyed before the guest has run."""
    io_limit_s: float | None
    """How long dom0 waits for a missing page that a request of the guest's disks or networks names.
    ``None``: the guest has no devices in dom0.
    """

    # ---- preflight ----
    def refuses(self, offer: m.Offer) -> str:
        """Return why the toolstack cannot do what is offered; empty if it can."""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        """Raises ``XenError``."""

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        """Return the empty domain into which the guest is restored.  Raises ``XenError``."""

    # ---- who decides, and who starts ----
    def expect_entrust(self) -> None:
        """Note that the sender leaves the decision to the toolstack.

        Raises :class:`RemoteProtocolError` if the toolstack does not decide.
        """

    def restored(self, domain: Domain) -> None:
        """Report that all but the missing pages has arrived, and that these are served.  Called in
        a thread of trio's.
        """

    async def while_undecided(self, watch: Callable[[], Awaitable[None]]) -> None:
        """Call ``watch`` if the domain can show a decision.  Called while there are no lanes and
        nothing is decided.
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
    """Whether the guest of a sender that aborts after the handover runs at the source."""

    # ---- the end ----
    async def discard(self, domain: Domain, reason: str) -> None:
        """Give the domain up, because the migration is undone.  Raises ``XenError`` if something is
        left over.
        """

    async def failed(self, reason: str) -> None:
        """Report that the migration has failed, unless its end was reported already."""


GRANT_RETRY_S = 32.0
"""Linux tries for this time to use a grant of a page that is paged out, and gives the guest an I/O
error then (drivers/xen/grant-table.c: pauses of 1, 2, ... 256 ms).
"""


class OwnToolstack:
    io_limit_s: float | None = None
    domid, owns_domain, abort_recalls = -1, False, True
    gone_before_it_ran = "its domain was destroyed"

    def refuses(self, offer: m.Offer) -> str:
        return ""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        return hypervisor.preflight(config, paging=paging)

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        return hypervisor.create_incoming(config)

    def expect_entrust(self) -> None:
        raise RemoteProtocolError("entrust: this receiver has no toolstack that decides")

    def restored(self, domain: Domain) -> None:
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
    """xl, by its helper.  ``helper``: the connection of the helper, after its request; ``None`` if
    the connection ended with a predecessor of this daemon.
    """

    owns_domain, abort_recalls = True, False
    gone_before_it_ran = "xl destroyed its domain before it ran"
    io_limit_s: float | None = GRANT_RETRY_S

    def __init__(self, domid: int, ports: ToolstackPorts, helper: ControlConnection | None = None):
        self.domid, self._ports = domid, ports
        self.last_answer = LastAnswer(helper)
        """The helper's last answer, which has the end of the migration."""

    def refuses(self, offer: m.Offer) -> str:
        if offer.checkpoint_ms:
            return "a guest that xl migrates cannot be protected: xl destroys the source"
        return ""

    def preflight(self, hypervisor: Hypervisor, config: DomainConfig, *, paging: bool) -> Preflight:
        """Check the domain as libxl has made it.  libxl has provided the memory for it."""
        with hypervisor.open(self.domid) as domain:
            found = domain.preflight()
        return found if paging else Preflight((), found.populate_evicted)

    def make(self, hypervisor: Hypervisor, config: DomainConfig) -> Domain:
        domain = hypervisor.bind_incoming(self.domid, config, self._ports)
        try:
            domain.reserve(config.max_pages)
        except XenError:
            domain.close()
            raise
        return domain

    def expect_entrust(self) -> None:
        pass

    def restored(self, domain: Domain) -> None:
        store, console = domain.toolstack_gfns()
        give = functools.partial(self.last_answer.give, store_gfn=store, console_gfn=console)
        trio.from_thread.run(give, "result")

    async def while_undecided(self, watch: Callable[[], Awaitable[None]]) -> None:
        await watch()

    def check_decision(self, name: str) -> None:
        raise MigrationError(
            "there is nothing to decide here: xl decides, and the daemon follows what xl does to "
            f"{name}; {xl_command('destroy', name)} ends it"
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
        """Give the ring up, which would prevent libxl from destroying the domain when the helper
        has failed.
        """
        with contextlib.suppress(XenError):  # the domain may have no ring, or be gone already
            await trio.to_thread.run_sync(domain.paging_disable)
        await trio.to_thread.run_sync(domain.close)
        await self.failed(reason)

    async def failed(self, reason: str) -> None:
        await self.last_answer.give("error", message=reason)
