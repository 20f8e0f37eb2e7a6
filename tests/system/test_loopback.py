# SPDX-License-Identifier: GPL-2.0-or-later
"""``loopback`` reports what it has measured, and leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World, verify_migrated
from migrate.errors import MigrationError
from migrate.protocol.pfns import pfn_array
from tests.support import zygote
from tests.support.command_line import run
from tests.support.commands import COMMAND_S, PROGRAM
from tests.support.waiting import WAIT_S
from xenbackend.simulated.guest import GuestSpec


def test_loopback_reports_and_writes_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = run("loopback", "--memory", "8M", "--vcpus", "2", "--json", path)
    assert result.returncode == 0, result.stderr
    assert "verified: all 2048 pages" in result.stdout
    data = json.loads(path.read_text())
    missing = data["switchover"]["missing_pages"]  # a short freeze needs none
    assert ("after the handover: " in result.stdout) == bool(missing)
    documented = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    for key in (
        "verified", "strategy", "memory_bytes", "total_s", "downtime_s", "precopy", "push", "pull",
        "zero_pages", "fault_latency_us", "vcpu_block_s", "throughput_bytes_per_s",
    ):  # fmt: skip
        assert key in data
        assert f"`{key}`" in documented
    assert data["verified"] is True
    assert set(data["precopy"]) == {"rounds", "pages"}
    assert set(data["push"]) == {"pages", "bytes"}
    assert set(data["pull"]) == {"requests", "ahead", "pages"}
    assert set(data["fault_latency_us"]) == {"count", "mean", "p50", "p99", "max", "histogram"}


def test_a_guest_that_was_damaged_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from migrate.cli import loopback

    def damage(world: World, spec: GuestSpec) -> Any:
        domain = world.destination.open(spec.name)
        domain.suspend()
        domain.write_pages(pfn_array([700]), b"x" * 4096)
        domain.resume()
        domain.close()
        return verify_migrated(world, spec)

    monkeypatch.setattr(loopback, "this_program", lambda: PROGRAM)
    monkeypatch.setattr(loopback, "verify_migrated", damage)
    with pytest.raises(MigrationError, match="the guest was damaged"):
        loopback.loopback_command.main(["--memory", "4M", "--rate", "2000"], standalone_mode=False)
    assert "damaged: 1 of 1024 pages differ" in capsys.readouterr().out


def test_a_loopback_whose_sender_dies_shows_its_log() -> None:
    options = ["--memory", "8M", "--rate", "100", "--bandwidth", "64K", "--strategy", "postcopy"]
    with zygote.Popen(
        [*PROGRAM, "loopback", *options], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "postcopy" not in (line := process.stderr.readline()):
            assert line
        for pid in children(process.pid):
            if b"sender" in command(pid):
                os.kill(pid, signal.SIGKILL)
        _out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert (
        "--- sender ---" in err
        and "sender ready" in err
        and "ended in the middle of the request" in err
    )


def test_loopback_starts_its_daemons_as_it_was_started_itself(tmp_path: Path) -> None:
    """The program of a distribution's package finds its modules by itself; ``python -m`` does not
    find them.
    """
    program = tmp_path / "program"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from migrate.cli.loopback import this_program\nprint(*this_program())\n"
    )
    command = [sys.executable, "-s", "-P", str(program)]
    options = ["loopback", "--memory", "4M"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == command


def execute(environment: dict[str, str]) -> None:
    """Execute the command with a small guest, until its end."""
    subprocess.run(
        [*PROGRAM, "loopback", "--memory", "4M"],
        check=True,
        capture_output=True,
        env=environment,
        timeout=COMMAND_S,
    )


def test_loopback_leaves_nothing_behind() -> None:
    """The command and the daemons that it starts are executed; in most other tests the zygote forks
    them.
    """
    with tempfile.TemporaryDirectory() as place:  # a short path, because sockets are made there
        environment = {**os.environ, "TMPDIR": place}
        execute(environment)
        assert list(Path(place).iterdir()) == []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert place.encode() not in process.read_bytes()


def children(pid: int) -> set[int]:
    """Return the living children of a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(path.parent.name))
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "sig",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL],
    ids=lambda sig: sig.name,
)
def test_loopback_leaves_no_process_behind(sig: signal.Signals) -> None:
    options = ["--memory", "8M", "--rate", "100", "--bandwidth", "64K", "--strategy", "postcopy"]
    process: subprocess.Popen[bytes] = zygote.Popen(
        [*PROGRAM, "loopback", *options], stderr=subprocess.PIPE
    )
    with process:
        assert process.stderr is not None
        while b"postcopy" not in (line := process.stderr.readline()):
            assert line
        started = children(process.pid)
        assert len(started) == 4
        folders = {
            Path(os.fsdecode(part)).parent
            for pid in started
            for part in command(pid)
            if b"xen-postcopy-" in part
        }
        process.send_signal(sig)
        assert process.wait(WAIT_S) == (-sig if sig is signal.SIGKILL else 128 + sig)
        output = process.stderr.read()
        assert b"`" not in output, "a command is named for daemons that have ended"
        assert sig is not signal.SIGINT or output.endswith(b"xen-postcopy: interrupted\n")
    deadline = time.monotonic() + WAIT_S
    while any(map(runs, started)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert folders
    for folder in folders:
        assert not folder.exists() or sig is signal.SIGKILL
        shutil.rmtree(folder, ignore_errors=True)


def test_the_next_loopback_removes_what_a_killed_one_has_left() -> None:
    """The directory of a loopback that still runs is kept."""
    with tempfile.TemporaryDirectory() as place:  # a short path, because sockets are made there
        environment = {**os.environ, "TMPDIR": place}
        options = [
            "--memory",
            "8M",
            "--rate",
            "100",
            "--bandwidth",
            "64K",
            "--strategy",
            "postcopy",
        ]
        running = [
            subprocess.Popen(
                [*PROGRAM, "loopback", *options], env=environment, stderr=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for process in running:
            assert process.stderr is not None
            while b"postcopy" not in (line := process.stderr.readline()):
                assert line
        folders = set(Path(place).iterdir())
        assert len(folders) == 2
        killed, other = running
        killed.kill()
        killed.communicate()
        execute(environment)
        (left,) = Path(place).iterdir()
        assert other.poll() is None and left in folders
        other.terminate()
        other.communicate()
        assert list(Path(place).iterdir()) == []


def command(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
