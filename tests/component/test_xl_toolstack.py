# SPDX-License-Identifier: GPL-2.0-or-later
"""What the sender does with a domain of xl's, and when: not while xl is still working on it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from sender.toolstack import UNKNOWN_XL_S, XL_DESTROY_TIMEOUT_S, XlToolstack
from tests.support import zygote
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import no_such_domain


class Suspended:
    """A domain that xl has left suspended, until the sender destroys it."""

    def __init__(self) -> None:
        self.destroyed_by = ""

    def state(self) -> DomainState:
        if self.destroyed_by:
            raise no_such_domain(1)
        return DomainState.SUSPENDED

    def info(self) -> Suspended:
        self.state()
        return self

    name = "web--migratedaway"

    def destroy(self) -> None:
        self.state()
        self.destroyed_by = "us"


@pytest.fixture
def xl() -> Iterator[subprocess.Popen[bytes]]:
    process = zygote.Popen[bytes](["sleep", "600"])
    yield process
    process.kill()
    process.wait()


async def finished(xl_pid: int, domain: Suspended) -> float:
    """Return the time at which it has finished, on a clock that jumps."""
    toolstack = XlToolstack("web", Path("/nowhere"), None, xl_pid)
    began = trio.current_time()
    real: Domain = domain  # type: ignore[assignment]
    await toolstack.finish(real)
    toolstack.close()
    return trio.current_time() - began


async def test_a_domain_is_left_to_an_xl_that_is_still_at_it(
    xl: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock
) -> None:
    """Each hotplug script takes half a minute."""
    domain = Suspended()

    async def destroy_slowly() -> None:
        await trio.sleep(XL_DESTROY_TIMEOUT_S / 2)
        domain.destroyed_by = "xl"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(destroy_slowly)
        await finished(xl.pid, domain)
    assert domain.destroyed_by == "xl"


async def test_what_an_xl_leaves_that_has_ended_is_destroyed_at_once(
    xl: subprocess.Popen[bytes],
) -> None:
    domain = Suspended()
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(finished, xl.pid, domain)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert domain.state() is DomainState.SUSPENDED
            xl.kill()
    assert domain.destroyed_by == "us"


@pytest.mark.parametrize("pid", [0, 1])
async def test_where_xl_is_not_known_it_has_time(
    pid: int, autojump_clock: trio.testing.MockClock
) -> None:
    """The sender was restarted, or init had adopted the helper already."""
    domain = Suspended()
    assert await finished(pid, domain) >= UNKNOWN_XL_S
    assert domain.destroyed_by == "us"


async def test_a_program_that_never_ends_does_not_keep_a_domain_for_good(
    xl: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock
) -> None:
    """The program is libvirt's daemon."""
    domain = Suspended()
    assert await finished(xl.pid, domain) >= XL_DESTROY_TIMEOUT_S
    assert domain.destroyed_by == "us"
