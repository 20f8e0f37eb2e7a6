# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of the steps of one outgoing migration, from the first connection on.

:meth:`Transfer.run` has the whole, and :meth:`Transfer._use_pair` the steps over one pair of lanes.
The other modules in the order of their use:

    preflight.py          the domain is free, and the destination accepts the guest
    precopy.py            rounds over what the guest writes, while the guest runs here
    switchover.py         the guest is suspended, and is handed over
    inbox.py              what the destination sends
    faults.py, push.py    the pages that the destination lacks
    recovery.py           the lanes are lost, or the sender was restarted
    rollback.py           an error: the guest stays here, or its pages are kept
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time

import trio

from migrate.errors import CleanEndError, MigrationError, PeerClosedError
from migrate.lanes.connection import EXPLANATION_S, step_timeout
from migrate.protocol import messages as m
from migrate.tasks import first, in_thread, is_final, task_group
from sender.context import Context, Source
from sender.dirty import limit_of
from sender.faults import FaultServer
from sender.inbox import Inbox
from sender.ownership import DECIDED, Restart, State
from sender.pace import SLOW_PACE_PAGES, SlowPace
from sender.precopy import Precopy
from sender.preflight import agree
from sender.push import BATCH_PAGES, Announce, PushLane, Sent
from sender.recovery import Recovery
from sender.rollback import Rollback, error_of_decision
from sender.source_pages import announce_missing, count_pages
from sender.switchover import Switchover, follow_decision, hand_over_when_decided
from xenbackend.pages import PAGE_SIZE, PfnArray

log = logging.getLogger(__name__)


class Transfer:
    """The steps of one outgoing migration, from the first connection on."""

    def __init__(
        self,
        context: Context,
        source: Source,
        recovery: Recovery,
        rollback: Rollback,
    ):
        self._context = context
        self._ownership = context.ownership
        self._source = source
        self._recovery = recovery
        self._rollback = rollback

    async def run(self) -> None:
        push = await agree(self._context, self._source)
        async with task_group() as tasks:  # tasks that do not end with the lanes
            await self._use_lanes(tasks, push)
            tasks.cancel_scope.cancel()
        await self._finish()

    async def continue_predecessor(self) -> None:
        """Continue the migration of a sender that was killed, from the last entry in its journal.

        Raises the error for which the migration ends; :meth:`Rollback.settle` does what follows.
        """
        if self._ownership.state in DECIDED:
            raise error_of_decision(self._ownership.state)
        match self._ownership.row.restart:
            case Restart.TAKE_BACK:
                raise MigrationError("the sender was ended in the middle of this migration")
            case Restart.REJOIN | Restart.FOLLOW_TOOLSTACK:
                async with task_group() as tasks:
                    tasks.start_soon(follow_decision, self._context, self._source)
                    push = await self._recovery.resume_predecessor()
                    await self._use_lanes(tasks, push)
                    tasks.cancel_scope.cancel()
        await self._finish()

    async def _use_lanes(self, tasks: trio.Nursery, push: PushLane) -> None:
        """Use one pair of lanes after the other, until nothing is missing at the destination."""
        while True:
            try:
                await self._use_pair(tasks, push)
                return
            except Exception as error:
                if self._ownership.state is State.COMPLETING:
                    log.info("%s: the lanes ended with: %s", self._context.name, error)
                    self._context.last_message = m.Completed()  # the first one may be lost
                    return
                if not self._ownership.may_be_elsewhere or is_final(error):
                    raise
                if await self._recovery.pages_are_lost():
                    raise
                push = await self._recovery.rejoin(error)

    async def _use_pair(self, tasks: trio.Nursery, push: PushLane) -> None:
        context = self._context
        async with task_group() as lane_tasks:
            for connection in context.connections():
                lane_tasks.start_soon(connection.keep_alive, context.guest_waits)
            lane_tasks.start_soon(Inbox(context, self._source, push).receive)
            if context.pull is not None:
                # The fault server is started before the switchover.  A guest that has just been
                # started at the destination faults at once, and a thread takes milliseconds to
                # start.
                faults = FaultServer(
                    self._source.domain,
                    context.pull,
                    context.session,
                    context.statistics,
                    context.cap,
                    context.pause,
                )
                lane_tasks.start_soon(_serve, faults)
                if self._ownership.may_be_elsewhere:
                    faults.open(context.backlog)
                else:
                    await self._move(tasks, push, faults)
            await self._feed(lane_tasks, push)
            await self._complete(push)
            lane_tasks.cancel_scope.cancel()

    async def _move(self, tasks: trio.Nursery, push: PushLane, faults: FaultServer) -> None:
        """Do precopy and the switchover."""
        context, source = self._context, self._source
        limit = await trio.to_thread.run_sync(limit_of, source.domain)
        source.dirty_log.max_pages = context.entry.max_pages = limit
        await trio.to_thread.run_sync(self._ownership.enter, State.COPYING)
        precopy = Precopy(context, source, push)
        plan = await precopy.run()
        await Switchover(context, source, precopy, push, faults).run(tasks, plan)

    async def _feed(self, lane_tasks: trio.Nursery, push: PushLane) -> None:
        """Push what the destination lacks."""
        context = self._context
        complete = context.signals.complete
        lane_tasks.start_soon(hand_over_when_decided, context, push)

        def sent(_pfns: PfnArray, message: m.Pages) -> bool:
            context.statistics.push_pages += count_pages(message)
            context.statistics.push_bytes += len(message.pfns) * PAGE_SIZE
            return True

        def stops() -> bool:
            return context.pause.is_on or complete.is_set()

        announce = functools.partial(announce_missing, backlog=context.backlog)
        if self._ownership.state is State.UNDECIDED and context.backlog.unsent:
            await self._feed_undecided(push, sent, announce)
        await self._decided()
        while context.backlog.unsent and not complete.is_set():
            await first(context.pause.wait, complete.wait)
            batches = context.backlog.batches(BATCH_PAGES)
            await push.send_batches(batches, sent, announce, stops)
        if self._ownership.state is State.HANDED_OVER:
            await in_thread(self._ownership.enter, State.ALL_SENT)

    async def _feed_undecided(self, push: PushLane, sent: Sent, announce: Announce) -> None:
        """Push slowly until the toolstack has decided: it needs the CPU to finish its work, and the
        guest will need the pages.
        """
        backlog = self._context.backlog
        pace = SlowPace(lambda: backlog.in_transit, lambda: backlog.has_first)

        async def end_when_decided() -> None:
            await self._decided()
            pace.over.set()
            self._context.cap.wake()

        async with task_group() as tasks:
            tasks.start_soon(end_when_decided)
            await push.send_batches(
                backlog.batches(SLOW_PACE_PAGES),
                lambda pfns, message: sent(pfns, message) and pace.continues(),
                announce,
                stop=pace.over,
            )

    async def _decided(self) -> None:
        """Wait until the destination has reported that the guest runs (``resumed``, set in
        ``inbox.py``), or until the guest was handed over (set by :func:`follow_decision`).  The
        latter ends the wait also for a guest that xl leaves paused (``xl migrate -p``).
        """
        signals = self._context.signals
        await first(signals.resumed.wait, signals.handed_over.wait)

    async def _complete(self, push: PushLane) -> None:
        context = self._context
        await context.signals.complete.wait()
        # From here on the receiver may forget the session.
        await in_thread(self._ownership.enter, State.COMPLETING)
        if push.connection.is_over():
            raise PeerClosedError("the connection was lost before `completed` was sent")
        await push.send(m.Completed())
        # The receiver closes the connection when it has given its ring up.  If the connection ends
        # otherwise, ``completed`` may have been lost in transit.
        is_open = step_timeout("the destination did not close the connection")
        with contextlib.suppress(CleanEndError), is_open:
            while True:
                await push.connection.receive()

    async def _finish(self) -> None:
        self._context.statistics.finished = time.monotonic()
        await self._rollback.destroy_source()
        self._context.progress.problem = ""
        await in_thread(self._rollback.forget, State.COMPLETED)
        log.info("%s completed", self._context.name)


async def _serve(faults: FaultServer) -> None:
    try:
        await faults.serve()
    except PeerClosedError:
        await trio.sleep(EXPLANATION_S)  # the push lane may have the reason
        raise
