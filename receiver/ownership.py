# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns the guest, as the destination knows it: one table of states.  Sans-IO.

    OFFERED -> MAKING -> RESTORING -> SUSPENDED -> READY -> OWNS
         -> COMPLETING -> FINISHING -> COMPLETED

Until READY any failure takes the migration back.  From READY on the receiver keeps the guest until
the sender, an operator or xl decides.  From OWNS on the guest lives here: only its own end leads
out, or HELD, or LOST (invariant 1).

A transition writes the step of the new state into the journal before the state changes, so whatever
is sent afterwards was noted before.  If the entry cannot be written, the state stays as it was.
The start of the guest is the one step that precedes its entry: a successor sees the start by the
domain (``READY -> OWNS``), and the guest does not wait for the journal.

What people are shown is derived from the state and from the link, and is not read back.
``tests/unit/test_ownership_receiver.py`` compares the states with those of the model
(``tests/campaigns/model/session.pml``).
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
    BY_WORD = "a message of the sender, an operator or xl"
    NOTHING = "nothing: the guest runs here"
    BEING_UNDONE = "the migration is being taken back"
    OVER = "nothing is owed any more"


class Restart(Enum):
    """What a restarted daemon does."""

    NOTHING = "there is no entry"
    DISCARD = "destroys the domain"
    WAIT = "keeps the domain, and waits for the sender or an operator"
    SERVE = "serves the guest's faults"
    START = "starts the guest if it has not been started, and serves its faults"


@dataclass(frozen=True)
class Row:
    step: str
    """The journal's; empty: the entry stays as it was."""
    connected: str
    """The phase that people are shown."""
    lost: str
    """The same while the lanes are lost."""
    undo: Undo
    restart: Restart
    successor: State | None
    """The state in which a restarted daemon begins."""
    then: tuple[State, ...]


S = State
ANYTHING, BY_WORD, NOTHING, OVER = Undo.ANYTHING, Undo.BY_WORD, Undo.NOTHING, Undo.OVER
DISCARD, WAIT, SERVE, START = Restart.DISCARD, Restart.WAIT, Restart.SERVE, Restart.START
_TAKEN_BACK = (S.REFUSED, S.GIVEN_UP)
TABLE: dict[State, Row] = {
    S.OFFERED: Row("", "preflight", "preflight", ANYTHING, Restart.NOTHING, None,
        (S.MAKING, *_TAKEN_BACK)),
    S.MAKING: Row("making", "preflight", "preflight", ANYTHING, DISCARD, S.LEFT_OVER,
        (S.RESTORING, *_TAKEN_BACK)),
    S.RESTORING: Row("made", "precopy", "precopy", ANYTHING, DISCARD, S.LEFT_OVER,
        (S.SUSPENDED, *_TAKEN_BACK)),
    S.SUSPENDED: Row("suspended", "switchover", "switchover", ANYTHING, WAIT, S.MAYBE_READY,
        (S.READY, S.GIVEN_UP)),
    S.MAYBE_READY: Row("suspended", "switchover", "in doubt", BY_WORD, WAIT, S.MAYBE_READY,
        (S.SERVING, S.UNSTARTED, S.OWNS, S.DECIDED_ELSEWHERE, S.GIVEN_UP, S.ENDED)),
    S.READY: Row("ready", "switchover", "in doubt", BY_WORD, WAIT, S.READY,
        (S.SERVING, S.UNSTARTED, S.OWNS, S.DECIDED_ELSEWHERE, S.GIVEN_UP, S.ENDED)),
    S.SERVING: Row("entrusted", "deciding", "in doubt", BY_WORD, SERVE, S.SERVING,
        (S.RUNNING, S.OWNS, S.LOST, S.DECIDED_ELSEWHERE, S.GIVEN_UP, S.ENDED)),
    S.RUNNING: Row("entrusted", "deciding", "interrupted", NOTHING, SERVE, S.SERVING,
        (S.OWNS, S.LOST, S.HELD, S.ENDED)),
    S.UNSTARTED: Row("taken over", "postcopy", "interrupted", BY_WORD, START, S.UNSTARTED,
        (S.OWNS, S.LOST, S.DECIDED_ELSEWHERE, S.ENDED)),
    S.OWNS: Row("taken over", "postcopy", "interrupted", NOTHING, START, S.UNSTARTED,
        (S.COMPLETING, S.FINISHING, S.LOST, S.HELD, S.ENDED)),
    S.COMPLETING: Row("taken over", "completing", "completing", NOTHING, START, S.UNSTARTED,
        (S.OWNS, S.FINISHING, S.LOST, S.HELD, S.ENDED)),
    S.FINISHING: Row("finishing", "completing", "completing", NOTHING, SERVE, S.FINISHING,
        (S.COMPLETED, S.LOST, S.HELD, S.ENDED)),
    S.LOST: Row("lost", "lost", "lost", NOTHING, SERVE, S.LOST,
        (S.FINISHING, S.ENDED)),
    S.HELD: Row("held", "held", "held", NOTHING, SERVE, S.HELD,
        (S.LOST, S.FINISHING, S.DECIDED_ELSEWHERE, S.ENDED)),
    S.DECIDED_ELSEWHERE: Row("decided elsewhere", "in doubt", "in doubt", Undo.BEING_UNDONE,
        DISCARD, S.DECIDED_ELSEWHERE, (S.GIVEN_UP,)),
    S.LEFT_OVER: Row("", "precopy", "precopy", Undo.BEING_UNDONE, DISCARD, S.LEFT_OVER,
        (S.GIVEN_UP,)),
    S.REFUSED: Row("", "refused", "refused", OVER, Restart.NOTHING, None, ()),
    S.GIVEN_UP: Row("", "failed", "failed", OVER, Restart.NOTHING, None, ()),
    S.ENDED: Row("", "failed", "failed", OVER, Restart.NOTHING, None, ()),
    S.COMPLETED: Row("", "completed", "completed", OVER, Restart.NOTHING, None, (S.STOPPED,)),
    S.STOPPED: Row("", "failed", "failed", OVER, Restart.NOTHING, None, ()),
}  # fmt: skip

BY_STEP = {row.step: row.successor for row in TABLE.values() if row.step and row.successor}
"""The state in which a restarted daemon begins, by the last step in the journal."""
STAYS_POSSIBLE = (S.MAKING, S.RESTORING, S.SUSPENDED, S.READY)
"""States in which the guest may still stay at the source, if they cannot be noted."""
OURS = (*(state for state in S if TABLE[state].undo is NOTHING), S.UNSTARTED)
"""States in which only the end of the guest ends the migration."""


def _check_table() -> None:
    """The invariants of the table; ``AssertionError`` names a bug in it."""
    assert set(TABLE) == set(S)
    for state, row in TABLE.items():
        # Nothing follows an end, except that a COMPLETED guest can be recalled.
        assert row.undo is not OVER or row.then in ((), (S.STOPPED,)), state
        # A guest that runs here is not taken back.  It must be HELD before it can be given up.
        for then in row.then if row.undo is NOTHING and state is not S.HELD else ():
            assert TABLE[then].undo is NOTHING or then in (S.ENDED, S.COMPLETED), state
        # What is being undone is undone.
        assert row.undo is not Undo.BEING_UNDONE or row.then == (S.GIVEN_UP,), state
        # A successor promises no less than its predecessor.
        if row.undo in (BY_WORD, NOTHING):
            assert row.successor and TABLE[row.successor].undo in (BY_WORD, NOTHING), state
        assert bool(row.successor) is (row.restart is not Restart.NOTHING), state
        if row.successor and row.step:
            assert BY_STEP[row.step] is row.successor, state


_check_table()


class Link(Enum):
    UP = auto()
    DOWN = auto()
    BACK = auto()
    """The sender has reconnected, and is being asked what it knows."""


class Ownership:
    """``write`` writes the journal's entry with a step; its second argument is whether a failure is
    to be raised.
    """

    def __init__(
        self,
        write: Callable[[str, bool], None],
        *,
        left_at: str = "",
    ):
        """``left_at``: the last step in the journal of a predecessor."""
        self._write = write
        self._lock = threading.Lock()
        """Held for moments only: the event loop takes it."""
        self._writing = threading.Lock()
        """Held while the journal is written."""
        self._state = BY_STEP[left_at] if left_at else S.OFFERED
        self._step = left_at
        self.link = Link.DOWN if left_at else Link.UP
        self._becomes_ready = False
        self.taken_back = ""
        """Why somebody has cancelled the migration."""
        self.is_taking_up = bool(left_at)
        """What a predecessor has left is being looked for."""

    @property
    def state(self) -> State:
        return self._state

    @property
    def row(self) -> Row:
        return TABLE[self._state]

    @property
    def phase(self) -> str:
        """What people are shown."""
        return self.row.connected if self.link is Link.UP else self.row.lost

    @property
    def has_ended(self) -> bool:
        """Nothing more comes of the migration."""
        return self.row.undo is OVER

    @property
    def needed(self) -> bool:
        """The guest may depend on this process."""
        return self.row.undo in (BY_WORD, NOTHING)

    @property
    def ours(self) -> bool:
        """The guest belongs here: no error is a reason to give it up."""
        return self._state in OURS

    @property
    def was_handed_over(self) -> bool:
        return self.ours and self._state is not S.RUNNING

    # ---- transitions ----
    def become(self, state: State) -> None:
        """Write the state's step into the journal, and change to the state.  Call this in a thread
        if the step is another one.

        Raises ``LocalProtocolError`` for a transition that is not in the table, and what ``write``
        raises; then the state stays as it was.
        """
        step = TABLE[state].step
        if state is self._state or not step or step == self._step:
            self._change(state)
            return
        with self._writing:
            self._check(state)
            self._write(step, state in STAYS_POSSIBLE)
            self._step = step
            self._change(state)

    def note_again(self) -> None:
        """Write the last step once more, because another fact has changed.  Raises what ``write``
        raises.
        """
        with self._writing:
            self._write(self._step, not self.needed)

    def seen_to_run(self) -> None:
        """The guest has been seen to run.  While another state is being noted this has no effect,
        and the next look at the domain calls again.
        """
        if not self._writing.acquire(blocking=False):
            return
        try:
            with self._lock:
                seen = {S.SERVING: S.RUNNING, S.UNSTARTED: S.OWNS}
                self._state = seen.get(self._state, self._state)
        finally:
            self._writing.release()

    # ---- decisions that race ----
    def try_take_back(self, reason: str) -> bool:
        """Cancel the migration, if it can still be cancelled.  It does not become READY then."""
        with self._lock:
            if self.row.undo is not ANYTHING or self._becomes_ready:
                return False
            self.taken_back = self.taken_back or reason
            return True

    def try_become_ready(self) -> bool:
        """Become READY, if nobody has cancelled the migration.  It cannot be cancelled then.

        Raises what ``write`` raises.
        """
        with self._lock:
            if self.taken_back:
                return False
            self._becomes_ready = True
        self.become(S.READY)
        return True

    def _check(self, state: State) -> None:
        if state is not self._state and state not in self.row.then:
            raise LocalProtocolError(f"{state.name} after {self._state.name}")

    def _change(self, state: State) -> None:
        with self._lock:
            self._check(state)
            self._state = state
