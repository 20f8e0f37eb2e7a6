# SPDX-License-Identifier: GPL-2.0-or-later
"""One outgoing migration as the daemon has it, from a request or from a predecessor's journal.

The order of the steps is in ``transfer.py``.  Who owns the guest is in one table, ``ownership.py``.
What an operator may ask for meanwhile is in ``requests.py``.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import trio

from migrate import logs
from migrate.errors import MigrationError
from migrate.lanes.pairs import Lanes
from migrate.options import MigrationOptions
from migrate.outcomes import outcome
from migrate.protocol import messages as m
from migrate.service.journal import Journal, is_there
from migrate.service.lifecycle import RESUMING
from migrate.tasks import as_soon_as_threads_start, in_thread
from sender.checkpoints import CheckpointStore
from sender.context import Context, Source, latest_suspension
from sender.dirty import DirtyLog
from sender.entry import Entry, read_entry
from sender.last_message import send_last_message
from sender.ownership import LOG_DIRTY_MAY_BE_ON, State
from sender.policy import DefaultPolicy
from sender.progress import BEFORE_RESTART, OF_CHECKPOINTS, OF_DESTINATION, Progress
from sender.recovery import Recovery
from sender.requests import Requests
from sender.rollback import AGAIN_S, Rollback, error_of_decision, source_is_gone
from sender.toolstack import OwnToolstack, Toolstack, XlToolstack
from sender.transfer import Transfer
from xenbackend.contract import Domain, DomainId, Hypervisor
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.keeper import open_with_keeper

log = logging.getLogger(__name__)


class OutgoingMigration:
    def __init__(self, context: Context):
        self.context = context
        self.ownership = context.ownership
        self.requests = Requests(context, self._carry_out)

    @classmethod
    def of_request(
        cls,
        session_id: str,
        hypervisor: Hypervisor,
        domain: DomainId,
        lanes: Lanes,
        options: MigrationOptions,
        journal: Journal,
        *,
        toolstack: Toolstack | None = None,
        policy: DefaultPolicy | None = None,
    ) -> OutgoingMigration:
        """Return a new migration.  ``session_id``: the session of ``lanes``
        (:func:`migrate.protocol.session.new_id`).
        """
        toolstack = toolstack or OwnToolstack()
        entry = Entry(domain, options, toolstack.destroys_source)
        context = Context(session_id, hypervisor, lanes, journal, toolstack, entry, State.OFFERING)
        context.policy = policy or context.policy
        return cls(context)

    @classmethod
    def of_predecessor(
        cls,
        session_id: str,
        hypervisor: Hypervisor,
        lanes: Lanes,
        journal: Journal,
        facts: dict[str, Any],
    ) -> OutgoingMigration:
        """Return the migration of a daemon that has died, from its journal.  ``lanes`` are for
        rejoining only.

        Raises ``ValueError`` or :class:`MigrationError` for an entry that this release must not act
        on.
        """
        entry, state = read_entry(facts, has_checkpoint=is_there(journal.checkpoint(session_id)))
        keeper = journal.keeper(session_id)
        toolstack = XlToolstack(entry.domain.name, keeper) if entry.xl else OwnToolstack()
        lanes.keep(entry.key)
        context = Context(session_id, hypervisor, lanes, journal, toolstack, entry, state)
        context.progress.problem = RESUMING
        if is_there(journal.stopped(session_id)):
            context.suspends_until = latest_suspension()
        if state is State.GIVEN_UP:
            context.progress.problem = "given up, before the sender was restarted"
            context.last_message = m.Abort("the guest stays at the source")
        elif state is State.COMPLETING:  # the predecessor may not have sent ``completed``
            context.last_message = m.Completed()
        return cls(context)

    # ---- what is shown ----
    @property
    def id(self) -> str:
        return self.context.id

    @property
    def domain(self) -> DomainId:
        return self.context.entry.domain

    @property
    def domain_name(self) -> str:
        return self.context.name

    @property
    def phase(self) -> str:
        return self.ownership.phase

    @property
    def progress(self) -> Progress:
        return self.context.progress

    @property
    def has_ended(self) -> bool:
        """Whether the migration has ended."""
        return self.ownership.has_ended

    @property
    def keeps_pages(self) -> bool:
        """Whether the guest is at the destination, and some of its pages may be only here."""
        return self.ownership.may_be_elsewhere and not self.has_ended

    @property
    def holds_pages(self) -> bool:
        """Whether this process holds the pages of a domain that the toolstack destroys."""
        return self.keeps_pages and self.context.toolstack.destroys_source

    @property
    def unknown(self) -> tuple[str, ...]:
        """Return the keys, of the progress and of the result, whose values this sender does not
        have.
        """
        if self.context.began_here:
            return ()
        confirmed = self.ownership.state in (State.COMPLETING, State.COMPLETED)
        has_reported = confirmed or not self.ownership.inherited
        has_older_one = self.context.entry.applied and self.progress.checkpoint_at == 0
        return (
            *BEFORE_RESTART,
            *(() if has_reported else OF_DESTINATION),
            *(OF_CHECKPOINTS if has_older_one and not self.has_ended else ()),
        )

    @property
    def outstanding_in_words(self) -> str:
        """State in words what is outstanding."""
        if "outstanding" in self.unknown:
            return "its missing pages are not counted yet"
        paused = ", and copying is paused" if self.context.pause.is_on else ""
        return f"{self.progress.outstanding} pages to go{paused}"

    def result(self) -> dict[str, Any]:
        """Return the result, with the JSON keys that docs/commands.md explains."""
        theirs = self.context.receiver_statistics
        ours = self.context.statistics.summary(*self.context.lane_bytes())
        return {**theirs, "id": self.id, "domain": self.domain_name, **ours}

    def recorded(self) -> dict[str, Any]:
        """Return what was recorded so far.  Call this in a thread."""
        return self.context.record.taken()

    # ---- the lifetime ----
    async def run(self) -> None:
        """Carry the migration out.  Raises :class:`MigrationError` or ``XenError``; ``ownership``
        then states where the guest is.
        """
        context = self.context
        logs.migration.set(context.id)
        context.statistics.started = time.monotonic()
        try:
            if self.ownership.state is State.GIVEN_UP:
                raise MigrationError(self.progress.problem)
            source = await self._open()
            if source is not None:
                await self._transfer(source)
        finally:
            self.requests.is_over = True
            self.requests.decided.set()
            context.statistics.finished = context.statistics.finished or time.monotonic()
            context.toolstack.close()
            context.close_lanes()
            if not self.keeps_pages and context.source is not None:
                await self._close(context.source)

    async def _transfer(self, source: Source) -> None:
        context = self.context
        recovery = Recovery(context, source)
        rollback = self.requests.rollback = Rollback(context, source, recovery)
        transfer = Transfer(context, source, recovery, rollback)
        try:
            with self.requests.scope:
                await (
                    transfer.continue_predecessor() if self.ownership.inherited else transfer.run()
                )
            if self.requests.scope.cancelled_caught:
                raise await self._cancelled()
        except BaseException as error:
            phase = self.phase
            await as_soon_as_threads_start(functools.partial(rollback.settle, error))
            how = outcome(self.phase, problem := self.progress.problem)
            logs.abnormal_end(self.domain_name, phase, how, problem, self.result())
            raise

    async def linger(self) -> None:
        """Send the outcome until the destination has it, if anything is left to be sent."""
        await send_last_message(self.context)

    async def _open(self) -> Source | None:
        """Open the guest's domain.  Returns ``None`` if a predecessor has completed the
        migration.  Raises ``XenError`` if the domain of a new migration cannot be opened.
        """
        context = self.context
        try:
            domain = await as_soon_as_threads_start(self._open_domain)
        except XenError as error:
            if not self.ownership.inherited:
                is_gone = isinstance(error, NoSuchDomainError)
                end = State.FAILED if is_gone else State.STAYED
                await in_thread(context.fail, end, str(error))
                raise
            await in_thread(source_is_gone, context, error)
            return None
        context.is_domain(domain, "")
        may_be_on = LOG_DIRTY_MAY_BE_ON
        if context.toolstack.destroys_source:  # ``before_decision`` has switched log-dirty off
            may_be_on -= {State.HANDED_OVER, State.DECIDED_HERE}
        is_on = self.ownership.state in may_be_on
        dirty_log = DirtyLog(domain, context.entry.max_pages, enabled=is_on)
        checkpoints = None
        if context.options.checkpoint_every_s is not None:
            path = context.journal.checkpoint(context.id)
            checkpoints = CheckpointStore(path, domain, context.note_applied)
        context.source = Source(domain, dirty_log, checkpoints)
        return context.source

    async def _open_domain(self) -> Domain:
        """Return the domain.  Raises ``XenError``.  A guest elsewhere may need the pages of a
        predecessor's domain, so for such a migration only :class:`NoSuchDomainError` is raised.
        """
        while True:
            try:
                return await trio.to_thread.run_sync(self._find_domain)
            except NoSuchDomainError:
                raise
            except XenError as error:
                if not self.ownership.inherited:
                    raise
                problem = f"the migration cannot be resumed yet: {error}; trying again"
                self.progress.problem = problem
                log.error("%s: %s", self.domain_name, problem)
                await trio.sleep(AGAIN_S)

    def _find_domain(self) -> Domain:
        """Open the domain, with the pages that a predecessor's keeper has."""
        domid, handle, hypervisor = self.domain.domid, self.domain.handle, self.context.hypervisor
        if not self.ownership.inherited:
            return hypervisor.open(domid, handle)
        return open_with_keeper(self.context.journal.keeper(self.id), hypervisor, domid, handle)

    async def _cancelled(self) -> MigrationError:
        """Note an operator's decision, if any, and return the error that ends the migration."""
        decision = self.requests.decision
        if decision is None:
            return MigrationError(self.requests.cancelled)
        # The journal has the decision before the operator has an answer.
        try:
            await in_thread(self.ownership.enter, decision)
        except MigrationError as error:
            self.requests.refusal = error
            raise
        self.requests.refusal = None
        self.requests.decided.set()
        return error_of_decision(decision)

    async def _carry_out(self, decision: State) -> None:
        """Carry a decision out after an error has ended :meth:`run` and the guest's pages are
        kept.
        """
        rollback, source = self.requests.rollback, self.context.source
        assert rollback is not None and source is not None
        await in_thread(self.ownership.enter, decision)
        settle = functools.partial(rollback.settle, error_of_decision(decision))
        await as_soon_as_threads_start(settle)
        await self._close(source)

    async def _close(self, source: Source) -> None:
        with trio.CancelScope(shield=True):
            await in_thread(source.domain.close)
        self.requests.rollback = None
        self.context.give_back()
