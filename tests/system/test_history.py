# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that have ended are shown after their daemons were killed and started again."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World, start_receiver, start_sender
from migrate.errors import MigrationError
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.daemons import begin, boot, kill, lines, listed, phase, world
from tests.support.waiting import WAIT_S, until

__all__ = ["world"]
BOTH = ("sender", "receiver")


def history(world: World, which: str) -> Path:
    host = "source" if which == "sender" else "destination"
    return world.directory / f"{host}.sock.state" / which / "history.jsonl"


def migrate(world: World, domain: str) -> None:
    boot(world, domain)
    begin(world, domain, bandwidth=2**30)
    completed(world, domain)


def completed(world: World, domain: str) -> None:
    def everywhere() -> bool:
        found = [line for which in BOTH for line in lines(world, which)[-1:]]
        # A migration is shown as completed a moment before its daemon notes its end.
        ends = [(one["phase"], one["domain"]) for one in found if one["ended_at"]]
        return ends == [("completed", domain)] * 2

    until(everywhere, f"{domain} is not completed")


def restart(world: World) -> None:
    for which in BOTH:
        kill(world, which)
    start_receiver(world, world.port)
    start_sender(world)


def written(world: World, domain: str = "guest") -> None:
    """Wait until both files have the migration: its end is shown before."""
    name = json.dumps(domain).encode()
    paths = [history(world, which) for which in BOTH]
    until(lambda: all(path.exists() and name in path.read_bytes() for path in paths), "no entry")


def command(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    sockets = ("--socket", str(world.sender_socket), "--socket", str(world.receiver_socket))
    return zygote.run([*PROGRAM, *arguments, *sockets], timeout=WAIT_S)


def as_json(world: World, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command(world, *arguments, "--json").stdout)
    return found


def test_ended_migrations_are_shown_after_a_kill(world: World) -> None:
    migrate(world, "guest")
    before = {which: world.ask(which, command="show", migration="guest") for which in BOTH}
    written(world)
    restart(world)
    assert [line for which in BOTH for line in listed(world, which)] == []
    assert as_json(world, "list") == []
    assert "guest" not in command(world, "list").stdout
    shown = command(world, "list", "--all").stdout
    assert shown.count("guest") == 2 and shown.count("completed") == 2
    for line in as_json(world, "list", "--all"):
        assert line["phase"] == "completed" and line["domain"] == "guest"
        assert 0 < line["started_at"] <= line["ended_at"] and line["domid"] >= 0
    for which in BOTH:
        assert world.ask(which, command="show", migration="guest") == before[which]
    assert before["sender"]["details"]["downtime_s"] > 0
    assert "guest" in command(world, "show", before["sender"]["id"][:8]).stdout


def test_a_request_for_an_ended_migration_is_answered_after_a_kill(world: World) -> None:
    migrate(world, "guest")
    written(world)
    restart(world)
    for which in BOTH:
        for asked in ("cancel", "reconnect"):
            with pytest.raises(MigrationError, match=r"has ended \(completed\): there is nothing"):
                world.ask(which, command=asked, migration="guest")
    ended = command(world, "watch", "guest")
    assert (ended.returncode, ended.stdout) == (0, "guest: completed\n")


def test_a_guest_under_way_is_shown_without_its_past(world: World) -> None:
    """The guest has the name of one that was migrated, or has come back."""
    migrate(world, "guest")
    world.destination.open("guest").destroy()
    boot(world, "guest")
    begin(world, "guest")
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    (first, *_), (second, *_) = [listed(world, which) for which in BOTH]
    assert first["id"] == second["id"] and first["phase"] == "completed"
    shown = as_json(world, "show", "guest")
    assert {one["id"] for one in shown} == {listed(world, "sender")[-1]["id"]} != {first["id"]}
    assert len(shown) == 2


def test_a_kill_in_the_middle_of_an_entry_costs_that_entry(world: World) -> None:
    migrate(world, "first")
    written(world, "first")
    for which in BOTH:
        kill(world, which)
        path = history(world, which)
        path.write_bytes(path.read_bytes() * 2 + b'\n{"format": 1, "id": "cut')
    start_receiver(world, world.port)
    start_sender(world)
    for which in BOTH:
        log = world.processes[which].log
        assert "1 of 3 lines were cut off, or another release wrote them" in log.read_text()
    migrate(world, "second")
    written(world, "second")
    restart(world)
    for which in BOTH:
        found = world.ask(which, command="list", all=True)["migrations"]
        assert [line["domain"] for line in found] == ["first", "second"]


@pytest.mark.parametrize("disk", ["full", "not a file"])
def test_a_history_that_cannot_be_written_disturbs_no_migration(world: World, disk: str) -> None:
    if disk == "not a file":
        for which in BOTH:
            history(world, which).mkdir()
        migrate(world, "guest")
    else:
        boot(world, "guest")
        begin(world, "guest")
        until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
        # The receiver writes the guest's memory, and so cannot be limited.
        pid = world.processes["sender"].popen.pid
        _soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        completed(world, "guest")
    world.check_alive()
    for which in BOTH:
        assert listed(world, which)[-1]["phase"] == "completed"
    if disk != "full":  # then the logs are not written either
        logs = [world.processes[which].log for which in BOTH]
        complaint = "cannot write the history"
        until(lambda: all(complaint in log.read_text() for log in logs), "no complaint")
