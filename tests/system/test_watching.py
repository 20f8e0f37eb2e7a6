# SPDX-License-Identifier: GPL-2.0-or-later
"""What follows a migration from outside: events, the table, and the line on a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from migrate.cli.world import World, wait_for_steps
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.screen import Screen
from tests.support.waiting import WAIT_S, until
from xenbackend.simulated.guest import GuestSpec

Process = zygote.Popen[Any]


def boot(world: World, name: str) -> None:
    spec = GuestSpec(name, 16 * MIB, workload="hotset", zero_permille=0)
    domain = world.source.create_guest(spec.to_bytes())
    wait_for_steps(domain, 5)
    domain.close()


def start(world: World, *arguments: str, **streams: Any) -> Process:
    """Start a command that asks both daemons."""
    both = (world.sender_socket, world.receiver_socket)
    options = [text for path in both for text in ("--socket", str(path))]
    return zygote.Popen([*PROGRAM, *arguments, *options], **streams)


def migration(world: World, name: str, *options: str, **streams: Any) -> Process:
    to = (f"127.0.0.1:{world.port}", "--socket", str(world.sender_socket))
    return zygote.Popen([*PROGRAM, "migrate", name, *to, *options], **streams)


def ask(world: World, which: str, name: str) -> dict[str, Any]:
    lines = world.ask(which, command="list")["migrations"]
    return next((line for line in lines if line["domain"] == name), {})


@pytest.fixture
def under_way(world: World, name: str) -> Iterator[Process]:
    """A migration by postcopy that is so slow that it does not end by itself in time."""
    boot(world, name)
    options = ("--strategy", "postcopy", "--bandwidth", "64K")
    with migration(world, name, *options, stderr=subprocess.DEVNULL) as process:
        until(lambda: ask(world, "receiver", name).get("phase") == "postcopy", "no postcopy")
        yield process
        world.destination.open(name).destroy()


def test_events_of_both_ends_from_the_first_phase_to_the_end(world: World, name: str) -> None:
    boot(world, name)
    with migration(world, name, "--bandwidth", "8M", stderr=subprocess.DEVNULL) as process:
        until(lambda: ask(world, "receiver", name).get("phase") == "precopy", "no precopy")
        with start(
            world, "watch", name, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as watching:
            output, errors = watching.communicate(timeout=WAIT_S)
        assert (watching.returncode, errors) == (0, b"")
        assert process.wait(WAIT_S) == 0
    events = [json.loads(line) for line in output.splitlines()]
    for direction, first in (("outgoing", "connecting"), ("incoming", "preflight")):
        ours = [event for event in events if event["direction"] == direction]
        phases = [event["phase"] for event in ours if event["event"] == "phase"]
        assert phases[0] == first and phases[-1] == "completed"
        assert {"precopy", "switchover"} <= set(phases)
        times = [event["at"] for event in ours if event["event"] == "phase"]
        assert times == sorted(times)
        assert [event["event"] for event in ours].count("end") == 1
        end = ours[-1]
        assert (end["event"], end["outcome"], end["problem"]) == ("end", "completed", "")
        assert end["elapsed_s"] > 0 and end["bytes_per_s"] is None
        assert end["details"]["fault_latency_us"]["count"] == end["faults"]


def test_both_ends_have_the_figures_of_postcopy(
    world: World, name: str, under_way: Process
) -> None:
    for which in ("sender", "receiver"):

        def has_figures(which: str = which) -> bool:
            line = ask(world, which, name)
            keys = ("longest_wait_us", "faults", "latency_us", "elapsed_s")
            return all(line.get(key) for key in keys)

        until(has_figures, f"the {which} has no figures of faults")
        line = ask(world, which, name)
        assert 0 < line["outstanding"] <= line["pages_total"]
        assert line["pages_done"] == line["pages_total"] - line["outstanding"]
        assert line["elapsed_s"] > 0 and line["started_at"] > 0
        assert line["outcome"] == ""
    assert ask(world, "receiver", name)["bytes_received"] > 0
    assert world.ask("sender", command="show", migration=name)["details"]["bytes_sent"] > 0


def test_a_reader_that_ends_is_no_error(world: World, name: str, under_way: Process) -> None:
    """As with ``head``."""
    for command in (("watch", name, "--json"), ("list", "--watch", "--json")):
        with start(world, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            assert json.loads(process.stdout.readline())["event"] == "phase"
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(WAIT_S) == 1


def test_a_reader_that_ends_is_noticed_though_nothing_changes(world: World) -> None:
    with start(world, "list", "--watch", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(WAIT_S) == 1


def test_the_table_is_watched_until_ctrl_c(world: World, name: str, under_way: Process) -> None:
    with closing(Screen(80)) as screen:
        with start(world, "list", "--watch", stdout=screen.stream) as process:
            try:
                until(lambda: any(name in row for row in screen.read()), "the table is not drawn")
            except BaseException:
                process.kill()
                raise
            assert screen.read()[0].split()[:4] == ["ID", "DOMAIN", "DIRECTION", "PHASE"]
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT_S) == 130
        assert screen.read() == []


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_keeps_nothing_of_the_line(world: World, name: str, width: int) -> None:
    boot(world, name)
    rows: list[list[str]] = []

    def drawn() -> bool:
        rows.append(screen.read())
        return any("MiB/s" in row and "ETA" in row for row in rows[-1])

    with closing(Screen(width)) as screen:
        options = ("--bandwidth", "8M")
        with migration(
            world, name, *options, stderr=screen.stream, stdout=subprocess.DEVNULL
        ) as process:
            until(drawn, "no progress is drawn")
            assert process.wait(WAIT_S) == 0
        assert screen.read() == []
    assert all(len(found) <= 1 for found in rows)
