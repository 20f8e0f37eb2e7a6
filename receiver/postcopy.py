# SPDX-License-Identifier: GPL-2.0-or-later
"""From the guest's first fault to the end of the paging ring.

The functions run once for each pair of lanes, except :func:`finish`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable

import trio

from migrate.errors import PeerClosedError
from migrate.lanes.connection import EXPLANATION_S
from migrate.protocol import messages as m
from migrate.service.journal import remove
from migrate.tasks import first, in_thread
from receiver.checkpoints import Checkpoints, mark
from receiver.context import LAST_START_AGAIN_S, Context
from receiver.ownership import State
from receiver.statistics import PagerStatistics
from receiver.switchover import LOOK_AGAIN_EVERY_S, Switchover
from xenbackend.contract import DomainState
from xenbackend.errors import NoSuchDomainError, XenError

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.25
NO_MEMORY = (
    "this host has no memory for pages that have arrived, and vCPUs wait for them: "
    "make room on this host"
)


async def serve_faults(switchover: Switchover) -> None:
    try:
        await switchover.pager.serve(switchover.context.peer.pull)
    except PeerClosedError:
        await trio.sleep(EXPLANATION_S)  # the push lane may have the reason
        raise


async def report(switchover: Switchover) -> None:
    """Report to the sender what was loaded, and the progress, until nothing is missing."""
    context, pager = switchover.context, switchover.pager
    await switchover.serving.wait()
    while True:
        if not pager.acknowledged:
            await trio.to_thread.run_sync(pager.acknowledge)
        if pager.nothing_outstanding.is_set():
            return
        now, context.progress.waiting = pager.report()
        context.progress.outstanding = now.outstanding
        if pager.short_of_memory or context.progress.problem == NO_MEMORY:
            context.progress.problem = NO_MEMORY if pager.short_of_memory else ""
        await context.peer.send(now)
        if pager.nothing_outstanding.is_set():
            continue  # ``complete`` may have been sent meanwhile, and nothing may follow it
        if m.WAITS in context.peer.push.capabilities:
            await context.peer.send(m.Waits(pager.longest_wait_us(time.monotonic())))
        with trio.move_on_after(REPORT_EVERY_S):
            await pager.nothing_outstanding.wait()


async def complete(switchover: Switchover) -> None:
    """Send ``resumed`` when the guest runs, unless the thread that started it has sent it, and
    ``complete`` when all pages have arrived.

    A toolstack may leave the guest paused for any time.  Its memory arrives nevertheless.
    """
    context = switchover.context
    peer, runs = context.peer, switchover.runs
    await switchover.serving.wait()

    async def all_is_here() -> None:
        await switchover.pager.nothing_outstanding.wait()
        await switchover.handed_over.wait()

    if context.toolstack.completes_paused(peer.push.capabilities):
        await first(runs.wait, all_is_here)
        state = await trio.to_thread.run_sync(switchover.guest.state)
        if state not in (None, DomainState.INCOMING):
            runs.set()
    else:
        await runs.wait()
    if runs.is_set() and not peer.session.resumed:
        await peer.send(m.Resumed())
    await all_is_here()
    while switchover.lacked:
        await trio.sleep(LOOK_AGAIN_EVERY_S)
    if context.is_in(State.OWNS):
        context.ownership.enter(State.COMPLETING)
    if switchover.checkpoints is not None:
        await switchover.checkpoints.end()
    await trio.to_thread.run_sync(switchover.pager.acknowledge)
    await peer.send(complete_message(context.statistics))


def complete_message(statistics: PagerStatistics) -> m.Message:
    return m.Complete(json.dumps(statistics.summary()).encode())


async def send_checkpoints(switchover: Switchover) -> None:
    """Send checkpoints.  When no further ones can be made, send the reason."""
    peer, progress = switchover.context.peer, switchover.context.progress
    await switchover.handed_over.wait()
    checkpoints = switchover.checkpoints
    if checkpoints is not None and not progress.unprotected:
        await checkpoints.run(peer.push.shut)
    if progress.unprotected and m.UNPROTECTED in peer.push.capabilities:
        await peer.send(m.Unprotected(m.printable(progress.unprotected)))


async def finish(switchover: Switchover) -> m.Message | None:
    """Give the ring up.  Returns the message that the sender must still receive before it releases
    the guest's pages.
    """
    context, guest = switchover.context, switchover.guest
    entry = context.entry
    await in_thread(context.ownership.enter, State.FINISHING)
    if switchover.checkpoints is not None:
        resume = functools.partial(in_thread, switchover.checkpoints.resume_if_suspended)
        await _repeat(context, resume, "the guest cannot be resumed after its last checkpoint")
    await in_thread(_note_stop, context)
    await _repeat(context, switchover.pager.finish, "the ring cannot be given up")
    if switchover.checkpoints is not None:
        resume = functools.partial(_resume_late, context, switchover.checkpoints)
        await _repeat(context, resume, "the guest cannot be resumed after a failed checkpoint")
    await in_thread(remove, entry.stopped)
    with contextlib.suppress(NoSuchDomainError):
        await in_thread(guest.domain.reserve, 0)
        if switchover.checkpoints is not None:
            await in_thread(switchover.checkpoints.stop)
        await in_thread(guest.limit.give_back)
    if switchover.settled:
        await in_thread(entry.erase)
    context.progress.outstanding = context.progress.waiting = 0
    context.ownership.enter(State.COMPLETED)
    await in_thread(context.holdings.release)
    log.info("%s completed", context.name)
    return None if switchover.settled else complete_message(context.statistics)


async def _resume_late(context: Context, checkpoints: Checkpoints) -> None:
    """Wait for as long as the guest may suspend for a failed checkpoint, and resume it."""
    while checkpoints.may_suspend_late:
        context.progress.problem = (
            "all memory has arrived; the guest runs, but may still suspend for a failed "
            "checkpoint, and is then resumed"
        )
        await in_thread(checkpoints.resume_if_suspended)
        await trio.sleep(LOOK_AGAIN_EVERY_S)


async def _repeat(context: Context, step: Callable[[], Awaitable[object]], problem: str) -> None:
    """Do a step until it succeeds, or until the guest has ended."""
    while True:
        try:
            await step()
            break
        except NoSuchDomainError:
            break
        except XenError as error:
            context.progress.problem = (
                f"all memory has arrived, but {problem}: {error}; trying again"
            )
            log.error("%s: %s", context.name, context.progress.problem)
            await trio.sleep(LAST_START_AGAIN_S)
    context.progress.problem = ""


def _note_stop(context: Context) -> None:
    with contextlib.suppress(XenError):  # the ring must be given up even without the note
        mark(context.entry.stopped)
