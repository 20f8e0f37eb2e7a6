# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile senders and receivers, and daemons that migrate a bystander while such a peer is
connected.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import trio

from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from migrate.errors import MigrationError, PeerClosedError
from migrate.lanes.accept import AwaitedLanes, Reception
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.dial import DialledLanes
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.session import new_id, new_token
from migrate.tasks import in_abandoned_thread
from tests.conftest import MIB
from tests.support.daemons import listed
from tests.support.links import no_look
from tests.support.resources import holds
from tests.support.waiting import until_async as until
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

MORE_MIB = 96
"""The memory in MiB that a peer may make a daemon use, for the threads and buffers of several
hundred connections.
"""
FROM_POSTCOPY_ON = ("postcopy", "completing", "completed")
"""Phases of a receiver.  On a busy machine a phase may end before it is noticed."""
numbers = itertools.count(1)
MISSING = np.arange(16, 64, dtype=np.uint64)


@pytest.fixture(scope="module")
def hosts_with_daemons() -> Iterator[World]:
    with loopback_world(512 * MIB) as made:
        yield made


@pytest.fixture
async def world(hosts_with_daemons: World, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Yield daemons between which a migration runs during the test and then completes.  A parameter
    is its duration in seconds.
    """
    world, seconds = hosts_with_daemons, getattr(request, "param", 1)
    spec = GuestSpec(
        f"bystander{next(numbers)}", 8 * MIB, 2, workload="random", zero_permille=0, rate=2000
    )
    guest = world.source.create_guest(spec.to_bytes())
    await trio.to_thread.run_sync(wait_for_steps, guest, 50)
    guest.close()
    before = {which: holds(world, which)["MiB"] for which in ("sender", "receiver")}
    errors: list[Exception] = []

    def bystander() -> None:
        try:
            world.ask(
                "sender", command="migrate", domain=spec.name,
                destination=f"127.0.0.1:{world.port}", strategy="postcopy",
                bandwidth=8 * MIB // seconds,
            )  # fmt: skip
        except MigrationError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_abandoned_thread, bystander)
        await until(lambda: bool(errors) or phase(world, "receiver", spec.name) in FROM_POSTCOPY_ON)
        assert not errors
        yield world
        more = {which: holds(world, which)["MiB"] - before[which] for which in before}
        assert max(more.values()) < MORE_MIB, more
    assert not errors
    verification, _view = await trio.to_thread.run_sync(verify_migrated, world, spec)
    assert verification.problems == []
    world.check_alive()
    world.destination.open(spec.name).destroy()


def line(world: World, which: str, name: str) -> dict[str, Any]:
    found = listed(world, which, name)
    return found[-1] if found else {"phase": "", "problem": ""}


def phase(world: World, which: str, name: str) -> str:
    return str(line(world, which, name)["phase"])


def logged(world: World, which: str, name: str, complaint: str) -> bool:
    """Whether the log has a complaint.  ``list`` shows the present reason, which soon changes."""
    return any(
        name in line and complaint in line
        for line in world.processes[which].log.read_text().splitlines()
    )


# ---- a sender ----
@dataclass
class Sender:
    """The sender of a guest that is suspended.  It sends whatever the test demands."""

    world: World
    guest: SimulatedDomain
    name: str
    push: LaneConnection
    pull: LaneConnection

    @classmethod
    @contextlib.asynccontextmanager
    async def of_a_guest(cls, world: World) -> AsyncIterator[Sender]:
        """Yield a sender whose offer was accepted, in precopy."""
        spec = GuestSpec(f"guest{next(numbers)}", 4 * MIB, 1)
        guest = world.source.create_guest(spec.to_bytes())
        guest.suspend()
        config = guest.config()
        lanes = DialledLanes(("127.0.0.1", world.port), new_id(), Terms())
        push = await lanes.push()
        await push.send(
            m.Offer(
                config.name,
                config.nr_pfns,
                config.max_pages,
                config.vcpus,
                config.platform,
                True,
                b"key",
                0,
            )
        )
        accepted, _pages = await push.receive()
        assert isinstance(accepted, m.Accepted)
        pull = await lanes.pull(accepted.token)
        try:
            yield cls(world, guest, spec.name, push, pull)
        finally:
            push.close()
            pull.close()
            with contextlib.suppress(MigrationError):
                world.ask("receiver", command="decide", migration=spec.name, here=False)
            guest.destroy()

    async def hand_over(self) -> None:
        """Hand over as the protocol demands."""
        everything = np.arange(self.guest.nr_pfns, dtype=np.uint64)
        with self.guest.map_pages(everything) as mapped:
            data = everything[mapped.status == 0]
            await trio.to_thread.run_sync(
                self.push.send_blocking, m.Pages(data, everything[mapped.status == 1]), mapped.data
            )
        for message in (m.Suspended(), m.Missing(MISSING), m.Context(self.guest.context(), True)):
            await self.push.send(message)
        assert isinstance((await self.push.receive())[0], m.Ready)
        await self.push.send(m.Handover())
        assert isinstance((await self.push.receive())[0], m.Resumed)


Sent = list[tuple[Lane, m.Message, list[memoryview]]]


def on_push(*messages: m.Message) -> Sent:
    return [(Lane.PUSH, message, []) for message in messages]


async def send_all(peer: Sender | Receiver, sent: Sent) -> None:
    for lane, message, payload in sent:
        connection = peer.push if lane is Lane.PUSH else peer.pull
        with contextlib.suppress(PeerClosedError):  # the daemon has closed the connection
            await trio.to_thread.run_sync(connection.send_blocking, message, payload)


# ---- a receiver ----
@dataclass
class Receiver:
    """A receiver that accepts every offer, and then sends whatever the test demands."""

    push: LaneConnection
    pull: LaneConnection

    async def receive(self, *kinds: type[m.Message]) -> m.Message:
        while not isinstance(message := (await self.push.receive())[0], kinds):
            if isinstance(message, m.Barrier):
                await self.push.send(m.Passed(message.number))
        return message


async def receiver_of(
    world: World,
    what: Callable[[Receiver], Awaitable[None]],
    *,
    after: Callable[[str], Awaitable[None]],
) -> None:
    """Have the sender migrate a guest to a receiver that does ``what``.  ``after`` is called with
    the guest's name.
    """
    spec = GuestSpec(f"guest{next(numbers)}", 4 * MIB, 1, workload="random", zero_permille=0)
    guest = world.source.create_guest(spec.to_bytes())
    # The sender dials again when its lanes are closed; the new connection is closed as well.
    with contextlib.closing(AwaitedLanes()) as awaited:
        await _receive_of(world, spec, awaited, what, after)
    guest.destroy()


async def _receive_of(
    world: World,
    spec: GuestSpec,
    awaited: AwaitedLanes,
    what: Callable[[Receiver], Awaitable[None]],
    after: Callable[[str], Awaitable[None]],
) -> None:
    async with trio.open_nursery() as nursery:
        reception = Reception(lambda _greeting: awaited, no_look, Terms())
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, reception.receive, [listener])

        def ask() -> None:
            with contextlib.suppress(MigrationError):
                client = world.control("sender")
                client.send(
                    command="migrate",
                    domain=spec.name,
                    destination=f"127.0.0.1:{port}",
                    strategy="postcopy",
                )
                client.answer()
                client.close()

        nursery.start_soon(trio.to_thread.run_sync, ask)
        push = await awaited.push()
        assert isinstance((await push.receive())[0], m.Offer)
        token = new_token()
        await push.send(m.Accepted("native", token))
        pull = await awaited.pull(token)
        try:
            with trio.move_on_after(30):
                await what(Receiver(push, pull))
            await after(spec.name)
        finally:
            push.close()
            pull.close()
            nursery.cancel_scope.cancel()
