# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns the guest, as the sender sees it: one table, and the steps that it allows.

Each state has the step that the journal has, the phase that ``list`` shows, where the guest is, and
what a daemon does that finds the step in the journal of its predecessor.  The journal is written
inside the step from one state to the next, before anything follows from the new state: no message
can be sent for a state that the journal does not have (invariant 6).

The guest goes on at exactly one end (invariant 1).  While the guest is not handed over yet, two
things race: somebody has the guest stay (:meth:`Ownership.try_keep`), and the destination becomes
ready (:meth:`Ownership.try_hand_over`).  One of the two succeeds, and never both.

Nothing is read back from what is shown.  The module does no input or output of its own.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass


class Guest(enum.Enum):
    """Where the guest is, for all that the sender can know."""

    RUNS_HERE = "runs here"
    SUSPENDED_HERE = "is suspended here, and goes on here if anything fails"
    UNDECIDED = "is suspended here, until a toolstack resumes or destroys it"
    THERE = "runs, or may run, at the destination; missing pages are kept here"
    DECIDED_HERE = "goes on here, because an operator has decided so"
    GONE = "is not the sender's any more"


class Restart(enum.Enum):
    """What a daemon does with the migration of its predecessor."""

    FORGET = "nothing is left to do"
    TAKE_BACK = "has the guest go on here, and sends `abort` until the destination has it"
    FOLLOW_TOOLSTACK = "waits for what the toolstack does, and rejoins the session"
    REJOIN = "rejoins the session, and sends what is missing"
    LET_GO = "destroys what is left of the guest here"
    SEND_LAST_WORD = "sends the last word until the destination has it"


class State(enum.Enum):
    OFFERING = enum.auto()
    COPYING = enum.auto()
    SUSPENDING = enum.auto()
    """The guest may be suspended.  The destination has not been sent ``suspended``."""
    SUSPENDED = enum.auto()
    """The destination may have all that it needs, and wait for the handover."""
    UNDECIDED = enum.auto()
    HANDED_OVER = enum.auto()
    ALL_SENT = enum.auto()
    """As :attr:`HANDED_OVER`.  Each missing page has been sent, and some are not confirmed."""
    COMPLETING = enum.auto()
    """Each page is confirmed.  The destination may forget the session."""
    DECIDED_HERE = enum.auto()
    RETURNING = enum.auto()
    """To the last checkpoint, in a new domain."""
    DECIDED_ELSEWHERE = enum.auto()
    GIVEN_UP = enum.auto()
    """The guest goes on here.  The destination may not have been told."""
    PAGES_LOST = enum.auto()
    """The source domain was destroyed with pages that the destination may lack."""
    COMPLETED = enum.auto()
    FAILED = enum.auto()


class Link(enum.Enum):
    """The lanes to the destination."""

    LOST = enum.auto()
    """Or not there yet."""
    UP = enum.auto()
    GIVEN_UP = enum.auto()
    """Nobody tries to connect any more."""


@dataclass(frozen=True)
class Row:
    step: str
    """In the journal.  Empty: the journal has no entry."""
    shown: str
    """The phase in ``list``, while the lanes are there."""
    guest: Guest
    restart: Restart
    then: tuple[State, ...]
    """The states that may follow."""
    cut: str = ""
    """The phase while the lanes are lost, where it is another one."""
    alone: str = ""
    """The phase when the sender has stopped trying to connect, where it is another one."""


_BEFORE = (State.GIVEN_UP, State.FAILED)
_THERE = (
    State.COMPLETING,
    State.DECIDED_HERE,
    State.DECIDED_ELSEWHERE,
    State.PAGES_LOST,
    State.FAILED,
)
TABLE: dict[State, Row] = {
    State.OFFERING: Row(
        "",
        "preflight",
        Guest.RUNS_HERE,
        Restart.FORGET,
        (State.COPYING, *_BEFORE),
        cut="connecting",
    ),
    State.COPYING: Row(
        "begun", "precopy", Guest.RUNS_HERE, Restart.TAKE_BACK, (State.SUSPENDING, *_BEFORE)
    ),
    State.SUSPENDING: Row(
        "suspending",
        "switchover",
        Guest.SUSPENDED_HERE,
        Restart.TAKE_BACK,
        (State.COPYING, State.SUSPENDED, *_BEFORE),
    ),
    State.SUSPENDED: Row(
        "suspending",
        "switchover",
        Guest.SUSPENDED_HERE,
        Restart.TAKE_BACK,
        (State.UNDECIDED, State.HANDED_OVER, *_BEFORE),
    ),
    State.UNDECIDED: Row(
        "deciding",
        "deciding",
        Guest.UNDECIDED,
        Restart.FOLLOW_TOOLSTACK,
        (State.HANDED_OVER, *_THERE, State.GIVEN_UP),
        cut="interrupted",
        alone="in doubt",
    ),
    State.HANDED_OVER: Row(
        "handed over",
        "postcopy",
        Guest.THERE,
        Restart.REJOIN,
        (State.ALL_SENT, *_THERE),
        cut="interrupted",
    ),
    State.ALL_SENT: Row(
        "handed over",
        "completing",
        Guest.THERE,
        Restart.REJOIN,
        (State.HANDED_OVER, *_THERE),
        cut="interrupted",
    ),
    State.COMPLETING: Row(
        "completing", "completing", Guest.GONE, Restart.LET_GO, (State.COMPLETED, State.FAILED)
    ),
    State.DECIDED_HERE: Row(
        "decided here",
        "interrupted",
        Guest.DECIDED_HERE,
        Restart.TAKE_BACK,
        (State.RETURNING, State.DECIDED_ELSEWHERE, *_BEFORE),
    ),
    State.RETURNING: Row(
        "going back",
        "interrupted",
        Guest.DECIDED_HERE,
        Restart.TAKE_BACK,
        (State.DECIDED_ELSEWHERE, *_BEFORE),
    ),
    State.DECIDED_ELSEWHERE: Row(
        "decided elsewhere",
        "interrupted",
        Guest.GONE,
        Restart.LET_GO,
        (State.PAGES_LOST, State.FAILED),
    ),
    State.GIVEN_UP: Row(
        "given up", "failed", Guest.RUNS_HERE, Restart.SEND_LAST_WORD, (State.FAILED,)
    ),
    State.PAGES_LOST: Row(
        "handed over", "failed", Guest.GONE, Restart.SEND_LAST_WORD, (State.FAILED,)
    ),
    State.COMPLETED: Row("", "completed", Guest.GONE, Restart.FORGET, ()),
    State.FAILED: Row("", "failed", Guest.GONE, Restart.FORGET, ()),
}
INHERITED = {
    "begun": State.COPYING,
    "suspending": State.SUSPENDED,
    "deciding": State.UNDECIDED,
    "handed over": State.HANDED_OVER,
    "completing": State.COMPLETING,
    "going back": State.RETURNING,
    "decided here": State.DECIDED_HERE,
    "decided elsewhere": State.DECIDED_ELSEWHERE,
    "given up": State.GIVEN_UP,
}
"""The state of a predecessor's migration, by the step in the journal."""
ENDED = frozenset({State.GIVEN_UP, State.PAGES_LOST, State.COMPLETED, State.FAILED})
DECIDED = frozenset({State.DECIDED_HERE, State.RETURNING, State.DECIDED_ELSEWHERE})
_HANDED_OVER = frozenset({State.HANDED_OVER, State.ALL_SENT, State.COMPLETING, *DECIDED})


class Ownership:
    """Of one migration.  Any thread may call.

    ``write(step, needed)`` writes the step, with the other facts, into the journal.  Where that
    fails and the entry is ``needed``, ``write`` raises, and the state stays.  ``erase`` removes the
    entry, and raises nothing.
    """

    def __init__(
        self,
        write: Callable[[str, bool], None],
        erase: Callable[[], None],
        state: State = State.OFFERING,
    ):
        self._write, self._erase = write, erase
        self._state = state
        self._kept = False
        self._lock = threading.RLock()
        self.link = Link.LOST
        self.inherited = state is not State.OFFERING
        """The state is a predecessor's, and this process has not taken the session up yet."""
        self.handed_over = state in _HANDED_OVER
        """The guest was handed over, whatever has happened since."""

    @property
    def state(self) -> State:
        return self._state

    @property
    def row(self) -> Row:
        return TABLE[self._state]

    @property
    def shown(self) -> str:
        """The phase that ``list`` shows."""
        row = self.row
        if self.link is Link.UP:
            return row.shown
        alone = row.alone if self.link is Link.GIVEN_UP else ""
        return alone or row.cut or row.shown

    # ---- what follows from the state ----
    @property
    def has_ended(self) -> bool:
        """Nothing more happens to the guest by this migration."""
        return self._state in ENDED

    @property
    def may_be_elsewhere(self) -> bool:
        """The guest may run at the destination, or a toolstack may have it run there."""
        return self.row.guest not in (Guest.RUNS_HERE, Guest.SUSPENDED_HERE)

    @property
    def may_stay(self) -> bool:
        """The guest can still go on here."""
        return State.GIVEN_UP in self.row.then

    @property
    def is_cut_off(self) -> bool:
        """The guest was given away, its pages are kept here, and the destination is not there."""
        return self.row.guest in (Guest.UNDECIDED, Guest.THERE) and self.link is not Link.UP

    @property
    def is_suspended(self) -> bool:
        """This migration has the guest suspended here."""
        return self._state is not State.OFFERING and self._state is not State.COPYING

    @property
    def peer_may_be_ready(self) -> bool:
        """The destination may keep the guest, and wait for the handover or for an ``abort``."""
        early = (State.OFFERING, State.COPYING, State.SUSPENDING)
        return self.inherited or self._state not in early

    @property
    def is_kept(self) -> bool:
        """The guest stays here, and nothing more may be sent that makes the destination ready."""
        return self._kept

    # ---- steps ----
    def enter(self, state: State) -> None:
        """Write the journal, then be in ``state``.  Blocks: run the call in a thread.

        Raises :class:`MigrationError` where the journal cannot be written and the guest can still
        go on here.
        """
        with self._lock:
            self._enter(state)

    def note(self, *, needed: bool = False) -> None:
        """Write the facts of the state anew, because one has changed.  Raises as :meth:`enter`."""
        with self._lock:
            if self.row.step:
                self._write(self.row.step, needed)

    def try_keep(self) -> bool:
        """Have the guest stay here.  Returns false if it is too late."""
        with self._lock:
            self._kept = self._kept or not self.may_be_elsewhere
            return self._kept

    def try_hand_over(self, state: State) -> bool:
        """Be in ``state``, :attr:`State.HANDED_OVER` or :attr:`State.UNDECIDED`, unless the guest
        stays here.  Returns whether the guest may go on elsewhere now.  Raises as :meth:`enter`.
        """
        with self._lock:
            if not self._kept:
                self._enter(state)
            return not self._kept

    def _enter(self, state: State) -> None:
        row, new = self.row, TABLE[state]
        assert state in row.then, f"{state.name} cannot follow {self._state.name}"
        assert not (self._kept and new.guest in (Guest.UNDECIDED, Guest.THERE)), "two owners"
        if not new.step:
            self._erase()
        elif new.step != row.step:
            # On the way to the destination the guest can still stay here instead.
            on_its_way = self._state.value < state.value <= State.HANDED_OVER.value
            self._write(new.step, on_its_way and not self.may_be_elsewhere)
        self._state = state
        self.handed_over = self.handed_over or state in _HANDED_OVER
