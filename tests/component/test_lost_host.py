# SPDX-License-Identifier: GPL-2.0-or-later
"""The host to which a protected guest has gone is lost, and an operator has the guest continue at
the source.  The daemons are processes, and the sender may be killed as well.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from migrate.cli.world import World, loopback_world, start_sender, wait_for_steps
from tests.conftest import MIB
from tests.support.daemons import kill, lines, note
from tests.support.protected import EVERY_S, verified_at_source
from tests.support.waiting import until
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec


@pytest.fixture
def world() -> Iterator[World]:
    with loopback_world(256 * MIB) as made:
        yield made


def begin(world: World) -> GuestSpec:
    spec = GuestSpec(
        "guest", 32 * MIB, 2, workload="random", working_set_bytes=16 * MIB, zero_permille=100
    )
    guest = world.source.create_guest(spec.to_bytes())
    wait_for_steps(guest, 100)
    guest.close()
    client = world.control("sender")
    client.send(
        command="migrate", domain="guest", destination=f"127.0.0.1:{world.port}",
        strategy="postcopy", bandwidth=4 * MIB, checkpoint_every_s=EVERY_S,
    )  # fmt: skip
    client.answer()
    client.close()
    return spec


def the_destination_dies(world: World) -> None:
    """End the destination's host, with everything that runs on it."""
    kill(world, "receiver")
    world.destination.close()
    kill(world, "destination")


def line(world: World) -> dict[str, Any]:
    (found,) = lines(world, "sender")
    return found


def test_a_host_dies_and_an_operator_decides(world: World) -> None:
    spec = begin(world)
    until(lambda: line(world)["checkpoints"] >= 2, "no checkpoints")
    the_destination_dies(world)
    until(lambda: line(world)["phase"] == "interrupted", "it was not noticed")
    assert "its missing pages are kept here" in line(world)["problem"]
    world.ask("sender", command="decide", migration=line(world)["id"], here=True)
    until(lambda: line(world)["phase"] == "failed", "the sender does not fail")
    went_back = "the guest continues here, as it was when the last checkpoint was made"
    assert line(world)["problem"].startswith(went_back)
    assert line(world)["outcome"] == "rescued"
    assert verified_at_source(world.source, spec).problems == []


def test_a_domain_that_the_sender_made_and_did_not_note_is_replaced(world: World) -> None:
    """Found under load: the sender was killed while the hypervisor made the domain in which the
    guest was to continue.
    """
    spec = begin(world)
    until(lambda: line(world)["checkpoints"] >= 1, "no checkpoints")
    the_destination_dies(world)
    until(lambda: line(world)["phase"] == "interrupted", "it was not noticed")
    kill(world, "sender")
    with world.source.open(spec.name) as suspended:
        world.source.create_incoming(suspended.config(), instead_of=suspended).close()
    note(world, "sender", "decided here")
    start_sender(world)
    until(
        lambda: [i.state for i in world.source.domains()] == [DomainState.RUNNING],
        "it does not run alone",
    )
    assert verified_at_source(world.source, spec).problems == []


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(8))
def test_the_sender_is_killed_at_any_instant_as_well(world: World, seed: int) -> None:
    """The sender is killed while checkpoints are kept, and during the return."""
    random_ = random.Random(seed)
    spec = begin(world)
    until(lambda: line(world)["checkpoints"] >= 1, "no checkpoints")
    time.sleep(random_.uniform(0, 0.1))
    kill(world, "sender")
    start_sender(world)
    until(lambda: line(world)["phase"] in ("postcopy", "completing"), "it does not continue")
    the_destination_dies(world)
    until(lambda: line(world)["phase"] == "interrupted", "it was not noticed")
    world.ask("sender", command="decide", migration=line(world)["id"], here=True)
    time.sleep(random_.uniform(0, 0.06))
    world.stop("sender", signal.SIGKILL)
    start_sender(world)
    until(
        lambda: [i.state for i in world.source.domains()] == [DomainState.RUNNING],
        "it does not run",
    )
    assert verified_at_source(world.source, spec).problems == []
