# SPDX-License-Identifier: GPL-2.0-or-later
"""What the order of the push could gain at most.

An oracle pushes the pages in the order in which an undisturbed guest touches them, and never sends
a page again that is on its way.  Each vCPU does as many accesses as it would do undisturbed while
the whole memory passes the link.  The time for which vCPUs wait meanwhile is compared: with faults
alone, where nothing is pushed or read ahead; with today's order and read-ahead; and with the
oracle.

The simulated guest's touches are a pure function (``program.c``).  The orders are compared in a
model with a time of its own, because no daemon can have the oracle.  The model uses the product's
backlog and read-ahead.  The link sends one page at a time; pages for which vCPUs wait come first,
then pages that were read ahead, then pushed ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from migrate.protocol.pfns import NO_PFNS
from receiver.readahead import ReadAhead
from sender.backlog import Backlog
from sender.push import BATCH_PAGES
from tests.bench.runs import CAP, Limits, row
from xenbackend.pages import PAGE_SIZE, PfnArray
from xenbackend.simulated._sim import lib
from xenbackend.simulated.guest import GuestSpec

MEMORY_BYTES = 2**28
FAULT_S = 60e-6
"""What a fault takes with an idle link, without its page on the link."""
STEP_S = 5e-6
"""What a guest computes between two touches."""
RATES = {"1.2 GB/s": 1.2e9, "125 MB/s": CAP}
NEVER = float("inf")


def touches(spec: GuestSpec, vcpu: int) -> Iterator[int]:
    """Yield the pages that a vCPU touches, without an end."""
    program = spec.program()
    for step in count():
        yield lib.sim_access_at(program, vcpu, step).page


@dataclass
class _Vcpu:
    touches: Iterator[int]
    page: int
    """The page that it touches next."""
    left: int
    """The number of accesses that it has not done."""
    at_s: float = 0.0
    """When it touches the page, or has touched it and waits."""
    waits: bool = False
    waited_s: float = 0.0


@dataclass
class _Destination:
    arrives_s: np.ndarray
    """When each page arrives; infinite if it was not sent."""
    now: float = 0.0
    ahead: ReadAhead = field(init=False)

    def __post_init__(self) -> None:
        self.ahead = ReadAhead(len(self.arrives_s), self._missing)

    def _missing(self, first: int, stop: int, step: int) -> PfnArray:
        arrives_s = self.arrives_s[first : stop if stop >= 0 else None : step]
        found = first + step * np.flatnonzero(arrives_s > self.now)
        return (found if step > 0 else found[::-1]).astype(np.uint64)


class Model:
    """One postcopy.  ``order``: the pages in the order of the push, or ``None`` for today's order
    with the read-ahead.  ``knows``: no page is sent twice.
    """

    def __init__(
        self, spec: GuestSpec, rate: float, order: PfnArray | None, *, knows: bool = False
    ):
        self._knows = knows
        self._page_s = PAGE_SIZE / rate
        self._order = order
        self._at = 0
        self._backlog = Backlog(np.ones(spec.pages, dtype=np.bool_))
        self._there = _Destination(np.full(spec.pages, NEVER))
        self._vcpus = []
        for vcpu in range(spec.vcpus):
            these = touches(spec, vcpu)
            accesses = int(spec.memory_bytes / rate / STEP_S)
            self._vcpus.append(_Vcpu(these, next(these), accesses))
        self._requests: deque[tuple[float, int, PfnArray]] = deque()
        """When each request reaches the sender, its page, and what is read ahead after the page."""
        self._requested: set[int] = set()
        self._urgent: deque[int] = deque()
        self._ahead: deque[int] = deque()
        self._pushed: deque[int] = deque()

    def blocked_s(self) -> float:
        """Return for how long all vCPUs wait until each has done its accesses."""
        now, arrives_s = 0.0, self._there.arrives_s
        while any(vcpu.left for vcpu in self._vcpus):
            page = self._next(now)
            now += self._page_s
            if page is not None:
                arrives_s[page] = min(arrives_s[page], now + FAULT_S / 2)
            for vcpu in self._vcpus:
                self._run(vcpu, now)
        return sum(vcpu.waited_s for vcpu in self._vcpus)

    def _next(self, now: float) -> int | None:
        """Return the page that the link sends next."""
        while self._requests and self._requests[0][0] <= now:
            _at, page, ahead = self._requests.popleft()
            asked = np.array([page], dtype=np.uint64)
            send = self._backlog.ahead if self._knows else self._backlog.fault
            self._urgent += send(asked).tolist()
            self._ahead += self._backlog.ahead(ahead).tolist()
        if self._urgent:
            return self._urgent.popleft()
        while self._ahead:
            page = self._ahead.popleft()
            if len(self._backlog.pull(np.array([page], dtype=np.uint64))):
                return page
        if not self._pushed:
            self._pushed += self._batch().tolist()
        return self._pushed.popleft() if self._pushed else None

    def _batch(self) -> PfnArray:
        if self._order is None:
            return self._backlog.next_batch(BATCH_PAGES)
        while self._at < len(self._order):
            batch = self._order[self._at : self._at + BATCH_PAGES]
            self._at += len(batch)
            if len(wanted := self._backlog.ahead(batch)):
                return wanted
        return NO_PFNS

    def _run(self, vcpu: _Vcpu, until: float) -> None:
        """Have a vCPU run until this time, or until it waits for a page that arrives later."""
        while vcpu.left and vcpu.at_s <= until:
            arrival = float(self._there.arrives_s[vcpu.page])
            if arrival > until:
                if not vcpu.waits:
                    self._fault(vcpu)
                return
            vcpu.waited_s += max(arrival - vcpu.at_s, 0.0)
            vcpu.at_s = max(arrival, vcpu.at_s) + STEP_S
            vcpu.waits = False
            vcpu.left -= 1
            vcpu.page = next(vcpu.touches)

    def _fault(self, vcpu: _Vcpu) -> None:
        """Request the page, unless another vCPU waits for it."""
        vcpu.waits = True
        if vcpu.page in self._requested:
            return
        self._requested.add(vcpu.page)
        self._there.now = vcpu.at_s
        ahead = self._there.ahead.after(vcpu.page) if self._order is None else NO_PFNS
        self._requests.append((vcpu.at_s + FAULT_S / 2, vcpu.page, ahead))


def touched_order(spec: GuestSpec) -> PfnArray:
    """Return all pages, in the order in which undisturbed vCPUs touch them first; the pages that
    they do not touch follow.
    """
    order: dict[int, None] = {}
    streams = [touches(spec, vcpu) for vcpu in range(spec.vcpus)]
    while len(order) < spec.working_pages:
        for stream in streams:
            order.setdefault(next(stream))
    order.update(dict.fromkeys(range(spec.pages)))
    return np.array(list(order), dtype=np.uint64)


def oracle(_limits: Limits, _runs: int) -> None:
    """The ratio is the part of the waiting which is saved today, of all that the oracle saves.  The
    model has no noise, so that each case is run one time.
    """
    for workload in ("random", "sequential", "hotset", "stride"):
        spec = GuestSpec("guest", MEMORY_BYTES, 2, workload)
        true_order = touched_order(spec)
        for what, rate in RATES.items():
            faults, today = (Model(spec, rate, order).blocked_s() for order in (NO_PFNS, None))
            best = Model(spec, rate, true_order, knows=True).blocked_s()
            row(
                f"oracle, {workload}, {what}",
                (faults - today) / (faults - best),
                f"vCPUs wait {today:.3f} s",
                f"faults alone: {faults:.3f} s, the oracle: {best:.3f} s",
            )
