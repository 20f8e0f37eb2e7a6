# SPDX-License-Identifier: GPL-2.0-or-later
"""The file system of the state directory becomes read-only in the middle of a migration.

Linux then reports EROFS for a removal also if there is no such file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World
from migrate.service.journal import Journal
from receiver import checkpoints as receiver_checkpoints
from receiver.checkpoints import Checkpoints
from receiver.recovery import Predecessor
from receiver.statistics import PagerStatistics
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.left import left_by_a_receiver
from tests.support.links import Link
from tests.support.protected import protected, slow_guest
from tests.support.waiting import until_async
from xenbackend.contract import DomainState
from xenbackend.simulated.client import SimulatedDomain

Patch = pytest.MonkeyPatch
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def becomes_read_only(monkeypatch: Patch, directory: Path) -> None:
    """Let nothing be made, opened to be written, renamed or removed in a directory.  Files that are
    open already can still be written.
    """

    def refuse_if(refused: bool) -> None:
        if refused:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def is_in(path: Any) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(directory)

    opened, unlink, rename, utime = os.open, os.unlink, os.rename, os.utime

    def open_to_read(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        refuse_if(is_in(path) and bool(flags & TO_WRITE))
        return opened(path, flags, *arguments, **options)

    def unlink_elsewhere(path: Any, **options: Any) -> None:
        refuse_if(is_in(path))
        unlink(path, **options)

    def rename_elsewhere(path: Any, *arguments: Any, **options: Any) -> None:
        refuse_if(is_in(path))
        rename(path, *arguments, **options)

    def utime_elsewhere(path: Any, *arguments: Any, **options: Any) -> None:
        refuse_if(is_in(path))
        utime(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "unlink", unlink_elsewhere)
    monkeypatch.setattr(os, "rename", rename_elsewhere)
    monkeypatch.setattr(os, "utime", utime_elsewhere)


async def test_a_guest_arrives_all_the_same(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until_async(lambda: outcome.migration.ownership.handed_over)
        becomes_read_only(monkeypatch, clean_hosts.directory / "arrivals")

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    monkeypatch.undo()
    assert outcome.error is None and outcome.incoming.phase == "completed"
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_protected_guest_keeps_its_sender(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The guest is suspended for a checkpoint when its file system becomes read-only."""
    suspend, stopped = SimulatedDomain.suspend, list[str]()

    def suspend_on_a_failing_disk(self: SimulatedDomain) -> None:
        if self._host is clean_hosts.destination and not stopped:
            stopped.append(name)
            becomes_read_only(monkeypatch, clean_hosts.directory / "arrivals")
        suspend(self)

    monkeypatch.setattr(SimulatedDomain, "suspend", suspend_on_a_failing_disk)
    outcome = await protected(clean_hosts, slow_guest(name))
    monkeypatch.undo()
    assert stopped and outcome.error is None and outcome.incoming.phase == "completed"
    assert outcome.migration.context.statistics.rejoins == 0
    assert "Read-only file system" in outcome.incoming.progress.unprotected
    assert (await verification(clean_hosts, slow_guest(name))).problems == []


def test_a_guest_that_another_program_suspends_later_stays_suspended(
    boot: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The file that could not be removed does not state that a checkpoint has stopped the guest."""
    _spec, domain = boot()
    monkeypatch.setattr(receiver_checkpoints, "SUSPENDS_LATE_S", 0)
    stopped = tmp_path / "guest.stopped"
    made = Checkpoints(domain, 1, lambda *_: None, PagerStatistics(), stopped, lambda _why: None)
    with made._suspended():
        becomes_read_only(monkeypatch, tmp_path)
    assert stopped.exists() and domain.state() is DomainState.RUNNING
    domain.suspend()
    made.resume_if_suspended()
    assert domain.state() is DomainState.SUSPENDED


def test_a_successor_serves_a_guest_although_the_note_of_its_stop_stays(
    boot: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    _spec, domain = boot()
    context = left_by_a_receiver(domain._host, Journal(tmp_path), "taken over").requests.context
    context.entry.stopped.touch()
    domain.suspend()
    becomes_read_only(monkeypatch, tmp_path)
    Predecessor(context, context.entry.offer, "taken over")._undo_stop(
        domain, DomainState.SUSPENDED
    )
    assert domain.state() is DomainState.RUNNING
