# SPDX-License-Identifier: GPL-2.0-or-later
"""What operators may ask of an incoming migration.

Each command acts, or its answer has what to do instead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from migrate.errors import GuestEndedError, MigrationError
from migrate.service.lifecycle import decide_commands, ended
from migrate.tasks import in_thread
from migrate.units import xl_command
from receiver.context import Context
from receiver.ownership import Link, State, Undo
from receiver.recovery import Recovery

log = logging.getLogger(__name__)

UNDECIDED = (State.MAYBE_READY, State.READY)


@dataclass(frozen=True)
class Requests:
    """The requests to one migration.  ``take_back`` ends the migration's tasks.  ``recovery``
    returns ``None`` until there is a guest here.
    """

    context: Context
    take_back: Callable[[], None]
    recovery: Callable[[], Recovery | None]

    def ending(self, asked: str) -> str:
        """Return the answer to a request that came after the end of the migration."""
        context = self.context
        return ended(context.name, context.ownership.phase, context.progress.problem, asked)

    @property
    def known_of_peer(self) -> str:
        """What is known of the source, in words for an operator who decides."""
        if self.context.ownership.has_ended:
            return "the migration has ended: nothing is needed of the source any more"
        if self.context.peer.session.decided and self.context.ownership.link is not Link.UP:
            return "an operator has decided that the guest runs here"
        if self.context.is_in(*UNDECIDED) and self.context.ownership.link is not Link.UP:
            return (
                "the source may have handed the guest over, or may still run it; it has not been "
                "connected since the link was lost"
            )
        if self.context.is_in(State.HELD):
            return self.context.entry.reason
        if self.context.ownership.handed_over:
            return "the source has handed the guest over"
        return "the source has not handed the guest over"

    def cancel(self, reason: str) -> bool:
        """Take the migration back, so that it does not become ready.  Returns whether that was
        possible.
        """
        if not self.context.ownership.try_take_back(reason):
            return False
        self.take_back()
        return True

    def ask_to_cancel(self) -> None:
        """Cancel the migration for an operator.  Raises :class:`MigrationError` if that is too
        late.
        """
        name = self.context.name
        self._check_going_on("cancel")
        if self.cancel("cancelled by the operator of the destination"):
            return
        if self.context.is_in(*UNDECIDED):
            raise MigrationError(
                f"too late to cancel: {name} may have been handed over; if the other host never "
                f"comes back: {decide_commands(name)}"
            )
        if self.context.is_in(State.SERVING):
            raise MigrationError(f"too late to cancel: xl decides whether {name} runs here")
        raise MigrationError(
            f"too late to cancel: {name} belongs here already; {xl_command('destroy', name)} "
            "ends it"
        )

    def reconnect(self) -> None:
        """Dial the source at once.  Raises :class:`MigrationError` if this end has nothing to
        dial.
        """
        context = self.context
        if context.ownership.has_ended:
            raise MigrationError(self.ending("reconnect"))
        away = context.ownership.link is not Link.UP
        if not away or not context.ownership.needed or context.is_in(State.LOST, State.HELD):
            raise MigrationError(
                f"there is nothing to reconnect: {context.name} is {context.ownership.phase}"
            )
        if context.peer.lanes.dials is None:
            raise MigrationError(
                f"the source dials, and tries by itself: ask its sender to reconnect {context.name}"
            )
        context.peer.lanes.hurry()

    async def decide(self, *, here: bool, force: bool = False) -> None:
        """Carry out an operator's decision on where the guest runs, because the sender does not
        decide.

        Raises as :meth:`check_decision`, and :class:`MigrationError` if the journal cannot have the
        decision.
        """
        async with self.context.deciding:
            recovery = self._decidable(here=here, force=force)
            if not here:
                # Before the operator is answered, so that a successor carries the decision out.
                decided = functools.partial(
                    self.context.ownership.enter, State.DECIDED_ELSEWHERE, needed=True
                )
                await in_thread(decided)
                self.take_back()
            elif self.context.is_in(State.HELD):
                recovery.released.set()
            else:
                await self._start(recovery)

    async def check_decision(self, *, here: bool, force: bool = False) -> None:
        """Raises :class:`MigrationError` if there is nothing to decide, or if the decision is known
        to be wrong and is not forced.
        """
        async with self.context.deciding:
            self._decidable(here=here, force=force)

    def _decidable(self, *, here: bool, force: bool) -> Recovery:
        self._check_going_on("decide")
        recovery = self.recovery()
        if recovery is None or not self.context.ownership.needed:
            raise MigrationError(
                f"there is nothing to decide: the migration of {self.context.name} is "
                f"{self.context.ownership.phase}, and the guest belongs to the source"
            )
        self.context.toolstack.check_decision(self.context.name)
        self._check_decision(recovery, here=here, force=force)
        return recovery

    def _check_going_on(self, asked: str) -> None:
        ownership, progress = self.context.ownership, self.context.progress
        if ownership.has_ended:
            raise MigrationError(self.ending(asked))
        if ownership.inherited:
            raise MigrationError(f"{progress.domain}: {progress.problem}; ask again in a moment")
        if ownership.row.undo is Undo.BEING_UNDONE:
            late = "there is nothing to decide" if asked == "decide" else f"too late to {asked}"
            raise MigrationError(
                f"{late}: the migration of {progress.domain} is being taken back already"
            )

    def _check_decision(self, recovery: Recovery, *, here: bool, force: bool) -> None:
        """Raises :class:`MigrationError` if there is nothing to decide in this state."""
        context, name = self.context, self.context.name
        match context.ownership.state:
            case State.HELD:
                if here and not force:
                    raise MigrationError(
                        f"{context.entry.reason}: if you are certain that {name} does not run "
                        "there, --force decides nevertheless that it runs here"
                    )
            case State.UNSTARTED:
                if here:
                    not_started = recovery.switchover.not_started
                    raise MigrationError(
                        f"there is nothing to decide: {name} belongs here already, and "
                        f"{not_started}"
                    )
            case State.MAYBE_READY | State.READY:
                if context.ownership.link is Link.UP:
                    raise MigrationError(
                        f"there is nothing to decide here: both ends are connected, and {name} is "
                        f"{context.ownership.phase}"
                    )
                if context.ownership.link is Link.BACK:
                    raise MigrationError(
                        f"the sender of {name} is back and about to decide: see `xen-postcopy list`"
                    )
                if here and context.is_in(State.MAYBE_READY):
                    raise MigrationError(
                        "it is not known whether everything that the guest needs to run has arrived"
                    )
            case _:
                raise MigrationError(
                    f"there is nothing to decide: {name} runs here; {xl_command('destroy', name)} "
                    "ends it"
                )

    async def _start(self, recovery: Recovery) -> None:
        log.warning("%s: an operator has decided that the guest runs here", self.context.name)
        session, switchover = self.context.peer.session, recovery.switchover
        self.context.entry.decided = True
        try:
            # A successor without this entry would destroy the guest if the sender sent ``abort``.
            await in_thread(functools.partial(self.context.ownership.note, needed=True))
        except MigrationError:
            self.context.entry.decided = False
            raise
        session.handed_over = session.decided = True
        try:
            started = await in_thread(switchover.take_over)
        except GuestEndedError as error:
            switchover.end_at_start(error)
            raise
        switchover.taken_over(started=started)
        recovery.note("started by an operator")
