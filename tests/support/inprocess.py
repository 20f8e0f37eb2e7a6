# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration with both daemons' code in the test's own process, so that a test can break parts of
it.

The hosts are still processes, and the lanes real TCP connections.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from migrate.cli.world import World, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.lanes.tls import Tls
from migrate.options import MigrationOptions, PolicyOptions, Strategy
from migrate.protocol.session import new_id
from migrate.service.config import Config, NetworkConfig, TlsConfig
from migrate.service.journal import Journal
from migrate.tasks import isolated
from receiver.daemon import ReceiverDaemon
from receiver.migration import IncomingMigration
from sender.migration import OutgoingMigration
from sender.policy import Decision, DefaultPolicy, PrecopyProgress
from tests.support.links import Link, link
from tests.support.waiting import WAIT_S
from xenbackend.errors import XenError
from xenbackend.find import find_domain
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import Verification


@dataclass(frozen=True)
class LeavesPages(DefaultPolicy):
    """The default policy, which takes the link for slow: with ``hybrid`` pages stay missing."""

    def decide(self, progress: PrecopyProgress) -> Decision:
        return super().decide(replace(progress, bytes_per_s=0.0))


class Receiver(ReceiverDaemon):
    """A receiver that keeps each migration, also when the migration has ended."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.begun: list[IncomingMigration] = []

    def _start(self, migration: IncomingMigration) -> None:
        self.begun.append(migration)
        super()._start(migration)


@dataclass
class Outcome:
    migration: OutgoingMigration
    error: Exception | None = None
    receiver: Receiver = field(init=False)
    arrivals: Journal = field(init=False)
    """The journal of the receiver."""
    connections: int = 0

    @property
    def incoming(self) -> IncomingMigration:
        (migration,) = self.receiver.begun
        return migration


Meanwhile = Callable[[Outcome, Link], Awaitable[None]]


async def migrate(
    world: World,
    spec: GuestSpec,
    strategy: Strategy = Strategy.POSTCOPY,
    *,
    options: MigrationOptions | None = None,
    timeout_s: float = WAIT_S,
    budgets: list[int | None] | None = None,
    terms: Terms = Terms(),
    sender_tls: Tls | None = None,
    meanwhile: Meanwhile | None = None,
    decide_as: type[DefaultPolicy] = LeavesPages,
) -> Outcome:
    """Boot the guest at the source and migrate it.  A failure is in the outcome, and is not raised.

    ``budgets``: those of the link between the ends.  ``meanwhile`` is called during the migration,
    with the outcome, which is still being filled in, and with the link.
    """
    guest = world.source.create_guest(spec.to_bytes())
    await trio.to_thread.run_sync(wait_for_steps, guest, 100)
    guest.close()
    journal, arrivals = (Journal(world.directory / name) for name in ("journal", "arrivals"))
    receiver = Receiver(world.destination, world.receiver_socket, _config(terms), arrivals)
    # The bandwidth is so low that the guest touches pages before they are pushed, also on a busy
    # machine.
    options = options or MigrationOptions(
        strategy, PolicyOptions(max_rounds=2), bandwidth_bytes_per_s=32 * 2**20
    )
    policy = decide_as(options.strategy, options.policy)
    with trio.fail_after(timeout_s):
        async with trio.open_nursery() as nursery:
            session = new_id()
            between = await _link_to(receiver, nursery, budgets)
            lanes = DialledLanes(
                ("127.0.0.1", between.port), session, replace(terms, tls=sender_tls)
            )
            target = find_domain(world.source.domains(), spec.name).id
            outcome = Outcome(
                OutgoingMigration.of_request(
                    session, world.source, target, lanes, options, journal, policy=policy
                )
            )
            outcome.receiver, outcome.arrivals = receiver, arrivals
            if meanwhile is not None:
                nursery.start_soon(meanwhile, outcome, between)
            try:
                await outcome.migration.run()
                await outcome.migration.linger()
            except (MigrationError, XenError) as error:
                outcome.error = error
                nursery.start_soon(outcome.migration.linger)
            for incoming in receiver.begun:
                await incoming.ended.wait()
            outcome.connections = between.connections
            nursery.cancel_scope.cancel()
    assert session not in journal.entries() or outcome.error is not None
    return outcome


async def _link_to(
    receiver: Receiver, nursery: trio.Nursery, budgets: list[int | None] | None
) -> Link:
    """Have the receiver accept connections.  Returns a link that leads to it."""
    receiver._nursery = nursery

    async def receive(stream: trio.SocketStream) -> None:
        await isolated("a connection", receiver.reception.receive, stream)

    listeners = await nursery.start(functools.partial(trio.serve_tcp, receive, 0, host="127.0.0.1"))
    return await link(nursery, ("127.0.0.1", listeners[0].socket.getsockname()[1]), budgets)


def _config(terms: Terms) -> Config:
    """Return the configuration of a receiver with these terms."""
    network = NetworkConfig(
        checksums=terms.checksums,
        silence_s=terms.silence_s,
        postcopy_silence_s=terms.postcopy_silence_s,
    )
    tls = terms.tls
    return Config(
        network,
        TlsConfig()
        if tls is None
        else TlsConfig(str(tls.certificate), str(tls.key), str(tls.authority), tls.peers),
    )


async def verification(world: World, spec: GuestSpec) -> Verification:
    result, _view = await trio.to_thread.run_sync(verify_migrated, world, spec)
    return result
