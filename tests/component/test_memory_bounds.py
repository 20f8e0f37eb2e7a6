# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a daemon is limited by the memory of its guests, and is released when a migration
has ended.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

import numpy as np
import pytest

from migrate.cli.world import World
from migrate.options import Strategy
from migrate.protocol import messages as m
from migrate.protocol.pfns import pfn_array
from migrate.service.journal import Journal
from receiver.migration import IncomingMigration
from receiver.ownership import State
from receiver.restore import FrameLimit, MemoryRestorer
from tests.conftest import MIB
from tests.support.inprocess import Outcome, migrate
from tests.support.left import NoLanes
from tests.support.links import Link
from tests.support.waiting import until_async as until
from xenbackend.contract import Domain, DomainState, Hypervisor
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec


def held_by(thing: object) -> int:
    """Return the number of bytes of arrays and buffers that only this object keeps."""
    seen, found, to_look_at = set[int](), 0, [thing]
    others = (type, ModuleType, FunctionType, World, Hypervisor, Domain, Journal)
    while to_look_at:
        one = to_look_at.pop()
        if (
            id(one) in seen
            or isinstance(one, others)
            or type(one).__module__.startswith(("trio", "logging", "_thread"))
        ):
            continue
        seen.add(id(one))
        if isinstance(one, np.ndarray):
            found += one.nbytes
        elif isinstance(one, bytes | bytearray):
            found += len(one)
        to_look_at += gc.get_referents(one)
    return found


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_an_ended_migration_keeps_nothing_as_large_as_its_guest(
    clean_hosts: World, name: str, strategy: Strategy
) -> None:
    """``list`` shows a hundred ended migrations at each end."""
    running = list[int]()

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until(
            lambda: outcome.migration.phase in ("precopy", "switchover", "postcopy", "completed")
        )
        running.append(held_by(outcome.migration))

    spec = GuestSpec(name, 64 * MIB, workload="idle", zero_permille=1000)
    outcome = await migrate(clean_hosts, spec, strategy, meanwhile=meanwhile)
    assert outcome.error is None
    assert running[0] > spec.nr_pfns  # so that kept memory would be noticed
    assert held_by(outcome.migration) < spec.nr_pfns
    assert held_by(outcome.incoming) < spec.nr_pfns
    assert outcome.migration.result()["memory_bytes"] == spec.memory_bytes


async def test_a_guest_with_devices_is_refused_without_a_toolstack(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the destination the guest would have none of them, and nothing would record what its
    device model writes.
    """
    monkeypatch.setattr(SimulatedDomain, "devices", lambda self: ["vbd", "device model"])
    outcome = await migrate(clean_hosts, GuestSpec(name, 4 * MIB))
    assert "has devices that only its toolstack can move (vbd, device model)" in str(outcome.error)
    assert clean_hosts.source.open(name).state() is DomainState.RUNNING


async def test_a_guest_whose_memory_is_too_sparse_is_refused_here(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimulatedDomain.config
    monkeypatch.setattr(
        SimulatedDomain, "config", lambda self: replace(config(self), nr_pfns=2**36)
    )
    outcome = await migrate(clean_hosts, GuestSpec(name, 4 * MIB))
    assert "the guest's memory is too sparse" in str(outcome.error)
    assert clean_hosts.source.open(name).state() is DomainState.RUNNING


def test_a_sender_whose_guest_outgrows_its_offer_page_by_page_fills_no_journal(
    clean_hosts: World, name: str, tmp_path: Path
) -> None:
    """A successor destroys a domain that is being restored, and does not need its limit.  The next
    step has an entry with the limit.
    """
    journal, host, lanes = Journal(tmp_path), clean_hosts.destination, cast(Any, NoLanes())
    config = GuestSpec(name, 4 * MIB).domain_config()
    context = IncomingMigration.of_offer(host, "session", lanes, journal).requests.context
    context.ownership.enter(State.MAKING)
    domain = host.create_incoming(config)
    domain.set_max_pages(1)
    context.ownership.enter(State.RESTORING)
    before = (tmp_path / "session.json").stat().st_size
    limit = FrameLimit(domain, context.entry.raised, context.note_raised)
    memory = MemoryRestorer(domain, limit, 1)
    for pfn in range(50):
        memory.pages(m.Pages(pfn_array(), pfn_array([pfn])), memoryview(b""))
    assert domain.reservation().tot_pages >= 50
    assert (tmp_path / "session.json").stat().st_size == before
    context.ownership.enter(State.SUSPENDED)
    raised = journal.entries()["session"]["raised"]
    assert raised == [1, domain.reservation().max_pages]
    domain.destroy()
    domain.close()
