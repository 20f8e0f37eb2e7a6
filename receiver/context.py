# SPDX-License-Identifier: GPL-2.0-or-later
"""What every phase of an incoming migration works with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

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

FIRST_START_AGAIN_S = 0.1
LAST_START_AGAIN_S = 5.0
"""Each attempt to start or pause a guest waits twice as long as the one before it, up to this."""
NOT_HERE = "an operator has said that the guest is not to run here"


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
    """An operator's decision is being carried out, or the guest is being started."""

    @property
    def name(self) -> str:
        return self.progress.domain

    def is_in(self, *states: State) -> bool:
        return self.ownership.state in states

    def disconnect(self) -> None:
        """The lanes are lost."""
        self.peer.close()
        self.ownership.link = Link.LOST

    def note_raised(self, raised: tuple[int, int]) -> None:
        """The domain's limit of frames is about to be raised: see :class:`FrameLimit`."""
        self.entry.raised = raised
        self.ownership.note()

    async def persist(self, call: Callable[[], object], what: str, what_to_do: str = "") -> None:
        """Make a call to the hypervisor in a thread until an attempt succeeds."""
        for pause_s in retries():
            try:
                await trio.to_thread.run_sync(call)
                return
            except XenError as error:
                self.progress.problem = f"{what} ({error}), which is tried again and again"
                if what_to_do:
                    self.progress.problem += f": {what_to_do}"
                log.error("%s: %s", self.name, self.progress.problem)
                await trio.sleep(pause_s)


def retries() -> Iterator[float]:
    return pauses(FIRST_START_AGAIN_S, LAST_START_AGAIN_S, growth=2)
