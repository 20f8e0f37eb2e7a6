# SPDX-License-Identifier: GPL-2.0-or-later
"""A helper of xl is answered however its migration ends, and an exchange ends with its helper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from migrate.cli.world import World
from migrate.control.client import Json
from migrate.service.config import Config
from migrate.service.journal import Journal
from receiver.daemon import ReceiverDaemon
from receiver.migration import IncomingMigration
from receiver.ownership import State
from sender.daemon import SenderDaemon
from sender.migration import OutgoingMigration
from tests.support.guests import busy
from xenbackend.errors import no_such_domain

DESTROYED = "the domain of web was destroyed"


class Helper:
    """The daemon's end of an exchange with a helper."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, Json]] = []
        self.has_left = trio.Event()

    async def request(self) -> None:
        await self.has_left.wait()

    async def answer(self, event: str, **fields: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.answers.append((event, fields))


def restore_request() -> Json:
    return {
        "command": "restore", "session": "5e5510", "domid": 7, "token": "00",
        "address": ["127.0.0.1", 1], "ports": {"store": 1, "console": 2},
    }  # fmt: skip


@pytest.fixture
def receiver(clean_hosts: World, tmp_path: Path) -> ReceiverDaemon:
    return ReceiverDaemon(
        clean_hosts.destination, tmp_path / "receiver.sock", Config(), Journal(tmp_path)
    )


async def test_a_restore_whose_domain_was_destroyed_fails(
    receiver: ReceiverDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a guest is not reported as a failure to restore the guest."""

    async def ends(self: IncomingMigration) -> None:
        self._context.ownership._state = State.ENDED
        self.progress.problem = DESTROYED
        self.ended.set()

    monkeypatch.setattr(IncomingMigration, "run", ends)
    helper = Helper()
    with trio.fail_after(10):
        async with trio.open_nursery() as receiver._nursery:
            await receiver._handle(restore_request(), cast(Any, helper))
            receiver._nursery.cancel_scope.cancel()
    assert helper.answers == [("error", {"message": DESTROYED})]


async def test_the_exchange_ends_with_a_helper_although_its_migration_continues(
    receiver: ReceiverDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def goes_on(self: IncomingMigration) -> None:
        self._context.ownership._state = State.READY
        await trio.sleep_forever()

    monkeypatch.setattr(IncomingMigration, "run", goes_on)
    helper = Helper()
    with trio.fail_after(10):
        async with trio.open_nursery() as receiver._nursery:
            receiver._nursery.start_soon(_leave, helper)
            await receiver._handle(restore_request(), cast(Any, helper))
            assert receiver._migrations and helper.has_left.is_set()
            receiver._nursery.cancel_scope.cancel()
    assert helper.answers == []


async def _leave(helper: Helper) -> None:
    await trio.testing.wait_all_tasks_blocked()
    helper.has_left.set()


async def test_a_save_whose_domain_is_gone_is_left_to_xl(
    clean_hosts: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(self: OutgoingMigration) -> None:
        raise no_such_domain(self.domain.domid)

    monkeypatch.setattr(OutgoingMigration, "_find_domain", find)
    domid = clean_hosts.source.create_guest(busy(name).to_bytes()).domid
    daemon = SenderDaemon(clean_hosts.source, tmp_path / "sender.sock", Config(), Journal(tmp_path))
    helper = Helper()
    with trio.fail_after(10):
        async with trio.open_nursery() as daemon._nursery:
            await daemon._handle({"command": "save", "domid": domid}, cast(Any, helper))
            daemon._nursery.cancel_scope.cancel()
    events = [event for event, _fields in helper.answers]
    assert events[0] == "offer" and events[-1] == "declined"
