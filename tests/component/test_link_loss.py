# SPDX-License-Identifier: GPL-2.0-or-later
"""The link is lost.  Before the handover the guest stays at the source, afterwards at the
destination, and nothing else is lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError, RefusedError
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.dial import DialledLanes
from migrate.options import MigrationOptions, Strategy
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.session import hello
from migrate.service.journal import Journal
from receiver.peer import Peer
from sender.migration import OutgoingMigration
from sender.push import PushLane
from sender.transfer import Transfer
from tests.conftest import MIB
from tests.support.guests import busy, goes_on_here_only, steps
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, Patch, cut_when, until_cut
from tests.support.waiting import until_async as until
from xenbackend.contract import DomainState
from xenbackend.errors import NoSuchDomainError

SLOWLY = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=MIB)


def watch(links: list[Link]) -> Callable[[Outcome, Link], Awaitable[None]]:
    async def meanwhile(_outcome: Outcome, link: Link) -> None:
        links.append(link)

    return meanwhile


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
    await goes_on_here_only(clean_hosts, name)


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
        await goes_on_here_only(clean_hosts, name)


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


async def test_while_the_link_is_down_the_guest_goes_on_as_far_as_its_pages_allow(
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
        await goes_on_here_only(clean_hosts, name)
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


async def test_garbage_on_a_lane_ends_the_lanes_and_not_the_migration(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    garbled: list[str] = []
    loaded = m.Loaded.header

    def garble(self: m.Loaded) -> dict[str, object]:
        header = loaded(self)
        if not garbled:
            garbled.append("loaded")
            header["pfns"] = b"not eight"
        return header

    monkeypatch.setattr(m.Loaded, "header", garble)
    outcome = await migrate(clean_hosts, busy(name))
    assert garbled and outcome.error is None
    assert outcome.migration.context.statistics.rejoins == 1
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_nobody_else_takes_a_session_up(clean_hosts: World, name: str) -> None:
    """Without the key of the session, or with a token that was used, a lane is refused with a
    reason.
    """
    refusals: list[str] = []

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        for key in (b"", b"guessed", b"another"):
            thief = DialledLanes(("127.0.0.1", link.port), outcome.migration.id, Terms())
            thief.keep(key)
            thief.hurry()  # the migration itself does not wait for the thief
            try:
                (await thief.again(refusals.append)).close()
            except RefusedError as error:
                refusals.append(str(error))

    # The guest's memory takes longer to arrive than the thief takes.
    slow = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=4 * MIB)
    spec = busy(name, rate=2000, working_set_bytes=MIB)
    outcome = await migrate(clean_hosts, spec, options=slow, meanwhile=meanwhile)
    assert outcome.error is None
    assert outcome.migration.context.statistics.rejoins == 0
    assert len(refusals) == 3 and all("wrong or used token" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    "answer", [m.Rejoined("postcopy", b"t"), m.Complete(b"{}"), m.Ended(False, "x"), m.Failed("x")]
)
async def test_another_daemon_at_its_address_cannot_answer_for_the_destination(
    clean_hosts: World, name: str, answer: m.Message
) -> None:
    """If the sender believed the answer, it would destroy the pages that the guest still lacks, or
    refuse to send them.
    """

    async def pretend(stream: trio.SocketStream) -> None:
        lane = await LaneConnection.from_stream(stream, Terms())
        try:
            theirs = await lane.receive_hello()
            await lane.send(hello(Lane(theirs.lane), theirs.session))
            with contextlib.suppress(MigrationError):
                await lane.receive()  # rejoin
                await lane.send(answer)
                await lane.receive()
        finally:
            lane.close()

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        real = link.to
        async with trio.open_nursery() as impostor:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            impostor.start_soon(trio.serve_listeners, pretend, [listener])
            link.to = listener.socket.getsockname()
            link.cut()
            await until(lambda: "session's key" in outcome.migration.progress.problem)
            link.to = real
            impostor.cancel_scope.cancel()
        link.cut()

    slow = MigrationOptions(Strategy.POSTCOPY, bandwidth_bytes_per_s=4 * MIB)
    spec = busy(name, rate=2000, working_set_bytes=MIB)
    outcome = await migrate(clean_hosts, spec, options=slow, meanwhile=meanwhile)
    assert outcome.error is None and outcome.incoming.phase == "completed"
    assert (await verification(clean_hosts, spec)).problems == []


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
async def test_a_guest_that_an_operator_has_decided_against_stands_still_when_the_link_is_back(
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
    await goes_on_here_only(clean_hosts, name)


async def test_a_guest_that_was_not_handed_over_stands_still_though_an_operator_has_started_it(
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
    await goes_on_here_only(clean_hosts, name)


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


async def test_pages_are_checked_from_end_to_end(clean_hosts: World, name: str) -> None:
    """One bit in the middle of a page is flipped."""

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.damage(
            lambda data: (
                data[:-100] + bytes([data[-100] ^ 1]) + data[-99:] if len(data) > 4096 else data
            )
        )

    outcome = await migrate(
        clean_hosts, busy(name), terms=Terms(checksums=True), meanwhile=meanwhile
    )
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_an_abort_that_is_damaged_in_transit_is_sent_again(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Found by chaos: the sender took the refusal of its damaged ``abort`` for an answer, and the
    receiver stayed in doubt.
    """
    links = cut_when(monkeypatch, Peer, m.Ready, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until(lambda: outcome.incoming.phase == "in doubt")
        await until(lambda: outcome.migration.phase == "failed")
        link.damage(lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:])
        link.is_up = True

    outcome = await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=meanwhile)
    assert outcome.incoming.phase == "failed"
    assert clean_hosts.destination.domains() == []


async def test_a_sender_killed_after_completed_has_a_successor_that_destroys_the_source(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """Found by killing at random: the receiver has rightly removed the session by then."""
    with monkeypatch.context() as patch:

        async def killed(self: Transfer) -> None:
            raise MigrationError("killed")

        patch.setattr(Transfer, "_finish", killed)
        outcome = await migrate(clean_hosts, busy(name))
    assert outcome.incoming.phase == "completed"
    assert clean_hosts.source.open(name).info().state is DomainState.SUSPENDED
    journal = Journal(clean_hosts.directory / "journal")
    facts = journal.entries()[outcome.migration.id]
    assert facts["step"] == "completing"
    lanes = DialledLanes(("127.0.0.1", 1), outcome.migration.id, Terms())
    successor = OutgoingMigration.of_predecessor(
        outcome.migration.id, clean_hosts.source, lanes, journal, facts
    )
    await successor.run()
    assert clean_hosts.source.domains() == []
    assert outcome.migration.id not in journal.entries()


@pytest.mark.parametrize("session", ["../../elsewhere", "a/b", "a.b", ""])
async def test_a_session_id_that_is_no_name_is_refused(
    clean_hosts: World, name: str, session: str
) -> None:
    """A peer chooses the session's identifier, which becomes the name of a file."""
    refusals: list[str] = []

    async def meanwhile(_outcome: Outcome, link: Link) -> None:
        with pytest.raises(RefusedError) as info:
            await DialledLanes(("127.0.0.1", link.port), session, Terms()).push()
        refusals.append(str(info.value))

    outcome = await migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is None
    assert len(refusals) == 1 and "letters and digits" in refusals[0]


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
