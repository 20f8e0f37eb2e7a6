# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons as processes: a pair for one test, what they show, and their death."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.service.lifecycle import RESUMING
from tests.conftest import MIB
from tests.support.waiting import until
from xenbackend.simulated.guest import GuestSpec


@pytest.fixture
def world() -> Iterator[World]:
    with loopback_world(256 * MIB) as made:
        yield made


UNUSUAL = ("failed", "lost", "held", "in doubt", "interrupted")
"""The phases that are shown with a reason."""


def listed(world: World, which: str, domain: str = "") -> list[dict[str, Any]]:
    """Return what ``list`` shows, of all domains or of one.  A failure must never be shown without
    its reason.

    Raises :class:`MigrationError` if the daemon does not answer.
    """
    found: list[dict[str, Any]] = world.ask(which, command="list")["migrations"]
    for line in found:
        assert line["problem"] or line["phase"] not in UNUSUAL, line
        check_whose_here(line["problem"])
    return [line for line in found if not domain or line["domain"] == domain]


OF_OTHER_END = re.compile(
    "(?:the sender gave up|the destination cannot continue|the destination has given the guest up|"
    "the guest ended at the destination): (.*?)"
    "(?:; [^;]* was handed over|; the guest is|; xl has not|; the destination has not|; and then|$)"
)


def check_whose_here(problem: str) -> None:
    """What the other end has sent names that end: "here" would be read as this host, and what an
    operator does at the wrong host may cost the guest.
    """
    for reason in OF_OTHER_END.findall(problem):
        assert "here" not in reason.split(), problem


def lines(world: World, which: str) -> list[dict[str, Any]]:
    """Return what :func:`listed` returns, or nothing if the daemon does not answer."""
    try:
        return listed(world, which)
    except MigrationError:
        return []


def phase(world: World, which: str) -> str:
    found = lines(world, which)
    return str(found[-1]["phase"]) if found else ""


def until_taken_up(world: World) -> None:
    """Wait until a sender's successor has taken its migration up: then it can carry a decision out.
    The phase is shown before that.
    """
    until(lambda: lines(world, "sender")[-1]["problem"] != RESUMING, "it is not taken up")


def kill(world: World, which: str) -> None:
    world.stop(which, signal.SIGKILL)


def journal(world: World, which: str) -> Path:
    host = "source" if which == "sender" else "destination"
    (found,) = (world.directory / f"{host}.sock.state" / which).glob("*.json")
    return found


def last_entry(path: Path) -> dict[str, Any]:
    """Return the facts of a journal's last entry, without the checksum: a test changes them."""
    facts: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    facts.pop("sum", None)
    return facts


def note(world: World, which: str, step: str) -> None:
    """Append to a daemon's journal what the daemon itself appends before it is killed."""
    path = journal(world, which)
    last = last_entry(path)
    with path.open("a") as file:
        file.write("\n" + json.dumps({**last, "step": step}))


SLOW = 4 * MIB


def boot(
    world: World, name: str = "guest", *, domid: int | None = None, **options: Any
) -> GuestSpec:
    defaults: dict[str, Any] = {
        "workload": "random",
        "working_set_bytes": 8 * MIB,
        "zero_permille": 0,
        "rate": 2000,
    }
    spec = GuestSpec(name, 16 * MIB, 2, **{**defaults, **options})
    with world.source.create_guest(spec.to_bytes(), domid=domid) as guest:
        wait_for_steps(guest, 20)
    return spec


def begin(
    world: World, domain: str, which: str = "sender", bandwidth: int = SLOW, **options: Any
) -> None:
    """Start a migration, which continues without the test."""
    with world.control(which) as client:
        client.send(
            command="migrate", domain=domain, destination=f"127.0.0.1:{world.port}",
            bandwidth=bandwidth, **{"strategy": "postcopy", **options},
        )  # fmt: skip
        client.answer()


def copying(world: World) -> bool:
    """Whether precopy has begun, and the journal has what a successor needs."""
    return bool(lines(world, "sender")[-1]["round"])


def states(world: World, name: str) -> dict[str, list[str]]:
    hosts = {"source": world.source, "destination": world.destination}
    return {
        which: [i.state.value for i in host.domains() if i.name == name]
        for which, host in hosts.items()
    }


async def migrates(world: World, name: str = "another") -> None:
    """Migrate another guest, for which nothing must have changed."""
    spec = GuestSpec(name, 4 * MIB, 1, workload="random")
    world.source.create_guest(spec.to_bytes()).close()

    def migrate() -> None:
        world.ask(
            "sender",
            command="migrate",
            domain=name,
            destination=f"127.0.0.1:{world.port}",
            strategy="postcopy",
        )

    await trio.to_thread.run_sync(migrate)
    verification, _view = await trio.to_thread.run_sync(verify_migrated, world, spec)
    assert verification.problems == []
    world.check_alive()
