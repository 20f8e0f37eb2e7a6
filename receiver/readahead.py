# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that vCPUs will probably touch next, guessed from the pages that they requested.
Sans-IO.

A pager sees only faults.  If a guess was right, there is no fault.  So a *stream* is not recognised
by the steps between its faults, but by the place of its next fault: behind the window that was
fetched after the fault before.  With each fault there the window doubles, as in the read-ahead of a
file system.

Two faults next to each other begin a stream, and so do three at equal distances, forwards or
backwards.  A fault that is not next to another one fetches nothing more.  If vCPUs touch pages at
random, additional pages would only delay them.  (Leap, Al Maruf and Chowdhury, ATC 2020, takes the
majority of the last steps.  To distinguish streams by their place works for any number of
interleaved streams, of any vCPU.)

Only missing pages count.  Two pages are next to each other if the pages between them are present.
A window has the same number of missing pages even if most pages around it are present.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from migrate.protocol.pfns import NO_PFNS, union
from xenbackend.pages import PfnArray

FIRST_WINDOW = 4
MAX_WINDOW = 64
"""The most pages of a window.  Pages that are in transit before a page for which a vCPU waits delay
that page.  A window of 256 pages gained nothing, and made the waits longer.
"""
NEAR = 8
"""The most pfns between two faults that are next to each other."""
SPAN = 8
"""A window of n pages is searched for in SPAN * n pfns."""
MAX_STREAMS = 16
MAX_SINGLE_FAULTS = 16

Missing = Callable[[int, int, int], PfnArray]
"""Returns the pfns among first, first + step, ... before stop that are to be fetched; ascending."""


@dataclass
class _Stream:
    first: int
    """The pfn at which the last window began."""
    next: int
    """The pfn at which the stream continues."""
    step: int
    window: int

    def is_continued_by(self, pfn: int, missing: Missing) -> bool:
        """Whether a fault continues the stream: a fault in the last window, which is in transit, or
        at the next missing page behind the window.
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
        """The streams; the one that continued last is last."""
        self._single_faults: deque[int] = deque(maxlen=MAX_SINGLE_FAULTS)
        """The last faults that continued no stream."""

    def after(self, pfn: int) -> PfnArray:
        """Return the pages to fetch ahead after a vCPU has requested this page."""
        for stream in reversed(self._streams):
            if stream.is_continued_by(pfn, self._missing):
                self._streams.remove(stream)
                stream.window = min(stream.window * 2, MAX_WINDOW)
                if (pfn - stream.next) * stream.step >= 0:
                    stream.next = pfn + stream.step
                return self._continue(stream)
        step = self._step_to(pfn)
        self._single_faults.append(pfn)
        return self._continue(_Stream(pfn, pfn + step, step, FIRST_WINDOW)) if step else NO_PFNS

    def _step_to(self, pfn: int) -> int:
        """Return the step from an earlier fault, if this fault continues it; otherwise 0."""
        for other in reversed(self._single_faults):
            step = pfn - other
            if step and pfn - 2 * step in self._single_faults:
                return step
            if 0 < abs(step) <= NEAR:
                step = 1 if step > 0 else -1
                if not len(self._missing(other + step, pfn, step)):
                    return step
        return 0

    def _continue(self, stream: _Stream) -> PfnArray:
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
    """Return one window of at most ``most`` pages for several faults."""
    windows = [window for window in windows if len(window)]
    if not windows:
        return NO_PFNS
    return (union(windows) if len(windows) > 1 else windows[0])[:most]
