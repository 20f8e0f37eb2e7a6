# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator, or the daemon, may ask of a migration that is under way.

Each request acts, or raises a :class:`MigrationError` with the reason and with what to do instead.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from migrate.errors import MigrationError
from migrate.outcomes import CANCELLED
from migrate.service.lifecycle import decide_commands, ended
from migrate.tasks import in_thread
from migrate.units import command
from sender.context import Context
from sender.ownership import DECIDED, Link, State
from sender.recovery import is_gone
from sender.rollback import Rollback, unreadable
from sender.switchover import stay

DECISIONS = {
    State.DECIDED_HERE: "decided here",
    State.RETURNING: "decided here",
    State.DECIDED_ELSEWHERE: "decided elsewhere",
}

TOO_LATE = "too late: in the meantime the outcome is known, see `xen-postcopy list`"


@dataclass(frozen=True)
class _WayBack:
    """How the guest could continue here after the handover."""

    begins_at: str = "its suspension"
    """From which instant it would continue."""
    certain: bool = False
    """The guest was protected to the end and its last checkpoint can be read: it may continue here
    even if it has run at the destination.
    """
    obstacle: str = ""
    """Why the guest cannot continue here; empty if it can."""


class Requests:
    """The requests to one migration.  ``carry_out``: carries a decision out after the migration's
    task has ended.
    """

    def __init__(self, context: Context, carry_out: Callable[[State], Awaitable[None]]):
        self._context = context
        self._ownership = context.ownership
        self._carry_out = carry_out
        self.scope = trio.CancelScope()
        """The scope in which the migration's task runs."""
        self.cancelled = ""
        """Why the migration was cancelled; empty if it was not."""
        self.decision: State | None = None
        """The decision of an operator.  A second decision is refused."""
        self.decided = trio.Event()
        """Set when the journal has the decision, or when the decision came too late."""
        self.refusal: MigrationError | None = MigrationError(TOO_LATE)
        """Why the decision is refused; ``None`` when the journal has the decision."""
        self.rollback: Rollback | None = None
        """``None`` if the domain is not open yet."""
        self.is_over = False
        """The migration's task has ended."""

    # ---- precopy ----
    def postcopy_now(self) -> None:
        """Switch over at once, and send the rest afterwards."""
        name, shown = self._context.name, self._ownership.phase
        if self._ownership.has_ended:
            raise MigrationError(self._ending("switch over"))
        if not self._context.options.strategy.pages_after_handover:
            raise MigrationError("this migration was started with --strategy precopy")
        if self._ownership.is_suspended:
            raise MigrationError(f"{name} is past its precopy: its phase is {shown}")
        if self._context.pause.is_on:
            raise MigrationError(
                f"the copying of {name} is paused: first {command('resume', name)}"
            )
        self._context.postcopy_asked = True
        self._context.cap.wake()

    # ---- cancel ----
    def cancel(self, why: str) -> None:
        """Give the migration up, so that the guest continues here.  ``why``: follows the word
        ``cancelled`` in the reason.
        """
        if not stay(self._context):
            if decision := DECISIONS.get(self._ownership.state):
                raise MigrationError(f"too late to cancel: that was {decision} by an operator")
            if self._ownership.state is State.UNDECIDED:
                raise MigrationError(
                    "too late to cancel: xl now decides at which end the guest runs"
                )
            when = "was" if self._ownership.may_be_elsewhere else "is being"
            raise MigrationError(f"too late to cancel: the guest {when} handed over")
        self.cancelled = f"{CANCELLED} {why}"
        self.scope.cancel()

    def ask_to_cancel(self) -> None:
        """Call :meth:`cancel` for an operator."""
        if self._ownership.has_ended:
            raise MigrationError(self._ending("cancel"))
        try:
            self.cancel("by the operator")
        except MigrationError as error:
            if self._ownership.is_cut_off:
                commands = decide_commands(self._context.name)
                raise MigrationError(
                    f"{error}; if the other host never comes back: {commands}"
                ) from None
            raise

    # ---- a destination that is not there ----
    def reconnect(self) -> None:
        """Dial the destination at once."""
        name, shown = self._context.name, self._ownership.phase
        has_ended = self._ownership.has_ended
        if has_ended and self._context.last_message is None:
            raise MigrationError(self._ending("reconnect"))
        if self._ownership.link is Link.GIVEN_UP and not has_ended:
            raise MigrationError(f"reconnecting does not help: {self._context.progress.problem}")
        if not has_ended and not self._ownership.is_cut_off:
            raise MigrationError(
                f"there is nothing to reconnect: the migration of {name} is {shown}"
            )
        if self._context.lanes.dials is None:
            raise MigrationError(
                f"the destination dials, and tries by itself: ask its receiver to reconnect {name}"
            )
        self._context.lanes.hurry()

    @property
    def known_of_peer(self) -> str:
        """The facts for and against a decision, in words."""
        context, now = self._context, time.monotonic()
        ran = "has" if context.entry.ran else "has not"
        known = [f"the destination {ran} reported that {context.name} runs there"]
        if context.signals.complete.is_set():
            known.append("it has reported that all memory has arrived")
        elif context.progress.outstanding:
            missing = context.progress.outstanding
            known.append(f"when it was last connected, {missing} pages were missing there")
        if self._ownership.has_ended:  # the history keeps this text, and times would not be true
            return "; ".join(known)
        if context.lost_at:
            away_s = f"{now - context.lost_at:.0f} s ago"
            known.append(
                f"it has not been connected since this sender was started, {away_s}"
                if self._ownership.inherited
                else f"it was last connected {away_s}"
            )
        if context.progress.checkpoint_at:
            age_s = now - context.progress.checkpoint_at
            known.append(f"the last checkpoint arrived {age_s:.0f} s ago")
        elif context.entry.applied:
            known.append("the last checkpoint arrived before this sender was started")
        return "; ".join(known)

    async def decide(self, *, here: bool, force: bool = False) -> bool:
        """Carry out an operator's decision, because the destination cannot be reached.  The guest
        does not run there and never will (``here``), or nothing of it is needed at the source.

        Returns whether the migration's task had ended before: then the caller sends the outcome.
        Raises as :meth:`check_decision`, and :class:`MigrationError` if the journal cannot have the
        decision.
        """
        await self.check_decision(here=here, force=force)
        # If the journal cannot be written, the migration continues unchanged.
        await in_thread(functools.partial(self._ownership.note, needed=True))
        self._check_undecided(here=here, force=force)
        self._context.toolstack.overrule()
        decision = State.DECIDED_HERE if here else State.DECIDED_ELSEWHERE
        if self.rollback is not None and self.rollback.is_waiting:
            if not await self.rollback.overrule(decision):
                raise MigrationError(TOO_LATE)
            return False
        self.decision, was_over = decision, self.is_over
        try:
            await (self._carry_out(decision) if was_over else self._interrupt())
        except BaseException:
            self.decision = None  # so that the decision can be made again
            raise
        return was_over

    async def _interrupt(self) -> None:
        """Have the migration's task take the decision."""
        self.scope.cancel()
        await self.decided.wait()
        if self.refusal is not None:
            raise self.refusal

    async def check_decision(self, *, here: bool, force: bool = False) -> None:
        """Raises :class:`MigrationError` if there is nothing to decide, or if the decision is known
        to be wrong and is not forced.
        """
        way_back = await trio.to_thread.run_sync(self._way_back) if here else None
        gone = await trio.to_thread.run_sync(self._is_gone)
        self._check_undecided(here=here, force=force)
        if self._context.source is None and self._ownership.inherited:
            problem = self._context.progress.problem
            raise MigrationError(f"{self._context.name}: {problem}; ask again in a moment")
        if way_back is not None:
            self._check_way_back(way_back, gone=gone, force=force)

    def _way_back(self) -> _WayBack:
        """Return how the guest could continue here.  Called in a thread."""
        source = self._context.source
        if source is None or source.checkpoints is None:
            return _WayBack()
        if problem := unreadable(source.checkpoints):
            return _WayBack(obstacle=problem if self._context.entry.applied else "")
        return _WayBack("its last checkpoint", certain=not self._context.progress.unprotected)

    def _is_gone(self) -> bool:
        source = self._context.source
        return source is not None and is_gone(source.domain, self._context.name)

    def _ending(self, asked: str) -> str:
        context = self._context
        return ended(context.name, self._ownership.phase, context.progress.problem, asked)

    def _check_undecided(self, *, here: bool, force: bool) -> None:
        """Raises :class:`MigrationError` if there is no decision to make."""
        name, shown, state = self._context.name, self._ownership.phase, self._ownership.state
        if self._ownership.has_ended:
            raise MigrationError(self._ending("decide"))
        if not self._ownership.may_be_elsewhere:
            raise MigrationError(
                f"there is nothing to decide: the migration of {name} is {shown}, and the guest "
                f"belongs here; {command('cancel', name)} ends the migration"
            )
        if decision := self.decision or (state if state in DECIDED else None):
            # A return to the checkpoint that fails again and again can be given up.
            if here or self.rollback is None or not self.rollback.is_waiting:
                raise MigrationError(
                    f"that was {DECISIONS[decision]} already, which is being carried out: see "
                    "`xen-postcopy list`"
                )
        elif not self._ownership.is_cut_off:
            who = (
                "xl decides, and has not decided yet"
                if state is State.UNDECIDED
                else "both ends are connected"
            )
            raise MigrationError(f"there is nothing to decide here: {who}; {name} is {shown}")
        elif state is State.UNDECIDED and self._context.toolstack.may_decide() and not force:
            raise MigrationError(
                "there is nothing to decide here: xl may still decide at which end the guest runs; "
                f"{name} is {shown}; if xl has ended here and at the destination: --force"
            )

    def _check_way_back(self, way_back: _WayBack, *, gone: bool, force: bool) -> None:
        """Raises :class:`MigrationError` if the guest cannot or must not continue here.  ``gone``:
        the domain here does not exist any more.
        """
        name = self._context.name
        if gone:
            xl = self._context.toolstack.destroys_source
            raise MigrationError(
                (
                    "xl has destroyed the domain here"
                    if xl
                    else f"the domain of {name} does not exist here any more"
                )
                + f": no guest is left that could continue; {command('decide', name, 'elsewhere')} "
                + ("releases its pages" if xl else "ends the migration")
            )
        if way_back.obstacle:
            raise MigrationError(
                f"{name} cannot continue here, even with --force: {way_back.obstacle}; without a "
                "checkpoint its memory here mixes two instants, because checkpoints were written "
                "into it; the guest continues at the destination as soon as that is back; if the "
                f"guest is lost: {command('decide', name, 'elsewhere')} releases its pages"
            )
        # The answer that a session is unknown proves nothing: a receiver with another state
        # directory does not have the session, and the guest may run there nevertheless.
        if self._context.entry.ran and not (force or way_back.certain):
            raise MigrationError(
                f"the destination has reported that {name} runs there: if {name} still runs there, "
                f"--force makes it run twice; otherwise {name} continues here from "
                f"{way_back.begins_at}, and loses what it did there since then; "
                f"{command('decide', name, 'elsewhere')} destroys what is left of it here"
            )
