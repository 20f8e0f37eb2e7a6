# SPDX-License-Identifier: GPL-2.0-or-later
"""The migration of a killed daemon; and the time without lanes, until they are back or the guest
continues without the sender.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time

import trio

from migrate.errors import (
    GuestEndedError,
    MigrationError,
    PagesLostError,
    PeerClosedError,
    ProtocolError,
    RecalledError,
    RemoteProtocolError,
    UnknownSessionError,
)
from migrate.lanes.connection import step_timeout
from migrate.outcomes import GAVE_UP
from migrate.protocol import messages as m
from migrate.protocol.pfns import windows
from migrate.protocol.session import new_token
from migrate.service.host import config_of
from migrate.service.journal import is_there, remove
from migrate.service.lifecycle import RESUMING
from migrate.tasks import (
    as_soon_as_threads_start,
    first,
    in_thread,
    is_bug,
    is_final,
    is_used_up,
    task_group,
)
from migrate.units import command, xl_command
from receiver.context import LAST_START_AGAIN_S, NOT_HERE, Context
from receiver.guest import Guest
from receiver.origins import Origin
from receiver.outstanding import OutstandingPages
from receiver.ownership import Link, Restart, State, Undo
from receiver.preflight import Begun
from receiver.restore import FrameLimit
from receiver.rollback import recall_reason
from receiver.switchover import LOOK_EVERY_S, Switchover
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.ring import PagingRing

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 10.0
CARRY_ON_AGAIN_S = 0.5
"""The pause after an error that is not an error of the link."""
REPORT_LOST_EVERY_S = 1.0
WAS_HELD = "the guest runs at its source, as the source or an operator has stated"
WAS_LOST = "the source has nothing of the guest any more"
MAYBE_FINISHED = ("taken over", "finishing")
"""The steps in a journal after which the ring may have been given up, because later entries may not
have been written.
"""


class Predecessor:
    """The migration of a killed daemon.  ``noted``: the last step in its journal."""

    def __init__(self, context: Context, offer: m.Offer, noted: str):
        self._context = context
        self._offer = offer
        self._noted = noted

    async def begin(self) -> Begun:
        """Resume the migration.  A guest waits, so the attempt is repeated after an error that may
        pass.
        """
        return Begun(await as_soon_as_threads_start(self._keep_resuming), None)

    async def _keep_resuming(self) -> Guest:
        context = self._context
        while True:
            try:
                guest = await trio.to_thread.run_sync(self._resume_migration)
                break
            except Exception as error:
                if is_final(error) or is_used_up(error) or not context.ownership.needed:
                    raise
                await in_thread(context.holdings.release)
                context.progress.problem = (
                    f"the migration cannot be resumed yet: {error}; trying again"
                )
                log.error("%s: %s", context.name, context.progress.problem, exc_info=is_bug(error))
                await trio.sleep(LAST_START_AGAIN_S)
        context.progress.problem = context.entry.reason or RESUMING
        context.progress.outstanding = guest.pages.count
        context.progress.pages_total = context.entry.missing or None
        log.warning(
            "%s: resuming the migration of a killed receiver, %s, %d pages missing",
            context.name,
            self._noted,
            guest.pages.count,
        )
        return guest

    def _resume_migration(self) -> Guest:
        context, ownership, offer = self._context, self._context.ownership, self._offer
        if ownership.row.restart is Restart.DISCARD:
            self._find_left_over()
            not_arrived = "the receiver was ended before the guest had arrived"
            raise MigrationError(
                NOT_HERE if context.is_in(State.DECIDED_ELSEWHERE) else not_arrived
            )
        try:
            domain = context.hypervisor.reopen_incoming(
                context.entry.domid,
                config_of(offer),
                lent=context.entry.owns_domain,
                handle=context.entry.handle,
            )
            context.holdings.add_domain(domain)
            if context.toolstack.has_started(domain.state()):
                self._has_started()
        except NoSuchDomainError:
            raise GuestEndedError("its domain was destroyed") from None
        limit = FrameLimit(domain, context.entry.raised, context.note_raised)
        pages, ring = OutstandingPages(offer.nr_pfns), None
        if offer.paging:
            ring = self._attach(domain)
            if ring is not None:
                context.holdings.add(ring.close)
            pages.add(domain.paged_out())
        pages.origins.others = Origin.UNKNOWN
        ownership.inherited = False
        return Guest(offer, domain, ring, pages, limit)

    def _find_left_over(self) -> None:
        context = self._context
        hypervisor, entry = context.hypervisor, context.entry
        with contextlib.suppress(NoSuchDomainError):
            if self._noted == "making":
                abandoned = next(iter(hypervisor.abandoned(config_of(self._offer))), None)
                if abandoned is not None:
                    context.holdings.add_domain(abandoned)
            else:
                context.holdings.add_domain(hypervisor.open(entry.domid, entry.handle))

    def _has_started(self) -> None:
        """Note the start of the guest, which precedes its entry in the journal."""
        if self._context.is_in(State.MAYBE_READY, State.READY, State.UNSTARTED):
            self._context.peer.session.handed_over = True
            self._context.ownership.enter(State.OWNS)

    def _attach(self, domain: Domain) -> PagingRing | None:
        """Attach to the guest's ring.  Returns ``None`` if a predecessor has given the ring up.

        journal                              domain                       what follows
        `taken over`, `finishing`, or OWNS   no ring, no page paged out   no ring is needed
        any step                             no ring otherwise            the error is raised
        any step                             another pager (EBUSY)        another attempt
        """
        deadline = time.monotonic() + ATTACH_TIMEOUT_S
        while True:
            try:
                return domain.paging_attach()
            except XenError as error:
                given_up = self._noted in MAYBE_FINISHED or self._context.is_in(State.OWNS)
                if error.errno == errno.ENODEV and given_up and not len(domain.paged_out()):
                    return None
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                # The hypervisor has not noticed yet that the predecessor is dead.
                time.sleep(LOOK_EVERY_S)

    async def serve_inherited(self, switchover: Switchover) -> None:
        """Start the guest if it belongs here and was not started, and serve its faults."""
        if self._context.ownership.row.restart not in (Restart.SERVE, Restart.START):
            return
        state = await trio.to_thread.run_sync(switchover.guest.state)
        await trio.to_thread.run_sync(self._undo_stop, switchover.guest.domain, state)
        async with self._context.deciding:
            if state is DomainState.INCOMING and self._context.is_in(State.UNSTARTED):
                started = await in_thread(switchover.take_over)
                switchover.taken_over(started=started)
                return
        if self._context.is_in(State.UNSTARTED):
            self._context.ownership.seen_to_run()
        await trio.to_thread.run_sync(switchover.protect)
        if self._context.ownership.handed_over:
            switchover.runs.set()
        switchover.serve()

    def _undo_stop(self, domain: Domain, state: DomainState | None) -> None:
        """Have a guest that a predecessor stopped continue.

        Raises ``XenError``.  The note of the stop is then kept for the next attempt.
        """
        if self._was_stopped_by_us(state):
            if state is DomainState.SUSPENDED:
                domain.resume()
            elif state is DomainState.PAUSED:
                domain.unpause()
            elif self._offer.checkpoint_ms:
                return  # the guest may still suspend; see :meth:`Checkpoints.begin`
            remove(self._context.entry.stopped)

    def _was_stopped_by_us(self, state: DomainState | None) -> bool:
        """Whether a predecessor stopped the guest: for a checkpoint, to give the ring up, or to
        start the guest.  The first line that applies decides.  Release 0.1.0 noted no handle.

            journal                                      domain             stopped by a predecessor
            `finishing` of 0.1.0, which noted no stops   any state          yes
            a step before `taken over`, or any of 0.1.0  may be starting    yes
            any step                                     any state          if `stopped` is there

        ``lost`` and ``held`` follow `taken over`.
        """
        entry = self._context.entry
        if entry.handle is None and self._noted == "finishing":
            return True  # the predecessor's release noted only this
        just_started = self._noted not in (*MAYBE_FINISHED, "lost", "held") or entry.handle is None
        if just_started and self._context.toolstack.may_have_been_starting(state):
            return True
        return is_there(entry.stopped)


class Recovery:
    """The time between two pairs of lanes."""

    def __init__(self, switchover: Switchover):
        self.switchover = switchover
        self._context = switchover.context
        self.released = trio.Event()
        """Set when an operator has decided that a held guest continues."""

    @property
    def io_fails_in_s(self) -> float | None:
        """See :attr:`IncomingProgress.io_fails_in_s`.  A request may have been made since the
        sender was last connected, so the time counts from then.
        """
        context = self._context
        limit_s = context.toolstack.io_limit_s
        waits = context.is_in(State.RUNNING, State.OWNS) and self.switchover.guest.pages.count
        if limit_s is None or not waits or context.ownership.link is Link.UP:
            return None
        return round(max(0.0, limit_s - (time.monotonic() - context.peer.received_at)), 1)

    async def rejoin(self, lost: Exception) -> None:
        """Return when the sender is back on new lanes, or is not needed any more.  A guest that is
        here continues meanwhile as far as its pages allow.
        """
        context = self._context
        if context.is_in(State.COMPLETING):
            context.ownership.enter(State.OWNS)
        while True:
            self.note(str(lost))
            context.disconnect()
            log.warning(
                "%s %s: %s", context.name, context.ownership.phase, lost, exc_info=is_bug(lost)
            )
            try:
                await self._reconnect()
                await self._resume_session()
                break
            except PagesLostError as error:
                await self.serve_without_sender(str(error))
                return
            except RecalledError as error:
                await self.hold(str(error))
                return
            except UnknownSessionError as error:
                if not self.switchover.serving.is_set():
                    raise MigrationError("the sender has given this migration up") from error
                lost = error
            except Exception as error:
                if is_final(error):
                    raise
                lost = error
                if not isinstance(error, PeerClosedError | ProtocolError):
                    await trio.sleep(CARRY_ON_AGAIN_S)
        context.ownership.link = Link.UP
        context.progress.problem = self.switchover.not_started
        log.info(
            "%s: the sender is back, %d pages are missing",
            context.name,
            self.switchover.guest.pages.count,
        )

    async def _reconnect(self) -> None:
        context = self._context
        async with task_group() as offline:
            offline.start_soon(self._serve_alone)
            offline.start_soon(self._while_undecided)
            await context.peer.reconnect(self.note)
            context.ownership.link = Link.BACK
            async with context.deciding:
                offline.cancel_scope.cancel()

    async def _serve_alone(self) -> None:
        await self.switchover.serving.wait()
        await self.switchover.pager.serve(None)

    async def _while_undecided(self) -> None:
        if not self.switchover.serving.is_set():
            await self._context.toolstack.while_undecided(self.switchover.watch_domain)

    async def _resume_session(self) -> None:
        """Receive the sender's first message, and report what is missing."""
        context, switchover = self._context, self.switchover
        peer = context.peer
        peer.session.rejoin()
        with step_timeout("the sender sent nothing"):
            message = await peer.receive()
        await self._check(message)
        if switchover.settled:
            return
        pages = switchover.pager if switchover.serving.is_set() else switchover.guest.pages
        for base, bitmap in windows(await trio.to_thread.run_sync(pages.rejoin)):
            await peer.send(m.Outstanding(base, bitmap))
        token = new_token()
        reached = "postcopy"
        if not context.ownership.handed_over:
            reached = "decision" if switchover.serving.is_set() else "switchover"
        await peer.send(m.Rejoined(reached, token))
        await peer.open_pull_lane(token)

    async def _check(self, message: m.Message) -> None:
        """Carry out the sender's first message on new lanes."""
        context, switchover = self._context, self.switchover
        match message:
            case m.Rejoin():
                pass
            case m.Completed() if switchover.needs_nothing:
                switchover.settled = True
            case m.Abort() | m.Recall() if reason := recall_reason(context, message):
                async with context.deciding:  # no attempt to start the guest is under way
                    if context.ownership.row.undo is Undo.NOTHING:
                        raise RecalledError(reason)
                    await in_thread(context.ownership.enter, State.DECIDED_ELSEWHERE)
                await context.peer.acknowledge()
                raise MigrationError(reason)
            case m.Abort() if not context.ownership.handed_over:
                raise MigrationError(f"{GAVE_UP}{message.reason}")
            case m.Lost():
                if not switchover.serving.is_set() and not context.toolstack.owns_domain:
                    await self._take_over_what_is_whole()
                if not switchover.needs_nothing:
                    raise PagesLostError(message.reason)
                await context.peer.acknowledge(m.ALL_ARRIVED)
                switchover.settled = True
            case _:
                missing = switchover.guest.pages.count
                raise RemoteProtocolError(f"{message.type}, but {missing} pages are missing")

    async def _take_over_what_is_whole(self) -> None:
        """Start a guest that lacks no page.  The source had handed the guest over, and has nothing
        of it any more, so this is the only copy.
        """
        async with self._context.deciding:
            if not self.switchover.guest.pages.count:
                self._context.peer.session.handed_over = True
                started = await in_thread(self.switchover.take_over)
                self.switchover.taken_over(started=started)

    def note(self, why: str) -> None:
        """Show why the link is lost, and what follows for the guest."""
        if self._context.ownership.ours:
            waits = bool(self.switchover.guest.pages.count)
            lacks = "waits for its missing pages" if waits else "lacks no page"
            state = self.switchover.not_started or f"the guest is here and {lacks}"
        elif self._context.is_in(State.SERVING):
            state = "xl has not decided yet whether the guest runs here; its faults are served"
        else:
            state = (
                "the sender may or may not have handed the guest over: it is kept, and does not run"
            )
        self._context.progress.problem = f"{why}; {state}"

    # ---- without the sender ----
    async def serve_without_sender(self, reason: str) -> None:
        """Serve the guest with the pages that are here, until the guest is destroyed or no page is
        missing any more.
        """
        context, switchover = self._context, self.switchover
        if not switchover.serving.is_set():
            raise MigrationError(reason)
        context.entry.reason = reason
        async with context.deciding:
            if switchover.guest.pages.count:
                context.progress.problem = self._what_is_lost(reason)
                await in_thread(context.ownership.enter, State.LOST)
            elif context.is_in(State.SERVING, State.RUNNING):
                # The source is gone, so xl has decided for this end.  The state is noted before the
                # sender is answered: the answered sender forgets the session, and a successor of
                # this daemon without the note would wait for that sender.
                await in_thread(context.ownership.enter, State.OWNS)
        log.error(
            "%s: %s; %d pages are missing", context.name, reason, switchover.guest.pages.count
        )
        nothing_missing = switchover.pager.nothing_outstanding
        async with task_group() as offline:
            offline.start_soon(switchover.pager.serve, None)
            await self._answer_and_leave()  # the loss has been noted
            while not nothing_missing.is_set():
                context.progress.problem = self._what_is_lost(reason)
                with trio.move_on_after(REPORT_LOST_EVERY_S):
                    await nothing_missing.wait()
            context.progress.problem = switchover.not_started
            await switchover.runs.wait()  # this daemon or xl starts the guest
            offline.cancel_scope.cancel()
        if context.is_in(State.UNSTARTED):
            await in_thread(context.ownership.enter, State.OWNS)
        switchover.settled = True

    def _what_is_lost(self, reason: str) -> str:
        name, count = self._context.name, self.switchover.guest.pages.count
        return (
            f"{reason}; {name} lacks {count} pages that exist nowhere any more: "
            f"destroy it ({xl_command('destroy', name)}) and start it anew"
        )

    async def hold(self, reason: str) -> None:
        """Keep the guest paused, because it runs at the source as well, until it is destroyed or an
        operator decides again.
        """
        context, pager = self._context, self.switchover.pager
        name = context.name
        what_to_do = (
            f"{xl_command('destroy', name)} ends it here"
            if context.toolstack.owns_domain
            else f"{command('decide', name, 'elsewhere')} destroys it, "
            f"{command('decide', name, 'here', '--force')} lets it continue"
        )
        context.entry.reason = reason
        context.progress.problem = f"{reason}; so {name} is being paused here"
        await in_thread(context.ownership.enter, State.HELD)  # before the source is answered
        async with task_group() as offline:
            offline.start_soon(self._answer_and_leave)
            offline.start_soon(pager.serve, None)
            cannot = f"{reason}, and {name} cannot be paused here"

            async def pause() -> None:
                await context.persist(lambda: self._pause(paused=True), cannot, what_to_do)

            await first(pause, self.released.wait)
            context.progress.problem = f"{reason}; so {name} is paused here: {what_to_do}"
            log.error("%s: %s", name, context.progress.problem)
            await self.released.wait()
            cannot = f"{name} should continue here, and cannot be unpaused"
            await context.persist(lambda: self._pause(paused=False), cannot)
            offline.cancel_scope.cancel()
        await self.serve_without_sender(
            "the source has taken the guest back, and an operator has decided that it continues "
            "here"
        )

    def _pause(self, *, paused: bool) -> None:
        """Pause or unpause the guest, if it is not so already.  Raises ``XenError``."""
        domain = self.switchover.guest.domain
        # A predecessor may have paused the guest.
        is_paused = self.switchover.guest.state() is DomainState.PAUSED
        if is_paused is not paused:
            (domain.pause if paused else domain.unpause)()

    async def _answer_and_leave(self) -> None:
        await self._context.peer.acknowledge()
        self._context.disconnect()

    async def continue_held_or_lost(self) -> None:
        """Continue with a guest that is HELD or LOST, after a predecessor or an earlier attempt."""
        reason = self._context.entry.reason
        if self._context.is_in(State.HELD):
            await self.hold(reason or WAS_HELD)
        elif self._context.is_in(State.LOST):
            await self.serve_without_sender(reason or WAS_LOST)
