# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: the answer to a client's mistake, and the error if the daemon ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from click.testing import CliRunner, Result

from migrate.cli import cli, migrations
from migrate.cli.text import announce_wait
from migrate.control import server as control
from migrate.control.client import MAX_LINE, SOCKETS, ControlClient, Json
from migrate.control.server import ANSWER_S, ControlConnection, LastAnswer
from migrate.errors import MigrationError, SilentDaemonError, UnknownMigrationError
from migrate.tasks import task_group
from tests.support.control import begin
from xenbackend import unix


async def handle(request: Json, connection: ControlConnection) -> None:
    match request["command"]:
        case "refuse":
            raise MigrationError("no such domain")
        case "bug":
            raise RuntimeError("a bug")
        case "number":
            await connection.answer("result", number=int(request["domid"]))
        case "stay":
            await connection.answer("progress")
            await connection.request()
        case _:
            await connection.answer("result", echo=request["word"])


async def ask(path: Path, client: Callable[[Path], Any]) -> Any:
    """Return what a client in a thread returns, with a server at this path."""
    with trio.fail_after(30):
        async with task_group() as nursery:
            await begin(nursery, path, handle)
            try:
                return await trio.to_thread.run_sync(client, path)
            finally:
                nursery.cancel_scope.cancel()


def raw(data: bytes) -> Callable[[Path], bytes]:
    """Return a client that sends these bytes and returns all that it receives."""

    def exchange(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(os.fspath(path))
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    return exchange


def call(**request: Any) -> Callable[[Path], Json]:
    def exchange(path: Path) -> Json:
        with ControlClient(path) as client:
            return client.call(**request)

    return exchange


async def test_a_request_is_answered_once(tmp_path: Path) -> None:
    assert (await ask(tmp_path / "s", call(command="echo", word="x")))["echo"] == "x"


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"[1]\n", b"not a JSON object"),
        (b"{\n", b"not a JSON object"),
        (b"{}\n", b"bad request: the key 'command' is missing"),
        (b'{"command": "echo"}\n', b"bad request: the key 'word' is missing"),
        (b'{"command": "refuse"}\n', b"no such domain"),
        (b'{"command": "number", "domid": 1e999}\n', b"bad request: "),
        (b'{"command": "number", "domid": NaN}\n', b"bad request: "),
        (b"x" * (MAX_LINE + 1), b"a line without end"),
    ],
)
async def test_a_bad_request_is_answered_with_an_error(
    tmp_path: Path, sent: bytes, message: bytes
) -> None:
    answer = await ask(tmp_path / "s", raw(sent))
    assert answer.startswith(b'{"event": "error"') and message in answer


async def test_a_client_that_leaves_without_a_request_is_not_answered(tmp_path: Path) -> None:
    assert await ask(tmp_path / "s", raw(b"")) == b""
    assert await ask(tmp_path / "s", raw(b'{"command": ')) == b""


async def test_a_bug_ends_one_exchange_and_is_logged_with_its_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MigrationError, match="internal error, which the daemon's log has"):
        await ask(tmp_path / "s", call(command="bug"))
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None and isinstance(record.exc_info[1], RuntimeError)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_whatever_the_mode_of_the_socket(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tempfile.TemporaryDirectory() as directory, trio.fail_after(30):
        path = Path(directory) / "s"
        os.chmod(directory, 0o711)
        async with trio.open_nursery() as nursery:
            await begin(nursery, path, handle)
            path.chmod(0o666)
            with socket.socket(socket.AF_UNIX) as client:
                os.seteuid(65534)  # the server does not run before this is undone
                try:
                    client.connect(os.fspath(path))
                finally:
                    os.seteuid(0)
                client.settimeout(20)
                assert await trio.to_thread.run_sync(client.recv, 4096) == b""
            nursery.cancel_scope.cancel()
    assert "a request of user 65534 refused" in caplog.text


async def test_a_socket_that_somebody_listens_at_is_not_taken_over(tmp_path: Path) -> None:
    def second(path: Path) -> str:
        async def listen() -> None:
            async with control.listening(path):
                pass

        with pytest.raises(MigrationError) as caught:
            trio.run(listen)
        return str(caught.value)

    assert "another process listens there" in await ask(tmp_path / "s", second)


async def test_a_place_where_no_socket_can_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path / "file", "Address already in use"),
        (tmp_path / "n\0ull", "no path of a socket"),
        (tmp_path / "a" / "b" / "s", f"there is no folder {tmp_path / 'a'}$"),
    ):
        with pytest.raises(MigrationError, match=why):
            await ask(path, call(command="echo"))
    assert not (tmp_path / "a").exists()


async def test_a_socket_that_nobody_listens_at_any_more_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(os.fspath(path))
    assert (await ask(path, call(command="echo", word="x")))["echo"] == "x"
    assert not path.exists()


async def test_a_socket_that_another_daemon_has_made_meanwhile_is_left(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as successor:

        def replace(path: Path) -> None:
            path.unlink()
            successor.bind(os.fspath(path))

        await ask(path, replace)
        assert path.is_socket()


async def test_the_last_answer_is_given_once_and_a_client_that_is_gone_does_no_harm() -> None:
    ours, theirs = trio.socket.socketpair()
    with theirs:
        answer = LastAnswer(ControlConnection(trio.SocketStream(ours)))
        await answer.give("result", status="completed")
        await answer.give("result", status="failed")
        assert await theirs.recv(4096) == b'{"event": "result", "status": "completed"}\n'
        await answer.given.wait()
        late = LastAnswer(ControlConnection(trio.SocketStream(ours)))
    await late.give("error", message="too late")
    assert late.given.is_set()
    nobody = LastAnswer(None)
    await nobody.give("result")
    assert nobody.begun
    ours.close()


async def test_a_client_that_reads_nothing_holds_nothing_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """For example xl's helper, stopped by SIGSTOP, with a socket that is full."""
    ours, theirs = trio.socket.socketpair()
    with theirs:
        answer = LastAnswer(ControlConnection(trio.SocketStream(ours)))
        await answer.give("result", text=" " * 2**24)
        assert answer.given.is_set()
        assert trio.current_time() >= ANSWER_S
    ours.close()


# ---- the client's end ----
@pytest.fixture
def daemon(tmp_path: Path) -> Any:
    """Yield a client and the socket to which it is connected."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "daemon"))
        listener.listen()
        with ControlClient(tmp_path / "daemon") as client:
            theirs, _address = listener.accept()
            with theirs:
                yield client, theirs


def test_no_daemon_is_an_error_that_asks_whether_it_runs(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="is the daemon running"):
        ControlClient(tmp_path / "none")


@pytest.mark.parametrize("path", ["", "s" * 108])
def test_what_is_no_path_of_a_socket_is_refused(path: str) -> None:
    with pytest.raises(MigrationError, match="is this the path of its control socket"):
        ControlClient(path)


@pytest.mark.parametrize("part", [b"", b'{"event": "progress"}\n', b'{"event": "res'])
def test_a_daemon_that_ends_before_the_result_is_an_error(
    daemon: tuple[ControlClient, socket.socket], part: bytes
) -> None:
    client, theirs = daemon
    theirs.sendall(part)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(MigrationError, match="ended in the middle of the request"):
        client.call(command="list")


def test_a_daemon_that_is_killed_before_it_reads_the_request_is_an_error(
    daemon: tuple[ControlClient, socket.socket],
) -> None:
    """The kernel resets the connection, because the request was not read."""
    client, theirs = daemon
    client.send(command="list")
    theirs.close()
    assert client.answer() is None
    with pytest.raises(MigrationError, match="the daemon has ended"):
        client.send(command="cancel")


def test_an_answer_is_waited_for_only_until_the_watched_descriptor_ends(
    daemon: tuple[ControlClient, socket.socket],
) -> None:
    client, theirs = daemon
    watched, other = socket.socketpair()
    with watched:
        theirs.sendall(b'{"event": "progress"}\n')
        assert client.answer(watched.fileno()) == {"event": "progress"}
        other.close()
        with pytest.raises(EOFError):
            client.answer(watched.fileno())


def test_a_signal_that_interrupts_no_call_of_the_kernel_is_handled(
    daemon: tuple[ControlClient, socket.socket],
) -> None:
    """A signal just before the call, or one that another thread receives."""
    client, _theirs = daemon

    class HandledError(Exception):
        pass

    def handle(*_signal: object) -> None:
        raise HandledError

    def send() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        sending = threading.Timer(0.05, send)
        sending.start()
        with pytest.raises(HandledError):
            client.answer()
    finally:
        sending.join()
        signal.signal(signal.SIGUSR1, before)


LINE = {
    "id": "0123456789",
    "domain": "guest",
    "direction": "incoming",
    "phase": "completed",
    "outstanding": 0,
}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["list"], "01234567  guest"),
        (["list", "--json"], '"guest"'),
        (["show", "guest"], "guest"),
        (["show", "guest", "--json"], '"guest"'),
        (["watch", "guest"], "guest: completed"),
    ],
)
@pytest.mark.parametrize("queue_is_full", [False, True])
async def test_a_daemon_that_hangs_is_named_and_hides_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    shown: str,
    queue_is_full: bool,
) -> None:
    monkeypatch.setattr(migrations, "ANSWER_S", 1.5)
    hanging, other = tmp_path / "hanging", tmp_path / "other"

    async def answer(request: Json, connection: ControlConnection) -> None:
        line = {**LINE, "problem": ""}
        await connection.answer(
            "result",
            **({"migrations": [line]} if request["command"] == "list" else line),
            details={},
        )

    def run(*sockets: Path) -> Result:
        options = [text for path in sockets for text in ("--socket", str(path))]
        return CliRunner().invoke(cli, [*arguments, *options])

    with contextlib.ExitStack() as stack, trio.fail_after(60):
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(os.fspath(hanging))
        listening.listen(0)
        if queue_is_full:
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(os.fspath(hanging))
        async with task_group() as nursery:
            await begin(nursery, other, answer)
            result = await trio.to_thread.run_sync(run, hanging, other)
            nursery.cancel_scope.cancel()
        assert shown in result.stdout and result.exit_code != 0
        named = f"{result.exception} {result.output}"
        assert f"the daemon at {hanging} has not answered for 1.5 s" in named
        alone = await trio.to_thread.run_sync(run, hanging)
        assert isinstance(alone.exception, SilentDaemonError) and str(hanging) in str(
            alone.exception
        )


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "reconnect"])
async def test_a_daemon_that_does_not_run_is_named_if_the_other_has_no_such_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The migration may be one of the daemon that does not run."""
    monkeypatch.setenv(SOCKETS, str(tmp_path))

    async def answer(_request: Json, _connection: ControlConnection) -> None:
        raise UnknownMigrationError("there is no migration 'web' here")

    with trio.fail_after(30):
        async with task_group() as nursery:
            await begin(nursery, tmp_path / "receiver.sock", answer)
            result = await trio.to_thread.run_sync(CliRunner().invoke, cli, [command, "web"])
            nursery.cancel_scope.cancel()
    assert str(result.exception) == (
        f"there is no migration 'web' here; no daemon at {tmp_path}/sender.sock: No such file or "
        "directory; is the daemon running?"
    )


def test_the_sockets_of_both_daemons_are_named_and_their_wait_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    monkeypatch.setenv(SOCKETS, str(tmp_path))
    monkeypatch.setattr(unix, "ANNOUNCED_S", 0.0)
    monkeypatch.setattr(migrations, "STARTING_S", 0.2)
    monkeypatch.setattr(migrations, "announce_wait", lambda *paths: told.extend(map(str, paths)))
    result = CliRunner().invoke(cli, ["list"])
    both = [f"{tmp_path}/sender.sock", f"{tmp_path}/receiver.sock"]
    assert told == both
    assert all(f"no daemon at {path}: No such file" in str(result.exception) for path in both)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_wait_is_announced_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(unix, "ANNOUNCED_S", 0.0)
    with pytest.raises(MigrationError, match="is the daemon running"):
        ControlClient("/nowhere/s", wait_s=0.2, announce=announce_wait)
    told = "waiting for the daemon at /nowhere/s\n" if is_terminal else ""
    assert capsys.readouterr().err == told


async def test_a_client_that_says_nothing_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.05)

    def exchange(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(os.fspath(path))
            return b"".join(iter(lambda: sock.recv(65536), b""))

    assert b"no request came within 0.05 s" in await ask(tmp_path / "s", exchange)


async def test_clients_are_limited_in_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_CONNECTIONS", 2)

    def exchange(path: Path) -> Json:
        with ControlClient(path) as one, ControlClient(path) as two:
            for client in (one, two):
                client.send(command="stay")
                assert client.answer() is not None
            with pytest.raises(MigrationError, match="2 requests are being answered"):
                call(command="echo", word="x")(path)
        while True:  # the server may not have noticed yet that the clients have gone
            with contextlib.suppress(MigrationError):
                return call(command="echo", word="x")(path)

    assert (await ask(tmp_path / "s", exchange))["echo"] == "x"
