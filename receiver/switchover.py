# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's start at the destination, and its service from then on.

The pager and its thread are started before the guest runs, because a thread takes milliseconds to
start and the guest faults at once.  From the handover until the guest is started one thread does
everything.  The guest is suspended meanwhile, and a turn of the event loop would take longer.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable

import trio

from migrate.errors import GuestEndedError
from migrate.logs import Complaint
from migrate.tasks import in_thread, is_bug, poll_in_thread
from migrate.units import pauses
from receiver.checkpoints import NOT_PROTECTED, Checkpoints
from receiver.context import Context, retries
from receiver.guest import Guest
from receiver.ownership import State, Undo
from receiver.pager import Pager
from xenbackend.contract import DomainState
from xenbackend.errors import XenError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
"""The first pause between two polls of a domain that is about to run."""
LOOK_AT_LAST_EVERY_S = 2.0
"""The longest pause between two polls of a domain that is about to run."""
LOOK_AGAIN_EVERY_S = 0.5
"""The pause between two polls of a domain that runs."""

ENDED = {
    None: "the domain of {name} was destroyed",
    DomainState.CRASHED: "{name} crashed",
    DomainState.SHUT_DOWN: "{name} has shut down",
}
"""The states in which no attempt to start a guest can succeed, and what is reported then."""


class Switchover:
    """The start and the service of one guest.  ``inherits``: a predecessor has left the guest."""

    def __init__(self, context: Context, guest: Guest, *, inherits: bool = False):
        self.context = context
        self.guest = guest
        self._inherits = inherits
        self.pager = Pager(
            guest.domain,
            guest.ring,
            context.peer.session,
            guest.pages,
            context.statistics,
            context.peer.send_blocking,
            guest.limit.make_room,
        )
        context.holdings.add(self.pager.close)
        self.checkpoints: Checkpoints | None = None
        self.serving = trio.Event()
        """Set when the guest's faults are served, so that the guest may run."""
        self.handed_over = trio.Event()
        """Set when the guest belongs here."""
        self.runs = trio.Event()
        """Set when the guest runs here."""
        self.not_started = ""
        """Why the guest, which belongs here, does not run yet."""
        self._to_start = trio.Event()
        self._ended_at_start: GuestEndedError | None = None
        self.lacked = 0
        """The number of pages that were missing when another program suspended the guest."""
        self.settled = False
        """The sender needs no further message."""
        if context.ownership.handed_over:
            self.handed_over.set()

    # ---- the start ----
    def take_over(self, report: Callable[[], None] = lambda: None) -> bool:
        """Start the guest, which belongs here.  Called in a thread; the caller then calls
        :meth:`taken_over`.

        ``report`` is called when the guest runs, before the start is noted, because the entry would
        add to the downtime.  A successor sees the start from the state of the domain.  Returns
        whether the guest was started.  Raises :class:`GuestEndedError` if no attempt can succeed,
        and what ``report`` raises.
        """
        try:
            started = self.start()
        except XenError as error:
            self._not_yet(error)
            self.context.ownership.enter(State.UNSTARTED)
            return False
        try:
            if started:
                report()
        finally:
            self.context.ownership.enter(State.OWNS)
        return started

    def taken_over(self, *, started: bool) -> None:
        """Finish :meth:`take_over`.  Called in the event loop."""
        self.handed_over.set()
        if started:
            self.runs.set()
        if self.not_started:
            self._to_start.set()
        self.serve()

    def serve(self) -> None:
        """Serve the guest's faults from here on."""
        self.pager.begin()
        self.serving.set()

    def end_at_start(self, error: GuestEndedError) -> None:
        """Note that the guest ended when it was being started."""
        self._ended_at_start = error
        self.serving.set()

    def start(self) -> bool:
        """Start the guest; returns false if xl does so.

        Raises ``XenError`` if a later attempt may succeed, and :class:`GuestEndedError` if none
        can.
        """
        try:
            return self._try_to_start()
        except XenError as error:
            state = self.guest.state()
            if state is DomainState.RUNNING:
                return True  # the error occurred after the start
            if state in ENDED:
                what = ENDED[state].format(name=self.context.name)
                raise GuestEndedError(f"{what} at its start: {error}") from error
            raise

    def _try_to_start(self) -> bool:
        """Start the guest once.  Raises ``XenError`` for any error, because the guest belongs here
        and no error is a reason to give it up.
        """
        try:
            self.protect()
            self.pager.begin()
            return self.context.toolstack.start(self.guest.domain)
        except XenError:
            raise
        except Exception as error:
            if is_bug(error):
                log.exception("internal error")
            raise XenError("start", errno.EAGAIN, why=repr(error)) from error

    def _not_yet(self, error: XenError) -> None:
        self.not_started = (
            f"the guest cannot be started yet ({error}), and the start is being repeated"
        )
        self.context.progress.problem = self.not_started
        log.warning("%s: %s", self.context.name, self.not_started)

    async def keep_starting(self) -> None:
        """Try to start a guest until an attempt succeeds.  The hypervisor or xenstored may have
        been busy, or memory may have been short.
        """
        await self._to_start.wait()
        attempts = retries()
        while self.not_started:
            await trio.sleep(next(attempts))
            async with self.context.deciding:
                if self.context.ownership.row.undo is Undo.BEING_UNDONE:
                    return
                try:
                    await in_thread(self.start)
                except XenError as error:
                    self._not_yet(error)
                    continue
                self.not_started = self.context.progress.problem = ""
                await in_thread(functools.partial(self.context.ownership.seen_to_run, wait=True))
                self.runs.set()
                log.info("%s runs", self.context.name)

    def protect(self) -> None:
        """Begin to record what the guest writes, if checkpoints are requested.  Called in a
        thread.
        """
        every_s = self.guest.offer.checkpoint_ms / 1000
        if not every_s or self.checkpoints is not None or self.context.progress.unprotected:
            return
        made = Checkpoints(
            self.guest.domain,
            every_s,
            self.context.peer.send_blocking,
            self.context.statistics,
            self.context.entry.stopped,
            self._protection_is_lost,
        )
        try:
            made.begin(inherit=self._inherits)
            self.checkpoints = made
        except XenError as error:
            self._protection_is_lost(str(error))

    def _protection_is_lost(self, problem: str) -> None:
        log.error("%s: %s: %s", self.context.name, NOT_PROTECTED, problem)
        self.context.progress.unprotected = self.context.entry.unprotected = problem
        self.context.ownership.note()

    # ---- the state of the domain ----
    async def follow_domain(self) -> None:
        """Call :meth:`watch_domain` as soon as the guest may run."""
        await self.serving.wait()
        if self._ended_at_start is not None:
            raise self._ended_at_start
        await self.watch_domain()

    async def watch_domain(self) -> None:
        """Poll the state of the domain, to notice that the guest runs here.  Raises
        :class:`GuestEndedError` when the guest has ended.
        """
        began = pauses(LOOK_EVERY_S, LOOK_AT_LAST_EVERY_S)
        complaint = Complaint(log.warning)
        while True:
            try:
                state = await trio.to_thread.run_sync(self.guest.state)
                if state is None:
                    raise GuestEndedError(await trio.to_thread.run_sync(self._end))
                if self.checkpoints is not None:
                    await trio.to_thread.run_sync(self.checkpoints.resume_if_suspended)
                self._note_state(state)
                if not self.runs.is_set():
                    await poll_in_thread(functools.partial(self._has_left, state), began)
                    continue
            except (XenError, RuntimeError) as error:  # the error may pass
                complaint.log(
                    "%s: its state is not known, or it cannot be resumed: %s",
                    self.context.name,
                    error,
                )
            await trio.sleep(LOOK_AGAIN_EVERY_S)

    def _has_left(self, before: DomainState | None) -> bool | None:
        """Whether the domain is in another state; ``None``: it is not."""
        try:
            return self.guest.state() is not before or None
        except XenError:
            return True  # the next look reports the error

    def _end(self) -> str:
        """Return how the guest, whose domain is gone, ended.  Between two polls the guest may have
        been started, and its domain destroyed.
        """
        if not self.runs.is_set() and not self.guest.domain.has_run():
            return self.context.toolstack.gone_before_it_ran
        return self.guest.domain.end().value

    def _note_state(self, state: DomainState) -> None:
        may_be_starting = state is DomainState.PAUSED and self.not_started
        if state is not DomainState.INCOMING and not may_be_starting:
            self.runs.set()
            self.context.ownership.seen_to_run()
        if not self.guest.offer.checkpoint_ms:  # checkpoints suspend the guest as well
            self._note_whether_it_is_saved(state is DomainState.SUSPENDED)

    def _note_whether_it_is_saved(self, suspended: bool) -> None:
        """Note that another program has suspended the guest.  Such a program may save the guest
        before its missing pages have arrived.
        """
        missing = self.guest.pages.count
        if suspended and not self.lacked and missing:
            self.lacked, self.pager.holds_back = missing, True
            about = (
                "%s was suspended by another program while %d pages are missing: "
                "an image that is made now lacks them"
            )
            log.error(about, self.context.name, self.lacked)
        elif not suspended and self.lacked:
            log.warning("%s runs again, and its pages are acknowledged again", self.context.name)
            self.lacked, self.pager.holds_back = 0, False

    @property
    def needs_nothing(self) -> bool:
        """Whether nothing is needed from the sender any more."""
        owns = self.context.is_in(State.OWNS, State.COMPLETING, State.FINISHING)
        return owns and not self.guest.pages.count and not self.lacked
