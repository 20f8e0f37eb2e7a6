# SPDX-License-Identifier: GPL-2.0-or-later
"""A host is tried without a migration: what is asked, what is answered, and what is not allowed."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from migrate.errors import MigrationError, PeerClosedError, ProtocolError, RefusedError
from migrate.lanes import accept, trial
from migrate.lanes.accept import AwaitedLanes, Reception
from migrate.lanes.connection import LaneConnection, Terms, connect
from migrate.lanes.ends import RECEIVER
from migrate.lanes.probe import greet, host_of
from migrate.lanes.tls import Tls
from migrate.protocol import messages as m
from migrate.protocol.messages import Hello
from migrate.protocol.pfns import pfn_array
from sender import measure
from sender.measure import Found, Link, try_destination
from tests.support.certificates import HOST, files
from tests.support.waiting import WAIT_S
from xenbackend.contract import DomainConfig
from xenbackend.pages import PAGE_SIZE

__all__ = ["files"]
GUEST = DomainConfig("guest", 4096, 4096, 2, b"platform")
GIB = 2**30


def nobody(_greeting: Hello) -> AwaitedLanes:
    raise MigrationError("no migration was asked for")


def takes_all(_offer: m.Offer) -> str:
    return ""


@contextlib.asynccontextmanager
async def listening(
    tls: Tls | None = None, judge: Callable[[m.Offer], str] | None = takes_all
) -> AsyncIterator[int]:
    async def look() -> m.Host:
        return m.Host("", "native", GIB, "", RECEIVER)

    reception = Reception(nobody, look, Terms(tls=tls), judge)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            serve = functools.partial(trio.serve_tcp, reception.receive, 0, host=HOST)
            yield int((await nursery.start(serve))[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()


async def tried(
    port: int, tls: Tls | None = None, cap: float | None = None, known: Link | None = None
) -> Found:
    return await try_destination((HOST, port), Terms(tls=tls), GUEST, cap, known)


@contextlib.asynccontextmanager
async def in_trial(port: int) -> AsyncIterator[LaneConnection]:
    """The connection of a peer in a trial, after ``host``."""
    lane = await connect(HOST, port, Terms())
    try:
        await greet(lane, Terms(), m.TRIAL)
        await host_of(lane, RECEIVER)
        yield lane
    finally:
        lane.close()


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure links for a short time."""
    monkeypatch.setattr(measure, "LAST_CHUNK", 2**20)


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_the_link_is_measured(files: Callable[..., Tls], with_tls: bool) -> None:
    tls = files() if with_tls else None
    async with listening(tls) as port:
        found = await tried(port, tls)
    assert found.is_encrypted is with_tls and found.host.free_bytes == GIB
    assert found.refusals == {True: "", False: ""}
    assert found.link.bytes_per_s > 0
    assert 0 <= found.link.round_trip_s <= found.link.fault_s


async def test_a_link_that_is_known_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(payload: memoryview) -> None:
        raise AssertionError(f"{len(payload)} bytes were sent")

    monkeypatch.setattr(trial, "_write", write)
    known = Link(1e9, 1e-4, 1e-5)
    async with listening() as port:
        found = await tried(port, known=known)
    assert found.link is known and found.refusals == {True: "", False: ""}


async def test_a_destination_that_falls_silent_ends_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()
    monkeypatch.setattr(trial, "_write", lambda _payload: over.wait(WAIT_S))
    monkeypatch.setattr(measure, "TRIAL_S", 0.2)
    async with listening() as port:
        try:
            with pytest.raises(PeerClosedError, match=r"did not confirm .* within 0.2 s"):
                await tried(port)
        finally:
            over.set()


async def test_a_cap_limits_what_a_measurement_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 KiB are sent in any case, and 512 KiB a second allow no chunk above a quarter of a MiB."""
    sizes: list[int] = []

    def write(payload: memoryview) -> None:
        sizes.append(len(payload))

    monkeypatch.setattr(trial, "_write", write)
    async with listening() as port:
        await tried(port, cap=512 * 1024)
    assert max(sizes) == 256 * 1024
    assert sum(sizes) == (64 + 128 + 256) * 1024 + measure.PAGES_ALONE * PAGE_SIZE


async def test_the_destination_judges_the_guest_with_and_without_paging() -> None:
    offers: list[m.Offer] = []

    def judge(offer: m.Offer) -> str:
        offers.append(offer)
        return "built without memory paging" if offer.paging else ""

    async with listening(judge=judge) as port:
        found = await tried(port)
    assert found.refusals == {True: "built without memory paging", False: ""}
    assert [(offer.name, offer.max_pages) for offer in offers] == [("guest", 4096)] * 2


async def test_a_sender_is_not_tried() -> None:
    async with listening(judge=None) as port:
        with pytest.raises(RefusedError, match=r"this is a sender.*receivers listen on port 8013"):
            await tried(port)


@pytest.mark.parametrize("lacks", ["preflight, trial", "trial"])
async def test_an_older_destination_is_named(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def negotiate(_greeting: Hello) -> None:
        raise ProtocolError(f"the peer requires capabilities that this end does not have: {lacks}")

    monkeypatch.setattr(accept, "negotiate", negotiate)
    async with listening() as port:
        with pytest.raises(MigrationError, match=f"{HOST}:{port} is of an older release, to which"):
            await tried(port)


async def test_another_refusal_is_not_taken_for_an_older_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def negotiate(_greeting: Hello) -> None:
        raise ProtocolError("the peer requires capabilities that this end does not have: checksums")

    monkeypatch.setattr(accept, "negotiate", negotiate)
    async with listening() as port:
        with pytest.raises(MigrationError, match="does not have: checksums"):
            await tried(port)


# ---- the end that is tried ----
@pytest.mark.parametrize("message", [m.Rejoin(), m.Context(b"x", True), m.Defer(0, b"\1")])
async def test_what_does_not_belong_to_a_trial_ends_it(message: m.Message) -> None:
    async with listening() as port, in_trial(port) as lane:
        await lane.send(message)
        answer, _pages = await lane.receive()
        assert isinstance(answer, m.Refused) and answer.reason == f"{message.type} in a trial"
        with pytest.raises(PeerClosedError):
            await lane.receive()


async def test_a_trial_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TRIAL_S", 0.05)
    async with listening() as port, in_trial(port) as lane:
        with pytest.raises(PeerClosedError):
            await lane.receive()


async def test_a_trial_ends_when_too_much_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MOST_BYTES", 4 * PAGE_SIZE)
    async with listening() as port, in_trial(port) as lane:
        await trio.to_thread.run_sync(
            lane.send_blocking, m.Pages(pfn_array(range(4))), [memoryview(bytes(4 * PAGE_SIZE))]
        )
        with pytest.raises(PeerClosedError):
            await lane.receive()


async def confirmed(lane: LaneConnection) -> None:
    """Have a barrier confirmed."""
    await lane.send(m.Barrier(0))
    answer, _pages = await lane.receive()
    assert isinstance(answer, m.Passed)


async def test_peers_measure_in_turn() -> None:
    """Two at once would measure each other."""
    async with listening() as port, in_trial(port) as second:
        async with in_trial(port) as first:
            await confirmed(first)
            await second.send(m.Barrier(0))
            assert not second.is_over(0.05) and not second.readable()
        answer, _pages = await second.receive()
        assert isinstance(answer, m.Passed)


async def test_a_peer_that_keeps_its_turn_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TURN_S", 0.05)
    async with listening() as port, in_trial(port) as slow:
        await confirmed(slow)
        assert (await tried(port)).link.bytes_per_s > 0
        await confirmed(slow)


async def test_guests_are_judged_while_another_peer_measures() -> None:
    async with listening() as port, in_trial(port) as slow:
        await confirmed(slow)
        found = await tried(port, known=Link(1e9, 1e-4, 1e-5))
        assert found.refusals == {True: "", False: ""}


async def test_more_estimates_at_once_than_the_limit_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "MOST_TRIALS_OF_ADDRESS", 1)
    found = []

    async def try_it(port: int) -> None:
        found.append(await tried(port))

    async with listening() as port, trio.open_nursery() as nursery:
        for _number in range(5):
            nursery.start_soon(try_it, port)
    assert len(found) == 5 and all(one.link.bytes_per_s > 0 for one in found)


async def test_trials_of_one_address_leave_room_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "MOST_TRIALS_OF_ADDRESS", 2)
    monkeypatch.setattr(trial, "MOST_TRIALS", 3)
    trials, admitted = trial.Trials(), list[str]()

    async def hold(address: str) -> None:
        async with trials.admitted(address):
            admitted.append(address)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as hostile:
            for _number in range(4):
                hostile.start_soon(hold, "hostile")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(hold, "other")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(hold, "third")
            await trio.testing.wait_all_tasks_blocked()
            assert admitted == ["hostile"] * 2 + ["other"]
            hostile.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert admitted == ["hostile"] * 2 + ["other", "third"]
        nursery.cancel_scope.cancel()


async def test_a_crowd_of_silent_connections_ends_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "MAX_STRANGERS_OF_ADDRESS", 2)
    async with listening() as port, in_trial(port) as lane:
        await confirmed(lane)
        crowd = [await connect(HOST, port, Terms()) for _number in range(3)]
        assert await trio.to_thread.run_sync(crowd[0].is_over, WAIT_S)
        await confirmed(lane)
        for one in crowd:
            one.close()


async def test_a_destination_that_answers_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(lane: LaneConnection) -> None:
        with contextlib.suppress(PeerClosedError):
            while True:
                message, _payload = lane.receive_blocking()
                if isinstance(message, m.Barrier):
                    lane.send_blocking(m.Ready())
                elif isinstance(message, m.Offer):
                    lane.send_blocking(m.Accepted("", b""))

    async def serve(_trials: trial.Trials, lane: LaneConnection, _judge: trial.Judge) -> None:
        await trio.to_thread.run_sync(answer, lane)

    monkeypatch.setattr(trial.Trials, "serve", serve)
    async with listening() as port:
        with pytest.raises(MigrationError, match="answered with ready instead of passed"):
            await tried(port)


async def test_a_destination_that_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MOST_BYTES", 128 * 1024)
    async with listening() as port:
        with pytest.raises(PeerClosedError):
            await tried(port)
