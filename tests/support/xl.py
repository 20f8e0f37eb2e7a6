# SPDX-License-Identifier: GPL-2.0-or-later
"""xl as its user sees it: both halves of a migration, with our helper in place of libxl's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.service.history import RECORDS
from migrate.service.journal import HISTORY
from migrate.xl.protocol import Message
from tests.conftest import MIB
from tests.support.daemons import listed
from tests.support.labs import until
from tests.support.libxl import Libxl, write_stock_helper
from xenbackend.contract import DomainState
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

LIVE = 1


CBFLAGS_SAVE, CBFLAGS_RESTORE = 136, 768


SHORT_OF_PATIENCE = "[sender]\npeer_timeout_s = 1\n"


class Xl:
    """``xl migrate``: its helpers run until they have ended, and then the test decides."""

    def __init__(self, world: World, spec: GuestSpec, directory: Path):
        self.world, self.spec = world, spec
        self.source = world.source.open(spec.name)
        self.destination: SimulatedDomain = world.destination.create_incoming(spec.domain_config())
        reader, writer = os.pipe()
        stock = str(write_stock_helper(directory / "libxl-save-helper"))
        sockets = {
            "XEN_POSTCOPY_SENDER": str(world.sender_socket),
            "XEN_POSTCOPY_RECEIVER": str(world.receiver_socket), "XEN_POSTCOPY_STOCK_HELPER": stock,
        }  # fmt: skip
        self.save = Libxl(
            "--save-domain", writer, (-1, self.source.domid, LIVE, CBFLAGS_SAVE, 0),
            {Message.SUSPEND: self.suspend}, dict(sockets),
        )  # fmt: skip
        self.restore = Libxl(
            "--restore-domain",
            reader,
            (-1, self.destination.domid, 1, 0, 2, 0, CBFLAGS_RESTORE, 0),
            {},
            dict(sockets),
        )

    def suspend(self) -> int:
        self.source.suspend()
        return 1

    def run(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Run the helpers, and return what each has reported as its result."""
        self.start()
        return self.wait()

    def start(self) -> None:
        self.restore.start()
        self.save.start()

    def wait(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert (self.save.wait(), self.restore.wait()) == (0, 0)
        return self.save.result, self.restore.result

    def go(self) -> None:
        """Let the guest run at the destination, and destroy the source."""
        self.destination.start()
        self.source.destroy()

    def stay(self) -> None:
        """Destroy the destination, and resume the guest at the source, where it had been
        suspended.
        """
        self.destination.destroy()
        if self.source.info().state is DomainState.SUSPENDED:
            self.source.resume()

    def line(self, daemon: str) -> dict[str, Any]:
        """Return the line of ``list`` for the newest migration of a domain of this name."""
        found = listed(self.world, daemon, self.spec.name)
        return found[-1] if found else {"phase": "none", "problem": ""}

    def wait_for(self, *phases: str) -> None:
        """Wait until the migrations of the sender and the receiver are in these phases."""

        def reached() -> bool:
            return [self.line(daemon)["phase"] for daemon in ("sender", "receiver")] == list(phases)

        try:
            until(reached, "")
        except AssertionError:
            pytest.fail(f"{phases} is not reached: {self.line('sender')}, {self.line('receiver')}")

    def close(self) -> None:
        for helper in (self.save, self.restore):
            helper.kill()
        for domain in (self.source, self.destination):
            domain.close()


@pytest.fixture
def xl(world: World, name: str, tmp_path: Path) -> Iterator[Xl]:
    spec = GuestSpec(name, 16 * MIB, vcpus=2, workload="random", rate=5000)
    domain = world.source.create_guest(spec.to_bytes())
    wait_for_steps(domain, 200)
    domain.close()
    with contextlib.closing(Xl(world, spec, tmp_path)) as made:
        yield made


def check_stayed(xl: Xl) -> None:
    """Check that the guest is unharmed at the source and can be migrated again, and that nothing is
    left at the destination.
    """
    until(lambda: xl.source.info().state is DomainState.RUNNING, "the guest is not resumed")
    wait_for_steps(xl.source, 200)
    report = xl.source.report()
    assert [vcpu["errors"] for vcpu in report["vcpu"]] == [0] * len(report["vcpu"])
    xl.world.check_alive()
    assert not [info for info in xl.world.destination.domains() if info.name == xl.spec.name]
    until(lambda: is_migrated_again(xl), "the domain does not become free")
    check_arrived(xl)


def is_migrated_again(xl: Xl) -> bool:
    """Migrate the guest.  Returns false if the end of the last migration is not over yet."""
    to = f"127.0.0.1:{xl.world.port}"
    try:
        xl.world.ask("sender", command="migrate", domain=xl.spec.name, destination=to)
    except MigrationError as error:
        if "is being migrated already" not in str(error):
            raise
        return False
    return True


def owed(xl: Xl) -> list[str]:
    """Return the names of the files that a sender has for what it must still do."""
    state = xl.world.directory / "source.sock.state/sender"
    return [path.name for path in state.iterdir() if path.name not in (HISTORY, RECORDS)]


def check_arrived(xl: Xl) -> None:
    verification, _view = verify_migrated(xl.world, xl.spec)
    assert verification.problems == []
