"""One incoming migration, from hello to completed.

Before ``ready`` is said any failure takes everything back: the incoming domain is destroyed and the
sender told why.  Once ``ready`` is said and the link breaks without a word, this end cannot know whether the guest was
handed over: it holds still.  After ``handover`` the guest lives here: whatever fails, its
ring stays enabled and its memory stays as it is (invariants 1 and 5).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from dataclasses import dataclass

import trio

from migrate import messages as m
from migrate.errors import MigrationError, PeerClosedError, ProtocolError, RemoteProtocolError
from migrate.messages import Lane
from migrate.pfns import pfns_of_window
from migrate.session import Role, Session
from migrate.statistics import PagerStatistics
from migrate.tasks import task_group
from migrate.transport import LaneConnection, run_in_thread, step_timeout
from receiver.outstanding import OutstandingPages
from receiver.pager import Pager
from receiver.restore import MemoryRestorer
from xenbackend.contract import Domain, DomainConfig, Hypervisor, XenError
from xenbackend.ring import PagingRing

log = logging.getLogger(__name__)

MAX_CONTEXT_BYTES = 64 * 1024 * 1024
REPORT_EVERY_S = 0.25


@dataclass
class IncomingProgress:
    """What ``list`` shows."""

    domain: str = ""
    phase: str = "preflight"
    outstanding: int = 0
    waiting: int = 0
    problem: str = ""


class IncomingMigration:
    def __init__(self, hypervisor: Hypervisor, migration_id: str, push: LaneConnection):
        self.id = migration_id
        self.token = secrets.token_bytes(32)
        self.progress = IncomingProgress()
        self.session = Session(Role.RECEIVER)
        self.statistics = PagerStatistics()
        self._hypervisor = hypervisor
        self._push = push
        self._pull: LaneConnection | None = None
        self._domain: Domain | None = None
        self._ring: PagingRing | None = None
        self._pages: OutstandingPages
        self._memory: MemoryRestorer
        self._pager: Pager
        self._context = bytearray()
        self._said_ready = False
        self._completed = False
        self._tasks: trio.Nursery
        self._scope = trio.CancelScope()
        self.ended = trio.Event()

    # ---- what others may ask ----
    def attach_pull_lane(self, lane: LaneConnection, token: bytes) -> None:
        """Raises :class:`ProtocolError` where the token is wrong or used."""
        if not secrets.compare_digest(token, self.token) or self._pull is not None or self._domain is None:
            raise ProtocolError("a pull lane with a wrong or used token")
        self._pull = lane

    @property
    def needed(self) -> bool:
        """The guest lives by this process: it must not be stopped."""
        return self._said_ready and self.progress.phase != "completed"

    def cancel(self) -> None:
        """Has no effect once :attr:`needed`."""
        if not self.needed:
            self._scope.cancel()

    # ---- the order of things ----
    async def run(self) -> None:
        try:
            with self._scope:
                await self._receive_migration()
            if self._scope.cancelled_caught:
                raise MigrationError("the receiver is being stopped")
        except Exception as error:
            if not isinstance(error, MigrationError | XenError | OSError):
                log.exception("%s: internal error", self.id)
            with trio.CancelScope(shield=True):
                await self._failed(error)
        finally:
            self.ended.set()
            self._push.close()
            if self._pull is not None:
                self._pull.close()

    async def _receive_migration(self) -> None:
        with step_timeout("the sender offered nothing"):
            offer, _pages = await self._push.receive()
        self.session.received(offer, Lane.PUSH)
        if not isinstance(offer, m.Offer):
            raise RemoteProtocolError(f"{offer.type} instead of an offer")
        refusal = self._prepare(offer)
        if refusal:
            self.progress.phase, self.progress.problem = "refused", refusal
            log.warning("%s: refused %s: %s", self.id, offer.name, refusal)
            await self._say(m.Refused(m.printable(refusal)))
            return
        await self._say(m.Accepted(self.statistics.populate_evicted, self.token))
        self.progress.phase = "precopy"
        async with task_group() as tasks:
            self._tasks = tasks
            await run_in_thread(self._receive_push_lane, self._push.stop_receiving)
            tasks.cancel_scope.cancel()
        if not self._completed:
            raise MigrationError("the receiver is being stopped")
        await self._pager.finish()
        self.progress.phase, self.progress.outstanding = "completed", 0
        assert self._domain is not None
        self._domain.close()
        log.info("%s: %s completed", self.id, self.progress.domain)

    def _prepare(self, offer: m.Offer) -> str | None:
        """Preflight, the incoming domain and its ring; returns why not."""
        self.progress.domain = offer.name
        config = DomainConfig(offer.name, offer.nr_pfns, offer.max_pages, offer.vcpus, offer.platform)
        try:
            preflight = self._hypervisor.preflight(config, paging=offer.paging)
            if preflight.problems:
                return "; ".join(preflight.problems)
            self._domain = self._hypervisor.create_incoming(config)
            if offer.paging:
                self._ring = self._domain.paging_enable()
                self.statistics.populate_evicted = preflight.populate_evicted
        except XenError as error:
            self._discard()
            return str(error)
        self._memory = MemoryRestorer(self._domain)
        self._pages = OutstandingPages(offer.nr_pfns)
        return None

    # ---- the push lane's thread ----
    def _receive_push_lane(self) -> None:
        """Do what the sender says, in its order, until it agrees that all is done.

        Pages are put in place here; what starts or ends something is the event loop's.
        """
        while not self._completed:
            message, payload = self._push.receive_blocking()
            self.session.received(message, Lane.PUSH)
            match message:
                case m.Pages() if self.session.handed_over:
                    self._pager.pushed(message, payload)
                case m.Pages():
                    self._memory.pages(message, payload)
                case m.Defer():
                    self._memory.evict(pfns_of_window(message.base, message.bitmap))
                case m.Barrier():
                    self._say_blocking(m.Passed(message.number))
                case m.Suspended():
                    self.progress.phase = "switchover"
                case m.Missing():
                    pfns = pfns_of_window(message.base, message.bitmap)
                    self._memory.evict(pfns)
                    self._pages.add(pfns)
                case m.Context():
                    self._take_context(message)
                case m.Handover():
                    trio.from_thread.run_sync(self._take_over)
                case m.Abort():
                    raise MigrationError(f"the sender gave up: {message.reason}")
                case m.Completed():
                    self._completed = True

    def _take_context(self, message: m.Context) -> None:
        assert self._domain is not None
        if len(self._context) + len(message.data) > MAX_CONTEXT_BYTES:
            raise RemoteProtocolError(f"context: more than {MAX_CONTEXT_BYTES} bytes")
        self._context += message.data
        if not message.last:
            return
        if self._pages.count and self._pull is None:
            raise RemoteProtocolError("pages are missing and there is no pull lane to fetch them")
        self._domain.set_context(bytes(self._context))
        self._context.clear()
        self._said_ready = True
        self._say_blocking(m.Ready())

    def _say_blocking(self, message: m.Message) -> None:
        self.session.sent(message, Lane.PUSH)
        self._push.send_blocking(message)

    # ---- from the handover on ----
    def _take_over(self) -> None:
        """The guest is ours: run it, and serve it."""
        assert self._domain is not None
        self._pager = Pager(
            self._domain,
            self._ring,
            self._pull,
            self.session,
            self._pages,
            self.statistics,
            self._say_blocking,
        )
        self.progress.phase = "postcopy"
        self._tasks.start_soon(self._pager.serve)
        self._domain.start()
        self._say_blocking(m.Resumed())
        self._tasks.start_soon(self._complete)
        self._tasks.start_soon(self._report)

    async def _complete(self) -> None:
        await self._pager.nothing_outstanding.wait()
        self.progress.phase = "completing"
        await trio.to_thread.run_sync(self._pager.acknowledge)
        await self._say(m.Complete(self._pager.summary()))

    async def _report(self) -> None:
        while True:
            await trio.to_thread.run_sync(self._pager.acknowledge)
            if self._pager.nothing_outstanding.is_set():
                return
            report, self.progress.waiting = self._pager.report()
            self.progress.outstanding = report.outstanding
            await self._say(report)
            with trio.move_on_after(REPORT_EVERY_S):
                await self._pager.nothing_outstanding.wait()

    async def _say(self, message: m.Message) -> None:
        self.session.sent(message, Lane.PUSH)
        await self._push.send(message)

    # ---- when it goes wrong ----
    async def _failed(self, error: Exception) -> None:
        self.progress.problem = str(error)
        aborted = isinstance(error, MigrationError) and not isinstance(error, PeerClosedError | ProtocolError)
        if self.session.handed_over:
            self.progress.phase = "interrupted"
            self.progress.problem += "; the guest is here and waits for its missing pages"
            log.error("%s: %s after the handover: %s", self.id, self.progress.domain, error)
        elif self._said_ready and not aborted:
            self.progress.phase = "in doubt"
            self.progress.problem += (
                "; the sender may or may not have handed the guest over: it is kept, and does not run"
            )
            log.error("%s: %s before the handover: %s", self.id, self.progress.domain, self.progress.problem)
            return
        else:
            self.progress.phase = "failed"
            log.warning("%s: %s given up: %s", self.id, self.progress.domain or "migration", error)
            await trio.to_thread.run_sync(self._discard)
        with trio.move_on_after(2), contextlib.suppress(MigrationError):
            await self._push.send(m.Failed(m.printable(str(error))))

    def _discard(self) -> None:
        """Nothing is left over."""
        if self._domain is None:
            return
        try:
            self._domain.destroy()
        except XenError as error:
            log.error("%s: %s is left over: %s", self.id, self.progress.domain, error)
            self.progress.problem += f"; and the incoming domain is left over: {error}"
        if self._ring is not None:
            self._ring.close()
        self._domain.close()
        self._domain = None
