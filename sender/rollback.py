# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to the guest and its pages when a migration does not complete.

Up to SUSPENDED the guest continues here as if nothing had happened.  In UNDECIDED the toolstack
decides.  From HANDED_OVER on the domain stays suspended, and its pages are kept until each is
confirmed or until an operator decides (invariants 1 and 6).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator

import trio

from migrate.errors import GuestEndedError, MigrationError, PeerClosedError, UsedUpError
from migrate.outcomes import RESCUED
from migrate.protocol import messages as m
from migrate.service.journal import remove
from migrate.service.lifecycle import decide_commands
from migrate.tasks import as_soon_as_threads_start, first, in_thread, is_bug, is_used_up
from migrate.units import command
from sender.checkpoints import CheckpointStore
from sender.context import Context, Source
from sender.last_message import NOT_NEEDED, lose
from sender.ownership import DECIDED, Guest, Link, Restart, State
from sender.recovery import Recovery, is_gone
from sender.toolstack import StaysHereError
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import NoSuchDomainError, XenError

log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""The pause between two attempts to have the guest continue here, or to destroy the source."""
LATE_LOOK_EVERY_S = 0.2
"""The pause between two polls of whether a guest suspends late."""
ABORT_S = 2.0
"""How long sending ``abort`` to a connected destination may take."""


class Rollback:
    def __init__(self, context: Context, source: Source, recovery: Recovery):
        self._context = context
        self._ownership = context.ownership
        self._source = source
        self._recovery = recovery
        self.is_waiting = False
        """Whether a toolstack, or the next attempt to return to a checkpoint, is being waited for.
        An operator may then :meth:`overrule`.
        """
        self._has_ended = False
        """The guest has ended here, before the handover."""
        self._shield = trio.CancelScope(shield=True)
        """The scope in which the guest is left at this end; see :meth:`_pause`."""
        self._overruled = trio.Event()
        self._overruling = State.DECIDED_ELSEWHERE
        self._taken: State | MigrationError | None = None
        """The decision, or why the journal cannot have it."""
        self._waited = trio.Event()
        """Set when the wait has ended, by itself or by an operator."""

    async def overrule(self, decision: State) -> bool:
        """End the wait, because an operator has decided.  Returns false if the decision came too
        late.

        Raises :class:`MigrationError` if the journal cannot have the decision; the wait continues.
        """
        self._overruling = decision
        self._overruled.set()
        await self._waited.wait()
        if isinstance(self._taken, MigrationError):
            raise self._taken
        return self._taken is decision

    async def settle(self, error: BaseException) -> None:
        """Leave the guest at exactly one end, after the error that has ended the migration.

        The error was raised before this call, and the state may have changed since: the state
        decides first.
        """
        if not self._ownership.may_be_elsewhere:
            await self._stay_here(error)
        elif isinstance(error, trio.Cancelled):
            self._keep(error)  # this process ends, and its successor continues
        elif isinstance(error, StaysHereError) and self._ownership.may_stay:
            await self._stay_here(error)
        elif isinstance(error, GuestEndedError | StaysHereError):
            await self._guest_ended(error)
        elif self._ownership.state is State.UNDECIDED:
            await self.settle(await self._wait_for_decision(error))
        elif await self._recovery.pages_are_lost():
            gone = f"the domain of {self._context.name} was destroyed at the source"
            reason = await in_thread(lose, self._context, gone)
            log.error("%s: %s", self._context.name, reason)
        else:
            await in_thread(self._ownership.note)  # the destination may have reported its end
            self._keep(error)

    def _keep(self, error: BaseException) -> None:
        name = self._context.name
        self._context.progress.problem = (
            f"{error}; {name} was handed over, and its missing pages are kept here until you "
            f"decide: {decide_commands(name)}"
        )
        self._ownership.link = Link.GIVEN_UP

    async def _wait_for_decision(self, error: BaseException) -> BaseException:
        """Wait for the toolstack's decision, or an operator's.  Returns what follows from the
        decision, or ``error`` if the guest belongs to the destination.
        """
        context, stays = self._context, False

        async def wait_for_toolstack() -> None:
            nonlocal stays
            stays = not await context.toolstack.decision(self._source.domain)

        context.progress.problem = f"{error}; xl has not decided yet at which end the guest runs"
        self._ownership.link = Link.GIVEN_UP
        log.warning("%s: %s", context.name, context.progress.problem)
        while True:
            self.is_waiting = True
            await first(wait_for_toolstack, self._overruled.wait)
            self.is_waiting = False
            if not self._overruled.is_set():
                break
            if await self._take_decision():
                return error_of_decision(self._ownership.state)
        self._waited.set()
        if stays:
            return StaysHereError(str(error))
        await in_thread(self._ownership.enter, State.HANDED_OVER)
        return error

    async def _take_decision(self) -> bool:
        """Enter the state of the operator's decision.  Returns false if the journal cannot have the
        decision: then everything is as it was before the decision.
        """
        decision, entry = self._overruling, self._context.entry
        recall, last_message = entry.recall, self._context.last_message
        if decision is State.DECIDED_ELSEWHERE:  # the guest may run at the destination
            entry.recall, self._context.last_message = False, None
        waited, self._taken = self._waited, decision
        try:
            await in_thread(self._ownership.enter, decision)
        except MigrationError as error:
            entry.recall, self._context.last_message = recall, last_message
            self._taken, self._waited, self._overruled = error, trio.Event(), trio.Event()
        waited.set()
        return self._taken is decision

    async def _guest_ended(self, error: MigrationError) -> None:
        """Destroy what is left of the guest here, and end the migration."""
        await self.destroy_source()
        if self._ownership.state is State.DECIDED_ELSEWHERE:
            # The destination may come back, and wait for pages.
            await in_thread(lose, self._context, NOT_NEEDED, str(error))
            await in_thread(self._close_checkpoints)
        else:
            self._context.progress.problem = str(error)
            await in_thread(self.forget, State.FAILED)

    # ---- the guest continues here ----
    async def _stay_here(self, error: BaseException) -> None:
        self._context.progress.problem = str(error)
        try:
            with trio.CancelScope(shield=True) as self._shield:
                reason = self._context.progress.problem = await in_thread(self._reason, error)
                await self._give_up(reason)
        except GuestEndedError as otherwise:
            await self._guest_ended(otherwise)

    def _reason(self, error: BaseException) -> str:
        """Return why the migration ends.  If the guest has ended here, each call about its domain
        fails, and the end of the guest is the reason.
        """
        domain, name = self._source.domain, self._context.name
        if self._ownership.may_be_elsewhere or not is_gone(domain, name):
            return str(error)
        self._has_ended = True
        return f"{name} has ended during the migration: {domain.end().value}"

    async def _give_up(self, reason: str) -> None:
        context, checkpoints = self._context, self._source.checkpoints
        log.warning("migration of %s given up: %s", context.name, reason)
        if self._ownership.handed_over:
            context.entry.recall = True
        abort = m.Abort(m.printable(reason))
        if self._ownership.peer_may_be_ready:
            context.last_message = abort
        await self._send_abort(abort)
        if checkpoints is not None and await in_thread(self._is_to_go_back, checkpoints):
            with self._reported():
                await trio.to_thread.run_sync(self._source.dirty_log.disable)
            with self._reported():
                await self._go_back(checkpoints)
        else:
            with self._reported():
                await self._continue(reason)
        with self._reported():
            end = State.FAILED if self._has_ended else State.STAYED
            await in_thread(self.forget, end if context.last_message is None else State.GIVEN_UP)

    async def _send_abort(self, abort: m.Abort) -> None:
        """Send ``abort`` once, and end the connection.  If the destination is not ready, the end of
        the connection has the same effect.  Otherwise ``abort`` is sent again later.

        The destination forgets the session then, so nothing is sent if a successor of this sender
        would still ask the destination what the toolstack has decided.
        """
        if self._context.push is not None and self._ownership.row.restart is Restart.TAKE_BACK:
            with trio.move_on_after(ABORT_S), contextlib.suppress(PeerClosedError):
                await self._context.push.connection.send(abort)
        self._context.close_lanes()

    async def _continue(self, reason: str) -> None:
        """Undo what the migration has changed in the domain, and have the guest continue there.  An
        error of the dirty log does not delay the guest.
        """
        domain, toolstack = self._source.domain, self._context.toolstack
        continues, suspended = False, self._ownership.is_suspended

        async def step() -> None:
            nonlocal continues
            try:
                await trio.to_thread.run_sync(self._source.dirty_log.disable)
            finally:
                if not continues:  # another program may have suspended the guest again since then
                    await self._resume_late(reason)
                    await toolstack.give_up(domain, reason, suspended=suspended)
                    continues = True

        await self._repeat(step, f"{reason}; the guest cannot continue here yet")

    async def _resume_late(self, reason: str) -> None:
        """Wait for as long as a guest that was asked to suspend may still do so, and resume it."""
        context, domain = self._context, self._source.domain
        while time.monotonic() < context.suspends_until:
            if await in_thread(domain.state) is DomainState.SUSPENDED:
                await in_thread(domain.resume)
                break
            context.progress.problem = (
                f"{reason}; the guest runs, but may still suspend, and is then resumed"
            )
            await self._pause(LATE_LOOK_EVERY_S)
        context.suspends_until = 0.0

    async def _repeat(self, step: Callable[[], Awaitable[object]], what: str) -> None:
        """Do a step until it succeeds.  After each error, ``what`` and the error are shown.  An
        unexpected error is no reason to stop, because nobody else would do the step.

        Raises :class:`NoSuchDomainError` if the domain is gone, and :class:`MigrationError` if the
        step does.
        """
        progress, before = self._context.progress, self._context.progress.problem
        while True:
            try:
                await as_soon_as_threads_start(step)
                break
            except (NoSuchDomainError, MigrationError):
                progress.problem = before
                raise
            except Exception as error:
                self._show(f"{what}: {in_words(error)}; trying again", error)
                await self._pause(AGAIN_S)
        progress.problem = before

    def _show(self, problem: str, error: Exception) -> None:
        """Show a problem and log it, with the traceback of an unexpected error."""
        self._context.progress.problem = problem
        log.error("%s: %s", self._context.name, problem, exc_info=is_bug(error))

    async def _pause(
        self, pause_s: float, wait: Callable[[], Awaitable[object]] = trio.sleep_forever
    ) -> None:
        """Wait for the next attempt, or until ``wait`` returns.  If this process ends meanwhile,
        its successor makes the next attempt, by the entry in the journal.
        """
        shield = self._shield
        shield.shield = False
        try:
            with trio.move_on_after(pause_s):
                await wait()
        finally:
            shield.shield = True

    def _is_to_go_back(self, checkpoints: CheckpointStore) -> bool:
        return self._context.entry.applied or not unreadable(checkpoints)

    async def _go_back(self, checkpoints: CheckpointStore) -> None:
        """Return to the guest as it was at the last checkpoint, and try until that succeeds.

        The old domain is destroyed then.  Raises :class:`GuestEndedError` if an operator decides
        otherwise after a failed attempt.
        """
        context = self._context
        while True:
            try:
                domain = await trio.to_thread.run_sync(self._new_domain)
                await trio.to_thread.run_sync(checkpoints.go_back, domain)
                break
            except Exception as error:
                self._show(
                    f"cannot go back to the last checkpoint: {in_words(error)}; trying again; to "
                    "give the guest up here instead: "
                    f"{command('decide', context.name, 'elsewhere')}",
                    error,
                )
                self.is_waiting = True
                await self._pause(AGAIN_S, self._overruled.wait)
                if self._overruled.is_set() and await self._take_decision():
                    raise error_of_decision(self._ownership.state) from error
        self.is_waiting = False
        self._waited.set()
        log.warning("%s continues here, as it was at the last checkpoint", context.name)
        old, self._source.domain, context.progress.problem = self._source.domain, domain, RESCUED
        with contextlib.suppress(NoSuchDomainError):  # another program has destroyed it
            destroy = functools.partial(context.toolstack.finish, old)
            await self._repeat(destroy, f"{RESCUED}; its old domain cannot be destroyed")
        await in_thread(old.close)

    def _new_domain(self) -> Domain:
        """Return the domain in which the guest will continue.  A guest keeps its UUID, so the
        domain that takes its place has the same one.
        """
        entry, hypervisor = self._context.entry, self._context.hypervisor
        config = self._source.domain.config()
        if entry.restored_domid is not None:
            return hypervisor.reopen_incoming(
                entry.restored_domid, config, lent=False, handle=self._source.domain.handle
            )
        for left in hypervisor.abandoned(config, instead_of=self._source.domain):
            left.destroy()  # a predecessor made it, and was killed before it noted the number
        domain = hypervisor.create_incoming(config, instead_of=self._source.domain)
        applied, entry.restored_domid, entry.applied = entry.applied, domain.domid, True
        try:
            self._ownership.enter(State.RETURNING)
        except MigrationError:
            entry.restored_domid, entry.applied = None, applied
            domain.destroy()
            raise
        return domain

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Add an error to the problem that is shown, and continue after the block."""
        try:
            yield
        except GuestEndedError:
            raise
        except Exception as error:
            if is_used_up(error):
                raise  # everything is repeated then
            if self._has_ended and isinstance(error, NoSuchDomainError):
                return  # nothing is left to be undone
            before = self._context.progress.problem
            self._show(f"{before}; and then: {in_words(error)}", error)

    # ---- the guest continues elsewhere, or nowhere ----
    async def destroy_source(self) -> None:
        """Destroy what is left of the guest here.  The attempt is repeated until it succeeds."""
        with contextlib.suppress(NoSuchDomainError):  # another program has destroyed it
            await self._repeat(self._destroy, "the source cannot be destroyed")

    async def _destroy(self) -> None:
        await self._destroy_restored()
        await self._context.toolstack.finish(self._source.domain)

    async def _destroy_restored(self) -> None:
        """Destroy the domain that was made for a checkpoint, if the guest never ran in it."""
        if self._context.entry.restored_domid is None:
            return
        with contextlib.suppress(NoSuchDomainError):
            successor = await trio.to_thread.run_sync(self._new_domain)
            if await trio.to_thread.run_sync(successor.state) is DomainState.INCOMING:
                await trio.to_thread.run_sync(successor.destroy)
        self._context.entry.restored_domid = None

    def forget(self, state: State) -> None:
        """Enter the last state, and remove the checkpoint.  Called in a thread."""
        self._ownership.enter(state)
        self._close_checkpoints()

    def _close_checkpoints(self) -> None:
        if self._source.checkpoints is not None:
            self._source.checkpoints.close()


def source_is_gone(context: Context, error: XenError) -> None:
    """End the migration of a predecessor whose domain does not exist any more.  Raises
    :class:`MigrationError`, unless the migration was completed.  Called in a thread.
    """
    ownership, state = context.ownership, context.ownership.state
    gone = f"the domain of {context.name} does not exist at the source any more"
    if ownership.row.guest in (Guest.UNDECIDED, Guest.THERE):
        raise MigrationError(lose(context, gone)) from error
    if state is State.COMPLETING:
        context.progress.problem = ""
        ownership.enter(State.COMPLETED)
        log.info("%s completed", context.name)
        return
    if state not in (State.RETURNING, State.DECIDED_ELSEWHERE):
        context.fail(State.FAILED, gone)
        raise MigrationError(gone) from error
    remove(context.journal.checkpoint(context.id))
    reason = error_of_decision(state)
    if state is State.RETURNING:  # the guest continues here, in its new domain
        context.entry.recall = True
        context.last_message = m.Abort(m.printable(str(reason)))
        context.fail(State.GIVEN_UP, str(reason))
    else:  # the destination may come back, and wait for pages
        lose(context, NOT_NEEDED, str(reason))
    raise reason from error


def error_of_decision(state: State) -> MigrationError:
    """Return the error that stands for an operator's decision."""
    assert state in DECIDED
    if state is State.DECIDED_ELSEWHERE:
        return GuestEndedError("an operator has decided that nothing of the guest is needed here")
    if state is State.RETURNING:
        return StaysHereError(RESCUED)
    return StaysHereError("an operator has decided that the guest does not run at the destination")


def in_words(error: Exception) -> str:
    """Return the error as people are shown it."""
    if is_used_up(error):
        return str(UsedUpError())
    return f"internal error: {error!r}" if is_bug(error) else str(error)


def unreadable(checkpoints: CheckpointStore) -> str:
    """Return why the guest cannot return to the last checkpoint; empty if it can."""
    try:
        checkpoints.check()
    except MigrationError as error:
        return str(error)
    return ""
