# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps from the offer until both lanes and an empty domain for the guest exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import trio

from migrate.errors import MigrationError, RemoteProtocolError
from migrate.lanes.connection import step_timeout
from migrate.outcomes import GAVE_UP
from migrate.protocol import messages as m
from migrate.protocol.pfns import sparseness
from migrate.protocol.session import new_token
from migrate.service.host import config_of
from receiver.context import Context
from receiver.guest import Guest
from receiver.inbox import Restoring
from receiver.outstanding import OutstandingPages
from receiver.ownership import State
from receiver.restore import FrameLimit, MemoryRestorer
from receiver.rollback import discard
from receiver.switchover import Switchover
from xenbackend.errors import XenError

UNDOING_S = 2.0
"""How long an offer waits for the end of another migration of a guest of the same name.  That
migration may just be being undone.
"""


@dataclass(frozen=True)
class Begun:
    """A guest with which a migration continues after its beginning."""

    guest: Guest
    restoring: Restoring | None
    """``None`` if a predecessor has restored the guest."""

    @property
    def inherits(self) -> bool:
        """A predecessor has left the guest."""
        return self.restoring is None


class Other(Protocol):
    """Another migration of this daemon."""

    id: str
    ended: trio.Event

    @property
    def phase(self) -> str: ...

    @property
    def domain_name(self) -> str: ...

    @property
    def has_ended(self) -> bool: ...

    @property
    def needed(self) -> bool: ...


Others = Callable[[], Iterable[Other]]


class Preflight:
    def __init__(self, context: Context, others: Others):
        self._context = context
        self._others = others

    async def begin(self) -> Begun | None:
        """Connect, receive the offer and prepare the guest.  Returns ``None`` if the offer was
        refused.
        """
        context, peer = self._context, self._context.peer
        await peer.connect()
        offer = await self._offer()
        context.progress.domain = offer.name
        context.entry.offered(offer)
        prepared: Begun | str = await self._wait_for_others(offer)
        if not prepared:
            prepared = await trio.to_thread.run_sync(self._prepare, offer)
        if isinstance(prepared, str):
            await self._refuse(prepared)
            return None
        token = new_token()
        await peer.send(m.Accepted(context.statistics.populate_evicted, token))
        await peer.open_pull_lane(token)
        peer.lanes.keep(offer.key)
        return prepared

    async def serve_inherited(self, switchover: Switchover) -> None:
        """Do nothing, because no guest runs here yet."""

    async def _offer(self) -> m.Offer:
        with step_timeout("the sender offered nothing"):
            offer = await self._context.peer.receive()
        if isinstance(offer, m.Abort):
            raise MigrationError(f"{GAVE_UP}{offer.reason}")
        if not isinstance(offer, m.Offer):
            raise RemoteProtocolError(f"{offer.type} instead of an offer")
        return offer

    async def _wait_for_others(self, offer: m.Offer) -> str:
        """Wait for the end of other migrations of the guest.  Returns why the guest cannot be
        accepted now; empty if it can.
        """
        coming = [
            other
            for other in self._others()
            if other.domain_name == offer.name and not other.has_ended
        ]
        # A migration that was cancelled a moment ago is still being undone.
        with trio.move_on_after(UNDOING_S):
            for other in coming:
                if not other.needed:
                    await other.ended.wait()
        coming = [other for other in coming if not other.has_ended]
        if not coming:
            return ""
        return (
            f"a guest named {offer.name!r} is incoming already, as migration {coming[0].id[:8]}, "
            f"which is {coming[0].phase}: wait until that migration has ended"
        )

    async def _refuse(self, refusal: str) -> None:
        context = self._context
        context.progress.problem = refusal
        answer = m.Refused(m.printable(refusal), False)
        await discard(context, refusal, answer)
        context.ownership.enter(State.REFUSED)
        if context.peer.connections:  # otherwise the sender has been answered already
            await context.peer.send(answer)

    def _prepare(self, offer: m.Offer) -> Begun | str:
        """Make the domain and its ring.  Returns the reason if this host cannot take the guest."""
        try:
            return self._make(offer)
        except (XenError, MigrationError) as error:
            return str(error)

    def _make(self, offer: m.Offer) -> Begun | str:
        context, config = self._context, config_of(offer)
        hypervisor, toolstack = context.hypervisor, context.toolstack
        if problem := sparseness(offer.nr_pfns, offer.max_pages):
            return problem
        found = toolstack.preflight(hypervisor, config, paging=offer.paging)
        if found.problems:
            return "; ".join(found.problems)
        if problem := toolstack.refuses(offer):
            return problem
        context.ownership.enter(State.MAKING)
        domain = context.holdings.add_domain(toolstack.make(hypervisor, config))
        context.entry.domid, context.entry.handle = domain.domid, domain.handle
        context.ownership.enter(State.RESTORING)
        if problem := sparseness(offer.nr_pfns, domain.config().max_pages):
            return problem  # xl may have made the domain with fewer pages than offered
        ring = None
        if offer.paging:
            ring = domain.paging_enable()
            context.holdings.add(ring.close)
            context.statistics.populate_evicted = found.populate_evicted
        limit = FrameLimit(domain, context.entry.raised, context.note_raised)
        guest = Guest(offer, domain, ring, OutstandingPages(offer.nr_pfns), limit)
        memory = MemoryRestorer(domain, limit, offer.max_pages)
        return Begun(guest, Restoring(guest, memory))
