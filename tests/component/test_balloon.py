# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests whose balloon moves while they are migrated, in both directions and in every phase."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from migrate.cli.world import World, loopback_world, start_sender, wait_for_steps
from migrate.errors import MigrationError
from migrate.options import MigrationOptions, PolicyOptions, Strategy
from migrate.protocol.pfns import PfnMask
from sender import dirty as written
from sender.dirty import NO_FURTHER, DirtyLog
from sender.toolstack import OwnToolstack
from tests.conftest import MIB
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.labs import until
from tests.support.links import Link
from tests.support.waiting import WAIT_S
from xenbackend.contract import Domain, DomainState
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec

PAGES = 200
"""The number of pages that the balloon of a guest gives away and takes back."""
Patch = pytest.MonkeyPatch


def ballooning(name: str, **options: object) -> GuestSpec:
    """Return a guest whose balloon soon gives all of its pages away and takes them back."""
    defaults: dict[str, object] = {
        "vcpus": 2, "working_set_bytes": 4 * MIB, "balloon_pages": PAGES, "balloon_every": 20,
        "balloon_back": True, "zero_permille": 0,
    }  # fmt: skip
    return GuestSpec(name, 16 * MIB, **{**defaults, **options})  # type: ignore[arg-type]


def balloon_steps(domain: Domain) -> int:
    assert isinstance(domain, SimulatedDomain)
    return int(domain.report()["balloon_steps"])


def let_balloon_move(domain: Domain, steps: int) -> None:
    """Raise the limit as ``xl mem-set`` does, so that the guest moves towards its target."""
    domain.set_max_pages(domain.config().max_pages)
    before = balloon_steps(domain)
    until(lambda: balloon_steps(domain) >= before + steps, "the balloon does not move", WAIT_S)


def before_each_read(monkeypatch: Patch, move: Callable[[Domain], None]) -> None:
    """Move the balloon between any two readings of the dirty log, and before the guest is
    suspended.  The guest is not suspended when all pages of the balloon are away, because no page
    that came back unseen could be noticed then.
    """
    read, suspend = DirtyLog._read, OwnToolstack.suspend

    def moving_read(self: DirtyLog) -> tuple[NDArray[np.uint8], PfnMask | None]:
        if self._domain.state() is DomainState.RUNNING:
            move(self._domain)
        return read(self)

    def moving_suspend(self: OwnToolstack, domain: Domain) -> None:
        move(domain)
        suspend(self, domain)
        while balloon_steps(domain) % (2 * PAGES) == PAGES:
            domain.resume()
            move(domain)
            suspend(self, domain)

    monkeypatch.setattr(DirtyLog, "_read", moving_read)
    monkeypatch.setattr(OwnToolstack, "suspend", moving_suspend)


@pytest.fixture(params=[(), ("--track-physmap",)], ids=["xen 4.17", "xen 4.22"])
def balloon_hosts(request: pytest.FixtureRequest) -> Iterator[World]:
    with loopback_world(256 * MIB, source_options=request.param, daemons=False) as world:
        yield world


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("steps", [2 * PAGES + 7, PAGES // 2], ids=["away and back", "some"])
async def test_a_balloon_that_moves_in_every_phase(
    balloon_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy, steps: int
) -> None:
    before_each_read(monkeypatch, lambda domain: let_balloon_move(domain, steps))
    outcome = await migrate(balloon_hosts, ballooning(name), strategy)
    assert outcome.error is None
    assert (await verification(balloon_hosts, ballooning(name))).problems == []


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_guest_gives_memory_away_in_every_phase(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy
) -> None:
    """The balloon also moves between early eviction and the suspension.  A missing page that has no
    memory any more could never be sent.
    """
    spec = ballooning(name, balloon_back=False, balloon_pages=2000)

    def give(domain: Domain) -> None:
        before = balloon_steps(domain)
        until(
            lambda: balloon_steps(domain) >= min(before + 40, spec.balloon_pages),
            "nothing is given away",
            WAIT_S,
        )

    before_each_read(monkeypatch, give)
    outcome = await migrate(clean_hosts, spec, strategy)
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_balloon_that_moves_across_a_hole_for_devices(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy
) -> None:
    spec = ballooning(
        name, working_set_bytes=1 * MIB, balloon_pages=3400, balloon_every=1,
        mmio_hole_bytes=64 * MIB,
    )  # fmt: skip
    assert spec.pages - spec.balloon_pages < spec.pieces[0].stop
    before_each_read(monkeypatch, lambda domain: let_balloon_move(domain, spec.balloon_pages + 100))
    outcome = await migrate(clean_hosts, spec, strategy)
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []


async def test_the_balloon_is_held_while_a_guest_is_copied(clean_hosts: World, name: str) -> None:
    """The balloon moves again at the destination."""
    spec = ballooning(name)
    seen = []

    async def watch(outcome: Outcome, _link: Link) -> None:
        with clean_hosts.source.open(spec.name) as domain:
            while outcome.migration.phase in ("", "preflight", "connecting", "precopy"):
                seen.append((domain.reservation().max_pages, balloon_steps(domain)))
                await trio.sleep(0.01)

    # The bandwidth is so low that the balloon would give all pages away and take them back.
    options = MigrationOptions(
        Strategy.HYBRID, PolicyOptions(max_rounds=2), bandwidth_bytes_per_s=16 * MIB
    )
    outcome = await migrate(clean_hosts, spec, options=options, meanwhile=watch)
    assert outcome.error is None
    held = [steps for limit, steps in seen if limit == NO_FURTHER]
    assert held and held[-1] - held[0] <= 2 * PAGES  # the balloon may give pages away
    with clean_hosts.destination.open(spec.name) as domain:
        assert domain.reservation().max_pages == spec.nr_pfns
        let_balloon_move(domain, 2 * PAGES)
    assert (await verification(clean_hosts, spec)).problems == []


@pytest.mark.parametrize("broken", ["not looked for", "not held"])
async def test_a_page_that_is_taken_back_unseen_is_noticed(
    clean_hosts: World, name: str, monkeypatch: Patch, broken: str
) -> None:
    """This test breaks invariant 2."""
    if broken == "not looked for":
        before_each_read(monkeypatch, lambda domain: let_balloon_move(domain, PAGES // 2))
        monkeypatch.setattr(
            DirtyLog, "_read", lambda self: (self._domain.log_dirty(clean=True), None)
        )
    else:  # down and up between two readings: the same number of frames, at the same pfns
        set_max_pages = SimulatedDomain.set_max_pages
        told: dict[SimulatedDomain, int] = {}

        def pretend(self: SimulatedDomain, pages: int) -> None:
            told[self] = pages
            set_max_pages(self, self.nr_pfns)

        reservation = SimulatedDomain.reservation
        monkeypatch.setattr(SimulatedDomain, "set_max_pages", pretend)
        monkeypatch.setattr(
            SimulatedDomain,
            "reservation",
            lambda self: reservation(self)._replace(max_pages=told.get(self, NO_FURTHER)),
        )

        def around(domain: Domain) -> None:
            steps = balloon_steps(domain) // (2 * PAGES) + 2
            until(
                lambda: balloon_steps(domain) // (2 * PAGES) >= steps,
                "the balloon does not move",
                WAIT_S,
            )

        before_each_read(monkeypatch, around)
    await migrate(clean_hosts, ballooning(name), Strategy.PRECOPY)
    try:
        problems = " ".join((await verification(clean_hosts, ballooning(name))).problems)
    except MigrationError as error:  # the guest met the damaged page before the comparison
        problems = str(error)
    noticed = ("pages differ", "wrong values", "which is no memory", "where there was memory still")
    assert any(text in problems for text in noticed), problems


async def test_a_migration_that_fails_leaves_the_limit_as_it_was(
    clean_hosts: World, name: str
) -> None:
    async def cancel(outcome: Outcome, _link: Link) -> None:
        with clean_hosts.source.open(name) as domain:
            while domain.reservation().max_pages != NO_FURTHER:
                await trio.sleep(0.005)
        outcome.migration.requests.cancel("by the test")

    spec = ballooning(name)
    outcome = await migrate(clean_hosts, spec, Strategy.HYBRID, meanwhile=cancel)
    assert isinstance(outcome.error, MigrationError)
    with clean_hosts.source.open(name) as domain:
        assert domain.reservation().max_pages == spec.nr_pfns


async def test_a_limit_that_somebody_sets_meanwhile_stays(clean_hosts: World, name: str) -> None:
    """An administrator calls ``xl mem-max`` while the guest is copied."""
    spec = ballooning(name)

    async def change(outcome: Outcome, _link: Link) -> None:
        with clean_hosts.source.open(name) as domain:
            while domain.reservation().max_pages != NO_FURTHER:
                await trio.sleep(0.005)
            domain.set_max_pages(spec.nr_pfns - 5)
            while domain.reservation().max_pages != NO_FURTHER:
                await trio.sleep(0.005)
        outcome.migration.requests.cancel("by the test")

    options = MigrationOptions(
        Strategy.PRECOPY, PolicyOptions(max_rounds=1000), bandwidth_bytes_per_s=64 * MIB
    )
    await migrate(clean_hosts, spec, options=options, meanwhile=change)
    with clean_hosts.source.open(name) as domain:
        assert domain.reservation().max_pages == spec.nr_pfns - 5


def test_the_successor_of_a_killed_sender_lets_the_balloon_go(name: str) -> None:
    spec = ballooning(name)
    with loopback_world(256 * MIB) as world:
        guest = world.source.create_guest(spec.to_bytes())
        wait_for_steps(guest, 100)
        with world.control("sender") as client:
            client.send(
                command="migrate", domain=name, destination=f"127.0.0.1:{world.port}", bandwidth=MIB
            )
            client.answer()
            until(lambda: guest.reservation().max_pages == NO_FURTHER, "the balloon is not held")
            world.stop("sender", signal.SIGKILL)
        start_sender(world)
        until(lambda: guest.reservation().max_pages == spec.nr_pfns, "it is held still")
        guest.close()


def test_a_limit_that_was_left_behind_is_no_limit(clean_hosts: World, name: str) -> None:
    guest = clean_hosts.source.create_guest(ballooning(name, balloon_pages=0).to_bytes())
    guest.set_max_pages(NO_FURTHER)
    assert written.limit_of(guest) == guest.nr_pfns
    guest.set_max_pages(5)
    assert written.limit_of(guest) == 5
    guest.close()


def test_no_frame_is_under_way_when_the_limit_is_set(clean_hosts: World, name: str) -> None:
    """Otherwise log-dirty would be cleaned before the frame is added."""
    guest = clean_hosts.source.create_guest(ballooning(name, balloon_every=1).to_bytes())
    another = SimulatedHypervisor(clean_hosts.directory / "source.sock")
    stop = threading.Event()

    def look() -> None:
        with another.open(name) as domain:
            while not stop.is_set():
                domain.log_dirty(clean=True)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            let_balloon_move(guest, 5)
            guest.set_max_pages(NO_FURTHER)
            frames = guest.reservation().tot_pages
            wait_for_steps(guest, 20)
            assert guest.reservation().tot_pages <= frames
    finally:
        stop.set()
        thread.join()
        another.close()
        guest.close()


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_guest_that_has_grown_finds_room_at_the_destination(
    clean_hosts: World, name: str, monkeypatch: Patch, strategy: Strategy
) -> None:
    """The limit of the domain at the destination is older.  Without more room, pages would be
    refused or never be loaded.
    """
    make = SimulatedHypervisor.create_incoming
    less = 100

    def make_smaller(self: SimulatedHypervisor, *arguments: Any, **others: Any) -> SimulatedDomain:
        domain = make(self, *arguments, **others)
        domain.set_max_pages(domain.nr_pfns - less)
        return domain

    monkeypatch.setattr(SimulatedHypervisor, "create_incoming", make_smaller)
    spec = ballooning(name, balloon_pages=0)
    outcome = await migrate(clean_hosts, spec, strategy)
    assert outcome.error is None
    assert (await verification(clean_hosts, spec)).problems == []
    with clean_hosts.destination.open(name) as domain:
        assert domain.reservation()[:2] == (spec.nr_pfns, spec.nr_pfns - less)


@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.HYBRID])
async def test_a_limit_that_is_lowered_while_pages_are_missing_holds_when_they_have_come(
    clean_hosts: World, name: str, strategy: Strategy
) -> None:
    """``xl mem-set`` lowers the limit.  The guest cannot give away pages that have not arrived, and
    its vCPUs used to wait for ever.
    """
    spec = ballooning(name, balloon_pages=0)
    lower = spec.nr_pfns - 500

    async def change(outcome: Outcome, _link: Link) -> None:
        while not outcome.migration.ownership.handed_over:
            await trio.sleep(0.005)
        with clean_hosts.destination.open(name) as domain:
            domain.set_max_pages(lower)
            assert len(domain.paged_out())

    outcome = await migrate(clean_hosts, spec, strategy, meanwhile=change)
    assert outcome.error is None
    with clean_hosts.destination.open(name) as domain:
        assert domain.reservation().max_pages == lower
    assert (await verification(clean_hosts, spec)).problems == []
