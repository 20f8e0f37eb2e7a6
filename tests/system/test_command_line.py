# SPDX-License-Identifier: GPL-2.0-or-later
"""The program as a user runs it: its output, its exit status, and that a mistake loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from migrate.cli.world import World, loopback_world, verify_migrated
from migrate.protocol.pfns import pfn_array
from migrate.service.journal import Kept
from receiver.daemon import kept_line as kept_line_of_receiver
from sender.progress import kept_line as kept_line_of_sender
from tests.conftest import MIB
from tests.support import zygote
from tests.support.command_line import assert_refused, assert_unharmed, boot, migrate, request, run
from tests.support.commands import COMMAND_S, PROGRAM
from tests.support.waiting import WAIT_S, until
from tests.tree.listing import TREE


@pytest.mark.parametrize(
    "command", [("migrate", "guest", "there"), ("loopback", "--memory", "4M")], ids=lambda c: c[0]
)
def test_a_result_that_could_not_be_written_is_refused_before_the_migration(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    missing = tmp_path / "none" / "result.json"
    result = run(*command, "--json", missing)
    assert_refused(result, "cannot be written: No such file or directory", status=2)
    assert result.stdout == ""
    assert_refused(run(*command, "--json", tmp_path), "is a directory", status=2)


def test_a_result_that_is_not_written_does_not_hide_the_migration(world: World, name: str) -> None:
    spec = boot(world, name)
    result = migrate(world, name, "--json", "/dev/full")
    assert_refused(
        result,
        "the migration is completed, but its result cannot be written to /dev/full: No space",
    )
    assert f"{name} migrated" in result.stdout
    assert verify_migrated(world, spec)[0].problems == []


def test_a_result_that_is_not_written_does_not_hide_the_verification() -> None:
    result = run("loopback", "--memory", "4M", "--json", "/dev/full")
    assert_refused(result, "cannot be written to /dev/full")
    assert "verified: all 1024 pages" in result.stdout


def test_the_life_of_a_simulated_guest(world: World, name: str) -> None:
    host = ["--host", str(world.directory / "source.sock")]
    assert run("simulated-guest", "create", name, *host, "--memory", "4M").returncode == 0
    assert_refused(run("simulated-guest", "create", name, *host, "--memory", "4M"), "there already")
    assert name in run("simulated-guest", "list", *host).stdout
    assert (
        "1024 pages are what the guest wrote"
        in run("simulated-guest", "verify", name, *host).stdout
    )
    domain = world.source.open(name)
    domain.suspend()
    domain.write_pages(pfn_array([700]), b"x" * 4096)
    domain.resume()
    domain.close()
    assert_refused(run("simulated-guest", "verify", name, *host), "1 of 1024 pages differ")
    assert run("simulated-guest", "destroy", name, *host).returncode == 0
    assert name not in run("simulated-guest", "list", *host).stdout


def test_preflight_of_a_host_and_of_a_guest(world: World, name: str) -> None:
    boot(world, name)
    host = ("--simulated", world.directory / "source.sock")
    told = run("preflight", *host)
    assert told.returncode == 0 and "ready; pages are evicted in batches" in told.stdout
    told = run("preflight", name, *host, "--json")
    assert json.loads(told.stdout) == {
        "ready": True,
        "problems": [],
        "warnings": [],
        "populate_evicted": "native",
        "limits": [],
    }
    assert_refused(run("preflight", "nobody", *host), "no such domain")
    alone = run("preflight", "--peer", "127.0.0.1", *host)
    assert_refused(
        alone, "--simulated: with --peer also give DOMAIN, a guest of that simulated", status=2
    )
    with loopback_world(64 * MIB, host_options=("--no-paging",), daemons=False) as unfit:
        told = run("preflight", "--simulated", unfit.directory / "destination.sock")
        assert_refused(told, "this host: this hypervisor is built without memory paging")


def test_help_teaches() -> None:
    top = run("--help").stdout
    for command in ("migrate", "list", "sender", "receiver", "simulated-host", "loopback"):
        assert command in top
        assert run(command, "--help").returncode == 0
    # The first sentence of each command fits a terminal of 80 columns.
    assert "..." not in top.partition("Commands:")[2]
    about = "MIGRATION is the guest's name, or at least the first eight characters"
    commands = "show watch postcopy-now set pause resume cancel reconnect decide"
    for command in commands.split():
        assert about in " ".join(run(command, "--help").stdout.split())
    assert run("--version").stdout.startswith("xen-postcopy, version ")
    assert "Xen" in run("--version").stdout.splitlines()[1]


def test_list(world: World, name: str) -> None:
    boot(world, name)
    assert migrate(world, name).returncode == 0
    sockets = ["--socket", str(world.sender_socket), "--socket", str(world.receiver_socket)]
    lines = [line for line in run("list", *sockets).stdout.splitlines() if name in line]
    assert len(lines) == 2
    assert all("completed" in line for line in lines)
    assert any(
        entry["domain"] == name for entry in json.loads(run("list", "--json", *sockets).stdout)
    )


def documented_keys(end: str) -> set[str]:
    """Return the keys of a line of ``list`` of the sender or the receiver, as docs/commands.md has
    them.
    """
    text = (TREE / "docs/commands.md").read_text()
    _before, _title, table = text.partition("### The keys of `list` and `show`\n")
    found = set()
    for keys, ends in re.findall(
        r"^\| (`[^|]*) \| [^|]*\| ([^|]*) \|", table.partition("###")[0], re.M
    ):
        names, each = re.findall(r"`(\w+)`", keys), ends.split(", ")
        if len(each) == 1:
            each *= len(names)
        found |= {name for name, of in zip(names, each, strict=True) if of in (end, "both")}
    return found - {"options"}  # which only `show` has


def test_a_line_of_list_has_the_documented_keys(world: World, name: str, tmp_path: Path) -> None:
    boot(world, name)
    assert migrate(world, name).returncode == 0
    kept = Kept("1" * 32, tmp_path / "entry.json", "guest", None, "an unknown step")
    for end, socket_path, kept_line in (
        ("sender", world.sender_socket, kept_line_of_sender),
        ("receiver", world.receiver_socket, kept_line_of_receiver),
    ):
        listed = json.loads(run("list", "--json", "--socket", str(socket_path)).stdout)
        for line in (*listed, kept_line(kept)):
            assert set(line) == documented_keys(end)


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["show", "NAME"]])
def test_a_daemon_that_was_named_and_does_not_run_is_reported(
    world: World, name: str, tmp_path: Path, command: list[str]
) -> None:
    boot(world, name)
    assert migrate(world, name).returncode == 0
    words = [name if word == "NAME" else word for word in command]
    gone = tmp_path / "receiver.sock"
    shown = run(*words, "--socket", world.sender_socket, "--socket", gone)
    assert_refused(shown, f"no daemon at {gone}: No such file or directory")
    assert name in shown.stdout


CLIENT_COMMANDS = """
import contextlib, sys
from migrate.cli import cli
from migrate.errors import MigrationError

sender, receiver = sys.argv[1:]
cli.main(["list", "--socket", sender, "--socket", receiver], standalone_mode=False)
for command in (
    ["show", "stranger"], ["watch", "stranger"], ["reconnect", "stranger"], ["cancel", "stranger"],
    ["postcopy-now", "stranger"], ["decide", "stranger", "here"], ["pause", "stranger"],
    ["resume", "stranger"], ["set", "stranger", "--bandwidth", "1G"],
    ["migrate", "stranger", "localhost"],
):
    try:
        cli.main([*command, "--socket", sender], standalone_mode=False)
    except MigrationError as error:
        assert "stranger" in str(error)
    else:
        sys.exit(f"{command} was not refused")
print("imported:", *{"numpy", "trio", "msgpack", "cffi"} & set(sys.modules))
"""


def test_a_client_command_imports_only_what_it_needs(world: World) -> None:
    """Each of these modules would make the command slower to start, and most commands are run again
    and again.
    """
    sockets = [str(world.sender_socket), str(world.receiver_socket)]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT_COMMANDS, *sockets],
        check=False,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_a_cancellation_reads_as_one(world: World, name: str) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    socket = ("--socket", world.sender_socket)
    migrating = zygote.Popen(
        [*PROGRAM, *request(world, name, "--bandwidth", "4M")], stderr=subprocess.PIPE, text=True
    )
    with migrating:
        assert migrating.stderr is not None and "precopy" in migrating.stderr.readline()
        cancelled = run("cancel", name, *socket)
        assert cancelled.returncode == 0 and cancelled.stdout == ""
        assert cancelled.stderr == f"{name}: cancelled; the guest continues at the source\n"
        output = migrating.stderr.read()
    text = f"{name} was not migrated: cancelled by the operator; the guest continues at the source"
    assert migrating.returncode == 1 and output.endswith(f"xen-postcopy: {text}\n")
    assert_refused(run("watch", name, *socket), text)
    (row,) = [row for row in run("list", *socket).stdout.splitlines() if f" {name} " in row]
    assert row.split()[3] == "cancelled" and row.endswith("  cancelled by the operator")
    until(
        lambda: any(
            (line["domain"], line["problem"])
            == (name, "the sender gave up: cancelled by the operator")
            for line in world.ask("receiver", command="list")["migrations"]
        ),
        "the receiver gives another reason",
    )
    assert_unharmed(world, spec)


def test_a_result_goes_to_standard_output_and_its_summary_does_not(world: World, name: str) -> None:
    boot(world, name)
    done = run(*request(world, name, "--json", "-"))
    assert done.returncode == 0 and f"{name} migrated" in done.stderr
    assert json.loads(done.stdout)["domain"] == name
    assert not Path("-").exists()


def test_the_progress_is_live_on_a_terminal(world: World, name: str) -> None:
    boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    process = zygote.Popen(
        [*PROGRAM, *request(world, name, "--bandwidth", "16M")],
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert process.wait(WAIT_S) == 0
    assert b"precopy, round 1" in shown
    assert b"\r" in shown
    assert b"%" in shown


def test_a_daemon_that_is_just_starting_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "sender.sock"
    listener = socket.socket(socket.AF_UNIX)
    with zygote.Popen(
        [*PROGRAM, "cancel", "x", "--socket", path], stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(0.5)  # the command must look for the socket before it exists
        listener.bind(os.fspath(path))
        listener.listen()
        listener.settimeout(WAIT_S)
        connection, _address = listener.accept()
        with connection, listener:
            connection.recv(4096)
            connection.sendall(b'{"event": "error", "message": "here it is"}\n')
        _out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (1, "xen-postcopy: here it is\n")
