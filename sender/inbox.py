# SPDX-License-Identifier: GPL-2.0-or-later
"""What the destination sends on the push lane, received in a thread of its own."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, NoReturn

import trio

from migrate.errors import GuestEndedError, MigrationError, RemoteProtocolError
from migrate.lanes import scheduling
from migrate.lanes.scheduling import run_in_thread
from migrate.outcomes import CANNOT_CONTINUE, GIVEN_UP
from migrate.protocol import messages as m
from sender.checkpoints import CheckpointStore
from sender.context import Context, Source
from sender.ownership import State
from sender.push import PushLane
from sender.statistics import from_peer
from sender.toolstack import StaysHereError
from xenbackend.errors import XenError

log = logging.getLogger(__name__)


class Inbox:
    """Receives the messages of one push lane."""

    def __init__(self, context: Context, source: Source, push: PushLane):
        self._context = context
        self._source = source
        self._push = push

    async def receive(self) -> None:
        """Receive until the destination reports that nothing is missing.  Raises as
        :func:`raise_end` does.
        """
        # The thread is urgent until ``ready``, because the guest is suspended until that arrives.
        stop = self._push.connection.stop_receiving
        later = self._context.ownership.may_be_elsewhere
        schedule = scheduling.reset if later else scheduling.be_urgent
        await run_in_thread(self._receive, stop, schedule)

    def _receive(self) -> None:
        context = self._context
        while not context.signals.complete.is_set():
            message, payload = self._push.receive_blocking()
            match message:
                case m.Passed():
                    context.barriers.passed(message.number, time.monotonic())
                case m.Ready():
                    context.signals.ready.set()
                    scheduling.reset()
                case m.Resumed() if not context.signals.resumed.is_set():
                    self._resumed()
                case m.Loaded():
                    context.backlog.loaded(message.pfns)
                    self._release(message)
                case m.Dropped():
                    context.backlog.dropped(message.pfns)
                    self._release(message)
                case m.Written() | m.Checkpoint() if self._source.checkpoints is not None:
                    self._take_checkpoint(self._source.checkpoints, message, payload)
                case m.Unprotected():
                    unprotected(context, message.reason)
                case m.Report():
                    context.progress.faults = message.faults
                    context.progress.latency_us = message.latency_us
                case m.Waits():
                    context.progress.longest_wait_us = message.longest_us
                case m.Complete():
                    trio.from_thread.run_sync(completed, context, message)
                case m.Ended() | m.Failed():
                    raise_end(context, message)

    def _resumed(self) -> None:
        context, stats = self._context, self._context.statistics
        stats.resumed = time.monotonic()
        context.record.end_step("start at the destination", stats.resumed, is_last=True)
        if stats.suspended:
            about = "%s runs at the destination, after %.1f ms of downtime"
            log.info(about, context.name, stats.downtime_s * 1000)
        context.entry.ran = True
        if context.ownership.state is not State.UNDECIDED:
            context.ownership.note()  # a successor shows this to its operator
        trio.from_thread.run_sync(context.signals.resumed.set)

    def _release(self, message: m.Loaded | m.Dropped) -> None:
        self._source.domain.release(message.pfns)
        self._context.count_down()

    def _take_checkpoint(
        self,
        checkpoints: CheckpointStore,
        message: m.Written | m.Checkpoint,
        payload: memoryview,
    ) -> None:
        problem = ""
        try:
            if not checkpoints.add(message, payload):
                return
            self._context.progress.checkpoints += 1
            self._context.progress.checkpoint_at = time.monotonic()
        except RemoteProtocolError:
            raise
        except (MigrationError, XenError, OSError) as error:
            problem = m.printable(str(error))
            unprotected(self._context, problem)
        self._push.send_blocking(m.Kept(problem))


def unprotected(context: Context, problem: str) -> None:
    """Note that no further checkpoints are kept.  The last one stays valid."""
    if not context.progress.unprotected:
        log.error("%s is not protected any more: %s", context.name, problem)
        context.progress.unprotected = problem


def completed(context: Context, message: m.Complete) -> None:
    """Note that nothing is missing at the destination.  Called in the event loop.

    Raises ``RemoteProtocolError`` if pages were never confirmed (invariant 8: success is reported
    only when it is so).  The destination is then asked anew what it lacks.
    """
    if missing := context.backlog.unacknowledged:
        raise RemoteProtocolError(f"complete, but {missing} pages were never confirmed")
    context.receiver_statistics = receiver_statistics(message.statistics)
    context.signals.resumed.set()
    context.signals.complete.set()
    context.cap.wake()  # the push ends, and does not wait until it may send again


def raise_end(context: Context, message: m.Ended | m.Failed) -> NoReturn:
    """Raise the error for a destination that sends nothing more, and waits for nothing.

    Raises :class:`StaysHereError` if the guest never ran there, :class:`GuestEndedError` if the
    guest has ended there, and :class:`MigrationError` otherwise.
    """
    context.entry.ended_there = True
    if isinstance(message, m.Failed):
        raise MigrationError(f"{CANNOT_CONTINUE}{message.reason}")
    if not context.ownership.handed_over and not message.ran:
        raise StaysHereError(f"{GIVEN_UP}{message.reason}")
    raise GuestEndedError(f"the guest ended at the destination: {message.reason}")


def receiver_statistics(data: bytes) -> dict[str, Any]:
    """Return the destination's counters, which are shown only."""
    try:
        return from_peer(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"complete: statistics are not JSON: {error}") from error
