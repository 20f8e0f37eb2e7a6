# SPDX-License-Identifier: GPL-2.0-or-later
"""The waits of the sender before the switchover, with a slow destination."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import trio
import trio.testing

from migrate.cli.world import World
from migrate.errors import PeerClosedError
from migrate.lanes.connection import STEP_TIMEOUT_S
from migrate.options import MigrationOptions, Strategy
from migrate.protocol import messages as m
from migrate.protocol import pfns
from migrate.protocol.pfns import NO_PFNS, from_mask, pfn_array, pfns_of_window, union
from sender import precopy
from sender.context import Barriers, Context, Source
from sender.dirty import DirtyLog
from sender.entry import Entry
from sender.ownership import State
from sender.precopy import Precopy, SwitchoverPlan
from sender.push import PushLane
from sender.toolstack import OwnToolstack
from tests.support.event_loop import in_event_loop
from tests.support.labs import SimulatedLab
from xenbackend.contract import DomainId
from xenbackend.pages import PAGE_SIZE, PfnArray
from xenbackend.simulated.client import SimulatedDomain

NR_PFNS, WINDOW_PFNS = 1024, 128


class SlowDestination:
    """The other end of a push lane.  It needs ``seconds`` for each window of pages that are evicted
    early.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._in, self._out = trio.open_memory_channel[m.Message](math.inf)
        self.evicted = NO_PFNS
        self.barriers = self.most_barriers = 0

    async def send(self, message: m.Message) -> None:
        if isinstance(message, m.Barrier):
            self.barriers += 1
            self.most_barriers = max(self.most_barriers, self.barriers)
        await self._in.send(message)

    async def report_holes(self, _pfns: PfnArray) -> PfnArray:
        return NO_PFNS

    async def serve(self, barriers: Barriers) -> None:
        async for message in self._out:
            if isinstance(message, m.Defer):
                await trio.sleep(self._seconds)
                self.evicted = union([self.evicted, pfns_of_window(message.base, message.bitmap)])
            elif isinstance(message, m.Barrier):
                self.barriers -= 1
                barriers.passed(message.number, trio.current_time())


@pytest.fixture
def lab(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> SimulatedLab:
    monkeypatch.setattr(pfns, "WINDOW_PFNS", WINDOW_PFNS)
    monkeypatch.setattr(precopy, "EVICT_PFNS", WINDOW_PFNS)
    return SimulatedLab(world, name)


async def put_off(lab: SimulatedLab, destination: SlowDestination) -> SwitchoverPlan:
    options = MigrationOptions(Strategy.POSTCOPY)
    domain = lab.boot(NR_PFNS * PAGE_SIZE, vcpus=1, workload="idle")
    none: Any = None
    entry = Entry(DomainId(domain.domid, domain.handle, "guest"), options, False)
    context = Context("session", none, none, none, OwnToolstack(), entry, State.COPYING)
    source = Source(domain, DirtyLog(domain, NR_PFNS), None)
    copying = Precopy(context, source, cast(PushLane, destination))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(destination.serve, context.barriers)
        plan = await copying.run()
        nursery.cancel_scope.cancel()
    return plan


async def test_each_window_that_is_put_off_has_time(
    lab: SimulatedLab, autojump_clock: trio.testing.MockClock
) -> None:
    """Eviction takes longer for a larger guest, so the limit is on each window and not on the
    whole.
    """
    destination = SlowDestination(STEP_TIMEOUT_S * 0.9)
    plan = await put_off(lab, destination)
    assert trio.current_time() > STEP_TIMEOUT_S * 5
    assert np.array_equal(from_mask(plan.deferred), destination.evicted)
    assert len(destination.evicted) > NR_PFNS / 2
    assert 2 < destination.most_barriers <= 16  # more than 16 are an error of the protocol


async def test_a_destination_that_does_not_evict_is_given_up(
    lab: SimulatedLab, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await put_off(lab, SlowDestination(STEP_TIMEOUT_S * 1.1))
    (error,) = raised.value.exceptions
    assert isinstance(error, PeerClosedError)
    assert "did not evict the unsent pages from pfn 0x0 on within 60 s" in str(error)


async def test_the_memory_of_devices_is_urgent_before_what_others_have_mapped(
    lab: SimulatedLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, mapped = pfn_array([700, 701]), pfn_array([30, 701])
    for method, found in (("device_memory", video), ("held", mapped)):
        monkeypatch.setattr(
            SimulatedDomain, method, lambda self, of, found=found: found[np.isin(found, of)]
        )
    plan = await put_off(lab, SlowDestination(0))
    assert plan.urgent.tolist() == [700, 701, 30, 701]


class Watched(np.ndarray[Any, np.dtype[np.bool_]]):
    """A set that notes which steps over the whole set are made in the event loop."""

    in_event_loop: ClassVar[list[str]] = []

    def _note(self, step: str, values: tuple[Any, ...]) -> None:
        if in_event_loop() and any(getattr(value, "size", 0) >= NR_PFNS for value in values):
            self.in_event_loop.append(step)

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        self._note(ufunc.__name__, inputs)
        plain = [np.asarray(value) for value in inputs]
        if out is not None:
            options["out"] = tuple(np.asarray(value) for value in out)
        result = getattr(ufunc, method)(*plain, **options)
        return result.view(Watched) if out is None and isinstance(result, np.ndarray) else result

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        self._note(function.__name__, arguments)
        return super().__array_function__(function, types, arguments, options)


async def test_no_step_over_all_of_a_guest_is_made_in_the_event_loop(
    lab: SimulatedLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a large guest such a step takes a second, in which the loop serves no other guest."""
    for method in ("memory", "read"):
        original = getattr(DirtyLog, method)
        monkeypatch.setattr(
            DirtyLog, method, lambda self, original=original: original(self).view(Watched)
        )
    monkeypatch.setattr(Watched, "in_event_loop", [])
    plan = await put_off(lab, SlowDestination(0))
    assert Watched.in_event_loop == []
    assert np.count_nonzero(plan.deferred.view(np.ndarray)) > NR_PFNS / 2
    _ = plan.deferred & plan.deferred
    assert Watched.in_event_loop == ["bitwise_and"]  # the set was watched to the end
