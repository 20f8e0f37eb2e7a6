# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns the guest, as far as the sender can find out: one table of states.  Sans-IO.

    OFFERING -> COPYING -> SUSPENDING -> SUSPENDED -> (UNDECIDED) -> HANDED_OVER -> ALL_SENT
         -> COMPLETING -> COMPLETED

Up to and including SUSPENDED any failure leaves the guest here.  In UNDECIDED a toolstack decides.
From HANDED_OVER on the pages are kept until each is confirmed, and the guest continues here only if
an operator decides so (invariant 1).

A transition writes the step of the new state into the journal before the state changes, so whatever
is sent afterwards was noted before (invariant 6).  If an entry that is needed cannot be written,
the state stays as it was.

What people are shown is derived from the state and from the link, and is not read back.
``tests/unit/test_ownership_sender.py`` compares the states with those of the models
(``tests/campaigns/model``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from migrate.errors import LocalProtocolError


class State(Enum):
    """The states up to HANDED_OVER are in the order in which a migration enters them."""

    OFFERING = auto()
    """The destination is being asked."""
    COPYING = auto()
    """Memory is sent while the guest runs."""
    SUSPENDING = auto()
    """The guest may be suspended.  The destination has not been sent ``suspended``."""
    SUSPENDED = auto()
    """The destination may have all that it needs, and wait for the handover."""
    UNDECIDED = auto()
    """A toolstack decides at which end the guest runs."""
    HANDED_OVER = auto()
    """The guest belongs to the destination."""
    ALL_SENT = auto()
    """As HANDED_OVER.  Each missing page has been sent, and some are not confirmed."""
    COMPLETING = auto()
    """Each page is confirmed.  The destination may forget the session."""
    DECIDED_HERE = auto()
    """An operator has decided that the guest continues here."""
    RETURNING = auto()
    """As DECIDED_HERE.  The guest returns to the last checkpoint, in a new domain."""
    DECIDED_ELSEWHERE = auto()
    """An operator has decided that nothing of the guest is needed here."""
    GIVEN_UP = auto()
    """The guest continues here.  The destination may not have received that."""
    PAGES_LOST = auto()
    """The source domain was destroyed with pages that the destination may lack."""
    COMPLETED = auto()
    """The guest has all of its memory at the destination, and its domain here is destroyed."""
    STAYED = auto()
    """The guest continues here, and the destination needs no message any more."""
    FAILED = auto()
    """The migration was not completed, and nothing of the guest is needed here any more."""


class Guest(Enum):
    """Where the guest is, as far as the sender can find out."""

    RUNS_HERE = "runs here"
    SUSPENDED_HERE = "is suspended here, and continues here if anything fails"
    UNDECIDED = "is suspended here, until a toolstack resumes or destroys it"
    THERE = "runs, or may run, at the destination; missing pages are kept here"
    DECIDED_HERE = "continues here, because an operator has decided so"
    GONE = "is not the sender's any more"


class Restart(Enum):
    """What a restarted daemon does."""

    NOTHING = "there is no entry"
    TAKE_BACK = "has the guest continue here, and sends `abort` until the destination has it"
    FOLLOW_TOOLSTACK = "waits for what the toolstack does, and rejoins the session"
    REJOIN = "rejoins the session, and sends what is missing"
    DESTROY_SOURCE = "destroys what is left of the guest here"
    SEND_LAST_MESSAGE = "sends the last message until the destination has it"


class Link(Enum):
    UP = auto()
    LOST = auto()
    """The lanes are lost, or do not exist yet."""
    GIVEN_UP = auto()
    """Nobody tries to connect any more."""


@dataclass(frozen=True, kw_only=True)
class Row:
    step: str = ""
    """The step in the journal; empty: there is no entry."""
    successor: State | None = None
    """The state in which a restarted daemon begins; ``None``: this one."""
    phase: str
    """The phase that people are shown."""
    if_lost: str = ""
    """The phase while the lanes are lost; empty: the same one."""
    if_given_up: str = ""
    """The phase when nobody tries to connect any more; empty: that of lost lanes."""
    guest: Guest
    restart: Restart = Restart.NOTHING
    next: tuple[State, ...] = ()
    """The states that may follow."""


S, G, R = State, Guest, Restart
_STAYS = (S.GIVEN_UP, S.STAYED, S.FAILED)
_AWAY = (S.COMPLETING, S.DECIDED_HERE, S.DECIDED_ELSEWHERE, S.PAGES_LOST, S.FAILED)
TABLE: dict[State, Row] = {
    S.OFFERING: Row(phase="preflight", if_lost="connecting",
        guest=G.RUNS_HERE, next=(S.COPYING, *_STAYS)),
    S.COPYING: Row(step="begun", phase="precopy",
        guest=G.RUNS_HERE, restart=R.TAKE_BACK, next=(S.SUSPENDING, *_STAYS)),
    S.SUSPENDING: Row(step="suspending", successor=S.SUSPENDED, phase="switchover",
        guest=G.SUSPENDED_HERE, restart=R.TAKE_BACK, next=(S.COPYING, S.SUSPENDED, *_STAYS)),
    S.SUSPENDED: Row(step="suspending", phase="switchover",
        guest=G.SUSPENDED_HERE, restart=R.TAKE_BACK, next=(S.UNDECIDED, S.HANDED_OVER, *_STAYS)),
    S.UNDECIDED: Row(step="deciding", phase="deciding",
        if_lost="interrupted", if_given_up="in doubt",
        guest=G.UNDECIDED, restart=R.FOLLOW_TOOLSTACK,
        next=(S.HANDED_OVER, *_AWAY, S.GIVEN_UP, S.STAYED)),
    S.HANDED_OVER: Row(step="handed over", phase="postcopy", if_lost="interrupted",
        guest=G.THERE, restart=R.REJOIN, next=(S.ALL_SENT, *_AWAY)),
    S.ALL_SENT: Row(step="handed over", successor=S.HANDED_OVER, phase="completing",
        if_lost="interrupted", guest=G.THERE, restart=R.REJOIN, next=(S.HANDED_OVER, *_AWAY)),
    S.COMPLETING: Row(step="completing", phase="completing",
        guest=G.GONE, restart=R.DESTROY_SOURCE, next=(S.COMPLETED, S.FAILED)),
    S.DECIDED_HERE: Row(step="decided here", phase="interrupted",
        guest=G.DECIDED_HERE, restart=R.TAKE_BACK,
        next=(S.RETURNING, S.DECIDED_ELSEWHERE, *_STAYS)),
    S.RETURNING: Row(step="going back", phase="interrupted",
        guest=G.DECIDED_HERE, restart=R.TAKE_BACK, next=(S.DECIDED_ELSEWHERE, *_STAYS)),
    S.DECIDED_ELSEWHERE: Row(step="decided elsewhere", phase="interrupted",
        guest=G.GONE, restart=R.DESTROY_SOURCE, next=(S.PAGES_LOST, S.FAILED)),
    S.GIVEN_UP: Row(step="given up", phase="failed",
        guest=G.RUNS_HERE, restart=R.SEND_LAST_MESSAGE, next=(S.STAYED, S.FAILED)),
    S.PAGES_LOST: Row(step="handed over", successor=S.HANDED_OVER, phase="failed",
        guest=G.GONE, restart=R.REJOIN, next=(S.FAILED,)),
    S.COMPLETED: Row(phase="completed", guest=G.GONE),
    S.STAYED: Row(phase="failed", guest=G.RUNS_HERE),
    S.FAILED: Row(phase="failed", guest=G.GONE),
}  # fmt: skip

INHERITED = {row.step: row.successor or state for state, row in TABLE.items() if row.step}
"""The state in which a restarted daemon begins, by the last step in the journal."""
LOG_DIRTY_MAY_BE_ON = frozenset({S.COPYING, S.SUSPENDED, S.HANDED_OVER, S.DECIDED_HERE})
"""The states in which a predecessor may have left log-dirty on."""
ENDED = (S.GIVEN_UP, S.PAGES_LOST, S.COMPLETED, S.STAYED, S.FAILED)
DECIDED = (S.DECIDED_HERE, S.RETURNING, S.DECIDED_ELSEWHERE)
_HANDED_OVER = (S.HANDED_OVER, S.ALL_SENT, S.COMPLETING, *DECIDED)
_NOT_HERE_ALONE = (G.UNDECIDED, G.THERE)


def _check_table() -> None:
    """The invariants of the table; ``AssertionError`` names a bug in it."""
    assert set(TABLE) == set(S)
    for state, row in TABLE.items():
        guests = {TABLE[then].guest for then in row.next}
        # Nothing follows an end but another end.
        assert state not in ENDED or set(row.next) <= set(ENDED), state
        # A guest is suspended before the handover.
        assert not guests.intersection(_NOT_HERE_ALONE) or row.guest in (
            G.SUSPENDED_HERE,
            *_NOT_HERE_ALONE,
        )
        # A guest that was handed over continues here only by a decision, and a guest that is gone
        # does not continue here.
        assert row.guest is not G.THERE or guests <= {G.THERE, G.DECIDED_HERE, G.GONE}, state
        assert row.guest is not G.GONE or guests <= {G.GONE}, state
        # A successor does what the row states, and keeps the pages that its predecessor kept.
        assert bool(row.step) is (row.restart is not R.NOTHING), state
        if row.step:
            successor = INHERITED[row.step]
            assert successor is (row.successor or state), state
            assert TABLE[successor].restart is row.restart, state
            assert TABLE[successor].guest in (row.guest, G.THERE), state


_check_table()


def _ignore(_phase: str) -> None:
    """Do nothing with the phases."""


class Ownership:
    """The ownership of one migration.  Any thread may call its methods.

    ``write`` writes the journal's entry with a step; its second argument is whether a failure is to
    be raised.  ``erase`` removes the entry, and raises nothing.
    """

    def __init__(
        self,
        write: Callable[[str, bool], None],
        erase: Callable[[], None],
        state: State = S.OFFERING,
    ):
        """``state``: what a predecessor has left (:data:`INHERITED`)."""
        self._write, self._erase = write, erase
        self._lock = threading.Lock()
        """Held for moments only: the event loop takes it."""
        self._writing = threading.Lock()
        """Held while the journal is written and the state changes."""
        self._state = state
        self._kept = False
        """The guest is kept here.  This excludes :attr:`_leaves`."""
        self._leaves = False
        """The guest is being handed over.  This excludes :attr:`_kept`."""
        self._link = Link.LOST
        self.on_phase: Callable[[str], object] = _ignore
        """Called with the phase after each change of the state or of the link."""
        self.inherited = state is not S.OFFERING
        """This process has not resumed the migration of its predecessor yet."""
        self.handed_over = state in _HANDED_OVER
        """The guest was handed over, whatever has happened since."""

    @property
    def state(self) -> State:
        return self._state

    @property
    def link(self) -> Link:
        return self._link

    @link.setter
    def link(self, link: Link) -> None:
        self._link = link
        self.on_phase(self.phase)

    @property
    def row(self) -> Row:
        return TABLE[self._state]

    @property
    def phase(self) -> str:
        """What people are shown."""
        row = self.row
        if self.link is Link.UP:
            return row.phase
        return (self.link is Link.GIVEN_UP and row.if_given_up) or row.if_lost or row.phase

    @property
    def has_ended(self) -> bool:
        """The migration has ended."""
        return self._state in ENDED

    @property
    def may_be_elsewhere(self) -> bool:
        """The guest may run at the destination, or a toolstack may have it run there."""
        return self.row.guest not in (G.RUNS_HERE, G.SUSPENDED_HERE)

    @property
    def may_stay(self) -> bool:
        """The guest can still continue here."""
        return S.GIVEN_UP in self.row.next

    @property
    def is_cut_off(self) -> bool:
        """The guest may be elsewhere, its pages are kept here, and the destination is not there."""
        return self.row.guest in _NOT_HERE_ALONE and self.link is not Link.UP

    @property
    def is_suspended(self) -> bool:
        """This migration has the guest suspended here."""
        return not self.has_ended and self._state not in (S.OFFERING, S.COPYING)

    @property
    def peer_may_be_ready(self) -> bool:
        """The destination may keep the guest, and wait for the handover or for an ``abort``."""
        return self.inherited or self._state not in (S.OFFERING, S.COPYING, S.SUSPENDING)

    @property
    def is_kept(self) -> bool:
        """The guest stays here, and nothing more may be sent that makes the destination ready."""
        return self._kept

    # ---- transitions ----
    def enter(self, state: State) -> None:
        """Write the state's step into the journal, and change to the state.  Call this in a thread.

        Raises ``LocalProtocolError`` for a transition that is not in the table, and what ``write``
        raises; then the state stays as it was.
        """
        with self._writing:
            row, new = self.row, TABLE[state]
            if state not in row.next or (self._kept and new.guest in _NOT_HERE_ALONE):
                raise LocalProtocolError(f"{state.name} after {self._state.name}")
            if not new.step:
                self._erase()
            elif new.step != row.step:
                # On the way to the destination the guest can still stay here instead.  A decision
                # can be made again, and a successor without its entry would undo it.
                on_its_way = self._state.value < state.value <= S.HANDED_OVER.value
                needed = (on_its_way and not self.may_be_elsewhere) or state in DECIDED
                self._write(new.step, needed)
            self._state = state
            self.handed_over = self.handed_over or state in _HANDED_OVER
            self.on_phase(self.phase)

    def note(self, *, needed: bool = False) -> None:
        """Write the state's step once more, because another fact has changed.  Raises what
        ``write`` raises.
        """
        with self._writing:
            if self.row.step:
                self._write(self.row.step, needed)

    # ---- decisions that race ----
    def try_keep(self) -> bool:
        """Have the guest stay here, if it may not be elsewhere and is not being handed over.  No
        handover can follow then.
        """
        with self._lock:
            self._kept = self._kept or not (self._leaves or self.may_be_elsewhere)
            return self._kept

    def try_hand_over(self, state: State) -> bool:
        """Enter HANDED_OVER or UNDECIDED, if nobody keeps the guest here.  From the write of the
        entry on the guest cannot be kept, because a successor may find the entry.

        Raises as :meth:`enter`; the guest can be kept again then.
        """
        with self._lock:
            if self._kept:
                return False
            self._leaves = True
        try:
            self.enter(state)
        except BaseException:
            self._leaves = False
            raise
        return True
