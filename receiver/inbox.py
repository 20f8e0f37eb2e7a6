# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages of the push lane, which one thread carries out in the sender's order.

The thread itself puts pages in place.  The event loop does what starts or ends something.
"""

from __future__ import annotations

import functools

import trio

from migrate.errors import MigrationError, RemoteProtocolError
from migrate.lanes import scheduling
from migrate.outcomes import GAVE_UP
from migrate.protocol import messages as m
from migrate.protocol.pfns import pfns_of_window
from receiver.guest import Guest
from receiver.origins import Origin
from receiver.ownership import State
from receiver.restore import MemoryRestorer
from receiver.switchover import Switchover
from xenbackend.pages import PfnArray

WAIT_FOR_SENDER = "wait for the handover"
MAX_CONTEXT_BYTES = 64 * 1024 * 1024


class Restoring:
    """The guest before it runs: its memory, and the context that arrives in chunks."""

    def __init__(self, guest: Guest, memory: MemoryRestorer):
        self._guest = guest
        self._memory = memory
        self._context = bytearray()

    def take_pages(self, message: m.Pages, payload: memoryview, origin: Origin) -> None:
        self._memory.pages(message, payload)
        for pfns in (message.pfns, message.zeros, message.holes):
            self._guest.pages.remove(pfns)
        origins = self._guest.pages.origins
        for pfns in (message.pfns, message.zeros):
            origins.note(pfns, origin)
        origins.note(message.holes, Origin.NOTHING)

    def miss(self, pfns: PfnArray) -> None:
        """Evict these pages, which arrive after the handover."""
        self._memory.evict(pfns)
        self._guest.pages.add(pfns)

    def take_context(self, message: m.Context) -> bool:
        """Add a piece of the context.  Returns whether the guest can be started."""
        if len(self._context) + len(message.data) > MAX_CONTEXT_BYTES:
            raise RemoteProtocolError(f"context: more than {MAX_CONTEXT_BYTES} bytes")
        self._context += message.data
        if not message.last:
            return False
        self._guest.domain.set_context(bytes(self._context))
        self._context.clear()
        self._guest.limit.make_room(self._guest.pages.count)
        return True


class Inbox:
    """Receives the messages of one pair of lanes.  ``restoring`` is ``None`` on all pairs but the
    first.
    """

    def __init__(self, switchover: Switchover, restoring: Restoring | None):
        self._switchover = switchover
        self._peer = switchover.context.peer
        self._ownership = switchover.context.ownership
        self._restoring = restoring

    def receive(self) -> None:
        """Receive until the sender agrees that nothing is left to do.  Called in a thread."""
        while not self._switchover.settled:
            self._peer.is_busy = False
            message, payload = self._peer.receive_blocking()
            self._peer.is_busy = True
            if isinstance(message, m.Pages) and self._switchover.serving.is_set():
                self._switchover.pager.pushed(message, payload, self._peer.push.is_over)
            elif isinstance(message, m.Pages | m.Defer | m.Missing | m.Context):
                self._restore(message, payload)
            else:
                self._take(message)

    def _restore(
        self, message: m.Pages | m.Defer | m.Missing | m.Context, payload: memoryview
    ) -> None:
        if self._restoring is None:
            raise RemoteProtocolError(f"{message.type}: the guest was restored on earlier lanes")
        match message:
            case m.Pages():
                suspended = self._ownership.state is State.SUSPENDED
                origin = Origin.SWITCHOVER if suspended else Origin.PRECOPY
                self._restoring.take_pages(message, payload, origin)
            case m.Defer():
                self._restoring.miss(pfns_of_window(message.base, message.bitmap))
            case m.Missing():
                self._restoring.miss(message.pfns)
            case m.Context():
                self._take_context(self._restoring, message)

    def _take_context(self, restoring: Restoring, message: m.Context) -> None:
        context = self._switchover.context
        if message.last:
            context.end_step("receive pages and vCPUs")
        if not restoring.take_context(message):
            return
        context.end_step("restore vCPUs and devices")
        context.entry.missing = self._switchover.guest.pages.count
        context.progress.pages_total = context.entry.missing
        if not self._ownership.try_become_ready():
            raise MigrationError(self._ownership.taken_back)
        self._peer.send_blocking(m.Ready())
        context.end_step("note that the guest is ready")

    def _take(self, message: m.Message) -> None:
        match message:
            case m.Barrier():
                self._peer.send_blocking(m.Passed(message.number))
            case m.Suspended():
                scheduling.be_urgent()  # because the guest is suspended
                self._switchover.context.begin_steps()
                self._ownership.enter(State.SUSPENDED)
            case m.Entrust():
                self._entrusted()
                scheduling.be_bulk()
            case m.Handover():
                self._handed_over()
                scheduling.be_bulk()
            case m.Abort():
                raise MigrationError(f"{GAVE_UP}{message.reason}")
            case m.Kept() if self._switchover.checkpoints is not None:
                self._switchover.checkpoints.kept(message.problem)
            case m.Completed():
                self._switchover.settled = True

    def _entrusted(self) -> None:
        """Serve the guest's faults, because xl is about to decide whether the guest runs here.

        The tasks of the event loop start last, because xl and the suspended guest wait for the
        answer.
        """
        switchover = self._switchover
        switchover.context.end_step(WAIT_FOR_SENDER)
        switchover.context.toolstack.expect_entrust()
        if not switchover.serving.is_set():
            self._ownership.enter(State.SERVING)
            switchover.pager.begin()
        switchover.context.toolstack.restored(switchover.guest.domain)
        switchover.context.end_step("serve faults", is_last=True)  # the rest is xl's
        trio.from_thread.run_sync(switchover.serve)

    def _handed_over(self) -> None:
        runs, context = False, self._switchover.context
        context.end_step(WAIT_FOR_SENDER)

        def report() -> None:
            nonlocal runs
            runs = True
            self._peer.send_blocking(m.Resumed())
            context.end_step("start the guest", is_last=True)

        try:
            self._switchover.take_over(report)
        finally:
            if context.ownership.handed_over:
                taken_over = functools.partial(self._switchover.taken_over, started=runs)
                trio.from_thread.run_sync(taken_over)
