# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that has to save a guest waits until its memory has arrived, for as long as pages
arrive.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from migrate.cli.world import World, start_receiver
from migrate.errors import MigrationError
from migrate.service.config import Config
from migrate.service.journal import BOOT_ID, Journal
from receiver.daemon import NO_PROGRESS_TIMEOUT_S, ReceiverDaemon
from receiver.ownership import INHERITED
from receiver.progress import IncomingProgress
from tests.support.daemons import world
from tests.support.left import left_by_a_receiver
from xenbackend.contract import Hypervisor

__all__ = ["world"]


@dataclass
class Incoming:
    """A migration, with what a daemon reads of it for this request."""

    domid: int
    missing: int | None
    domain_name: str = "web"
    has_ended: bool = False
    is_lost: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    progress: IncomingProgress = field(default_factory=lambda: IncomingProgress("web"))


class Client:
    def __init__(self) -> None:
        self.answers: list[tuple[str, dict[str, Any]]] = []

    async def answer(self, event: str, **fields: Any) -> None:
        self.answers.append((event, fields))


async def asked(
    tmp_path: Path, *migrations: Incoming, domid: int = 7, journal: Journal | None = None
) -> Client:
    journal = journal or Journal(tmp_path / "state")
    daemon = ReceiverDaemon(Hypervisor, tmp_path / "socket", Config(), journal)  # type: ignore[arg-type]
    daemon._migrations = {str(number): m for number, m in enumerate(migrations)}  # type: ignore[misc]
    client = Client()
    await daemon._handle({"command": "await-memory", "domid": domid}, client)  # type: ignore[arg-type]
    return client


@pytest.mark.parametrize("migrations", [(), (Incoming(8, 5),), (Incoming(7, 5, has_ended=True),)])
async def test_a_domain_of_which_nothing_is_missing_is_not_waited_for(
    tmp_path: Path, migrations: tuple[Incoming, ...]
) -> None:
    assert (await asked(tmp_path, *migrations)).answers == [("result", {})]


async def test_as_long_as_memory_comes_there_is_no_limit(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    migration = Incoming(7, 10)

    async def arrive() -> None:
        while migration.missing:
            await trio.sleep(NO_PROGRESS_TIMEOUT_S * 0.9)
            migration.missing -= 1
        migration.has_ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(arrive)
        answers = (await asked(tmp_path, migration)).answers
    assert answers[-1] == ("result", {})
    assert answers[0] == ("progress", {"arrived": 0, "missing": 10})
    assert trio.current_time() > 8 * NO_PROGRESS_TIMEOUT_S


async def test_where_none_comes_it_is_refused(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(
        MigrationError, match="3 pages of web have still to come, and none has come for 60 s"
    ):
        await asked(tmp_path, Incoming(7, 3))


async def test_a_paused_guest_with_all_its_memory_can_be_saved(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A sender of an older release does not end before the guest runs."""
    assert (await asked(tmp_path, Incoming(7, 0))).answers[-1] == ("result", {})


# ---- unknown numbers ----
async def test_a_guest_whose_missing_pages_are_not_counted_is_not_saved(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A restarted receiver could not resume the migration for longer than the patience.  Before,
    the guest was saved with holes in the place of its missing pages.
    """
    migration = Incoming(7, None)
    migration.progress.problem = "the migration cannot be resumed yet: getdomaininfo: busy"
    with pytest.raises(
        MigrationError,
        match=r"it is not known yet how many pages of web are missing \(.*: busy\): try again",
    ):
        await asked(tmp_path, migration)


async def test_the_patience_begins_when_the_missing_pages_are_counted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    migration = Incoming(7, None)

    async def arrive() -> None:
        await trio.sleep(NO_PROGRESS_TIMEOUT_S * 0.9)
        migration.missing = 10
        await trio.sleep(NO_PROGRESS_TIMEOUT_S * 0.9)
        migration.missing, migration.has_ended = 0, True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(arrive)
        answers = (await asked(tmp_path, migration)).answers
    assert answers[0] == ("progress", {"arrived": 0, "missing": 0})
    assert ("progress", {"arrived": 0, "missing": 10}) in answers
    assert answers[-1] == ("result", {})


def test_before_a_migration_is_resumed_its_missing_pages_are_not_counted(tmp_path: Path) -> None:
    host: Any = object()
    for step in INHERITED:
        assert left_by_a_receiver(host, Journal(tmp_path), step).missing is None


# ---- entries that were not resumed ----
@pytest.mark.parametrize(
    ("domid", "may_be"), [(7, True), (8, False), (None, True), ("seven", True), (10**30, True)]
)
async def test_a_guest_that_an_entry_which_was_not_resumed_may_be_of_is_not_saved(
    tmp_path: Path, domid: object, may_be: bool
) -> None:
    """Before, the guest was saved at once, with holes in the place of its missing pages."""
    journal = Journal(tmp_path / "state")
    journal.write("other", {"step": "of another release"})
    journal.leave("other", ValueError("this release does not have the step"), "web", domid)
    if not may_be:
        assert (await asked(tmp_path, journal=journal)).answers == [("result", {})]
        return
    with pytest.raises(MigrationError, match=r"memory of the guest may have .*remove the file"):
        await asked(tmp_path, journal=journal)
    (tmp_path / "state" / "other.json").unlink()  # as the answer states
    assert (await asked(tmp_path, journal=journal)).answers == [("result", {})]


async def test_a_receiver_refuses_while_it_has_an_entry_that_it_cannot_use(world: World) -> None:
    world.stop("receiver")
    path = world.directory / "destination.sock.state" / "receiver" / "other.json"
    facts = {"boot": BOOT_ID.read_text().strip(), "step": "of another release", "domid": 7}
    path.write_text(f"\n{json.dumps(facts)}")
    start_receiver(world)
    with pytest.raises(MigrationError, match=rf"memory of the guest may have .*{path}"):
        world.ask("receiver", command="await-memory", domid=7)
    world.ask("receiver", command="await-memory", domid=8)
