# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that programs in dom0 have mapped while their guest is migrated: those to which back ends
write, and those that are held at the source.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from numpy.typing import NDArray

from migrate.cli.world import World
from migrate.options import Strategy
from migrate.protocol.pfns import PfnMask
from sender.backlog import Backlog
from sender.dirty import DirtyLog
from sender.toolstack import OwnToolstack
from tests.conftest import MIB
from tests.support.inprocess import migrate, verification
from tests.support.pages import read, span
from xenbackend.contract import Domain, DomainState
from xenbackend.pages import PfnArray
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

Patch = pytest.MonkeyPatch
GRANTED = 3000
"""A page that the guest itself does not write."""
HELD = span(1000, 2000)


def quiet(name: str) -> GuestSpec:
    return GuestSpec(name, 16 * MIB, 2, working_set_bytes=2 * MIB, zero_permille=0)


class BackEnd:
    """A back end in dom0 that maps one page of the guest, and writes a number into the page."""

    def __init__(self) -> None:
        self._mapping = contextlib.ExitStack()
        self._page = memoryview(b"")
        self.written = 0

    def map(self, domain: Domain) -> None:
        assert isinstance(domain, SimulatedDomain)
        self._page = self._mapping.enter_context(domain.grant(GRANTED))

    def write(self) -> None:
        self.written += 1
        self._page[:8] = self.written.to_bytes(8, "little")

    def unmap(self) -> None:
        self._page = memoryview(b"")
        self._mapping.close()


async def arrived_with(hosts: World, spec: GuestSpec) -> int:
    """Return the number that the page has at the destination, where all others are correct."""
    found = await verification(hosts, spec)
    assert set(found.differing.tolist()) <= {GRANTED}
    with hosts.destination.open(spec.name) as domain:
        return int.from_bytes(read(domain, span(GRANTED, 1))[1][:8], "little")


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_page_that_a_back_end_writes_during_precopy_arrives_as_written(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy
) -> None:
    """Each request maps the page, writes, and unmaps the page before the guest is answered."""
    back_end, read_log = BackEnd(), DirtyLog._read

    def request(self: DirtyLog) -> tuple[NDArray[np.uint8], PfnMask | None]:
        if self._domain.state() is DomainState.RUNNING:
            back_end.map(self._domain)
            back_end.write()
            back_end.unmap()
        return read_log(self)

    monkeypatch.setattr(DirtyLog, "_read", request)
    outcome = await migrate(clean_hosts, quiet(name), strategy)
    assert outcome.error is None
    assert back_end.written > 0
    assert await arrived_with(clean_hosts, quiet(name)) == back_end.written


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_request_that_ends_when_the_guest_is_suspended_arrives_as_written(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy
) -> None:
    """The page is mapped during all of precopy.  Log-dirty records the writes when the page is
    unmapped, before the last reading.
    """
    back_end = BackEnd()
    enable, read_log, suspend = DirtyLog.enable, DirtyLog._read, OwnToolstack.suspend

    def map_first(self: DirtyLog) -> None:
        back_end.map(self._domain)
        enable(self)

    def write_before(self: DirtyLog) -> tuple[NDArray[np.uint8], PfnMask | None]:
        if self._domain.state() is DomainState.RUNNING:
            back_end.write()
        return read_log(self)

    def suspend_before(self: OwnToolstack, domain: Domain) -> None:
        suspend(self, domain)
        back_end.write()
        back_end.unmap()

    monkeypatch.setattr(DirtyLog, "enable", map_first)
    monkeypatch.setattr(DirtyLog, "_read", write_before)
    monkeypatch.setattr(OwnToolstack, "suspend", suspend_before)
    outcome = await migrate(clean_hosts, quiet(name), strategy)
    assert outcome.error is None
    assert await arrived_with(clean_hosts, quiet(name)) == back_end.written


async def test_what_programs_hold_is_pushed_first_and_not_sent_in_the_downtime(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The downtime must not depend on the pages that back ends and the device model have mapped."""
    pushed: list[PfnArray] = []
    next_batch, enable = Backlog.next_batch, DirtyLog.enable

    def hold(self: DirtyLog) -> None:
        assert isinstance(self._domain, SimulatedDomain)
        for pfn in HELD.tolist():
            self._domain.set_page(pfn, refs=1)
        enable(self)

    def note(self: Backlog, most: int) -> PfnArray:
        pushed.append(next_batch(self, most))
        return pushed[-1]

    monkeypatch.setattr(DirtyLog, "enable", hold)
    monkeypatch.setattr(Backlog, "next_batch", note)
    spec = GuestSpec(name, 16 * MIB, 2, working_set_bytes=2 * MIB, zero_permille=0, rate=100)
    outcome = await migrate(clean_hosts, spec, Strategy.POSTCOPY)
    assert outcome.error is None
    assert outcome.migration.context.statistics.switchover_pages < len(HELD) / 4
    first = np.concatenate(pushed)[: len(HELD)]
    assert len(np.setdiff1d(first, HELD)) <= spec.vcpus  # vcpu_info
    assert (await verification(clean_hosts, spec)).problems == []
