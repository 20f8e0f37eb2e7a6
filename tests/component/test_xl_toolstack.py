# SPDX-License-Identifier: GPL-2.0-or-later
"""What the sender does with a domain of xl's, and when: not while xl is still working on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.service.config import Config
from migrate.service.journal import Journal
from sender.daemon import SenderDaemon
from sender.toolstack import UNKNOWN_XL_S, XL_DESTROY_TIMEOUT_S, XlToolstack
from tests.support import zygote
from tests.support.guests import busy
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


def pids_held() -> int:
    """Return the number of descriptors of processes that this process has."""
    held = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this folder is closed meanwhile
            held += os.readlink(descriptor) == "anon_inode:[pidfd]"
    return held


class Helper:
    """A helper of xl that ends before it is answered."""

    async def answer(self, event: str, **_fields: object) -> None:
        assert event == "offer"
        raise trio.BrokenResourceError


@pytest.mark.parametrize("is_stopping", [True, False], ids=["a sender that ends", "no helper"])
async def test_a_request_of_xl_that_leads_to_no_migration_leaves_no_descriptor(
    clean_hosts: World, name: str, tmp_path: Path, is_stopping: bool
) -> None:
    domid = clean_hosts.source.create_guest(busy(name).to_bytes()).domid
    journal, helper = Journal(tmp_path), cast(Any, Helper())
    daemon = SenderDaemon(clean_hosts.source, tmp_path / "sender.sock", Config(), journal)
    daemon._stopping = is_stopping
    request, held = {"command": "save", "domid": domid, "xl": os.getpid()}, pids_held()
    for _again in range(3):
        with pytest.raises(MigrationError if is_stopping else trio.BrokenResourceError):
            await daemon._handle(request, helper)
    assert pids_held() == held
