# SPDX-License-Identifier: GPL-2.0-or-later
"""The link is lost.  Before the handover the guest stays at the source, afterwards at the
destination, and nothing else is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.lanes.connection import LaneConnection, Terms
from migrate.options import MigrationOptions, Strategy
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from receiver.peer import Peer
from sender.push import PushLane
from tests.conftest import MIB
from tests.support.guests import busy, continues_here_only, steps
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, Patch, cut_when, until_cut
from tests.support.waiting import until_async as until
from xenbackend.contract import DomainState
from xenbackend.errors import NoSuchDomainError


def watch(links: list[Link]) -> Callable[[Outcome, Link], Awaitable[None]]:
    async def meanwhile(_outcome: Outcome, link: Link) -> None:
        links.append(link)

    return meanwhile


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.HYBRID])
@pytest.mark.parametrize("cuts", range(6))
async def test_cut_anywhere_after_the_handover_nothing_is_lost(
    clean_hosts: World, name: str, strategy: Strategy, cuts: int
) -> None:
    """The first pair of lanes lasts until the handover.  Then one pair after the other is cut, at
    any byte.
    """
    cut_at = [3_000_001, 17, 900_000, 5_000_003, 12_345, 2_097_152]

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.cut()

    budgets: list[int | None] = [None, None]
    for number in range(cuts):
        at = cut_at[number]
        budgets += [at, None] if number % 2 else [None, at // 50]
    outcome = await migrate(clean_hosts, busy(name), strategy, budgets=budgets, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.migration.context.statistics.rejoins >= 1
    assert (await verification(clean_hosts, busy(name))).problems == []
    assert [domain.name for domain in clean_hosts.source.domains()] == []


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("cls", "sent", "before"),
    [
        (PushLane, m.Handover, True),
        (PushLane, m.Handover, False),
        (Peer, m.Resumed, True),
        (Peer, m.Resumed, False),
        (Peer, m.Report, True),
        (Peer, m.Loaded, True),
        (Peer, m.Complete, True),
        (Peer, m.Complete, False),
        (PushLane, m.Rejoin, True),
        (Peer, m.Outstanding, True),
        (Peer, m.Rejoined, True),
        (Peer, m.Rejoined, False),
        (PushLane, m.Completed, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strategy", [Strategy.POSTCOPY, Strategy.PRECOPY])
async def test_cut_at_any_message_from_the_handover_on_the_guest_arrives(
    clean_hosts: World,
    name: str,
    monkeypatch: Patch,
    cls: type,
    sent: type[m.Message],
    before: bool,
    strategy: Strategy,
) -> None:
    if strategy is Strategy.PRECOPY and sent in (m.Outstanding, m.Loaded, m.Report):
        strategy = Strategy.HYBRID
    links = cut_when(monkeypatch, cls, sent, before=before)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        links.append(link)
        if sent in (m.Rejoin, m.Outstanding, m.Rejoined):  # these need a cut before
            await until(lambda: outcome.migration.ownership.handed_over)
            link.cut()

    outcome = await migrate(clean_hosts, busy(name), strategy, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.incoming.phase == "completed"
    assert (await verification(clean_hosts, busy(name))).problems == []
    assert clean_hosts.source.domains() == []


@pytest.mark.parametrize(
    ("cls", "sent"),
    [
        (PushLane, m.Offer),
        (Peer, m.Accepted),
        (PushLane, m.Barrier),
        (PushLane, m.Suspended),
        (PushLane, m.Context),
        (Peer, m.Ready),
    ],
)
async def test_cut_before_the_handover_the_guest_stays_and_nothing_is_left_over(
    clean_hosts: World, name: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture,
    cls: type, sent: type[m.Message],
) -> None:  # fmt: skip
    links = cut_when(monkeypatch, cls, sent, before=True)
    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=watch(links))
    assert outcome.error is not None
    assert not outcome.migration.ownership.handed_over
    begins = f"the migration of {name} has ended without completing: "
    records = [record for record in caplog.messages if record.startswith(begins)]
    assert len(records) == 1 + (sent is not m.Offer), "each end leaves one record"
    assert all('"reason": "' in record and '"phase": "' in record for record in records)
    await continues_here_only(clean_hosts, name)


async def test_cut_behind_the_context_the_guest_is_at_one_end(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Which end has the guest depends on whether ``ready`` or the cut comes first."""
    links = cut_when(monkeypatch, PushLane, m.Context, before=False)
    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=watch(links))
    assert not links, "it was cut"
    if outcome.migration.ownership.handed_over:
        assert outcome.error is None
        assert (await verification(clean_hosts, busy(name))).problems == []
        assert clean_hosts.source.domains() == []
    else:
        assert outcome.error is not None
        await continues_here_only(clean_hosts, name)


async def test_ready_is_lost_and_the_receiver_waits(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The receiver cannot find out which end has the guest, until the sender is connected again."""
    links = cut_when(monkeypatch, Peer, m.Ready, before=True, down=True)
    in_doubt = trio.Event()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.incoming.phase == "in doubt")
        await until(lambda: outcome.migration.phase == "failed")
        assert clean_hosts.source.open(name).info().state is DomainState.RUNNING
        assert clean_hosts.destination.open(name).info().state is DomainState.INCOMING
        assert "may or may not have handed the guest over" in outcome.incoming.progress.problem
        link.is_up = True
        in_doubt.set()

    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=meanwhile)
    assert in_doubt.is_set()
    assert outcome.incoming.phase == "failed"
    assert "the sender gave up" in outcome.incoming.progress.problem
    assert clean_hosts.destination.domains() == []


async def test_abort_is_sent_to_a_receiver_that_may_be_ready(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Found by chaos: the receiver's successor treats the receiver as ready from ``suspended`` in
    its journal on.
    """
    links = cut_when(monkeypatch, PushLane, m.Suspended, before=False, down=True)
    outcome = await migrate(clean_hosts, busy(name), meanwhile=watch(links))
    assert outcome.error is not None
    assert (
        Journal(clean_hosts.directory / "journal").entries()[outcome.migration.id]["step"]
        == "given up"
    )


async def test_abort_is_sent_until_the_receiver_has_it(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """A message that was sent may not have arrived."""
    links = cut_when(monkeypatch, Peer, m.Ready, before=True)
    reconnect = Peer.reconnect
    deaf: list[str] = []

    async def loses_it(self: Peer, note: Callable[[str], None]) -> None:
        await reconnect(self, note)
        if not deaf:
            deaf.append("once")
            self.close()

    monkeypatch.setattr(Peer, "reconnect", loses_it)
    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=watch(links))
    assert deaf and outcome.error is not None
    assert "the sender gave up" in outcome.incoming.progress.problem
    assert clean_hosts.destination.domains() == []


async def test_while_the_link_is_down_the_guest_continues_as_far_as_its_pages_allow(
    clean_hosts: World, name: str
) -> None:
    """This tests invariants 1, 5 and 6."""
    spec = busy(name, rate=2000, working_set_bytes=MIB)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        target = clean_hosts.destination.open(name)
        await until(lambda: target.info().state is DomainState.RUNNING and min(steps(target)) > 0)
        link.down()
        await until(lambda: outcome.migration.phase == outcome.incoming.phase == "interrupted")
        with pytest.raises(MigrationError, match="too late"):
            outcome.migration.requests.cancel("by the test")
        assert clean_hosts.source.open(name).info().state is DomainState.SUSPENDED
        assert target.info().state is DomainState.RUNNING
        assert "its missing pages are kept here" in outcome.migration.progress.problem
        assert "waits for its missing pages" in outcome.incoming.progress.problem
        await until(lambda: link.connections > 3)  # the sender tries to connect
        link.is_up = True
        outcome.migration.context.lanes.hurry()

    outcome = await migrate(clean_hosts, spec, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.migration.progress.problem == outcome.incoming.progress.problem == ""
    assert (await verification(clean_hosts, spec)).problems == []


@pytest.mark.parametrize("here", [True, False])
async def test_a_guest_that_is_saved_while_pages_are_missing(
    clean_hosts: World, name: str, here: bool
) -> None:
    """The guest is saved by a program that ignores missing pages.  The image has holes, so the
    source keeps its pages until an operator decides.
    """

    async def meanwhile(outcome: Outcome, _link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        with clean_hosts.destination.open(name) as target:
            await until(lambda: target.state() is DomainState.RUNNING)
            target.suspend()
            target.destroy()

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert isinstance(outcome.error, MigrationError)
    progress = outcome.migration.progress
    assert outcome.migration.phase == "interrupted" and outcome.incoming.phase == "failed"
    for problem in (progress.problem, outcome.incoming.progress.problem):
        assert "pages were missing when it was suspended" in problem
        assert "an image or a copy that was made of it then lacks them" in problem
    assert clean_hosts.source.open(name).state() is DomainState.SUSPENDED
    if here:  # a copy of the guest may run elsewhere
        with pytest.raises(MigrationError, match="--force"):
            await outcome.migration.requests.decide(here=True)
    await outcome.migration.requests.decide(here=here, force=here)
    assert outcome.migration.phase == "failed"
    if here:
        await continues_here_only(clean_hosts, name)
    else:
        assert clean_hosts.source.domains() == []


async def test_one_end_alone_notices(clean_hosts: World, name: str) -> None:
    """The lanes of the other end look alive; it notices by the new lanes."""

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.cut_left()

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.migration.context.statistics.rejoins == 1
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_the_guest_ends_while_the_link_is_down(clean_hosts: World, name: str) -> None:
    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        target = clean_hosts.destination.open(name)
        await until(lambda: target.info().state is DomainState.RUNNING)
        link.down()
        await until(lambda: outcome.incoming.phase == "interrupted")
        target.destroy()
        await outcome.incoming.ended.wait()
        assert outcome.migration.phase == "interrupted"
        link.is_up = True

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert "ended at the destination" in str(outcome.error)
    with pytest.raises(NoSuchDomainError):
        clean_hosts.source.open(name)


async def test_a_lost_message_that_the_guest_has_ended_is_sent_again(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The receiver has sent the message, and the link loses it."""
    send, lost = LaneConnection.send, trio.Event()

    async def lose(self: LaneConnection, message: m.Message) -> None:
        if isinstance(message, m.Ended) and not lost.is_set():
            lost.set()
        else:
            await send(self, message)

    monkeypatch.setattr(LaneConnection, "send", lose)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        target = clean_hosts.destination.open(name)
        await until(lambda: target.info().state is DomainState.RUNNING)
        target.destroy()
        await lost.wait()
        link.cut()

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert "ended at the destination" in str(outcome.error)


@pytest.mark.parametrize("before_the_handover", [True, False])
async def test_a_link_that_says_nothing_is_given_up(
    clean_hosts: World, name: str, before_the_handover: bool
) -> None:
    """No connection is closed; each end notices the loss by itself."""

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        if before_the_handover:
            await until(lambda: outcome.migration.phase == "precopy")
            link.stop()
            return
        await until(lambda: outcome.migration.ownership.handed_over)
        link.stop()
        await until(lambda: outcome.migration.phase == "interrupted")
        await until(
            lambda: outcome.incoming.phase in ("interrupted", "in doubt")
        )  # with the message in transit
        link.go()

    spec = busy(name, rate=1000) if before_the_handover else busy(name)
    options = (
        MigrationOptions(Strategy.HYBRID, bandwidth_bytes_per_s=4 * MIB)
        if before_the_handover
        else None
    )
    # While no guest waits, the longer of the two limits counts.
    terms = Terms(silence_s=2) if before_the_handover else Terms(postcopy_silence_s=2)
    outcome = await migrate(clean_hosts, spec, terms=terms, meanwhile=meanwhile, options=options)
    if before_the_handover:
        assert "has sent nothing" in str(outcome.error) + outcome.incoming.progress.problem
        assert clean_hosts.source.open(name).info().state is DomainState.RUNNING
        assert clean_hosts.destination.domains() == []
    else:
        assert outcome.error is None
        assert (await verification(clean_hosts, spec)).problems == []


async def test_a_handover_that_is_lost_in_a_silent_link_is_noticed_early(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """No page is missing, and the guest runs at neither end until the handover is sent again."""
    send_blocking, links = PushLane.send_blocking, list[Link]()

    def send_into_silence(self: PushLane, message: m.Message) -> None:
        if isinstance(message, m.Handover) and links:
            trio.from_thread.run_sync(links.pop().stop)
        send_blocking(self, message)

    monkeypatch.setattr(PushLane, "send_blocking", send_into_silence)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        links.append(link)
        await until(lambda: outcome.migration.phase == "interrupted")
        assert outcome.migration.context.backlog.unacknowledged == 0
        assert clean_hosts.destination.open(name).info().state is DomainState.INCOMING
        link.go()

    terms = Terms(silence_s=3600, postcopy_silence_s=2)
    outcome = await migrate(
        clean_hosts, busy(name), Strategy.PRECOPY, terms=terms, meanwhile=meanwhile
    )
    assert outcome.error is None and not links
    assert outcome.migration.context.statistics.rejoins == 1
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_slow_link_is_not_a_silent_one(clean_hosts: World, name: str) -> None:
    """All pages of the guest are one batch, which the link carries in 8 s."""

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.piece, link.delay_s = 8192, 1 / 16

    spec = busy(name, memory_bytes=MIB, working_set_bytes=MIB)
    terms = Terms(postcopy_silence_s=2)
    outcome = await migrate(clean_hosts, spec, terms=terms, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.migration.context.statistics.rejoins == 0
    assert (await verification(clean_hosts, spec)).problems == []
