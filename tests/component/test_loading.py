# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages are loaded on a host that has no memory for a while.  No page is lost or taken for one that
was given away, and nothing else waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
from collections.abc import Callable

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from migrate.cli.world import World
from migrate.errors import PeerClosedError
from migrate.fastpath.page_states import LOADING, OUTSTANDING
from migrate.options import MigrationOptions, Strategy
from migrate.protocol import messages as m
from migrate.protocol.pfns import pfn_array
from receiver import loading
from receiver.postcopy import NO_MEMORY
from tests.conftest import MIB
from tests.support.faults import Destination, contents, encoded, lanes, put
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link
from tests.support.waiting import until_async as until
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE, Buffer, NativePages, PfnArray
from xenbackend.simulated.client import SimulatedDomain


class ShortOfMemory:
    """A domain that has frames for a limited number of pages in each call."""

    def __init__(self, frames: int, gone: set[int] | None = None):
        self.frames, self.gone = frames, gone or set()
        self.loaded: dict[int, bytes] = {}
        self.error = errno.ENOMEM

    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        results, left = np.zeros(len(pfns), dtype=np.int32), self.frames
        for i, pfn in enumerate(pfns.tolist()):
            if pfn in self.gone:
                results[i] = -errno.ENOENT
            elif left == 0:
                results[i] = -self.error
            else:
                assert pfn not in self.loaded
                left -= 1
                self.loaded[pfn] = (
                    bytes(pages[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) if pages is not None else b""
                )
        return results


@pytest.mark.parametrize("zeros", [False, True])
async def test_pushed_pages_are_loaded_as_soon_as_there_is_memory(
    zeros: bool, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []

    def goes_on(seconds: float) -> bool:
        waited.append(seconds)
        return False

    with (
        lanes() as (ours, theirs),
        contextlib.closing(Destination(ours, theirs, set(range(10, 20)), native=False)) as end,
    ):
        domain = ShortOfMemory(1, gone={12})
        end.pager._domain = domain  # type: ignore[assignment]
        pfns, none = pfn_array(range(10, 20)), pfn_array()
        pages = b"".join(bytes([pfn]) * PAGE_SIZE for pfn in range(10, 20))
        message, payload = (m.Pages(none, pfns), b"") if zeros else (m.Pages(pfns), pages)
        end.pager.pushed(message, memoryview(payload), goes_on)
        assert domain.loaded == {
            pfn: b"" if zeros else bytes([pfn]) * PAGE_SIZE for pfn in range(10, 20) if pfn != 12
        }
        end.pager.acknowledge()
        assert [(message.type, len(message.pfns)) for message in end.sent] == [
            ("loaded", 9),
            ("dropped", 1),
        ]
        assert not end.pager.short_of_memory
    assert waited[:4] == [0.05, 0.1, 0.2, 0.4] and waited[-1] == loading.LAST_RETRY_S
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


async def test_waiting_for_memory_ends_with_the_lane() -> None:
    with (
        lanes() as (ours, theirs),
        contextlib.closing(Destination(ours, theirs, {10, 11}, native=False)) as end,
    ):
        end.pager._domain = ShortOfMemory(0)  # type: ignore[assignment]
        theirs.shut()
        with pytest.raises(PeerClosedError, match="waited for memory"):
            end.pager.pushed(
                m.Pages(pfn_array([10]), pfn_array([11])),
                memoryview(bytes(PAGE_SIZE)),
                ours.is_over,
            )
        assert [end.pages.states[pfn] for pfn in (10, 11)] == [LOADING, LOADING]
        assert np.flatnonzero(end.pager.rejoin()).tolist() == [10, 11]
        assert end.pages.states[10] == OUTSTANDING


def test_what_waiting_does_not_help_is_an_error() -> None:
    domain = ShortOfMemory(2)
    domain.error = errno.EFAULT
    with pytest.raises(XenError, match=r"pfn 0x7.*EFAULT"):
        loading.load(domain, pfn_array([5, 6, 7]), None)  # type: ignore[arg-type]


def answered(end: Destination) -> list[int]:
    """Return the vCPUs that have been answered so far."""
    end.xen.take_answers()
    return end.xen.answered


def counted_turns(end: Destination) -> Callable[[], int]:
    """Return a function that returns how many turns the pager's thread has made since this call."""
    turn = end.pager._turn
    turns: list[None] = []

    def counted(poll: select.poll) -> None:
        turns.append(None)
        turn(poll)

    end.pager._turn = counted  # type: ignore[method-assign]
    return lambda: len(turns)


@pytest.mark.parametrize("native", [False, True])
async def test_others_are_served_meanwhile_and_the_thread_can_be_stopped(native: bool) -> None:
    with (
        lanes() as (ours, theirs),
        contextlib.closing(Destination(ours, theirs, {1, 2, 4}, native=native)) as end,
    ):
        end.memory.no_frames = {1}
        turns = counted_turns(end)
        end.end()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.pager.serve, ours)
            end.touch(1, vcpu=0)
            put(theirs, encoded(m.Pages(pfn_array([1])), contents(1)))
            await until(lambda: end.pager.short_of_memory == 1)
            for pfn, vcpu in ((2, 1), (30, 2)):  # the first page is missing, the second is present
                end.touch(pfn, vcpu)
            put(theirs, encoded(m.Pages(pfn_array([2])), contents(2)))
            await until(lambda: sorted(answered(end)) == [2, 30])
            assert turns() < 100
            end.memory.no_frames = set()
            await until(lambda: 1 in answered(end))
            end.memory.no_frames = {4}
            put(theirs, encoded(m.Pages(pfn_array([4])), contents(4)))
            await until(lambda: end.pager.short_of_memory == 1)
            nursery.cancel_scope.cancel()
        assert sorted(end.memory.loaded) == [1, 2]
        assert np.flatnonzero(end.pager.rejoin()).tolist() == [4]


async def test_a_pager_that_is_stopped_when_its_thread_has_ended_does_not_disturb_the_next() -> (
    None
):
    """The event loop notices the end of a thread only some time after it."""
    with (
        lanes() as (ours, theirs),
        contextlib.closing(Destination(ours, theirs, {1}, native=True)) as end,
    ):
        end.end()
        end.pager._stop()
        turns = counted_turns(end)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.pager.serve, None)
            for _ in range(5):
                end.touch(30, 0)
                await until(lambda: 30 in answered(end))
                end.xen.answered.clear()
            nursery.cancel_scope.cancel()
        assert turns() < 50


async def test_a_lost_link_is_noticed_while_there_is_no_memory(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is resumed on new lanes.  No page is lost, and the pages are loaded when there is
    memory.
    """
    load, full = SimulatedDomain.load, False

    def short(self: SimulatedDomain, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        return (
            np.full(len(pfns), -errno.ENOMEM, dtype=np.int32) if full else load(self, pfns, pages)
        )

    def no_native_pages(_self: SimulatedDomain) -> NativePages | None:
        return None

    monkeypatch.setattr(SimulatedDomain, "load", short)
    monkeypatch.setattr(SimulatedDomain, "native_pages", no_native_pages)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        nonlocal full
        await until(
            lambda: outcome.migration.ownership.handed_over and outcome.incoming.phase == "postcopy"
        )
        full = True
        await until(lambda: outcome.incoming.progress.problem == NO_MEMORY)
        link.cut()
        await until(lambda: outcome.migration.context.statistics.rejoins == 1)
        await until(lambda: outcome.incoming.progress.problem == NO_MEMORY)
        full = False

    options = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=8 * MIB)
    outcome = await migrate(clean_hosts, busy(name), options=options, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.incoming.progress.problem == ""
    assert (await verification(clean_hosts, busy(name))).problems == []
