# SPDX-License-Identifier: GPL-2.0-or-later
"""What the phases of an incoming migration share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from migrate.service.record import Record
from migrate.units import pauses
from receiver.entry import Entry
from receiver.guest import Holdings
from receiver.ownership import Link, Ownership, State
from receiver.peer import Peer
from receiver.progress import IncomingProgress
from receiver.statistics import PagerStatistics
from receiver.toolstack import Toolstack
from xenbackend.contract import Hypervisor
from xenbackend.errors import XenError

log = logging.getLogger(__name__)

COLUMNS = ("bytes_received", "outstanding", "waiting", "faults")
"""What is sampled.  The keys are those of ``show``."""
FIRST_START_AGAIN_S = 0.1
LAST_START_AGAIN_S = 5.0
"""The longest pause between two attempts to start or pause a guest.  Each pause is twice as long as
the one before it.
"""
NOT_HERE = "an operator has decided at the destination that the guest does not run there"


@dataclass(frozen=True)
class Context:
    hypervisor: Hypervisor
    toolstack: Toolstack
    peer: Peer
    ownership: Ownership
    entry: Entry
    progress: IncomingProgress
    statistics: PagerStatistics = field(default_factory=PagerStatistics)
    holdings: Holdings = field(default_factory=Holdings)
    deciding: trio.Lock = field(default_factory=trio.Lock)
    """Held while an operator's decision is carried out, and while the guest is being started."""

    record: Record = field(default_factory=lambda: Record(COLUMNS))

    @property
    def name(self) -> str:
        return self.progress.domain

    def begin_steps(self) -> None:
        """Note that the guest is suspended from now on."""
        self.record.begin_steps(time.monotonic())

    def end_step(self, step: str, *, is_last: bool = False) -> None:
        """Note that a step of the switchover has ended now."""
        self.record.end_step(step, time.monotonic(), is_last=is_last)

    def is_in(self, *states: State) -> bool:
        return self.ownership.state in states

    def disconnect(self) -> None:
        """Close the lanes."""
        self.peer.close()
        self.ownership.link = Link.LOST

    def note_raised(self, raised: tuple[int, int]) -> None:
        """Note that the domain's limit of frames is about to be raised; see :class:`FrameLimit`.

        While the guest is restored, a sender determines how often this happens, and a successor
        destroys the domain.  The entry of the step that ends this has the last limit.
        """
        self.entry.raised = raised
        if self.ownership.needed:
            self.ownership.note()

    async def persist(self, call: Callable[[], object], what: str, what_to_do: str = "") -> None:
        """Make a call to the hypervisor in a thread until an attempt succeeds."""
        for pause_s in retries():
            try:
                await trio.to_thread.run_sync(call)
                return
            except XenError as error:
                self.progress.problem = f"{what} ({error}); trying again"
                if what_to_do:
                    self.progress.problem += f": {what_to_do}"
                log.error("%s: %s", self.name, self.progress.problem)
                await trio.sleep(pause_s)


def retries() -> Iterator[float]:
    return pauses(FIRST_START_AGAIN_S, LAST_START_AGAIN_S, growth=2)
