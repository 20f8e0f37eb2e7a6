# SPDX-License-Identifier: GPL-2.0-or-later
"""One end never comes back, or an operator decides as if it did not: the guest runs where the
decision has it.
"""

from __future__ import annotations

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.options import MigrationOptions, Strategy
from migrate.protocol import messages as m
from receiver.peer import Peer
from sender.push import PushLane
from tests.conftest import MIB
from tests.support.guests import busy, continues_here_only
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, Patch, cut_when, until_cut
from tests.support.waiting import until_async as until
from xenbackend.contract import DomainState

SLOWLY = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=MIB)


async def test_the_sender_never_comes_back_and_an_operator_lets_the_guest_run(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The handover was sent and did not arrive, so neither end can decide alone.  When the link is
    back, the migration continues.
    """
    links = cut_when(monkeypatch, PushLane, m.Handover, before=True, down=True)
    ran = trio.Event()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.incoming.phase == "in doubt")
        target = clean_hosts.destination.open(name)
        assert target.info().state is DomainState.INCOMING
        await outcome.incoming.requests.decide(here=True)
        await until(lambda: target.info().state is DomainState.RUNNING)
        assert outcome.incoming.phase == "interrupted"
        with pytest.raises(MigrationError, match="nothing to decide"):
            await outcome.incoming.requests.decide(here=False)
        ran.set()
        link.is_up = True

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert ran.is_set()
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_the_destination_never_comes_back_and_an_operator_takes_the_guest_back(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    links = cut_when(monkeypatch, PushLane, m.Handover, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.migration.phase == "interrupted")
        await until(lambda: outcome.incoming.phase == "in doubt")
        await outcome.migration.requests.decide(here=True)
        await until(lambda: clean_hosts.source.open(name).info().state is DomainState.RUNNING)
        link.is_up = True  # if the destination comes back nevertheless, it is informed

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert "an operator has decided" in str(outcome.error)
    assert outcome.incoming.phase == "failed"
    assert clean_hosts.destination.domains() == []


@pytest.mark.parametrize("then", ["elsewhere", "here"])
async def test_a_guest_that_an_operator_has_decided_against_is_paused_when_the_link_is_back(
    clean_hosts: World, name: str, then: str
) -> None:
    """The guest is not destroyed: an operator may have been wrong, and then decides which of the
    two continues.
    """

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        target = clean_hosts.destination.open(name)
        await until(lambda: target.info().state is DomainState.RUNNING)
        await until(lambda: outcome.migration.context.entry.ran)
        link.down()
        await until(lambda: outcome.migration.phase == "interrupted")
        with pytest.raises(MigrationError, match=r"has reported that .* runs there.*--force"):
            await outcome.migration.requests.decide(here=True)
        await outcome.migration.requests.decide(here=True, force=True)
        await until(lambda: clean_hosts.source.open(name).info().state is DomainState.RUNNING)
        link.is_up = True
        incoming = outcome.incoming
        await until(lambda: incoming.phase == "held")
        await until(lambda: target.info().state is DomainState.PAUSED)
        assert "an operator has decided at the source" in incoming.progress.problem
        if then == "here":
            with pytest.raises(MigrationError, match=r"if you are certain.*--force"):
                await incoming.requests.decide(here=True)
            await incoming.requests.decide(here=True, force=True)
            await until(lambda: target.info().state is DomainState.RUNNING)
            await until(lambda: incoming.phase == "lost")
            target.destroy()
        else:
            await incoming.requests.decide(here=False)
        await until(lambda: incoming.phase == "failed")

    outcome = await migrate(clean_hosts, busy(name), options=SLOWLY, meanwhile=meanwhile)
    assert "an operator has decided" in str(outcome.error)
    await continues_here_only(clean_hosts, name)


async def test_a_guest_that_was_not_handed_over_is_paused_though_an_operator_has_started_it(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The operator of the destination was wrong: the source had given up, and runs the guest."""
    links = cut_when(monkeypatch, Peer, m.Ready, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.incoming.phase == "in doubt")
        await until(lambda: outcome.migration.phase == "failed")
        await outcome.incoming.requests.decide(here=True)
        target = clean_hosts.destination.open(name)
        await until(lambda: target.info().state is DomainState.RUNNING)
        link.is_up = True
        await until(lambda: outcome.incoming.phase == "held")
        await until(lambda: target.info().state is DomainState.PAUSED)
        await outcome.incoming.requests.decide(here=False)

    outcome = await migrate(clean_hosts, busy(name), options=SLOWLY, meanwhile=meanwhile)
    assert outcome.incoming.phase == "failed"
    await continues_here_only(clean_hosts, name)


@pytest.mark.parametrize(
    "when", ["both ends are connected", "the link is down", "an operator can decide"]
)
async def test_a_source_that_is_destroyed_takes_the_missing_pages_with_it(
    clean_hosts: World, name: str, when: str
) -> None:
    """Both ends report the loss, and no operator can let the guest continue at a host that has no
    domain of it.
    """

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        migration = outcome.migration
        await until(lambda: migration.context.entry.ran)
        target = clean_hosts.destination.open(name)
        if when != "both ends are connected":
            link.down()
            await until(lambda: migration.phase == "interrupted")
        clean_hosts.source.open(name).destroy()
        if when == "an operator can decide":
            with pytest.raises(MigrationError, match="does not exist here any more"):
                await migration.requests.decide(here=True, force=True)
        link.is_up = True
        await until(lambda: outcome.incoming.phase == "lost")
        await until(lambda: migration.id not in migration.context.journal.entries())
        assert "exist nowhere any more" in outcome.incoming.progress.problem
        assert "the pages that it lacks at the destination are lost" in migration.progress.problem
        assert migration.phase == "failed"
        for here in (True, False):
            with pytest.raises(MigrationError, match="failed"):
                await migration.requests.decide(here=here, force=True)
        assert target.info().state is DomainState.RUNNING
        target.destroy()

    await migrate(clean_hosts, busy(name), options=SLOWLY, meanwhile=meanwhile)
