# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured of an incoming migration while it runs: what ``list`` shows of its progress, and
the samples of its record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from receiver.context import Context
from receiver.ownership import State
from receiver.progress import Faults, Meter
from receiver.recovery import Recovery


class Measurement:
    """``started``: by the monotonic clock; ``None`` for the migration of a predecessor.
    ``recovery``: returns ``None`` before there is a guest, and after the end.
    """

    def __init__(
        self, context: Context, started: float | None, recovery: Callable[[], Recovery | None]
    ):
        self._context = context
        self._meter = Meter(context.progress, started)
        self._recovery = recovery
        context.ownership.on_phase = self._enter
        self._enter(context.ownership.phase)

    def _enter(self, phase: str) -> None:
        self._meter.enter(time.monotonic(), time.time(), phase)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Return the keys of the progress whose values this receiver does not have."""
        return ("outstanding", "waiting") if self._context.ownership.inherited else ()

    @property
    def outstanding_in_words(self) -> str:
        """State in words what is outstanding."""
        if "outstanding" in self.unknown:
            return "its missing pages are not counted yet"
        return f"{self._context.progress.outstanding} pages missing"

    def count(self) -> None:
        """Update what ``list`` shows, also while no sender is connected."""
        context, recovery, now = self._context, self._recovery(), time.monotonic()
        latency, shown = context.statistics.latency, context.progress
        phase = context.ownership.phase
        faults = None
        if recovery is not None and recovery.switchover.serving.is_set():
            pager = recovery.switchover.pager
            report, shown.waiting = pager.report()
            shown.outstanding = report.outstanding
            faults = Faults(report.faults, report.latency_us, pager.longest_wait_us(now))
        elif shown.pages_done is not None or context.is_in(State.COMPLETED):
            median_us, longest_us = latency.quantile(0.5), latency.max_us
            faults = Faults(latency.count, round(median_us), round(longest_us))
        shown.io_fails_in_s = None if recovery is None else recovery.io_fails_in_s
        peer = context.peer
        self._meter.copying(now, phase, peer.bytes_pushed, is_busy=peer.is_busy)
        self._meter.measure(now, phase, peer.bytes_received, faults)

    def sample(self) -> None:
        """Add a sample to the record: one value for each of ``COLUMNS``."""
        context, recovery, still = self._context, self._recovery(), dict[int, float]()
        statistics = context.statistics
        outstanding = faults = waiting = None
        if recovery is not None and recovery.switchover.serving.is_set():
            pages = recovery.switchover.guest.pages
            with pages.pages.lock:
                still = pages.pages.waits_s(time.monotonic())
            outstanding, waiting = pages.count, pages.waiting
            faults = statistics.latency.count
        elif context.is_in(State.COMPLETED):
            outstanding, waiting = context.progress.outstanding, 0
            faults = statistics.latency.count
        values = (context.peer.bytes_received, outstanding, waiting, faults)
        context.record.samples.add(time.time(), values, statistics.waited_s(still))

    def sampling_pause_s(self) -> float:
        """The time from one sample to the next one."""
        return self._context.record.samples.pause_s

    def recorded(self) -> dict[str, Any]:
        """Return what was recorded so far.  Call this in a thread."""
        context, recovery = self._context, self._recovery()
        found = {**context.record.taken(), "latency_us": context.statistics.latencies()}
        if recovery is not None:
            found["origins"] = recovery.switchover.guest.pages.summary_of_origins()
        return found
