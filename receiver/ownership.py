# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns the guest, as far as the receiver can find out: one table of states.  Sans-IO.

    OFFERED -> MAKING -> RESTORING -> SUSPENDED -> READY -> OWNS
         -> COMPLETING -> FINISHING -> COMPLETED

Before READY any failure takes the migration back.  From READY on the receiver keeps the guest until
the sender, an operator or xl decides.  From OWNS on the guest lives here: only completion, its own
end, HELD or LOST leads out (invariant 1).

A transition writes the step of the new state into the journal before the state changes, so whatever
is sent afterwards was noted before.  If an entry that is needed cannot be written, the state stays
as it was.  The start of the guest is the one step that precedes its entry: a successor sees the
start by the domain (``READY -> OWNS``), and the guest does not wait for the journal.

What people are shown is derived from the state and from the link, and is not read back.
``tests/unit/test_ownership_receiver.py`` compares the states with those of the models
(``tests/campaigns/model``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from migrate.errors import LocalProtocolError


class State(Enum):
    OFFERED = auto()
    """Nothing has been done yet."""
    MAKING = auto()
    """The domain is being made."""
    RESTORING = auto()
    """Memory is copied into the domain."""
    SUSPENDED = auto()
    """The guest is suspended at the source, and the rest of it arrives."""
    MAYBE_READY = auto()
    """A predecessor was SUSPENDED, and may have sent ``ready``."""
    READY = auto()
    """The guest can be started, and the sender decides."""
    SERVING = auto()
    """The guest's faults are served, and xl decides."""
    RUNNING = auto()
    """xl has let the guest run here, and the sender has not handed the guest over yet."""
    UNSTARTED = auto()
    """The guest belongs here, and could not be started yet."""
    OWNS = auto()
    """The guest belongs here."""
    COMPLETING = auto()
    """Nothing is missing, and the sender is asked to agree."""
    FINISHING = auto()
    """Nothing is missing, and the ring is given up."""
    LOST = auto()
    """The guest runs here, and its missing pages exist nowhere any more."""
    HELD = auto()
    """The guest runs at the source as well, and is paused here."""
    DECIDED_ELSEWHERE = auto()
    """The guest is not to run here, and its domain is being destroyed."""
    LEFT_OVER = auto()
    """A predecessor was MAKING or RESTORING; its domain is being destroyed."""
    REFUSED = auto()
    GIVEN_UP = auto()
    """The guest does not come, and its domain is destroyed."""
    ENDED = auto()
    """The guest's domain has ended here."""
    COMPLETED = auto()
    STOPPED = auto()
    """The migration was COMPLETED; the guest runs at the source as well, and is paused here."""


class Undo(Enum):
    """What can still take the migration back."""

    ANYTHING = "any failure, and any request to cancel"
    BY_DECISION = "a message of the sender, an operator or xl"
    NOTHING = "nothing: the guest runs here"
    BEING_UNDONE = "the migration is being taken back"
    OVER = "nothing is left to be done"


class Restart(Enum):
    """What a restarted daemon does."""

    NOTHING = "there is no entry"
    DISCARD = "destroys the domain"
    WAIT = "keeps the domain, and waits for the sender or an operator"
    SERVE = "serves the guest's faults"
    START = "starts the guest if it has not been started, and serves its faults"


class Link(Enum):
    UP = auto()
    LOST = auto()
    BACK = auto()
    """The sender has reconnected, and the receiver waits for its first message."""


@dataclass(frozen=True, kw_only=True)
class Row:
    step: str = ""
    """The step in the journal; empty: the entry stays as it was."""
    successor: State | None = None
    """The state in which a restarted daemon begins; ``None``: this one."""
    phase: str
    """The phase that people are shown."""
    if_lost: str = ""
    """The phase while the lanes are lost; empty: the same one."""
    undo: Undo
    restart: Restart = Restart.NOTHING
    next: tuple[State, ...] = ()
    """The states that may follow."""


S, U, R = State, Undo, Restart
_TAKEN_BACK = (S.REFUSED, S.GIVEN_UP)
_NOT_HERE = (S.DECIDED_ELSEWHERE, S.GIVEN_UP, S.ENDED)
TABLE: dict[State, Row] = {
    S.OFFERED: Row(phase="preflight",
        undo=U.ANYTHING, next=(S.MAKING, *_TAKEN_BACK)),
    S.MAKING: Row(step="making", successor=S.LEFT_OVER, phase="preflight",
        undo=U.ANYTHING, restart=R.DISCARD, next=(S.RESTORING, *_TAKEN_BACK)),
    S.RESTORING: Row(step="made", successor=S.LEFT_OVER, phase="precopy",
        undo=U.ANYTHING, restart=R.DISCARD, next=(S.SUSPENDED, *_TAKEN_BACK)),
    S.SUSPENDED: Row(step="suspended", successor=S.MAYBE_READY, phase="switchover",
        undo=U.ANYTHING, restart=R.WAIT, next=(S.READY, S.GIVEN_UP)),
    S.MAYBE_READY: Row(step="suspended", phase="switchover", if_lost="in doubt",
        undo=U.BY_DECISION, restart=R.WAIT, next=(S.SERVING, S.UNSTARTED, S.OWNS, *_NOT_HERE)),
    S.READY: Row(step="ready", phase="switchover", if_lost="in doubt",
        undo=U.BY_DECISION, restart=R.WAIT, next=(S.SERVING, S.UNSTARTED, S.OWNS, *_NOT_HERE)),
    S.SERVING: Row(step="entrusted", phase="deciding", if_lost="in doubt",
        undo=U.BY_DECISION, restart=R.SERVE, next=(S.RUNNING, S.OWNS, S.LOST, *_NOT_HERE)),
    S.RUNNING: Row(step="entrusted", successor=S.SERVING, phase="deciding", if_lost="interrupted",
        undo=U.NOTHING, restart=R.SERVE, next=(S.OWNS, S.LOST, S.HELD, S.ENDED)),
    S.UNSTARTED: Row(step="taken over", phase="postcopy", if_lost="interrupted",
        undo=U.BY_DECISION, restart=R.START, next=(S.OWNS, S.LOST, S.DECIDED_ELSEWHERE, S.ENDED)),
    S.OWNS: Row(step="taken over", successor=S.UNSTARTED, phase="postcopy", if_lost="interrupted",
        undo=U.NOTHING, restart=R.START, next=(S.COMPLETING, S.FINISHING, S.LOST, S.HELD, S.ENDED)),
    S.COMPLETING: Row(step="taken over", successor=S.UNSTARTED, phase="completing",
        undo=U.NOTHING, restart=R.START, next=(S.OWNS, S.FINISHING, S.LOST, S.HELD, S.ENDED)),
    S.FINISHING: Row(step="finishing", phase="completing",
        undo=U.NOTHING, restart=R.SERVE, next=(S.COMPLETED, S.LOST, S.HELD, S.ENDED)),
    S.LOST: Row(step="lost", phase="lost",
        undo=U.NOTHING, restart=R.SERVE, next=(S.FINISHING, S.ENDED)),
    S.HELD: Row(step="held", phase="held",
        undo=U.NOTHING, restart=R.SERVE, next=(S.LOST, S.FINISHING, S.DECIDED_ELSEWHERE, S.ENDED)),
    S.DECIDED_ELSEWHERE: Row(step="decided elsewhere", phase="in doubt",
        undo=U.BEING_UNDONE, restart=R.DISCARD, next=(S.GIVEN_UP,)),
    S.LEFT_OVER: Row(phase="precopy",
        undo=U.BEING_UNDONE, restart=R.DISCARD, next=(S.GIVEN_UP,)),
    S.REFUSED: Row(phase="refused", undo=U.OVER),
    S.GIVEN_UP: Row(phase="failed", undo=U.OVER),
    S.ENDED: Row(phase="failed", undo=U.OVER),
    S.COMPLETED: Row(phase="completed", undo=U.OVER, next=(S.STOPPED,)),
    S.STOPPED: Row(phase="failed", undo=U.OVER),
}  # fmt: skip

INHERITED = {row.step: row.successor or state for state, row in TABLE.items() if row.step}
"""The state in which a restarted daemon begins, by the last step in the journal."""
OURS = (*(state for state in S if TABLE[state].undo is U.NOTHING), S.UNSTARTED)
"""States in which no error ends the migration."""
_NEEDED = (U.BY_DECISION, U.NOTHING)


def _check_table() -> None:
    """The invariants of the table; ``AssertionError`` names a bug in it."""
    assert set(TABLE) == set(S)
    for state, row in TABLE.items():
        undos = {TABLE[then].undo for then in row.next}
        # Nothing follows an end but another end.
        assert row.undo is not U.OVER or undos <= {U.OVER}, state
        # A guest that runs here is not taken back.  It must be HELD before it can be given up.
        for then in row.next if row.undo is U.NOTHING and state is not S.HELD else ():
            assert TABLE[then].undo is U.NOTHING or then in (S.ENDED, S.COMPLETED), state
        # What is being undone is undone.
        assert row.undo is not U.BEING_UNDONE or row.next == (S.GIVEN_UP,), state
        # A successor does what the row states, and promises no less than its predecessor.
        assert bool(row.step or state is S.LEFT_OVER) is (row.restart is not R.NOTHING), state
        assert row.step or row.undo not in _NEEDED, state
        if row.step:
            successor = INHERITED[row.step]
            assert successor is (row.successor or state), state
            assert TABLE[successor].restart is row.restart, state
            assert row.undo not in _NEEDED or TABLE[successor].undo in _NEEDED, state


_check_table()


def _ignore(_phase: str) -> None:
    """Do nothing with the phases."""


class Ownership:
    """The ownership of one migration.  Any thread may call its methods.

    ``write`` writes the journal's entry with a step; its second argument is whether a failure is to
    be raised.
    """

    def __init__(self, write: Callable[[str, bool], None], state: State = S.OFFERED):
        """``state``: what a predecessor has left (:data:`INHERITED`)."""
        self._write = write
        self._lock = threading.Lock()
        """Held for moments only: the event loop takes it."""
        self._writing = threading.Lock()
        """Held while the journal is written."""
        self._state = state
        self._becomes_ready = False
        self.taken_back = ""
        """Why somebody has cancelled the migration."""
        self.inherited = state is not S.OFFERED
        """This process has not resumed the migration of its predecessor yet."""
        self.on_phase: Callable[[str], object] = _ignore
        """Called with the phase after each change of the state or of the link."""
        self._link = Link.LOST if self.inherited else Link.UP

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
        return row.phase if self.link is Link.UP else row.if_lost or row.phase

    @property
    def has_ended(self) -> bool:
        """The migration has ended."""
        return self.row.undo is U.OVER

    @property
    def needed(self) -> bool:
        """The guest may depend on this process."""
        return self.row.undo in _NEEDED

    @property
    def ours(self) -> bool:
        """The guest belongs here: no error is a reason to give it up."""
        return self._state in OURS

    @property
    def handed_over(self) -> bool:
        """The guest belongs here, and the sender is not asked any more."""
        return self.ours and self._state is not S.RUNNING

    # ---- transitions ----
    def enter(self, state: State, *, needed: bool = False) -> None:
        """Write the state's step into the journal, and change to the state.  Call this in a thread
        if the step is another one.  ``needed``: an error of ``write`` is raised; this is so in any
        case while anything can still take the migration back.

        Raises ``LocalProtocolError`` for a transition that is not in the table, and what ``write``
        raises; then the state stays as it was.
        """
        step = TABLE[state].step
        if step in ("", self.row.step):
            self._change(state)
            return
        with self._writing:
            self._check(state)
            self._write(step, needed or self.row.undo is U.ANYTHING)
            self._change(state)

    def note(self, *, needed: bool = False) -> None:
        """Write the state's step once more, because another fact has changed.  Raises what
        ``write`` raises, as :meth:`enter`.
        """
        with self._writing:
            row = self.row
            if row.step:
                self._write(row.step, needed or row.undo is U.ANYTHING)

    def seen_to_run(self, *, wait: bool = False) -> None:
        """The guest has been seen to run.  While the journal is written this has no effect, and the
        next look at the domain calls again.  ``wait``: until the journal is written, in a thread.
        """
        if not self._writing.acquire(blocking=wait):
            return
        try:
            with self._lock:
                seen = {S.SERVING: S.RUNNING, S.UNSTARTED: S.OWNS}
                self._state = seen.get(self._state, self._state)
        finally:
            self._writing.release()
        self.on_phase(self.phase)

    def _check(self, state: State) -> None:
        if state is not self._state and state not in self.row.next:
            raise LocalProtocolError(f"{state.name} after {self._state.name}")

    def _change(self, state: State) -> None:
        with self._lock:
            self._check(state)
            self._state = state
        self.on_phase(self.phase)

    # ---- decisions that race ----
    def try_take_back(self, reason: str) -> bool:
        """Cancel the migration, if it can still be cancelled.  It does not become READY then."""
        with self._lock:
            if self.row.undo is not U.ANYTHING or self._becomes_ready:
                return False
            self.taken_back = self.taken_back or reason
            return True

    def try_become_ready(self) -> bool:
        """Enter READY, if nobody has cancelled the migration.  It cannot be cancelled then.

        Raises as :meth:`enter`.
        """
        with self._lock:
            if self.taken_back:
                return False
            self._becomes_ready = True
        self.enter(S.READY)
        return True
