# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration, and a report of it from its daemons: while it runs, when it has ended, and after a
restart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.report.command import answers_of
from migrate.cli.world import World, start_receiver, start_sender
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.daemons import begin, boot, kill, phase, world
from tests.support.waiting import WAIT_S, until

__all__ = ["world"]
BOTH = ("sender", "receiver")
DRAWING_S = 4 * WAIT_S
"""The limit of a command that draws.  Drawing takes some seconds of CPU time: minutes on a busy
machine.
"""


def records(world: World, which: str) -> list[Path]:
    host = "source" if which == "sender" else "destination"
    return [*(world.directory / f"{host}.sock.state" / which / "records").glob("*.json.gz")]


def command(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    sockets = ("--socket", str(world.sender_socket), "--socket", str(world.receiver_socket))
    return zygote.run([*PROGRAM, *arguments, *sockets], timeout=DRAWING_S)


def recorded(world: World) -> dict[str, dict[str, Any]]:
    return dict(zip(BOTH, answers_of(world, "guest"), strict=True))


@pytest.mark.timeout(6 * DRAWING_S)
def test_a_report_is_made_before_and_after_the_end_and_after_a_restart(
    world: World, tmp_path: Path
) -> None:
    boot(world)
    begin(world, "guest", bandwidth=2 * 2**20)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    under_way = world.ask("receiver", command="record", migration="guest")
    assert under_way["record"]["origins"]["pages"]["missing"] > 0
    path = tmp_path / "under-way.html"
    made = command(world, "report", "guest", "-o", str(path))
    assert made.returncode == 0, made.stderr
    assert "still to come" in path.read_text()

    until(lambda: all(len(records(world, which)) == 1 for which in BOTH), "no records")
    ended = recorded(world)
    for which in BOTH:
        record = ended[which]["record"]
        assert record["is_whole"] and len(record["samples"]["at"]) > 2
    downtime_s = ended["sender"]["details"]["downtime_s"]
    steps = ended["sender"]["record"]["steps"]
    assert sum(step["s"] for step in steps) == pytest.approx(downtime_s, abs=1e-4)
    latency = ended["receiver"]["details"]["fault_latency_us"]
    assert (
        sum(n for _low, _high, n in ended["receiver"]["record"]["latency_us"]) == latency["count"]
    )
    pages = ended["receiver"]["record"]["origins"]["pages"]
    assert sum(pages.values()) == 16 * 2**20 // 4096 and pages["missing"] == 0
    assert pages["pushed"] > 0 and pages["fault"] > 0

    for which in BOTH:
        kill(world, which)
    start_receiver(world, world.port)
    start_sender(world)
    after = recorded(world)
    assert {which: after[which]["record"] for which in BOTH} == {
        which: ended[which]["record"] for which in BOTH
    }
    path = tmp_path / "report.html"
    made = command(world, "report", "guest", "-o", str(path), "--json")
    assert json.loads(made.stdout) == {
        "migration": ended["sender"]["id"], "file": str(path)
    }  # fmt: skip
    document = path.read_text()
    assert "Map of the guest" in document
    assert "as known at the source and the destination" in document
    (left, right) = (records(world, which)[0] for which in BOTH)
    left.unlink()
    right.write_bytes(b"damaged")
    made = command(world, "report", "guest", "-o", str(path))
    assert made.returncode == 0 and "do not have the record of this migration" in path.read_text()


def test_a_successor_records_from_its_start(world: World) -> None:
    boot(world)
    begin(world, "guest", bandwidth=2**20)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    for which in BOTH:
        kill(world, which)
    start_receiver(world, world.port)
    start_sender(world)
    until(lambda: all(len(records(world, which)) == 1 for which in BOTH), "no records")
    found = recorded(world)
    assert not any(found[which]["record"]["is_whole"] for which in BOTH)
    assert found["sender"]["record"]["steps"] == []
    assert found["receiver"]["record"]["origins"]["pages"]["unknown"] > 0


def test_a_report_of_no_migration_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    made = command(world, "report", "nobody", "-o", str(path))
    assert made.returncode == 1 and "there is no migration 'nobody'" in made.stderr
    assert not path.exists()


def test_without_matplotlib_a_report_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    path = tmp_path / "report.html"
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = "
        f"['loopback', '--memory', '16M', '--report', {str(path)!r}]; "
        "from migrate.cli import main; main()"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert made.returncode == 1 and "apt install python3-matplotlib" in made.stderr


def test_loopback_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    made = zygote.run(
        [*PROGRAM, "loopback", "--memory", "32M", "--strategy", "postcopy", "--report", str(path)],
        timeout=3 * WAIT_S,
    )
    assert made.returncode == 0, made.stderr
    document = path.read_text()
    assert "as known at the source and the destination" in document
    assert "as the guest itself has measured" in document
