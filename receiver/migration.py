# SPDX-License-Identifier: GPL-2.0-or-later
"""One incoming migration, from the first message to completion.

Read :meth:`IncomingMigration.run` from top to bottom:

1. A new migration begins with an offer (``preflight.py``).  The migration of a killed daemon begins
   with what is left of it (``recovery.py``).  Both produce a guest: a domain with its ring.
2. The guest is restored, started and served over one pair of lanes after the other: ``inbox.py``
   carries out the sender's messages, ``switchover.py`` starts the guest, ``postcopy.py`` reports
   and completes, and ``recovery.py`` has what is done while there are no lanes.
3. The paging ring is given up (``postcopy.py``); or the migration is undone (``rollback.py``).

Who owns the guest is in ``ownership.py`` alone.  Before READY any failure takes everything back.
From READY on a failed step is repeated while two conditions hold: the error may pass, and the guest
may depend on this process.  Once the guest belongs here, no error ends the migration (invariants 1
and 5).
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import trio

from migrate import logs
from migrate.errors import GuestEndedError, MigrationError
from migrate.lanes.pairs import Lanes
from migrate.lanes.scheduling import run_in_thread
from migrate.outcomes import outcome
from migrate.protocol import messages as m
from migrate.protocol.session import Role, Session
from migrate.service.history import Amend
from migrate.service.journal import Journal
from migrate.service.lifecycle import RESUMING
from migrate.tasks import as_soon_as_threads_start, in_thread, is_bug, is_final, task_group
from receiver import postcopy, recovery, rollback
from receiver.context import NOT_HERE, Context
from receiver.entry import Entry
from receiver.inbox import Inbox, Restoring
from receiver.measurement import Measurement
from receiver.ownership import INHERITED, Link, Ownership, State
from receiver.peer import Peer
from receiver.preflight import Others, Preflight
from receiver.progress import IncomingProgress
from receiver.recovery import Predecessor, Recovery
from receiver.requests import Requests
from receiver.statistics import PagerStatistics
from receiver.switchover import Switchover
from receiver.toolstack import OwnToolstack, Toolstack, XlToolstack
from xenbackend.contract import Hypervisor, ToolstackPorts

log = logging.getLogger(__name__)


class IncomingMigration:
    def __init__(self, migration_id: str, context: Context, beginning: Preflight | Predecessor):
        self.id = migration_id
        self._context = context
        started = None if context.ownership.inherited else time.monotonic()
        context.progress.started_at = context.entry.started_at
        self._beginning = beginning
        self._recovery: Recovery | None = None
        """``None`` before there is a guest, and after the end."""
        self._last_message: m.Message | None = None
        """The message that the sender still has to receive."""
        self.measurement = Measurement(context, started, lambda: self._recovery)
        self._scope = trio.CancelScope()
        self.requests = Requests(context, self._scope.cancel, lambda: self._recovery)
        self.ended = trio.Event()

    @classmethod
    def of_offer(
        cls,
        hypervisor: Hypervisor,
        migration_id: str,
        lanes: Lanes,
        journal: Journal,
        toolstack: Toolstack | None = None,
        others: Others = tuple,
    ) -> IncomingMigration:
        """Return a migration whose sender has not made its offer yet."""
        toolstack = toolstack or OwnToolstack()
        entry = Entry(journal, migration_id, lanes, owns_domain=toolstack.owns_domain)
        entry.domid = toolstack.domid
        progress = IncomingProgress()
        ownership = Ownership(entry.write)
        peer = Peer(lanes, Session(Role.RECEIVER))
        context = Context(hypervisor, toolstack, peer, ownership, entry, progress)
        return cls(migration_id, context, Preflight(context, others))

    @classmethod
    def of_predecessor(
        cls,
        hypervisor: Hypervisor,
        migration_id: str,
        lanes: Lanes,
        journal: Journal,
        facts: dict[str, Any],
    ) -> IncomingMigration:
        """Return the migration of a killed daemon, from its journal.  ``lanes`` are for rejoining
        only.

        Raises ``ValueError`` or :class:`MigrationError` for an entry that this release must not act
        on.
        """
        entry = Entry.of_predecessor(journal, migration_id, lanes, facts)
        offer, step = entry.offer, facts["step"]
        toolstack: Toolstack = OwnToolstack()
        if entry.owns_domain:
            toolstack = XlToolstack(entry.domid, ToolstackPorts(0, 0))
        progress = IncomingProgress(
            offer.name, unprotected=entry.unprotected, problem=entry.reason or RESUMING
        )
        ownership = Ownership(entry.write, INHERITED[step])
        session = Session.of_predecessor(
            Role.RECEIVER,
            offer.nr_pfns,
            handed_over=ownership.handed_over,
            protected=offer.checkpoint_ms > 0,
            entrusted=entry.owns_domain,
        )
        session.decided = entry.decided
        lanes.keep(offer.key)
        peer = Peer(lanes, session)
        context = Context(hypervisor, toolstack, peer, ownership, entry, progress)
        context.record.is_whole = False
        return cls(migration_id, context, Predecessor(context, offer, step))

    # ---- the order of the steps ----
    async def run(self) -> None:
        """Carry the migration out until its end.  An error is in ``progress`` and in the log."""
        logs.migration.set(self.id)
        ownership, progress = self._context.ownership, self.progress
        try:
            with self._scope:
                await self._migrate()
            if self._scope.cancelled_caught:
                raise MigrationError(ownership.taken_back or NOT_HERE)
        except Exception as error:
            if is_bug(error):
                log.exception("internal error")
            phase = self.phase
            await self._failed(error)
            how = outcome(self.phase, progress.problem)
            logs.abnormal_end(progress.domain, phase, how, progress.problem, self.details())
        finally:
            self._context.disconnect()
            if self.has_ended:
                # Release what is as large as the guest: ``list`` may show the migration for days.
                self._recovery = None
                self.ended.set()

    async def _migrate(self) -> None:
        begun = await self._beginning.begin()
        if begun is None:
            return
        self._context.ownership.link = Link.LOST if begun.inherits else Link.UP
        logged = ""
        while True:
            try:
                if self._recovery is None:
                    switchover = Switchover(self._context, begun.guest, inherits=begun.inherits)
                    self._recovery = Recovery(switchover)
                await self._to_the_end(self._recovery, begun.restoring)
                return
            except Exception as error:
                if not self._may_pass(error):
                    raise
                if str(error) != logged:
                    logged = str(error)
                    log.error("%s continues: %s", self.domain_name, error, exc_info=is_bug(error))
            if self._recovery is not None:
                self._recovery.note(logged)
            self._context.disconnect()
            await trio.sleep(recovery.CARRY_ON_AGAIN_S)

    def _may_pass(self, error: Exception) -> bool:
        """Whether the migration continues after this error."""
        ownership = self._context.ownership
        if isinstance(error, GuestEndedError):
            return False
        return ownership.ours or (ownership.needed and not is_final(error))

    async def _to_the_end(self, recovery: Recovery, restoring: Restoring | None) -> None:
        switchover = recovery.switchover
        async with task_group() as tasks:
            tasks.start_soon(switchover.follow_domain)
            tasks.start_soon(switchover.keep_starting)
            if not switchover.serving.is_set():
                await self._beginning.serve_inherited(switchover)
            await recovery.continue_held_or_lost()
            await self._follow_sender(recovery, restoring)
            tasks.cancel_scope.cancel()
        self._last_message = await postcopy.finish(switchover)
        self._context.record.origins = await in_thread(switchover.guest.pages.summary_of_origins)

    async def _follow_sender(self, recovery: Recovery, restoring: Restoring | None) -> None:
        """Serve the sender over one pair of lanes after the other, until the end is settled."""
        switchover = recovery.switchover
        while not switchover.settled:
            try:
                await self._over_one_pair(switchover, restoring)
            except Exception as error:
                if not self._context.ownership.needed or is_final(error):
                    raise
                if switchover.needs_nothing:
                    about = "nothing is missing; the sender may not have been informed: %s"
                    log.info(about, error)
                    return
                await recovery.rejoin(error)
            restoring = None

    async def _over_one_pair(self, switchover: Switchover, restoring: Restoring | None) -> None:
        push = self._context.peer.push
        async with task_group() as tasks:
            for lane in self._context.peer.connections:
                tasks.start_soon(lane.keep_alive, switchover.serving.is_set)
            tasks.start_soon(postcopy.serve_faults, switchover)
            tasks.start_soon(postcopy.complete, switchover)
            tasks.start_soon(postcopy.report, switchover)
            if switchover.guest.offer.checkpoint_ms:
                tasks.start_soon(postcopy.send_checkpoints, switchover)
            inbox = Inbox(switchover, restoring)
            await run_in_thread(inbox.receive, push.stop_receiving)
            tasks.cancel_scope.cancel()

    async def _failed(self, error: Exception) -> None:
        switchover = None if self._recovery is None else self._recovery.switchover
        undo = functools.partial(rollback.failed, self._context, error, switchover)
        answer = await as_soon_as_threads_start(undo)
        self._last_message = await rollback.send_outcome(self._context, answer)

    async def linger(self, amend: Amend) -> None:
        """Send the outcome to a sender that was cut off, if the sender connects again."""
        if self._last_message is not None:
            await rollback.linger(self._context, self._last_message, amend)

    # ---- what others see ----
    @property
    def progress(self) -> IncomingProgress:
        return self._context.progress

    @property
    def phase(self) -> str:
        return self._context.ownership.phase

    @property
    def statistics(self) -> PagerStatistics:
        return self._context.statistics

    @property
    def session(self) -> Session:
        return self._context.peer.session

    @property
    def lanes(self) -> Lanes:
        return self._context.peer.lanes

    @property
    def domain_name(self) -> str:
        return self.progress.domain

    @property
    def domid(self) -> int:
        """The domain's number; -1 before there is a domain."""
        return self._context.entry.domid

    @property
    def has_ended(self) -> bool:
        """Whether the migration has ended."""
        return self._context.ownership.has_ended

    @property
    def needed(self) -> bool:
        """Whether the guest may depend on this process, which must not be stopped then."""
        return self._context.ownership.needed

    @property
    def is_lost(self) -> bool:
        """Whether the guest's missing pages exist nowhere any more."""
        return self._context.is_in(State.LOST)

    @property
    def missing(self) -> int | None:
        """The number of the guest's missing pages; ``None`` if they cannot be counted (yet)."""
        if self._recovery is None or not self.needed:
            return None
        return self._recovery.switchover.guest.pages.count

    def recorded(self) -> dict[str, Any]:
        """Return what was recorded so far.  Call this in a thread."""
        return self.measurement.recorded()

    def details(self) -> dict[str, Any]:
        """Return what has been measured so far; see :meth:`PagerStatistics.summary`."""
        return self.statistics.summary()
