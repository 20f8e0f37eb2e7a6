# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands and daemons whose standard streams are closed, cannot be written, or have an encoding
that lacks characters.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.cli.world import World
from tests.support.guests import busy
from tests.support.labs import until
from tests.support.waiting import WAIT_S

PROGRAM = (sys.executable, "-m", "migrate.cli")


def shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command whose streams a shell redirects."""
    script = f'exec "$@" {redirection}'
    return subprocess.run(
        ["sh", "-c", script, "sh", *PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_migration_that_completes_has_exit_status_0(
    world: World, name: str, redirection: str
) -> None:
    world.source.create_guest(busy(name).to_bytes()).close()
    ended = shell(
        redirection, "migrate", name, f"127.0.0.1:{world.port}",
        "--socket", world.directory / "sender.sock",
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert world.destination.open(name)


def test_a_summary_that_cannot_be_printed_is_no_failed_migration(world: World, name: str) -> None:
    world.source.create_guest(busy(name).to_bytes()).close()
    ended = shell(
        ">/dev/full", "migrate", name, f"127.0.0.1:{world.port}",
        "--socket", world.directory / "sender.sock",
    )  # fmt: skip
    assert ended.returncode == 1
    assert "the migration is completed, but its summary cannot be printed" in ended.stderr


def test_an_output_that_cannot_be_written_is_named_with_the_reason(world: World) -> None:
    ended = shell(">/dev/full", "list", "--socket", world.directory / "sender.sock")
    assert ended.returncode == 1
    assert ended.stderr == (
        "xen-postcopy: standard output cannot be written: No space left on device\n"
    )


def test_a_path_that_is_too_long_is_named_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    for status, arguments in (
        (1, ("init", "host1", "host2", "--directory", path)),
        (2, ("migrate", "guest", "host", "--json", path)),
    ):
        ended = shell("2>&1", *arguments)
        assert ended.returncode == status
        assert "[Errno" not in ended.stdout and "File name too long" in ended.stdout
        assert "x" * 300 in ended.stdout


@pytest.mark.parametrize("arguments", [("list",), ("show", "none"), ("preflight",)])
def test_a_closed_output_gives_no_traceback(world: World, arguments: tuple[str, ...]) -> None:
    sockets = () if "preflight" in arguments else ("--socket", world.directory / "sender.sock")
    assert "Traceback" not in shell(">&-", *arguments, *sockets).stderr


def test_a_locale_without_the_characters_of_a_name_shows_their_numbers(world: World) -> None:
    guest, sockets = "gäst-\u65e5", ("--socket", world.directory / "sender.sock")
    world.source.create_guest(busy(guest).to_bytes()).close()
    in_latin_1 = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}

    def run(*arguments: object) -> bytes:
        ended = subprocess.run(
            [*PROGRAM, *map(str, (*arguments, *sockets))],
            capture_output=True, timeout=WAIT_S, check=False, env=in_latin_1,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr.decode("latin-1")
        return ended.stdout

    assert b"g\xe4st-\\u65e5" in run("migrate", guest, f"127.0.0.1:{world.port}")
    assert b"g\xe4st-\\u65e5" in run("list") and b"g\xe4st-\\u65e5" in run("show", guest)
    assert guest.encode() in run("report", guest, "-o", "-")
    assert rb"g\u00e4st-\u65e5" in run("list", "--json")


def test_a_daemon_without_standard_streams_writes_its_log_nowhere(
    world: World, tmp_path: Path
) -> None:
    """Its connection to the hypervisor got the number of standard error, and lines of the log."""
    control = tmp_path / "sender.sock"
    arguments = [
        "sender", "--listen", "127.0.0.1:0", "--socket", control, "--state", tmp_path / "state",
        "--simulated", world.directory / "source.sock",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *PROGRAM, *map(str, arguments)]
    )
    try:
        until(control.exists, "it does not start")
        streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert streams == [os.devnull] * 3
    finally:
        process.kill()
        process.wait()
