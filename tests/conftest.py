# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: simulated hosts and daemons as real processes, shared by the tests of a run."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator

import pytest
import trio

from migrate.cli.world import World, loopback_world
from tests.support import event_loop, rewritten, thorough, zygote
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

if "LAB_HYPERVISOR" in os.environ:
    collect_ignore = []
else:
    collect_ignore = [
        "xenlab"
    ]  # The tests of the lab run in the dom0 of an emulated machine: make xenlab.

World.spawn = zygote.Popen
# pytest-trio begins each test by it.  trio before 0.25 raises a lone error without its group.
trio.run = functools.partial(trio.run, strict_exception_groups=True)  # type: ignore[assignment]
event_loop.install()
# A run in the background of a shell, or under nohup, inherits signals that are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MIB = 2**20
LOG_LINES = 40
"""How many last lines of each process's log a failed test prints."""
_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    thorough.configure(config)
    rewritten.prepare(config)
    if "LAB_HYPERVISOR" not in os.environ:
        from hypothesis import settings

        # By default Hypothesis fails a test whose example takes longer than 200 ms, as each does
        # now and then on a busy machine.  It also calls the example's data inconsistent when the
        # second run is quicker.
        settings.register_profile("ours", deadline=None, max_examples=thorough.examples())
        settings.load_profile("ours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thorough.select(config, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the logs of a test's hosts and daemons to the report of its failure."""
    report = yield
    if report.failed:
        for world in (
            value for value in getattr(item, "funcargs", {}).values() if isinstance(value, World)
        ):
            for name, process in world.processes.items():
                lines = process.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                if lines:
                    report.sections.append((f"log of {name}, its last lines", "\n".join(lines)))
    return report


@pytest.fixture(scope="session")
def hosts() -> Iterator[World]:
    """Two simulated hosts without daemons."""
    with loopback_world(2048 * MIB, daemons=False) as world:
        yield world


@pytest.fixture(scope="session")
def _shared_world() -> Iterator[World]:
    with loopback_world(2048 * MIB) as world:
        yield world


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Two simulated hosts, a sender and a receiver; nothing is left on the hosts, whatever a test
    did.

    A parameter is the configuration of daemons for this test alone.
    """
    if hasattr(request, "param"):
        with loopback_world(256 * MIB, config=request.param) as made:
            yield made
        return
    shared: World = request.getfixturevalue("_shared_world")
    yield shared
    shared.check_alive()
    clear(shared)


@pytest.fixture
def clean_hosts(hosts: World) -> Iterator[World]:
    yield hosts
    clear(hosts)
    for journal in ("journal", "arrivals"):  # what a test that fails leaves would fail others
        shutil.rmtree(hosts.directory / journal, ignore_errors=True)


def clear(world: World) -> None:
    for host in (world.source, world.destination):
        for info in host.domains():
            domain = host.open(info.domid)
            domain.destroy()
            domain.close()


@pytest.fixture
def name() -> str:
    """A guest's name that no other test uses."""
    return f"guest-{next(_numbers)}"


Boot = Callable[..., tuple[GuestSpec, SimulatedDomain]]


@pytest.fixture
def boot(clean_hosts: World, name: str) -> Iterator[Boot]:
    """Boots a small guest at the source of ``hosts``; takes ``GuestSpec``'s options."""
    domains = []

    def make(memory: int = 4 * MIB, **options: object) -> tuple[GuestSpec, SimulatedDomain]:
        spec = GuestSpec(name, memory, **options)  # type: ignore[arg-type]
        domain = clean_hosts.source.create_guest(spec.to_bytes())
        domains.append(domain)
        return spec, domain

    yield make
    for domain in domains:
        domain.close()
