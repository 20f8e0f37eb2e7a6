# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that is destroyed, shut down or rebooted by its administrator in the middle of its
migration: both ends report what has happened to the guest, and nothing is left of it.
"""

from __future__ import annotations

import logging

import pytest

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.options import MigrationOptions, Strategy
from sender.preflight import check_free
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate
from tests.support.links import Link
from tests.support.waiting import until_async as until
from xenbackend.simulated.client import SimulatedDomain

ENDS = {
    "destroyed": "its domain was destroyed",
    "shut down": "it has shut down",
    "rebooted": "it has rebooted",
}
SLOWLY = 2**20


def end(domain: SimulatedDomain, how: str) -> None:
    """End the guest, and destroy its domain as a toolstack does."""
    if how != "destroyed":
        domain.shut_down(reboot=how == "rebooted")
    domain.destroy()


def check_nothing_is_left(world: World, outcome: Outcome) -> None:
    assert world.source.domains() == world.destination.domains() == []
    assert outcome.migration.context.journal.entries() == {}


def records(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the records of migrations that ended without completing."""
    return [text for text in caplog.messages if "has ended without completing" in text]


@pytest.mark.parametrize("how", ENDS)
async def test_a_guest_that_ends_while_pages_are_missing_is_reported_so(
    clean_hosts: World, name: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until(lambda: outcome.migration.context.entry.ran)
        end(clean_hosts.destination.open(name), how)

    slowly = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=SLOWLY)
    outcome = await migrate(clean_hosts, busy(name), options=slowly, meanwhile=meanwhile)
    assert outcome.incoming.progress.problem == ENDS[how]
    at_source = f"the guest ended at the destination: {ENDS[how]}"
    assert outcome.migration.progress.problem == at_source
    check_nothing_is_left(clean_hosts, outcome)
    assert len(records(caplog)) == 2 and all(ENDS[how] in text for text in records(caplog))


@pytest.mark.parametrize("how", ENDS)
async def test_a_guest_that_ends_while_it_is_copied_is_reported_so(
    clean_hosts: World, name: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """No failed call about its domain takes the place of the reason."""
    caplog.set_level(logging.WARNING)

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until(lambda: outcome.migration.phase == "precopy")
        await until(lambda: outcome.migration.progress.pages_done > 0)
        end(clean_hosts.source.open(name), how)

    slowly = MigrationOptions(Strategy.HYBRID, bandwidth_bytes_per_s=SLOWLY)
    outcome = await migrate(clean_hosts, busy(name), options=slowly, meanwhile=meanwhile)
    reason = f"{name} has ended during the migration: {ENDS[how]}"
    assert outcome.migration.progress.problem == reason
    assert outcome.incoming.progress.problem == f"the sender gave up: {reason}"
    check_nothing_is_left(clean_hosts, outcome)
    assert len(records(caplog)) == 2 and all(reason in text for text in records(caplog))


@pytest.mark.parametrize("reboot", [False, True])
def test_a_guest_that_has_shut_down_is_refused_and_not_called_crashed(
    clean_hosts: World, name: str, reboot: bool
) -> None:
    """Its domain is still there: ``on_poweroff = "preserve"``."""
    domain = clean_hosts.source.create_guest(busy(name).to_bytes())
    domain.shut_down(reboot=reboot)
    with pytest.raises(MigrationError, match=f"{name} is shut down: only a running guest"):
        check_free(domain, MigrationOptions())
