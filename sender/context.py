# SPDX-License-Identifier: GPL-2.0-or-later
"""What the parts of one outgoing migration share."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio

from migrate.errors import MigrationError
from migrate.lanes.connection import LaneConnection
from migrate.lanes.pairs import Lanes
from migrate.options import MigrationOptions
from migrate.protocol import messages as m
from migrate.protocol.session import Role, Session
from migrate.service.journal import Journal
from migrate.service.record import Record
from sender.backlog import Backlog
from sender.checkpoints import CheckpointStore
from sender.dirty import DirtyLog
from sender.entry import Entry
from sender.ownership import Link, Ownership, State
from sender.policy import DefaultPolicy
from sender.progress import Meter, Now, Progress
from sender.push import PushLane
from sender.statistics import SenderStatistics
from sender.throttle import Throttle
from sender.toolstack import Toolstack
from xenbackend.contract import SUSPENDS_LATE_S, Domain, Hypervisor
from xenbackend.pages import PAGE_SIZE

COLUMNS = ("bytes_sent", "left_of_round", "dirty_bytes_per_s", "outstanding", "faults")
"""What is sampled.  The keys are those of ``show``; ``left_of_round``: the pages of the round that
have still to be sent.
"""


@dataclass
class Signals:
    """What the destination, or a toolstack, has reported so far."""

    ready: threading.Event = field(default_factory=threading.Event)
    """A thread waits for this event; the event loop waits for the other events."""
    resumed: trio.Event = field(default_factory=trio.Event)
    complete: trio.Event = field(default_factory=trio.Event)
    handed_over: trio.Event = field(default_factory=trio.Event)
    """The guest belongs to the destination, and the handover can be sent."""


@dataclass
class Source:
    """The guest's domain at this end; after a return to a checkpoint, the new domain."""

    domain: Domain
    dirty_log: DirtyLog
    checkpoints: CheckpointStore | None


class Barriers:
    """Numbered barriers in the push lane, each of which the destination confirms.  One thread at a
    time adds barriers.
    """

    def __init__(self) -> None:
        self._number = 0
        self._open: dict[int, Callable[[float], object]] = {}

    def add(self, passed: Callable[[float], object]) -> int:
        """Return the number of a new barrier.  ``passed`` is called with the time when the barrier
        is passed, in the thread that receives.
        """
        self._number += 1
        self._open[self._number] = passed
        return self._number

    def passed(self, number: int, now: float) -> None:
        self._open.pop(number)(now)


def latest_suspension() -> float:
    """Return until when a guest may suspend that has not done so in time (time.monotonic())."""
    return time.monotonic() + SUSPENDS_LATE_S


class Context:
    """What the parts of one migration share, from its request to its end.

    ``session_id``: the session of ``lanes`` (:func:`migrate.protocol.session.new_id`).
    """

    def __init__(
        self,
        session_id: str,
        hypervisor: Hypervisor,
        lanes: Lanes,
        journal: Journal,
        toolstack: Toolstack,
        entry: Entry,
        state: State,
    ):
        self.id = session_id
        self.hypervisor = hypervisor
        self.lanes = lanes
        self.journal = journal
        self.toolstack = toolstack
        self.entry = entry
        self.policy = DefaultPolicy(entry.options.strategy, entry.options.policy)
        self.ownership = Ownership(self._write, self._erase, state)
        self.began_here = state is State.OFFERING
        """No predecessor has had the migration."""
        self.session = Session(Role.SENDER)
        self.progress = Progress(started_at=entry.started_at)
        self.meter = Meter(self.progress)
        self.ownership.on_phase = lambda phase: self.meter.phases.add(time.time(), phase)
        self.ownership.on_phase(self.ownership.phase)
        self.statistics = SenderStatistics(strategy=self.options.strategy.value)
        self.receiver_statistics: dict[str, Any] = {}
        self.record = Record(COLUMNS)
        self.record.is_whole = self.began_here
        self.cap = Throttle(self._bytes_per_s)
        self.pause = entry.pause
        self.adjusting = trio.Lock()
        """Held until a change by an operator is noted in the journal, or undone."""
        self.signals = Signals()
        self.barriers = Barriers()
        self.postcopy_asked = False
        """An administrator has asked for the switchover instead of further rounds of precopy."""
        self.rounds_are_over = False
        """No round of precopy follows.  From here to the handover copying cannot be paused."""
        self.last_message: m.Message | None = None
        """The message for a destination that was cut off.  The message is sent when the destination
        dials or can be dialled.
        """
        self.suspends_until = 0.0
        """Until this time (time.monotonic()) a guest that was asked to suspend, and has not done so
        in time, may still suspend.
        """
        self.lost_at = 0.0
        """The time at which the lanes were lost (time.monotonic()), or 0."""
        self.source: Source | None = None
        """``None`` if the domain is not open yet, or is not needed any more."""
        self.push: PushLane | None = None
        self.pull: LaneConnection | None = None
        self.backlog = _nothing_missing()

    # ---- the journal ----
    def _write(self, step: str, needed: bool) -> None:
        facts = {"step": step, **self.entry.facts(), **self.lanes.facts()}
        self.journal.write(self.id, facts, needed=needed)

    def _erase(self) -> None:
        self.journal.erase(self.id)

    def note_applied(self) -> None:
        """Note that a resume in the source domain is impossible from now on.  Raises
        :class:`MigrationError`.
        """
        if not self.entry.applied:
            self.entry.applied = True
            try:
                self.ownership.note(needed=True)
            except MigrationError:
                self.entry.applied = False
                raise

    def may_suspend_late(self) -> None:
        """Note, also for a successor, that the guest has not suspended in time.  Called in a
        thread.
        """
        self.suspends_until = latest_suspension()
        with contextlib.suppress(OSError):
            self.journal.stopped(self.id).touch(0o600)

    def fail(self, state: State, reason: str) -> None:
        """End the migration and show the reason, which is set before the state.  Blocks: run the
        call in a thread.
        """
        self.progress.problem = reason
        self.ownership.enter(state)

    # ---- what an operator may change meanwhile ----
    @property
    def options(self) -> MigrationOptions:
        return self.entry.options

    def use(self, options: MigrationOptions) -> None:
        """Use other options from now on."""
        self.entry.options = options
        self.policy = dataclasses.replace(self.policy, options=options.policy)
        self.set_cap()

    def set_cap(self) -> None:
        """Set the cap on background copying by the options and the state."""
        self.cap.change(self._bytes_per_s, time.monotonic())

    @property
    def _bytes_per_s(self) -> float | None:
        in_postcopy = self.ownership.may_be_elsewhere
        return self.options.cap_of_postcopy if in_postcopy else self.options.bandwidth_bytes_per_s

    # ---- the guest ----
    @property
    def name(self) -> str:
        return self.entry.domain.name

    def is_domain(self, domain: Domain, name: str) -> None:
        """Note the guest's domain and its name, as the hypervisor has them."""
        self.entry.domain = dataclasses.replace(
            self.entry.domain, handle=domain.handle, name=name or self.name
        )

    def guest_waits(self) -> bool:
        """The guest may be at the destination, and wait for pages that are here, or for the
        handover, which may be lost.
        """
        lacks_pages = self.ownership.inherited or self.backlog.unacknowledged > 0
        return self.ownership.may_be_elsewhere and (
            lacks_pages or not self.signals.resumed.is_set()
        )

    def count_down(self) -> None:
        """Show how many pages the destination still lacks."""
        self.progress.outstanding = self.backlog.unacknowledged
        self.progress.pages_done = self.progress.pages_total - self.progress.outstanding

    def measure(self) -> None:
        """Update the values of the progress that depend on time."""
        stats, ownership = self.statistics, self.ownership
        self.meter.measure(
            Now(
                time.monotonic(),
                ownership.phase,
                ownership.has_ended,
                self.options,
                is_paused=self.pause.is_on,
                started=stats.started if self.began_here else 0.0,
                finished=stats.finished,
                bytes_sent=self.bytes_sent,
                pages_sent=stats.precopy_pages,
                pages_confirmed=stats.missing_pages - self.backlog.unacknowledged,
                memory_pages=stats.memory_bytes // PAGE_SIZE,
                expected=stats.expected,
            )
        )

    def end_step(self, step: str) -> None:
        """Note that a step of the switchover has ended now."""
        self.record.end_step(step, time.monotonic())

    def sample(self) -> None:
        """Add a sample to the record: one value for each of :data:`COLUMNS`."""
        progress, in_rounds = self.progress, self.ownership.phase == "precopy"
        elsewhere, total = self.ownership.may_be_elsewhere, progress.pages_total
        values = (
            self.bytes_sent,
            max(total - progress.pages_done, 0) if in_rounds and total else None,
            progress.dirty_bytes_per_s if in_rounds else None,
            self.backlog.unacknowledged if elsewhere else None,
            progress.faults if elsewhere else None,
        )
        self.record.samples.add(time.time(), values, {})

    def give_back(self) -> None:
        """Release the memory that is proportional to the guest, because ``list`` shows a migration
        long after its end.
        """
        self.source = None
        self.backlog = _nothing_missing()

    # ---- the lanes ----
    def take_push_lane(self, connection: LaneConnection, domain: Domain) -> PushLane:
        self.push = PushLane(connection, self.session, domain, self.cap, self.statistics)
        return self.push

    def connections(self) -> list[LaneConnection]:
        push = None if self.push is None else self.push.connection
        return [connection for connection in (push, self.pull) if connection is not None]

    def lane_bytes(self) -> tuple[int, int]:
        """Return the numbers of bytes that were put on the push lanes and on the pull lanes."""
        closed = self.statistics
        push = 0 if self.push is None else self.push.connection.bytes_sent
        pull = 0 if self.pull is None else self.pull.bytes_sent
        return closed.push_lane_bytes + push, closed.pull_lane_bytes + pull

    @property
    def bytes_sent(self) -> int:
        """The number of bytes that were put on the lanes so far."""
        return sum(self.lane_bytes())

    def close_lanes(self) -> None:
        stats = self.statistics
        stats.push_lane_bytes, stats.pull_lane_bytes = self.lane_bytes()
        for connection in self.connections():
            connection.close()
        self.push = self.pull = None
        if self.ownership.link is Link.UP:
            self.ownership.link = Link.LOST


def _nothing_missing() -> Backlog:
    return Backlog(np.zeros(0, dtype=np.bool_))
