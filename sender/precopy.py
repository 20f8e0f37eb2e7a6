# SPDX-License-Identifier: GPL-2.0-or-later
"""Precopy: rounds over the pages that the guest has written, and early eviction of the pages that
will not be sent before the switchover.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import MigrationError
from migrate.lanes.connection import step_timeout
from migrate.lanes.latency import round_trip_s
from migrate.options import Strategy
from migrate.outcomes import CANCELLED
from migrate.protocol import messages as m
from migrate.protocol.pfns import NO_PFNS, PfnMask, bitmap_of, from_mask, union, windows
from sender.context import Context, Source
from sender.policy import Decision, PrecopyProgress
from sender.push import PushLane
from sender.round import Round
from sender.source_pages import device_memory, held, pinned
from xenbackend.pages import PAGE_SIZE, PfnArray

log = logging.getLogger(__name__)

MAX_DEFERRALS = 8
EVICT_PFNS = 2**13
"""The pfns that the destination is asked to evict at once.  Each time limit is for one request, and
a slow host that evicts page by page needs milliseconds for a page.
"""
MAX_EVICTIONS = 8
"""The most requests to evict that are under way, so that a round trip is not needed for each."""


@dataclass
class SwitchoverPlan:
    """What precopy leaves to the switchover."""

    deferred: PfnMask
    """The pages that the receiver was asked to evict."""
    unsent: NDArray[np.uint8]
    """All other unsent pages that are known, as a bitmap."""
    pinned: PfnArray
    """The pinned set, as far as it is known."""
    urgent: PfnArray
    """Deferred pages to push before all others, in this order: the memory of emulated devices, and
    what other programs have mapped at this host.
    """


def _counted(get: Callable[[], PfnMask]) -> tuple[PfnMask, int]:
    """Return a set and its size.  Called in a thread."""
    pages = get()
    return pages, int(np.count_nonzero(pages))


class Precopy:
    """The precopy of one guest over one push lane."""

    def __init__(self, context: Context, source: Source, push: PushLane):
        self._context = context
        self._domain = source.domain
        self._dirty_log = source.dirty_log
        self._push = push
        self._toolstack = context.toolstack
        self._progress = context.progress
        self._statistics = context.statistics
        self._bytes_per_s = self._fault_s = self._round_trip_s = 0.0
        self._began = self._elapsed_s = 0.0

    def sends_all(self, dirty: int) -> bool:
        """Whether ``dirty`` pages are to be sent before the handover, because no round follows.
        With a strategy that sends no pages after the handover, they have to be.
        """
        options = self._context.options
        if not options.strategy.pages_after_handover:
            return True
        rounds = options.policy.max_rounds
        return self._decide(rounds, True, dirty, dirty) is Decision.STOP_AND_COPY

    async def run(self) -> SwitchoverPlan:
        """Do the rounds and the early eviction.  Raises :class:`MigrationError` if the policy gives
        up.
        """
        dirty_log, domain = self._dirty_log, self._domain
        await trio.to_thread.run_sync(dirty_log.enable)
        await trio.to_thread.run_sync(self._toolstack.begin_copy, domain)
        to_send, remaining = await trio.to_thread.run_sync(_counted, dirty_log.memory)
        self._began = self._clock()
        decision = await self._send_rounds(to_send, remaining)
        if decision is Decision.CANCEL:
            limit = self._context.options.policy.limit
            raise MigrationError(
                f"{CANCELLED} after {self._elapsed_s:.1f} s of precopy, by {limit}"
            )
        if decision is Decision.STOP_AND_COPY:
            nothing = await trio.to_thread.run_sync(np.zeros_like, to_send)
            await self._put_off(nothing)  # waits until the receiver has loaded what was sent
            unsent = await trio.to_thread.run_sync(bitmap_of, to_send)
            return SwitchoverPlan(nothing, unsent, NO_PFNS, NO_PFNS)
        return await self._defer(to_send)

    async def _send_rounds(self, to_send: PfnMask, remaining: int) -> Decision:
        """Send rounds until the policy ends precopy.

        A pause ends the round that it interrupts.  That round is not judged and does not count:
        another one takes its place, over what is left and what was written meanwhile.
        """
        context, pause, stats = self._context, self._context.pause, self._statistics
        at_once = context.options.strategy is Strategy.POSTCOPY
        begun = self._decide(0, True, remaining, remaining) if at_once else Decision.CONTINUE
        decision = begun
        while decision is Decision.CONTINUE or pause.is_on:
            if pause.is_on:
                await pause.wait()
                remaining = await trio.to_thread.run_sync(self._read_after_round, to_send)
                decision = begun
                continue
            previous, began = remaining, time.monotonic()
            self._progress.round = stats.rounds + 1
            self._progress.pages_done, self._progress.pages_total = 0, remaining
            decision, is_whole = await self._send_round(to_send, remaining)
            remaining = await trio.to_thread.run_sync(self._read_after_round, to_send)
            if not is_whole:
                continue
            stats.rounds += 1
            if decision is Decision.CONTINUE:
                # Otherwise the rest of the round is among the remaining pages.
                seconds = max(time.monotonic() - began, 1e-6)
                self._progress.dirty_bytes_per_s = round(remaining * PAGE_SIZE / seconds)
                self._note_time()
                decision = self._decide(stats.rounds, True, remaining, previous)
            self._log_round(remaining, decision)
        context.rounds_are_over = True
        return decision

    def _log_round(self, remaining: int, decision: Decision) -> None:
        number, expected = self._statistics.rounds, self._statistics.expected
        log.info("round %d done, %d pages dirty, %s", number, remaining, decision.value)
        if expected is not None:
            log.info(
                "%d pages left: stop-and-copy would freeze the guest for %.1f ms, postcopy for "
                "%.1f ms",
                expected.dirty_pages,
                expected.stop_and_copy_ms,
                expected.postcopy_ms,
            )

    def _read_after_round(self, to_send: PfnMask) -> int:
        to_send |= self._dirty_log.read()
        return int(np.count_nonzero(to_send))

    async def _send_round(self, to_send: PfnMask, total: int) -> tuple[Decision, bool]:
        """Send the set, and remove from it the pages that were sent, until the set is empty, the
        policy decides otherwise, or copying is paused.  Returns the decision, and whether no pause
        has interrupted the round.
        """
        decision, is_whole = Decision.CONTINUE, True

        def continues(left: int) -> bool:
            nonlocal decision, is_whole
            is_whole = is_whole and not self._context.pause.is_on
            self._note_time()
            decision = self._decide(self._statistics.rounds + 1, False, left, total)
            return is_whole and decision is Decision.CONTINUE

        one = Round(self._context, self._push, to_send, total, continues)
        await self._push.send_in_thread(one.send, one.stop)
        self._bytes_per_s = one.bytes_per_s or self._bytes_per_s
        self._fault_s = one.page_alone_s or self._fault_s
        self._round_trip_s = round_trip_s(self._push.connection.fileno())
        return decision if is_whole else Decision.CONTINUE, is_whole

    def _note_time(self) -> None:
        """Note how long precopy has taken, without pauses."""
        self._elapsed_s = self._clock() - self._began

    def _clock(self) -> float:
        """Return the time, without the pauses so far."""
        now = time.monotonic()
        return now - self._context.pause.seconds(now)

    def _decide(self, round_number: int, finished: bool, dirty: int, previous: int) -> Decision:
        progress = PrecopyProgress(
            round_number,
            finished,
            dirty,
            previous,
            self._bytes_per_s,
            self._fault_s,
            self._round_trip_s,
            postcopy_asked=self._context.postcopy_asked,
            elapsed_s=self._elapsed_s,
        )
        decision = self._context.policy.decide(progress)
        if finished and progress.bytes_per_s:
            self._statistics.expected = progress
        return decision

    async def _defer(self, unsent: PfnMask) -> SwitchoverPlan:
        """Have the receiver evict the pages that will not be sent before the handover.  This is
        done while the guest still runs, and not in its downtime.

        The guest writes more pages during each pass.  The pass is therefore repeated with those
        pages, for as long as fewer pages remain to be evicted or read.  If the guest writes all of
        its memory, only one long pass is made.

        Every step over a set runs in a thread: for a large guest, a step takes a second.
        """
        domain = self._domain
        deferred, kept_back = [
            await trio.to_thread.run_sync(np.zeros_like, unsent) for _ in range(2)
        ]
        # In a thread, because the search for the pinned set may read every page.
        pinned_pfns = await trio.to_thread.run_sync(pinned, domain)
        device_pfns = held_pfns = NO_PFNS
        first = True

        def keep_back() -> PfnMask:
            """Return the pages that the receiver has to evict in this pass."""
            nonlocal pinned_pfns, device_pfns, held_pfns
            unsent[gone] = deferred[gone] = False
            if not first:
                pinned_pfns = union([pinned_pfns, domain.pinned(from_mask(unsent))])
            kept_back[pinned_pfns] |= unsent[pinned_pfns]
            unsent[pinned_pfns] = False
            device_pfns = union([device_pfns, device_memory(domain, unsent)])
            held_pfns = union([held_pfns, held(domain, unsent)])
            self._toolstack.hold(domain, unsent)
            others: PfnMask = unsent & ~deferred
            np.logical_or(deferred, unsent, out=deferred)
            return others

        _, to_look_at = await trio.to_thread.run_sync(_counted, lambda: unsent)
        to_evict = to_look_at
        for _number in range(MAX_DEFERRALS):
            gone = await self._push.report_holes(await trio.to_thread.run_sync(from_mask, unsent))
            await self._put_off(await trio.to_thread.run_sync(keep_back))
            first, looked_at, evicted = False, to_look_at, to_evict
            unsent, to_look_at, to_evict = await trio.to_thread.run_sync(self._written, deferred)
            log.info(
                "%d pages put off, %d written meanwhile, %d of them others",
                evicted,
                to_look_at,
                to_evict,
            )
            no_less = to_look_at >= looked_at * 0.9 and to_evict >= evicted * 0.9
            if no_less or to_look_at <= self._context.options.policy.dirty_threshold:
                break
        return SwitchoverPlan(
            deferred,
            await trio.to_thread.run_sync(lambda: bitmap_of(kept_back | unsent)),
            pinned_pfns,
            await trio.to_thread.run_sync(lambda: np.concatenate([device_pfns, held_pfns])),
        )

    def _written(self, deferred: PfnMask) -> tuple[PfnMask, int, int]:
        """Return the written pages, their number, and the number of them to be evicted."""
        written, count = _counted(self._dirty_log.read)
        return written, count, int(np.count_nonzero(written & ~deferred))

    async def _put_off(self, unsent: PfnMask) -> None:
        """Have the receiver evict pages.  The time limit is for each window, because the pages of a
        large guest take minutes if they are evicted one by one.
        """
        complaint = "the destination did not load what it was sent"
        under_way = deque([(await self._barrier(), complaint)])
        for base, bitmap in windows(unsent, EVICT_PFNS):
            await self._push.send(m.Defer(base, bitmap))
            complaint = f"the destination did not evict the unsent pages from pfn {base:#x} on"
            under_way.append((await self._barrier(), complaint))
            if len(under_way) > MAX_EVICTIONS:
                await self._wait_until_passed(*under_way.popleft())
        for barrier, complaint in under_way:
            await self._wait_until_passed(barrier, complaint)

    async def _barrier(self) -> trio.Event:
        passed, token = trio.Event(), trio.lowlevel.current_trio_token()
        number = self._context.barriers.add(lambda _now: token.run_sync_soon(passed.set))
        await self._push.send(m.Barrier(number))
        return passed

    async def _wait_until_passed(self, barrier: trio.Event, complaint: str) -> None:
        with step_timeout(complaint):
            await barrier.wait()
