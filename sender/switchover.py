# SPDX-License-Identifier: GPL-2.0-or-later
"""The switchover: the guest is suspended, the pages that it cannot run without are sent, and the
guest is handed over.

If a toolstack decides at which end the guest runs, the guest is entrusted to the toolstack first,
and is handed over when the toolstack has decided.
"""

from __future__ import annotations

import errno
import functools
import logging
import time

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import MigrationError, PeerClosedError
from migrate.lanes.connection import STEP_TIMEOUT_S
from migrate.protocol import messages as m
from migrate.protocol.pfns import from_bitmap, in_bitmap, pieces, union
from migrate.protocol.session import Phase
from migrate.tasks import task_group
from sender.backlog import Backlog
from sender.context import Context, Source
from sender.faults import FaultServer
from sender.ownership import State
from sender.precopy import Precopy, SwitchoverPlan
from sender.push import BATCH_PAGES, PushLane
from sender.source_pages import count_pages
from sender.toolstack import StaysHereError
from xenbackend.contract import DomainState
from xenbackend.errors import XenError
from xenbackend.pages import PfnArray

log = logging.getLogger(__name__)

LEAST_BATCH_PAGES, MOST_BATCHES = 256, 16
"""How the pages of the downtime are divided.  The destination loads a batch while the next one is
sent, and each batch costs both ends as much as the contents of a hundred pages.
"""
HOT_PAGES = 256
"""Frequently written pages that are sent during the downtime although the guest could fetch them
later.  On most links 1 MiB takes less than a millisecond, and each fault takes about half of one.
"""


class Switchover:
    """The switchover of one guest over one pair of lanes, whose faults ``faults`` serves."""

    def __init__(
        self,
        context: Context,
        source: Source,
        precopy: Precopy,
        push: PushLane,
        faults: FaultServer,
    ):
        self._context = context
        self._source = source
        self._precopy = precopy
        self._push = push
        self._faults = faults

    async def run(self, tasks: trio.Nursery, plan: SwitchoverPlan) -> None:
        """Return when the guest is handed over, or is entrusted to a toolstack, or is kept here.
        The task that follows the toolstack's decision is started in ``tasks``.
        """
        context = self._context
        context.backlog = Backlog(plan.deferred, plan.urgent)
        hand_over = functools.partial(self._hand_over, plan)
        try:
            await self._push.send_in_thread(hand_over, functools.partial(stay, context))
            await trio.lowlevel.checkpoint_if_cancelled()
        finally:
            if context.ownership.may_be_elsewhere:
                context.set_cap()
                tasks.start_soon(follow_decision, context, self._source)
                with trio.CancelScope(shield=True):
                    await context.toolstack.switched_over()
                stats = context.statistics
                about = "ready, %d pages in downtime, %d missing"
                log.info(about, stats.switchover_pages, stats.missing_pages)

    def _hand_over(self, plan: SwitchoverPlan) -> None:
        """Suspend the guest and hand it over.  One thread sends all of this, because a change of
        threads adds a tenth of a millisecond to the downtime.

        The time depends on what has changed since the last reading of the dirty log, and not on the
        size of the guest.  Nothing is sorted, because the guest may have written all of its memory.
        """
        context, domain, push = self._context, self._source.domain, self._push
        end_step = context.end_step
        self._suspend()
        push.send_blocking(m.Suspended())
        end_step("suspend the guest")
        written = self._source.dirty_log.read_last()
        plan.unsent |= written  # in place, because the kernel would have to map new memory
        changed, gone = push.send_holes(from_bitmap(plan.unsent, domain.nr_pfns))
        context.backlog.remove(gone[context.backlog.are_missing(gone)])
        now, new = self._choose(changed, written, plan)
        end_step("choose pages")
        if not self._send(now):
            return  # the guest is kept here: without its context the destination is not ready
        end_step("send pages")
        context.statistics.missing_pages = context.backlog.unsent
        for pfns in pieces(new[context.backlog.are_missing(new)], m.MAX_PFNS):
            push.send_blocking(m.Missing(pfns))
        end_step("announce missing pages")
        self._send_context()
        context.toolstack.before_decision(
            domain, lambda: changed[context.backlog.are_missing(changed)], self._source.dirty_log
        )
        end_step("send vCPUs and devices")
        if not context.signals.ready.wait(STEP_TIMEOUT_S):
            raise PeerClosedError(
                "the guest is suspended, and the destination was not ready within "
                f"{STEP_TIMEOUT_S:g} s"
            )
        context.entry.missing = context.statistics.missing_pages
        context.progress.pages_total = context.entry.missing
        context.count_down()
        end_step("wait until the destination is ready")
        self._pass_ownership()
        end_step("hand over")

    def _suspend(self) -> None:
        ownership, domain, stats = (
            self._context.ownership,
            self._source.domain,
            self._context.statistics,
        )
        if (state := domain.state()) is not DomainState.RUNNING:
            raise MigrationError(
                f"{self._context.name} is {state.value}, but not by this migration"
            )
        ownership.enter(State.SUSPENDING)
        stats.suspended = time.monotonic()
        self._context.record.begin_steps(stats.suspended)
        try:
            self._context.toolstack.suspend(domain)
        except XenError as error:
            if error.errno == errno.EINVAL:  # another program has suspended the domain
                ownership.enter(State.COPYING)
            if error.errno == errno.ETIMEDOUT:
                self._context.may_suspend_late()
            raise
        log.info("suspended")
        ownership.enter(State.SUSPENDED)

    def _choose(
        self, changed: PfnArray, written: NDArray[np.uint8], plan: SwitchoverPlan
    ) -> tuple[PfnArray, PfnArray]:
        """Return two lists of the changed pages: those to send during the downtime, and those that
        the destination was not asked to evict.
        """
        missing, domain = self._context.backlog, self._source.domain
        new = changed[~missing.are_missing(changed)]
        if not missing.unsent and self._precopy.sends_all(len(new)):
            return new, new
        hot = self._source.dirty_log.hottest(changed[in_bitmap(written, changed)], HOT_PAGES)
        now = union([plan.pinned, domain.pinned(changed), hot])
        missing.add(new)
        now = now[missing.are_missing(now)]
        missing.remove(now)
        return now, new

    def _send(self, pfns: PfnArray) -> bool:
        """Send these pages.  Returns whether the guest is still to be handed over.  The bandwidth
        cap does not apply, because the guest is suspended.
        """
        context = self._context

        def sent(_pfns: PfnArray, message: m.Pages) -> bool:
            context.statistics.switchover_pages += count_pages(message)
            return not context.ownership.is_kept

        self._push.send_all(pieces(pfns, batch_pages(len(pfns))), sent)
        return not context.ownership.is_kept

    def _send_context(self) -> None:
        """Send the state of the vCPUs and devices."""
        data = self._source.domain.context()
        for at in range(0, len(data), m.MAX_CONTEXT_CHUNK):
            chunk = data[at : at + m.MAX_CONTEXT_CHUNK]
            self._push.send_blocking(m.Context(chunk, at + len(chunk) == len(data)))

    def _pass_ownership(self) -> None:
        """Hand the guest over, unless it is kept here.  If the message does not arrive, it is sent
        again.
        """
        context = self._context
        if context.ownership.try_hand_over(context.toolstack.after_switchover):
            self._faults.open(context.backlog)
            self._push.send_blocking(last_of_switchover(context))


def batch_pages(pages: int) -> int:
    """Return the size of the batches in which so many pages are sent in the downtime."""
    batches = min(max(pages // LEAST_BATCH_PAGES, 1), MOST_BATCHES)
    return max(1, min(-(-pages // batches), BATCH_PAGES))


def stay(context: Context) -> bool:
    """Have the guest continue here.  Returns false if it is too late."""
    kept = context.ownership.try_keep()
    if kept:
        context.signals.ready.set()  # ends the wait for the destination
    return kept


def last_of_switchover(context: Context) -> m.Message:
    """Return the last message of the switchover.  It does not change if a toolstack has decided
    meanwhile, because the toolstack waits for the guest at the destination.
    """
    undecided = context.toolstack.after_switchover is State.UNDECIDED
    return m.Entrust() if undecided else m.Handover()


async def follow_decision(context: Context, source: Source) -> None:
    """Wait until the toolstack has decided, or the destination has reported what was decided.

    Raises :class:`StaysHereError` if the guest continues here.
    """
    handed_over = True
    if context.ownership.state is State.UNDECIDED:
        async with task_group() as tasks:

            async def end_after_resumed() -> None:
                await context.signals.resumed.wait()
                await context.toolstack.wait_for_end()
                tasks.cancel_scope.cancel()

            tasks.start_soon(end_after_resumed)
            handed_over = await context.toolstack.decision(source.domain)
            tasks.cancel_scope.cancel()
    if not handed_over:
        raise StaysHereError("xl resumed the guest at the source")
    if context.ownership.state is State.UNDECIDED:
        await trio.to_thread.run_sync(context.ownership.enter, State.HANDED_OVER)
    context.signals.handed_over.set()


async def hand_over_when_decided(context: Context, push: PushLane) -> None:
    await context.signals.handed_over.wait()
    if context.session.phase is Phase.DECISION:
        await push.send(m.Handover())
