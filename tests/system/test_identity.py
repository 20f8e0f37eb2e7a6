# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests name a domain or a migration without confusion.  A number is no name, and a name is no
identifier.  A domain that has got the number of another domain is a different domain.
"""

from __future__ import annotations

import json
import signal
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.cli.world import World, start_receiver, start_sender, verify_migrated, wait_for_steps
from migrate.errors import MigrationError, UnknownMigrationError
from migrate.service.journal import Kept
from migrate.service.lifecycle import find_migration
from tests.conftest import MIB
from tests.support.daemons import (
    begin,
    boot,
    copying,
    journal,
    kill,
    last_entry,
    lines,
    phase,
    states,
    world,
)  # fmt: skip
from tests.support.waiting import until
from xenbackend.contract import DomainInfo, DomainState
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.find import find_domain
from xenbackend.simulated.guest import GuestSpec

__all__ = ["world"]


# ---- which domain ----
def info(domid: int, name: str) -> DomainInfo:
    return DomainInfo(domid, name, DomainState.RUNNING, 1024, 1024, 1, handle=bytes([domid]) * 16)


HOST = [
    info(1, "2"),
    info(2, "web"),
    info(3, "db"),
    info(4, "twin"),
    info(5, "twin"),
    info(6, "77"),
]


@pytest.mark.parametrize(
    ("text", "domid"),
    [("web", 2), ("1", 1), ("3", 3), ("4", 4), (str(uuid.UUID(bytes=bytes([1]) * 16)), 1),
     (str(uuid.UUID(bytes=bytes([5]) * 16)).upper(), 5)],
)  # fmt: skip
def test_a_domain_is_found_by_what_fits_it_alone(text: str, domid: int) -> None:
    assert find_domain(HOST, text).domid == domid


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("2", "the number of 'web' and the name of the domain with the number 1"),
        ("77", "that is the name of the domain with the number 6"),
        ("twin", "more than one such domain: name it by one of these numbers: 4, 5"),
        ("", "no such domain"),
        ("01", "no such domain"),
        ("²", "no such domain"),
        ("we", "no such domain"),
    ],
)
def test_a_domain_that_could_be_another_is_not_guessed(text: str, complaint: str) -> None:
    with pytest.raises(XenError, match=complaint):
        find_domain(HOST, text)


# ---- which migration ----
@dataclass
class Known:
    id: str
    domain_name: str
    has_ended: bool = False


MIGRATIONS = [
    Known("db12cafe" + 24 * "0", "web"),
    Known("11111111" + 24 * "0", "mail", has_ended=True),
    Known("22222222" + 24 * "0", "mail"),
    Known("33333333" + 24 * "0", "mail", has_ended=True),
    Known("44444444" + 24 * "0", "old", has_ended=True),
    Known("55555555" + 24 * "0", "old", has_ended=True),
    Known("66666666" + 24 * "0", "db12cafe"),
    Known("77777777" + 24 * "0", ""),
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("web", 0),
        ("mail", 2),
        ("old", 5),
        ("11111111", 1),
        ("db12cafe0", 0),
        ("22222222" + 24 * "0", 2),
    ],
)
def test_a_migration_is_found_by_name_or_id(text: str, found: int) -> None:
    assert find_migration(MIGRATIONS, text) is MIGRATIONS[found]


@pytest.mark.parametrize("text", ["", "db", "d", "1111111", "nobody"])
def test_a_name_is_not_taken_for_the_beginning_of_an_id(text: str) -> None:
    with pytest.raises(UnknownMigrationError, match="no migration"):
        find_migration(MIGRATIONS, text)


def test_a_name_that_is_also_an_id_fits_two_migrations() -> None:
    with pytest.raises(
        MigrationError, match=r"more than one migration .db12cafe. here: .* 66666666, db12cafe"
    ):
        find_migration(MIGRATIONS, "db12cafe")


KEPT = [
    Kept("44444444" + 24 * "1", Path("old.json"), "old", 3, "start the release that wrote it"),
    Kept("22222222" + 24 * "0", Path("mail.json"), "mail", 4, "restart this daemon"),
    Kept("33333333" + 24 * "0", Path("mail2.json"), "mail", 4, "restart this daemon"),
]


@pytest.mark.parametrize("text", ["old", "44444444", "44444444" + 24 * "1", "33333333"])
def test_an_entry_that_was_not_resumed_is_found_before_a_migration_that_has_ended(
    text: str,
) -> None:
    """Before, `decide` answered that the migration has ended, while its guest waited."""
    with pytest.raises(MigrationError, match=r"start the release|restart this daemon"):
        find_migration(MIGRATIONS, text, KEPT)


@pytest.mark.parametrize(("text", "found"), [("mail", 2), ("22222222", 2), ("55555555", 5)])
def test_other_migrations_are_found_as_without_such_an_entry(text: str, found: int) -> None:
    assert find_migration(MIGRATIONS, text, KEPT) is MIGRATIONS[found]


# ---- daemons ----


def test_the_successor_of_a_sender_takes_no_guest_for_another_by_its_name(world: World) -> None:
    """The other guest's name is the number of the migrated one."""
    bystander, web = boot(world, "2", seed=7), boot(world, "web", seed=8)
    assert [(i.domid, i.name) for i in world.source.domains()] == [(1, "2"), (2, "web")]
    begin(world, "web")
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "sender")
    start_sender(world)
    until(lambda: phase(world, "sender") == "completed", "it does not complete")
    verification, _view = verify_migrated(world, web)
    assert verification.problems == []
    assert states(world, bystander.name) == {"source": ["running"], "destination": []}


def test_a_request_that_fits_two_guests_is_refused(world: World) -> None:
    boot(world, "2")
    boot(world, "web")
    with pytest.raises(MigrationError, match="the number of 'web' and the name of"):
        begin(world, "2")
    assert lines(world, "sender") == []


@pytest.mark.parametrize("in_precopy", [True, False])
def test_the_successor_of_a_sender_leaves_another_domain_with_the_same_number_alone(
    world: World, in_precopy: bool
) -> None:
    """The guest is destroyed while the sender is dead, and another guest gets its number."""
    boot(world)
    begin(world, "guest", strategy="precopy" if in_precopy else "postcopy")
    until(
        lambda: copying(world) if in_precopy else phase(world, "sender") == "postcopy",
        "it does not begin",
    )
    kill(world, "sender")
    (before,) = world.source.domains()
    world.source.open(before.domid).destroy()
    boot(world, "bystander", domid=before.domid)
    start_sender(world)
    until(lambda: phase(world, "sender") == "failed", "it does not end")
    assert "does not exist at the source any more" in lines(world, "sender")[-1]["problem"]
    assert states(world, "bystander") == {"source": ["running"], "destination": []}
    with world.source.open("bystander") as guest:
        wait_for_steps(guest, 20)


@pytest.mark.parametrize("step", ["made", "ready", "taken over", "decided elsewhere"])
def test_the_successor_of_a_receiver_leaves_another_domain_with_the_same_number_alone(
    world: World, step: str
) -> None:
    boot(world)
    begin(world, "guest")
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    entry = journal(world, "receiver")
    kill(world, "receiver")
    (before,) = world.destination.domains()
    world.destination.open(before.domid).destroy()
    spec = GuestSpec("bystander", 4 * MIB)
    bystander = world.destination.create_guest(spec.to_bytes(), domid=before.domid)
    facts = last_entry(entry)
    entry.write_text("\n" + json.dumps({**facts, "step": step}))
    start_receiver(world, world.port)
    until(lambda: phase(world, "receiver") == "failed", "it does not end")
    assert [i.name for i in world.destination.domains()] == ["bystander"]
    wait_for_steps(bystander, 20)
    bystander.close()


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_journal_of_a_release_without_handles_is_taken_up(world: World, which: str) -> None:
    spec = boot(world)
    begin(world, "guest")
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    entry = journal(world, which)
    kill(world, which)
    facts = last_entry(entry)
    del facts["handle"]
    entry.write_text("\n" + json.dumps(facts))
    start_sender(world) if which == "sender" else start_receiver(world, world.port)
    until(
        lambda: phase(world, "sender") == phase(world, "receiver") == "completed",
        "it does not complete",
    )
    verification, _view = verify_migrated(world, spec)
    assert verification.problems == []


def test_a_guest_that_is_renamed_meanwhile_is_the_same_guest(world: World) -> None:
    """The migration keeps the name with which it began, and its successor finds the guest."""
    boot(world)
    begin(world, "guest")
    until(lambda: phase(world, "sender") == "postcopy", "no postcopy")
    with world.source.open("guest") as suspended:
        suspended.rename("other")
    world.stop("sender", signal.SIGKILL)
    boot(world, "guest")
    start_sender(world)
    until(
        lambda: phase(world, "sender") == phase(world, "receiver") == "completed",
        "it does not complete",
    )
    assert [(i.name, i.state) for i in world.source.domains()] == [("guest", DomainState.RUNNING)]


def test_a_handle_of_another_domain_is_no_such_domain(world: World) -> None:
    boot(world)
    (there,) = world.source.domains()
    with world.source.open(there.domid, there.handle) as domain:
        world.source.open(there.domid).destroy()
        boot(world, "bystander", domid=there.domid)
        for call in (domain.info, domain.state, domain.destroy):
            with pytest.raises(NoSuchDomainError, match="another domain has this number now"):
                call()
