# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes on the link that the peer has not sent: they are noticed, and neither they nor a stranger
that tries to resume a session cost the guest anything.
"""

from __future__ import annotations

import contextlib

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
from receiver.peer import Peer
from tests.conftest import MIB
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, Patch, cut_when, until_cut
from tests.support.waiting import until_async as until


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
    """If the sender accepted the answer, it would destroy the pages that the guest still lacks, or
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
