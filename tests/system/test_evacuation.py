# SPDX-License-Identifier: GPL-2.0-or-later
"""``evacuate`` with daemons as processes: guests go, fail, are followed, and are left."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import signal
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from migrate.cli.world import World, loopback_world, start_receiver, verify_migrated
from migrate.protocol.pfns import pfn_array
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.daemons import begin, boot, kill, lines, states
from tests.support.screen import Screen
from tests.support.waiting import WAIT_S, until
from xenbackend.contract import DomainState
from xenbackend.pages import PAGE_SIZE
from xenbackend.simulated.client import SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec

SMALL, LARGE = 4 * MIB, 24 * MIB
IDLE: dict[str, Any] = {"workload": "idle", "zero_permille": 1000}
BRIEF = ("--seconds", "0.1")
"""The measurement of a guest whose rate of writes does not matter."""


@pytest.fixture
def world() -> Iterator[World]:
    with loopback_world(512 * MIB) as made:
        yield made


def command(world: World, *words: str, to: tuple[str, ...] = ()) -> list[str]:
    destinations = to or (f"127.0.0.1:{world.port}",)
    return [
        *PROGRAM,
        "evacuate",
        *destinations,
        "--socket",
        str(world.sender_socket),
        *BRIEF,
        *words,
    ]


def run(world: World, *words: str, to: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return zygote.run(command(world, *words, to=to), timeout=WAIT_S * 2)


def started(world: World, *words: str) -> zygote.Popen[str]:
    return zygote.Popen(
        command(world, *words),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(output: str) -> dict[str, str]:
    return {one["domain"]: one["result"] for one in json.loads(output)["guests"]}


def guests(world: World, *names: str, memory: int = SMALL, **options: Any) -> list[GuestSpec]:
    small = {"rate": 200, "working_set_bytes": SMALL // 2, "vcpus": 1}
    specs = [GuestSpec(name, memory, **{**small, **options}) for name in names]
    for spec in specs:
        world.source.create_guest(spec.to_bytes()).close()
    return specs


def crash(world: World, name: str) -> None:
    """Take pages from a guest that it touches, and let nobody bring them."""
    with world.source.open(name) as domain:
        domain.pause()
        ring = domain.paging_enable()
        domain.populate_evicted(pfn_array(range(SMALL // PAGE_SIZE // 2)))
        domain.paging_disable()
        domain.unpause()
        ring.close()
        until(lambda: domain.state() is DomainState.CRASHED, "the guest does not crash")


def here(world: World) -> set[str]:
    return {info.name for info in world.source.domains()}


def check_arrived(world: World, specs: list[GuestSpec]) -> None:
    for spec in specs:
        verification, _view = verify_migrated(world, spec)
        assert verification.problems == [], spec.name


# ---- twenty guests ----
def test_of_twenty_guests_two_fail_and_the_others_go(world: World) -> None:
    """One has crashed before.  The destination of the other is destroyed while it is copied."""
    specs = guests(world, *(f"guest-{number}" for number in range(18)))
    (large,) = guests(world, "large", memory=LARGE)
    guests(world, "crashed")
    crash(world, "crashed")
    with started(world, "--parallel", "4", "--bandwidth", "16M") as process:
        until(lambda: states(world, "large")["destination"], "the largest guest is not the first")
        (line,) = [one for one in lines(world, "sender") if one["domain"] == "large"]
        with world.destination.open("large") as domain:
            domain.destroy()
        output, error = process.communicate(timeout=WAIT_S * 2)
    assert process.returncode == 1, error
    assert here(world) == {"large", "crashed"}
    assert states(world, "large") == {"source": ["running"], "destination": []}
    check_arrived(world, specs)
    told = error.splitlines()
    assert told[0].startswith("crashed cannot go: crashed is crashed: it cannot be migrated")
    assert sum("crashed" in row for row in told) == 2  # at the beginning, and at the end
    assert any(row.startswith("large: failed: ") for row in told)
    assert sum(": gone after " in row for row in told) == 18
    assert told[-1] == "xen-postcopy: 2 of 20 guests did not go: large, crashed"
    rows = {row.split()[0]: row for row in output.splitlines()}
    assert len(rows) == 21
    assert " gone " in rows["guest-0"] and " failed " in rows["large"] and line["id"]

    # The same command tries again what is still here.
    with world.source.open("crashed") as domain:
        domain.destroy()
    again = run(world, "--json")
    assert again.returncode == 0, again.stderr
    assert results(again.stdout) == {"large": "gone"}
    check_arrived(world, [large])
    nothing = run(world)
    assert nothing.returncode == 0 and nothing.stderr.endswith("there is no guest on this host\n")


def test_an_evacuation_that_was_interrupted_is_continued_by_the_same_command(world: World) -> None:
    """Those under way continue in the daemons meanwhile."""
    specs = guests(world, *(f"guest-{number}" for number in range(8)))
    with started(world, "--bandwidth", "4M") as process:
        until(lambda: any(one["phase"] == "completed" for one in lines(world, "sender")), "none")
        until(lambda: any(one["round"] for one in lines(world, "sender")), "none is copied")
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, error
    last = error.splitlines()[-1]
    assert last.startswith("xen-postcopy: interrupted: ") and "continues the evacuation" in last
    assert "not begun" in output and " gone " in output
    assert here(world)
    again = run(world, "--json", "--parallel", "4")
    assert again.returncode == 0, again.stderr
    assert set(results(again.stdout).values()) == {"gone"}
    assert not here(world)
    check_arrived(world, specs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_its_migrations_to_the_daemons(
    world: World, number: signal.Signals
) -> None:
    specs = guests(world, "a", "b")
    with started(world, "--parallel", "1", "--bandwidth", "1M") as process:
        until(lambda: any(one["round"] for one in lines(world, "sender")), "none is copied")
        process.send_signal(number)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    again = run(world, "--json")
    assert again.returncode == 0, again.stderr
    # On a busy machine the first guest has arrived before the second command begins.
    assert results(again.stdout) | {"a": "gone"} == {"a": "gone", "b": "gone"}
    check_arrived(world, specs)


def test_two_evacuations_at_once_move_each_guest_once(world: World) -> None:
    specs = guests(world, *(f"guest-{number}" for number in range(8)))
    with started(world, "--json") as first, started(world, "--json") as second:
        outputs = [process.communicate(timeout=WAIT_S * 2) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    for output, _error in outputs:
        assert set(results(output).values()) == {"gone"}
    completed = [one["domain"] for one in lines(world, "sender") if one["phase"] == "completed"]
    assert sorted(completed) == sorted(spec.name for spec in specs)
    check_arrived(world, specs)


# ---- which guests ----
def test_guests_are_named_and_those_that_have_gone_are_named_again(world: World) -> None:
    specs = guests(world, "web", "db", "other")
    for _again in range(2):
        named = run(world, "--guest", "web", "--guest", "db", "--guest", "web", "--json")
        assert named.returncode == 0, named.stderr
        assert results(named.stdout) == {"web": "gone", "db": "gone"}
    assert here(world) == {"other"}
    check_arrived(world, specs[:2])
    wrong = run(world, "--guest", "other", "--guest", "wbe")
    assert wrong.returncode == 1
    assert "domain 'wbe': there is no such domain on this host" in wrong.stderr
    assert here(world) == {"other"}


def test_guests_that_a_number_and_a_uuid_name_are_named_again_after_an_interruption(
    world: World,
) -> None:
    """The last line of the command that was interrupted has the command that continues."""
    specs = guests(world, "first", memory=LARGE) + guests(world, "second", "third")
    found = {info.name: info for info in world.source.domains()}
    handle = uuid.UUID(bytes=found["second"].handle)
    names = ("--guest", str(found["first"].domid), f"--guest={handle}")
    with started(world, *names, "--parallel", "1", "--bandwidth", "8M") as process:
        until(lambda: any(one["round"] for one in lines(world, "sender")), "none is copied")
        process.send_signal(signal.SIGINT)
        _output, error = process.communicate(timeout=WAIT_S)
    again = shlex.split(error.splitlines()[-1].split("`")[-2])
    until(lambda: lines(world, "sender")[-1]["phase"] == "completed", "the first does not go")
    for _again in range(2):
        continued = zygote.run([*PROGRAM, *again[1:], "--json"], timeout=WAIT_S * 2)
        assert continued.returncode == 0, continued.stderr
        assert results(continued.stdout) == {"first": "gone", "second": "gone"}
    assert here(world) == {"third"}
    check_arrived(world, specs[:2])


def test_names_that_are_numbers_mean_the_guests_that_have_them(world: World) -> None:
    """The name of the second guest is the number of the first."""
    (first,) = guests(world, "first")
    number = str(world.source.open("first").domid)
    (second,) = guests(world, number)
    ambiguous = run(world, "--guest", number)
    assert ambiguous.returncode == 1 and "use a name, number or UUID" in ambiguous.stderr
    both = run(world, "--json")
    assert both.returncode == 0, both.stderr
    assert results(both.stdout) == {"first": "gone", number: "gone"}
    check_arrived(world, [first, second])


def test_a_guest_that_an_operator_moves_is_followed(world: World) -> None:
    boot(world)
    begin(world, "guest", bandwidth=8 * MIB)
    followed = run(world, "--json")
    assert followed.returncode == 0, followed.stderr
    (one,) = json.loads(followed.stdout)["guests"]
    assert one["result"] == "gone" and one["strategy"] == "postcopy" and one["downtime_s"] > 0


def test_a_guest_that_ends_before_its_turn_is_no_failure(world: World) -> None:
    specs = guests(world, "first", memory=LARGE)
    guests(world, "second")
    with started(world, "--parallel", "1", "--bandwidth", "8M", "--json") as process:
        until(lambda: any(one["round"] for one in lines(world, "sender")), "none is copied")
        with world.source.open("second") as domain:
            domain.destroy()
        output, error = process.communicate(timeout=WAIT_S * 2)
    assert process.returncode == 0, error
    assert results(output) == {"first": "gone", "second": "ended"}
    check_arrived(world, specs)


# ---- where they go ----
@contextlib.contextmanager
def another(world: World, memory: int) -> Iterator[tuple[str, SimulatedHypervisor]]:
    """A second destination: its address, and its host."""
    host = world.directory / "another.sock"
    world.start("another", "simulated-host", "--socket", str(host), "--memory", str(memory))
    control = world.directory / "receiver2.sock"
    world.start(
        "receiver2", "receiver", "--listen", "127.0.0.1:0", "--socket", str(control), "--simulated",
        str(host),
    )  # fmt: skip
    port = world.ask("receiver2", command="status")["port"]
    hypervisor = SimulatedHypervisor(host)
    try:
        yield f"127.0.0.1:{port}", hypervisor
    finally:
        hypervisor.close()


def test_of_two_destinations_each_takes_what_fits(world: World) -> None:
    """A guest that fits nowhere is named before anything moves."""
    with another(world, 40 * MIB) as (address, host):
        (blocker,) = guests(world, "blocker", memory=450 * MIB, **IDLE)
        world.destination.create_guest(GuestSpec("there", 450 * MIB, **IDLE).to_bytes()).close()
        guests(world, "large", memory=LARGE)
        guests(world, "middle", memory=20 * MIB)
        guests(world, "small")
        to = (f"127.0.0.1:{world.port}", address)
        dry = run(world, "--dry-run", "--json", to=to)
        assert dry.returncode == 1
        planned = {one["domain"]: one["destination"] for one in json.loads(dry.stdout)["guests"]}
        assert planned == {"blocker": None, "large": to[0], "middle": to[1], "small": to[0]}
        moved = run(world, to=to)
        assert moved.returncode == 1
        told = moved.stderr.splitlines()
        assert told[0].startswith("blocker cannot go: no place for its 450.0 MiB: 127.0.0.1:")
        assert told[-1] == "xen-postcopy: 1 of 4 guests did not go: blocker"
        assert here(world) == {blocker.name}
        assert {info.name for info in host.domains()} == {"middle"}


def test_a_destination_that_is_not_there_is_named_before_anything_moves(world: World) -> None:
    guests(world, "guest")
    there = f"127.0.0.1:{world.port}"
    refused = run(world, to=(there, "127.0.0.1:1"))
    assert refused.returncode == 1 and "127.0.0.1:1" in refused.stderr
    assert here(world) == {"guest"} and not lines(world, "sender")
    assert run(world, to=(there, "a b")).returncode == 2


def test_a_destination_that_ends_in_the_middle_and_comes_back_costs_one_guest(
    world: World,
) -> None:
    """What is copied then stays here; the others wait for the destination."""
    guests(world, "first", memory=LARGE)
    specs = guests(world, "second", "third")
    with started(world, "--parallel", "1", "--bandwidth", "8M", "--json") as process:
        until(lambda: any(one["round"] for one in lines(world, "sender")), "none is copied")
        kill(world, "receiver")
        until(lambda: lines(world, "sender")[-1]["phase"] == "failed", "it does not fail")
        start_receiver(world, world.port)
        output, error = process.communicate(timeout=WAIT_S * 2)
    assert process.returncode == 1, error
    assert results(output) == {"first": "failed", "second": "gone", "third": "gone"}
    assert states(world, "first")["source"] == ["running"]
    check_arrived(world, specs)


# ---- a dry run ----
def test_a_dry_run_moves_nothing(world: World) -> None:
    guests(world, "a", "b")
    result = run(world, "--dry-run")
    assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()
    assert rows[0].split()[:4] == ["GUEST", "MEMORY", "TO", "STRATEGY"]
    assert [row.split()[0] for row in rows[1:3]] == ["a", "b"]
    assert rows[3].startswith("2 guests")
    assert here(world) == {"a", "b"} and not lines(world, "sender")
    found = json.loads(run(world, "--dry-run", "--json").stdout)
    assert found["total"]["guests"] == 2
    assert found["dry_run"] and {one["result"] for one in found["guests"]} == {"planned"}
    assert all(one["expected"]["total_s"] > 0 for one in found["guests"])


# ---- at a terminal ----
@pytest.mark.parametrize("answer", ["leave", "cancel", "wait"])
def test_at_a_terminal_an_interruption_asks_what_is_to_follow(world: World, answer: str) -> None:
    guests(world, "large", memory=LARGE)
    guests(world, "small")
    master, terminal = pty.openpty()
    with contextlib.closing(Screen(80)) as screen:
        with zygote.Popen(
            command(world, "--parallel", "1", "--bandwidth", "8M"),
            stdin=terminal, stdout=subprocess.PIPE, stderr=screen.stream, text=True,
        ) as process:  # fmt: skip
            until(lambda: any("precopy" in row for row in screen.read()), "no table is drawn")
            assert screen.read()[0].startswith("0 of 2 guests gone, 1 under way, 1 to go, ")
            process.send_signal(signal.SIGINT)
            until(lambda: any("What is to follow" in row for row in screen.read()), "no question")
            os.write(master, f"{answer[0]}\n".encode())
            output, _none = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130
    ends = {"leave": "under way", "cancel": "cancelled", "wait": "gone"}
    rows = {row.split()[0]: row for row in output.splitlines()}
    assert f" {ends[answer]} " in rows["large"] and " not begun " in rows["small"]
    os.close(master)
    os.close(terminal)
    if answer == "leave":
        until(lambda: lines(world, "sender")[-1]["phase"] == "completed", "it does not complete")
