# SPDX-License-Identifier: GPL-2.0-or-later
"""What vCPUs are going to touch, guessed from the pages that they asked for.  Sans-IO.

A fault is the only access that a pager sees, and where the guess was right there is no fault.  So a
*stream* is not recognised by the steps between its faults, but by the place of its next fault:
behind the window that was fetched ahead of the last one.  With each fault there the window doubles,
as a file system's read-ahead does.

Two faults next to each other begin a stream, and so do three at equal distances, forwards or
backwards.  A fault that is next to no other fetches nothing more: where vCPUs touch pages at
random, the pages that are fetched besides only delay them.  (Leap, Al Maruf and Chowdhury, ATC
2020, takes the majority of the last steps.  To tell streams apart by their place works for any
number of interleaved streams, of any vCPU.)

Only missing pages count: a page is next to another when the pages between them are there, and a
window has as many missing pages where most pages are there already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from migrate.protocol.pfns import NO_PFNS, union
from xenbackend.pages import PfnArray

FIRST_WINDOW = 4
MAX_WINDOW = 64
"""Pages.  Pages on their way ahead of a page that a vCPU waits for delay that page; 256 gained
nothing, with longer waits.
"""
NEAR = 8
"""pfns from a fault to one next to it, at most."""
SPAN = 8
"""Windows are looked for in so many times as many pfns."""
MAX_STREAMS = 16
MAX_LONELY = 16

Missing = Callable[[int, int, int], PfnArray]
"""The pfns that are still to be fetched among first, first + step, ... before stop; ascending."""


@dataclass
class _Stream:
    first: int
    """Where its last window began."""
    next: int
    """Where it is going on."""
    step: int
    window: int

    def is_met_by(self, pfn: int, missing: Missing) -> bool:
        """True for a fault in the last window, which is on its way, and for the next missing page
        behind the window.
        """
        reach = self.next + self.window * SPAN * self.step
        inside = self.first <= pfn < reach if self.step > 0 else reach < pfn <= self.first
        if not inside or (pfn - self.first) % self.step:
            return False
        return (self.next - pfn) * self.step >= 0 or not len(missing(self.next, pfn, self.step))


class ReadAhead:
    def __init__(self, nr_pfns: int, missing: Missing):
        self._nr_pfns = nr_pfns
        self._missing = missing
        self._streams: list[_Stream] = []
        """The one that was met last is last."""
        self._lonely: deque[int] = deque(maxlen=MAX_LONELY)
        """Faults that met no stream."""

    def after(self, pfn: int) -> PfnArray:
        """A vCPU has asked for this page: what to fetch that nobody has asked for."""
        for stream in reversed(self._streams):
            if stream.is_met_by(pfn, self._missing):
                self._streams.remove(stream)
                stream.window = min(stream.window * 2, MAX_WINDOW)
                if (pfn - stream.next) * stream.step >= 0:
                    stream.next = pfn + stream.step
                return self._go_on(stream)
        step = self._step_to(pfn)
        self._lonely.append(pfn)
        return self._go_on(_Stream(pfn, pfn + step, step, FIRST_WINDOW)) if step else NO_PFNS

    def _step_to(self, pfn: int) -> int:
        """From the fault before, where this one goes on from it; otherwise 0."""
        for other in reversed(self._lonely):
            step = pfn - other
            if step and pfn - 2 * step in self._lonely:
                return step
            if 0 < abs(step) <= NEAR:
                step = 1 if step > 0 else -1
                if not len(self._missing(other + step, pfn, step)):
                    return step
        return 0

    def _go_on(self, stream: _Stream) -> PfnArray:
        self._streams.append(stream)
        del self._streams[:-MAX_STREAMS]
        first, step = stream.next, stream.step
        stop = min(max(first + stream.window * SPAN * step, -1), self._nr_pfns)
        if not 0 <= first < self._nr_pfns:
            return NO_PFNS
        pfns = self._missing(first, stop, step)
        if len(pfns) > stream.window:
            pfns = pfns[: stream.window] if step > 0 else pfns[-stream.window :]
        if len(pfns):
            last = int(pfns[-1] if step > 0 else pfns[0])
            stream.first, stream.next = first, last + step
        return pfns


def merged(windows: list[PfnArray], most: int) -> PfnArray:
    """Of several faults at once."""
    windows = [window for window in windows if len(window)]
    if not windows:
        return NO_PFNS
    return (union(windows) if len(windows) > 1 else windows[0])[:most]
