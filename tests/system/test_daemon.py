# SPDX-License-Identifier: GPL-2.0-or-later
"""What daemons have to do with systemd: sockets that it makes, its watchdog, its journal."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from migrate import logs
from migrate.cli.world import World
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.logs import JournalHandler
from tests.support import zygote

TIMEOUT_S = 60.0
AS_SYSTEMD = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-m", "migrate.cli", *sys.argv[2:]])
"""


def test_a_daemon_serves_the_socket_that_systemd_made_and_feeds_its_watchdog(hosts: World, tmp_path: Path) -> None:
    told, path = tmp_path / "notify", tmp_path / "activated.sock"
    with socket.socket(socket.AF_UNIX) as made, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        made.bind(str(path))
        made.listen()
        notify.bind(str(told))
        notify.settimeout(TIMEOUT_S)
        arguments = ["sender", "--listen", "127.0.0.1:0", "--simulated", str(hosts.directory / "source.sock")]
        daemon = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(made.fileno()), *arguments], pass_fds=[made.fileno()],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(told), "WATCHDOG_USEC": "300000"},
        )  # fmt: skip
        try:
            heard = b""
            while b"READY=1" not in heard or heard.count(b"WATCHDOG=1") < 3:
                heard += notify.recv(4096) + b"\n"
            with ControlClient(path) as client:
                assert client.call(command="list")["migrations"] == []
            daemon.send_signal(signal.SIGTERM)
            while b"STOPPING=1" not in heard:
                heard += notify.recv(4096)
            assert daemon.wait(TIMEOUT_S) == 0
        finally:
            daemon.kill()
            daemon.wait()
    assert path.exists()  # it is systemd's to take away


def test_a_record_in_the_journal_has_its_migration(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(TIMEOUT_S)
        handler = JournalHandler(str(tmp_path / "journal"))
        handler.addFilter(logs._WithMigration())
        token = logs.migration.set("abc")
        try:
            handler.handle(logging.LogRecord("pager", logging.WARNING, "pager.py", 7, "two\nlines: %d", (5,), None))
        finally:
            logs.migration.reset(token)
        entry = journal.recv(4096)
        handler._socket.close()
    assert b"MESSAGE\n" + (12).to_bytes(8, "little") + b"two\nlines: 5\n" in entry
    assert b"\nPRIORITY=4\n" in entry and b"\nXEN_POSTCOPY_MIGRATION=abc\n" in entry and b"CODE_LINE=7\n" in entry


def test_show_and_watch(world: World, name: str) -> None:
    from tests.system.test_migration import boot, migrate

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        sockets = ("--socket", str(world.sender_socket), "--socket", str(world.receiver_socket))
        command = [sys.executable, "-m", "migrate.cli", *arguments, *sockets]
        return zygote.run(command, timeout=TIMEOUT_S)

    boot(world, name)
    result = migrate(world, name)
    shown = run("show", result["id"][:8])
    assert shown.returncode == 0 and "outgoing" in shown.stdout and "incoming" in shown.stdout
    assert "fault latency us" in shown.stdout
    watched = run("watch", name)
    assert (watched.returncode, watched.stdout) == (0, f"{name}: completed\n")
    unknown = run("show", "unheard-of")
    assert unknown.returncode == 1 and "no migration 'unheard-of'" in unknown.stderr
    with pytest.raises(MigrationError, match="no migration"):
        world.ask("receiver", command="show", migration="")
