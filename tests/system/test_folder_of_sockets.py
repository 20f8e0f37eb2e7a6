# SPDX-License-Identifier: GPL-2.0-or-later
"""One variable, XEN_POSTCOPY_SOCKETS, moves every socket; and a command waits for a daemon that is
just starting.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from migrate.cli import cli, migrations
from migrate.cli.options import SocketPath, receiver_socket, sender_socket
from migrate.control import client
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.xl import restore, save
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.waiting import WAIT_S, until
from xenbackend import unix


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "sockets"
    made.mkdir()
    monkeypatch.setenv(client.SOCKETS, str(made))
    return made


@contextlib.contextmanager
def running(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    process = zygote.Popen(
        [*PROGRAM, *arguments], env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def run(*arguments: str) -> str:
    done = zygote.run([*PROGRAM, *arguments], timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def port(which: str) -> int:
    with ControlClient(os.environ[client.SOCKETS] + f"/{which}.sock", wait_s=WAIT_S) as daemon:
        return int(daemon.call(command="status")["port"])


def test_all_sockets_are_in_the_folder(folder: Path) -> None:
    """Everything is started at once, and each waits for what it needs."""
    with (
        running("simulated-host", "--socket", "b.sock", "--memory", "64M"),
        running("simulated-host", "--socket", "a.sock", "--memory", "64M"),
        running("receiver", "--simulated", "b.sock", "--listen", "127.0.0.1:0"),
        running("sender", "--simulated", "a.sock", "--listen", "127.0.0.1:0"),
    ):
        run("simulated-guest", "create", "web", "--host", "a.sock", "--memory", "8M")
        run("migrate", "web", f"127.0.0.1:{port('receiver')}")
        assert "completed" in run("list")
        assert "what the guest wrote" in run("simulated-guest", "verify", "web", "--host", "b.sock")
        there = {path.name for path in folder.iterdir()}
        assert there >= {"a.sock", "b.sock", "sender.sock", "receiver.sock", "a.sock.state"}


def test_a_relative_folder_in_a_working_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(client.SOCKETS, "here")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(MigrationError, match="the working directory was removed"):
        sender_socket()


def test_without_the_variable_a_path_counts_from_the_working_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(client.SOCKETS, raising=False)
    assert SocketPath().convert("a.sock", None, None) == Path("a.sock")
    assert str(sender_socket()) == client.sender_socket() == "/run/xen-postcopy/sender.sock"
    assert str(receiver_socket()) == "/run/xen-postcopy/receiver.sock"


def test_an_absolute_path_stays_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SocketPath().convert("a.sock", None, None) == folder / "a.sock"
    assert SocketPath().convert("/run/a.sock", None, None) == Path("/run/a.sock")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv(client.SOCKETS, "sockets")
    assert SocketPath().convert("a.sock", None, None) == folder / "a.sock"
    assert sender_socket() == folder / "sender.sock"


@pytest.mark.parametrize("module", [save, restore])
def test_the_helper_under_xl_has_the_same_sockets(module: object, folder: Path) -> None:
    assert module.receiver_socket() == str(folder / "receiver.sock")  # type: ignore[attr-defined]


def test_a_daemon_that_is_named_and_just_starts_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`list` begins before the daemon does.  Without the wait it would fail at once."""
    monkeypatch.setattr(migrations, "STARTING_S", WAIT_S)
    tries: list[Path] = []
    connect = unix.connect_unix

    def noted(sock: socket.socket, path: Path, wait_s: float, announce: Callable[[], None]) -> None:
        tries.append(path)
        connect(sock, path, wait_s, announce)

    monkeypatch.setattr(client, "connect_unix", noted)
    answers: list[str] = []

    def ask() -> None:
        answers.append(CliRunner().invoke(cli, ["list", "--socket", "sender.sock"]).output)

    waiting = threading.Thread(target=ask)
    waiting.start()
    until(lambda: tries == [folder / "sender.sock"], "nobody asks")
    with (
        running("simulated-host", "--socket", "a.sock", "--memory", "8M"),
        running("sender", "--simulated", "a.sock", "--listen", "127.0.0.1:0"),
    ):
        until(lambda: not waiting.is_alive(), "the command still waits")
    assert answers[0].startswith("ID")


def test_the_help_names_the_variable() -> None:
    assert f"${client.SOCKETS}" in run("migrate", "--help")
    assert isinstance(SocketPath(), click.Path)  # a shell completes it as a path
