# SPDX-License-Identifier: GPL-2.0-or-later
"""Invariant 7: a hostile peer gets an error that names what it did, memory stays limited, and the
daemon's other migrations continue.

In each test one such peer connects to the daemons, which are processes, while a guest is being
migrated between them.
"""

from __future__ import annotations

import contextlib
import socket

import numpy as np
import pytest
import trio

from migrate.cli.world import World, loopback_world
from migrate.errors import PeerClosedError, RefusedError
from migrate.lanes.accept import MAX_STRANGERS_OF_ADDRESS
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.dial import DialledLanes
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.pfns import pfn_array
from migrate.protocol.session import new_id
from migrate.tasks import in_abandoned_thread
from receiver.daemon import MAX_WITHOUT_OFFER
from tests.conftest import MIB
from tests.support.hostile_peers import (
    Receiver,
    Sender,
    Sent,
    hosts_with_daemons,
    line,
    logged,
    numbers,
    on_push,
    phase,
    receiver_of,
    send_all,
    world,
)
from tests.support.links import NO_LINGER
from tests.support.resources import holds
from tests.support.waiting import WAIT_S
from tests.support.waiting import until_async as until
from xenbackend.simulated.guest import GuestSpec

__all__ = ["hosts_with_daemons", "world"]
PAGE = memoryview(bytes(4096))


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (on_push(m.Handover()), "handover in phase precopy"),
        (on_push(m.Offer("other", 8, 8, 1, b"", True, b"key", 0)), "offer in phase precopy"),
        ([(Lane.PUSH, m.Pages(pfn_array([5000])), [PAGE])], "the domain ends at"),
        (
            [(Lane.PULL, m.Pages(pfn_array([1])), [PAGE])],
            "pages on the pull lane before the switchover",
        ),
        (on_push(m.Suspended(), m.Missing(pfn_array([2**30]))), "the domain ends at"),
        (on_push(m.Suspended(), m.Context(b"junk", True)), "not a context of this domain"),
        (
            on_push(m.Suspended(), *[m.Context(bytes(128 * 1024), False)] * 513),
            "context: more than",
        ),
        (on_push(m.Passed(7)), "passed from the sender"),
        (on_push(m.Kept("")), "kept in phase precopy"),
    ],
)
async def test_a_sender_before_the_handover(world: World, sent: Sent, complaint: str) -> None:
    async with Sender.of_a_guest(world) as sender:
        await send_all(sender, sent)
        await until(lambda: phase(world, "receiver", sender.name) == "failed")
        assert complaint in line(world, "receiver", sender.name)["problem"]
        assert sender.name not in [info.name for info in world.destination.domains()]
        with contextlib.suppress(PeerClosedError):
            while not isinstance(answer := (await sender.push.receive())[0], m.Failed):
                pass
            assert complaint in answer.reason


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (on_push(m.Handover()), "handover in phase postcopy"),
        (on_push(m.Completed()), "completed in phase postcopy"),
        (on_push(m.Suspended()), "suspended in phase postcopy"),
        (on_push(m.Abort("never mind")), "abort"),
        ([(Lane.PUSH, m.Pages(pfn_array([200])), [PAGE])], "pfn 0xc8 was not announced as missing"),
        ([(Lane.PULL, m.Pages(pfn_array([200])), [PAGE])], "pfn 0xc8 was not announced as missing"),
        ([(Lane.PULL, m.Pages(pfn_array([5000])), [PAGE])], "the domain ends at"),
        ([(Lane.PULL, m.Fault(pfn_array([20])), [])], "fault from the sender"),
    ],
)  # fmt: skip
async def test_a_sender_after_the_handover(world: World, sent: Sent, complaint: str) -> None:
    """The guest is kept, with the pages that have arrived."""
    async with Sender.of_a_guest(world) as sender:
        await sender.hand_over()
        await send_all(sender, sent)
        await until(lambda: phase(world, "receiver", sender.name) == "interrupted")
        assert logged(world, "receiver", sender.name, complaint)
        target = world.destination.open(sender.name)
        assert target.info().state.value == "running"
        target.destroy()
        await until(lambda: phase(world, "receiver", sender.name) == "failed")


@pytest.mark.parametrize("world", [3], indirect=True)
async def test_connections_that_say_nothing(world: World) -> None:
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(2 * MAX_STRANGERS_OF_ADDRESS):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(
                    socket.create_connection(("127.0.0.1", world.port), timeout=5)
                )
                connections.append(connection)
        await until(lambda: "the oldest are closed" in world.processes["receiver"].log.read_text())
        held = holds(world, "receiver")
        assert held["threads"] < 50
        assert held["descriptors"] < MAX_STRANGERS_OF_ADDRESS + 100
    await until(lambda: holds(world, "receiver")["descriptors"] < 100)


async def test_a_byte_now_and_then() -> None:
    """If the next byte takes longer than ``silence_s``, the peer counts as silent."""
    with loopback_world(64 * MIB, config="[network]\nsilence_s = 3\n") as world:
        async with Sender.of_a_guest(world) as sender:
            for byte in b"XPC1":
                with contextlib.suppress(OSError):
                    sender.push._socket.sendmsg([memoryview(bytes([byte]))])
                await trio.sleep(3.5)
            await until(lambda: phase(world, "receiver", sender.name) == "failed")
            assert (
                line(world, "receiver", sender.name)["problem"]
                == "the peer has sent nothing for 3 s"
            )


async def test_connections_that_are_reset_at_once(world: World) -> None:
    for number in range(300):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", world.port), timeout=5) as connection,
        ):
            if number % 2:
                connection.send(b"XPC1")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    world.check_alive()


async def test_a_sender_that_ends_before_its_pull_lane(world: World) -> None:
    """The memory of its guest at the destination is freed at once, and not only when the wait for
    the pull lane has failed.
    """
    spec = GuestSpec(f"guest{next(numbers)}", 4 * MIB)
    name = spec.name
    push = await DialledLanes(("127.0.0.1", world.port), new_id(), Terms()).push()
    await push.send(m.Offer(name, spec.nr_pfns, spec.nr_pfns, 1, spec.to_bytes(), True, b"key", 0))
    assert isinstance((await push.receive())[0], m.Accepted)
    assert name in [info.name for info in world.destination.domains()]
    push.close()
    await until(lambda: phase(world, "receiver", name) == "failed")
    assert (
        line(world, "receiver", name)["problem"]
        == "the peer closed the connection and did not open its pull lane"
    )
    assert name not in [info.name for info in world.destination.domains()]


@pytest.mark.serial
@pytest.mark.parametrize("world", [3], indirect=True)
async def test_sessions_that_offer_nothing(world: World) -> None:
    """Only sessions that have not ended count, so as many may be started again after their end.

    A session without an offer ends after a minute, so the limit of sessions must be reached within
    a minute.
    """

    def waiting() -> list[str]:
        lines = world.ask("receiver", command="list")["migrations"]
        return [line["id"] for line in lines if not line["domain"] and line["phase"] == "preflight"]

    async def refusals(nursery: trio.Nursery, count: int) -> list[str]:
        """Start so many sessions, some at a time.  Returns the refusals."""
        found, at_once = list[str](), trio.CapacityLimiter(8)

        async def start() -> None:
            async with at_once:
                try:
                    lane = await DialledLanes(("127.0.0.1", world.port), new_id(), Terms()).push()
                    nursery.start_soon(hold, lane)
                except RefusedError as error:
                    found.append(str(error))

        async with trio.open_nursery() as starting:
            for _ in range(count):
                starting.start_soon(start)
        return found

    async with trio.open_nursery() as nursery:
        # On a busy machine the first sessions end before the last ones begin.
        refused = list[str]()
        with trio.fail_after(2 * WAIT_S):
            while len(refused) < 20:
                refused += await refusals(nursery, MAX_WITHOUT_OFFER + 20)
        assert all("have not offered a guest yet" in why for why in refused)
        nursery.cancel_scope.cancel()
    await until(lambda: not waiting())
    async with trio.open_nursery() as nursery:
        assert await refusals(nursery, MAX_WITHOUT_OFFER) == []
        nursery.cancel_scope.cancel()
    await until(lambda: not waiting())


async def hold(lane: LaneConnection) -> None:
    try:
        await trio.sleep_forever()
    finally:
        lane.close()


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (on_push(m.Ready()), "ready in phase precopy"),
        (on_push(m.Passed(99)), "there was no such barrier"),
        (on_push(m.Loaded(pfn_array([1]))), "loaded in phase precopy"),
        (on_push(m.Complete(b"{}")), "complete in phase precopy"),
        (on_push(m.Written(pfn_array(), pfn_array([1]))), "written in phase precopy"),
    ],
)
async def test_a_receiver_before_the_handover(world: World, sent: Sent, complaint: str) -> None:
    async def what(receiver: Receiver) -> None:
        await send_all(receiver, sent)

    async def after(name: str) -> None:
        # At the latest in the middle of the switchover, to which a few of these messages belong.
        await until(lambda: phase(world, "sender", name) == "failed")
        assert complaint.split(" in phase")[0] in line(world, "sender", name)["problem"]
        assert world.source.open(name).info().state.value == "running"

    await receiver_of(world, what, after=after)


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        ([(Lane.PULL, m.Fault(pfn_array([5000])), [])], "the domain ends at"),
        ([(Lane.PULL, m.Fault(pfn_array([1023])), [])], "pfn 0x3ff is not outstanding"),
        (on_push(m.Loaded(pfn_array([1023]))), "pfn 0x3ff was not in transit"),
        (on_push(m.Dropped(pfn_array([1023]))), "a pfn that is not outstanding"),
        (on_push(m.Ready()), "ready in phase postcopy"),
        (on_push(m.Written(pfn_array(), pfn_array([1]))), "offered without checkpoints"),
        (on_push(m.Complete(b"{}")), "complete before resumed"),
        (on_push(m.Resumed(), m.Resumed()), "resumed a second time"),
        (on_push(m.Resumed(), m.Complete(b"{}")), "pages were never confirmed"),
    ],
)  # fmt: skip
async def test_a_receiver_after_the_handover(world: World, sent: Sent, complaint: str) -> None:
    """The guest's pages are kept, and the guest stays suspended."""

    async def what(receiver: Receiver) -> None:
        await receiver.receive(m.Context)
        await receiver.push.send(m.Ready())
        await receiver.receive(m.Handover)
        await send_all(receiver, sent)
        with contextlib.suppress(PeerClosedError):
            while True:
                await receiver.push.receive()

    async def after(name: str) -> None:
        await until(lambda: phase(world, "sender", name) == "interrupted")
        assert logged(world, "sender", name, complaint)
        assert world.source.open(name).info().state.value == "suspended"
        world.ask("sender", command="decide", migration=name, here=True, force=True)
        await until(lambda: phase(world, "sender", name) == "failed")

    await receiver_of(world, what, after=after)


@pytest.mark.serial
@pytest.mark.parametrize("world", [4], indirect=True)
async def test_a_flood_of_faults_by_one_that_reads_nothing(world: World) -> None:
    """Each fault is answered by a page, again and again.  The answers wait in the sender's own
    socket, and the sender reads no further faults meanwhile.
    """

    async def what(receiver: Receiver) -> None:
        await receiver.receive(m.Context)
        await receiver.push.send(m.Ready())
        await receiver.receive(m.Handover)
        await receiver.push.send(m.Resumed())
        # Pages beyond the guest's working set, because a page that the guest wrote lately is sent
        # before the handover, and is not outstanding.
        fault = m.Fault(np.arange(600, 664, dtype=np.uint64))

        def flood() -> None:
            for _ in range(200_000):
                receiver.pull.send_blocking(fault)

        with trio.move_on_after(3):
            await in_abandoned_thread(flood)
        receiver.pull.close()

    async def after(name: str) -> None:
        await until(lambda: phase(world, "sender", name) == "interrupted")
        world.ask("sender", command="decide", migration=name, here=True, force=True)
        await until(lambda: phase(world, "sender", name) == "failed")

    await receiver_of(world, what, after=after)


async def test_an_offer_of_sparse_memory_takes_no_memory_here(world: World) -> None:
    """A set of all pfns below the highest one would take so much memory."""
    spec = GuestSpec(f"guest{next(numbers)}", 4 * MIB)
    push = await DialledLanes(("127.0.0.1", world.port), new_id(), Terms()).push()
    await push.send(m.Offer(spec.name, 2**36, spec.nr_pfns, 1, spec.to_bytes(), True, b"key", 0))
    answer, _pages = await push.receive()
    assert isinstance(answer, m.Refused) and "the guest's memory is too sparse" in answer.reason
    push.close()
