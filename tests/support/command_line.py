# SPDX-License-Identifier: GPL-2.0-or-later
"""A user at the command line: commands, their refusals, and guests that stay unharmed."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from migrate.cli.world import World, wait_for_steps
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import COMMAND_S, PROGRAM
from tests.support.waiting import WAIT_S
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec


def run(*arguments: str | Path, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
    return zygote.run([*PROGRAM, *map(str, arguments)], timeout=timeout_s)


def boot(world: World, name: str, memory: int = 4 * MIB, **options: Any) -> GuestSpec:
    spec = GuestSpec(name, memory, **options)
    domain = world.source.create_guest(spec.to_bytes())
    wait_for_steps(domain, 5)
    domain.close()
    return spec


def request(world: World, name: str, *options: str, to: str | None = None) -> list[str]:
    """Return the arguments of a migration."""
    return [
        "migrate",
        name,
        to or f"127.0.0.1:{world.port}",
        "--socket",
        str(world.sender_socket),
        *options,
    ]


def migrate(
    world: World, name: str, *options: str, to: str | None = None
) -> subprocess.CompletedProcess[str]:
    return run(*request(world, name, *options, to=to))


def assert_refused(result: subprocess.CompletedProcess[str], what: str, status: int = 1) -> None:
    """Check that one line on standard error has what is wrong, and that the status is not 0."""
    assert result.returncode == status, result.stderr
    # guest: the progress of a migration, which on a busy machine takes long enough to be printed.
    # xencall: what Xen's library writes by itself, where it is installed and Xen does not run.
    others = ("guest-", "guest: ", "Usage:", "Try ", "xencall: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    assert len([line for line in lines if line.strip()]) == 1, result.stderr
    assert what in lines[-1]
    assert "Traceback" not in result.stderr


def assert_unharmed(world: World, spec: GuestSpec) -> None:
    """Check that the guest runs at the source, undamaged, and that the destination is empty."""
    from xenbackend.simulated.verify import verify

    deadline = time.monotonic() + WAIT_S
    while world.destination.domains():
        assert time.monotonic() < deadline, "left over at the destination"
        time.sleep(0.01)
    domain = world.source.open(spec.name)
    assert domain.info().state is DomainState.RUNNING
    wait_for_steps(domain, 5)
    domain.suspend()
    assert verify(domain, spec).problems == []
    domain.close()
