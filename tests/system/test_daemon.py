# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons under systemd: sockets that systemd makes, its watchdog, its journal."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import trio

from migrate import logs
from migrate.cli.world import World, loopback_world, start_receiver, verify_migrated
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.logs import JournalHandler
from migrate.service import lifecycle
from migrate.service.config import Config
from migrate.service.journal import Journal
from receiver.daemon import ReceiverDaemon
from sender.daemon import SenderDaemon, _line
from sender.progress import Progress
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.daemons import begin, boot, journal, kill, phase
from tests.support.waiting import WAIT_S, until
from xenbackend.contract import DomainState

TIMEOUT_S = 60.0
AS_SYSTEMD = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-m", "migrate.cli", *sys.argv[2:]])
"""


def test_a_daemon_serves_the_socket_that_systemd_made_and_feeds_its_watchdog(
    hosts: World, tmp_path: Path
) -> None:
    told, path = tmp_path / "notify", tmp_path / "activated.sock"
    with (
        socket.socket(socket.AF_UNIX) as made,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
    ):
        made.bind(str(path))
        made.listen()
        notify.bind(str(told))
        notify.settimeout(TIMEOUT_S)
        arguments = [
            "sender",
            "--listen",
            "127.0.0.1:0",
            "--simulated",
            str(hosts.directory / "source.sock"),
        ]
        daemon = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(made.fileno()), *arguments],
            pass_fds=[made.fileno()],
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "LISTEN_FDS": "1",
                "NOTIFY_SOCKET": str(told),
                "WATCHDOG_USEC": "300000",
            },
        )
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
    assert path.exists()  # systemd removes the socket


def test_a_record_in_the_journal_has_its_migration(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(TIMEOUT_S)
        handler = JournalHandler(str(tmp_path / "journal"))
        handler.addFilter(logs._WithMigration())
        token = logs.migration.set("abc")
        try:
            handler.handle(
                logging.LogRecord(
                    "pager", logging.WARNING, "pager.py", 7, "two\nlines: %d", (5,), None
                )
            )
        finally:
            logs.migration.reset(token)
        entry = journal.recv(4096)
        handler._socket.close()
    assert b"MESSAGE\n" + (12).to_bytes(8, "little") + b"two\nlines: 5\n" in entry
    assert (
        b"\nPRIORITY=4\n" in entry
        and b"\nXEN_POSTCOPY_MIGRATION=abc\n" in entry
        and b"CODE_LINE=7\n" in entry
    )


def test_a_daemon_that_systemd_starts_logs_to_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record then has its fields; a line on standard error has none."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logs, "JOURNAL_SOCKET", str(tmp_path / "journal"))
    monkeypatch.setenv("JOURNAL_STREAM", "8:9")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(TIMEOUT_S)
        logs.set_up(verbose=False)
        (handler,) = logging.getLogger().handlers
        assert isinstance(handler, JournalHandler)
        logging.getLogger("receiver").warning("two\nlines")
        assert b"MESSAGE=two\\nlines\n" in journal.recv(4096)
        handler._socket.close()


def test_a_host_that_is_started_by_hand_needs_nobody_to_report_to(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    command = [
        sys.executable,
        "-m",
        "migrate.cli",
        "simulated-host",
        "--socket",
        str(tmp_path / "host.sock"),
    ]
    with zygote.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stderr is not None and "simulated host ready" in host.stderr.readline()
        host.send_signal(signal.SIGTERM)
        assert host.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_command_of_another_release_is_refused_by_name(world: World, which: str) -> None:
    with pytest.raises(MigrationError, match="unknown command 'teleport'"):
        world.ask(which, command="teleport")


@pytest.mark.parametrize(
    ("which", "command", "other"),
    [("receiver", "migrate", "sender"), ("sender", "restore", "receiver")],
)
def test_a_request_to_the_wrong_daemon_names_the_right_one(
    world: World, which: str, command: str, other: str
) -> None:
    with pytest.raises(
        MigrationError, match=f"this is the {which}'s socket; `{command}` needs the {other}'s"
    ):
        world.ask(which, command=command)


def test_show_and_watch(world: World, name: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        sockets = ("--socket", str(world.sender_socket), "--socket", str(world.receiver_socket))
        command = [sys.executable, "-m", "migrate.cli", *arguments, *sockets]
        return zygote.run(command, timeout=TIMEOUT_S)

    boot(world, name)
    answer = world.ask(
        "sender", command="migrate", domain=name, destination=f"127.0.0.1:{world.port}",
        strategy="postcopy",
    )  # fmt: skip
    result = answer["result"]
    shown = run("show", result["id"][:8])
    assert shown.returncode == 0 and "outgoing" in shown.stdout and "incoming" in shown.stdout
    assert "fault latency          " in shown.stdout
    assert "handed over            yes\n" in shown.stdout and " missing pages\n" in shown.stdout
    found = json.loads(run("show", name, "--json").stdout)
    assert [answer["id"] for answer in found] == [result["id"]] * 2
    counts = [answer["details"]["fault_latency_us"]["count"] for answer in found]
    assert counts == [found[0]["faults"]] * 2
    assert "nothing is needed of the source any more" in found[1]["known"]
    watched = run("watch", name)
    assert (watched.returncode, watched.stdout) == (0, f"{name}: completed\n")
    for which in ("sender", "receiver"):
        assert f"{result['id']}: {name} completed\n" in world.processes[which].log.read_text()
    unknown = run("show", "unheard-of")
    assert unknown.returncode == 1 and "no migration 'unheard-of'" in unknown.stderr
    with pytest.raises(MigrationError, match="no migration"):
        world.ask("receiver", command="show", migration="")


def test_a_sender_shows_all_faults_when_the_receiver_has_reported_them() -> None:
    """The report before it has only the faults up to its own time."""
    migration = Mock(progress=Progress(faults=591, latency_us=30))
    migration.domain.handle = None
    migration.context.receiver_statistics = {}
    assert _line(migration)["faults"] == 591
    migration.context.receiver_statistics = {
        "fault_latency_us": {"count": 654, "p50": 31.7, "max": 812.4}
    }
    line = _line(migration)
    assert (line["faults"], line["latency_us"], line["longest_wait_us"]) == (654, 32, 812)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP], ids=lambda stop: stop.name)
@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_daemon_that_is_being_stopped_serves_its_guests_and_takes_on_no_other(
    which: str, stop: signal.Signals
) -> None:
    with loopback_world(256 * MIB) as world:
        guest, other = boot(world), boot(world, "other")
        begin(world, "guest", bandwidth=4 * MIB)
        until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
        stopping = world.processes[which]
        stopping.popen.send_signal(stop)
        until(lambda: "waiting for guests" in stopping.log.read_text(), "it does not stop")
        stopping.popen.send_signal(signal.SIGHUP)  # as from a terminal; it ends nothing early
        with pytest.raises(
            MigrationError, match="is being stopped, and serves only the guests that need it"
        ):
            world.ask(
                "sender", command="migrate", domain="other", destination=f"127.0.0.1:{world.port}"
            )
        assert phase(world, which) == "postcopy"
        assert stopping.popen.wait(WAIT_S) == 0
        assert "stopped for the second time" not in stopping.log.read_text()
        verification, _view = verify_migrated(world, guest)
        assert verification.problems == []
        assert [(info.name, info.state) for info in world.source.domains()] == [
            (other.name, DomainState.RUNNING)
        ]


def test_a_receiver_that_is_stopped_twice_leaves_its_socket_while_a_guest_needs_it() -> None:
    """By the socket xl's helper detects that a guest may lack pages."""
    with loopback_world(256 * MIB) as world:
        guest = boot(world)
        begin(world, "guest", bandwidth=4 * MIB)
        until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
        stopping = world.processes["receiver"]
        stopping.popen.terminate()
        until(lambda: "waiting for guests" in stopping.log.read_text(), "it does not stop")
        stopping.popen.terminate()
        assert stopping.popen.wait(WAIT_S) == 0
        with pytest.raises(MigrationError, match="Connection refused"):
            world.ask("receiver", command="list")
        start_receiver(world, world.port)
        for end in ("receiver", "sender"):

            def completed(end: str = end) -> bool:
                return phase(world, end) == "completed"

            until(completed, "it does not arrive")
        assert verify_migrated(world, guest)[0].problems == []
        world.stop("receiver")
        assert not world.receiver_socket.exists()


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_daemon_that_is_being_stopped_logs_for_whom_it_waits_once(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon: Any = (SenderDaemon if which == "sender" else ReceiverDaemon)(
        cast(Any, None), tmp_path / "s", Config(), Journal(tmp_path / which)
    )

    def wait_for(name: str) -> None:
        guest = Mock(id=name, domain_name=name, needed=True, holds_pages=True)
        guest.phase, guest.outstanding_in_words = "postcopy", "9 pages to go"
        guest.measurement.outstanding_in_words = "9 pages missing"
        daemon._migrations[name] = guest

    wait_for("one")
    for missing in ("9 pages", "8 pages", "7 pages"):
        daemon._migrations["one"].outstanding_in_words = missing
        daemon._migrations["one"].measurement.outstanding_in_words = missing
        assert await daemon._drain()
    wait_for("two")
    assert await daemon._drain() and await daemon._drain()
    logged = [text for text in caplog.messages if "waiting for guests" in text]
    assert len(logged) == 2 and "one" in logged[0] and "two" in logged[1]


async def test_a_sender_that_is_being_stopped_names_why_a_migration_has_not_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The guest is suspended here, and no guest elsewhere needs pages."""
    journal = Journal(tmp_path / "sender")
    daemon = SenderDaemon(cast(Any, None), tmp_path / "s", Config(), journal)
    daemon._migrations["one"] = guest = Mock(id="one", domain_name="one", keeps_pages=False)
    guest.phase, guest.progress.problem = "switchover", "the guest cannot continue here yet"
    daemon._active.add("one")
    assert await daemon._drain()
    (logged,) = caplog.messages
    assert logged == (
        "waiting for migrations that have not ended: one (switchover: the guest cannot continue "
        "here yet)"
    )


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_what_is_waited_for_has_no_empty_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    told = list[str]()
    journal = Journal(tmp_path / which)
    make: Any = {"sender": SenderDaemon, "receiver": ReceiverDaemon}[which]
    monkeypatch.setattr(sys.modules[make.__module__], "notify", told.append)
    daemon = make(cast(Any, None), tmp_path / "s", Config(), journal)
    guest = Mock(id="one", domain_name="web", phase="preflight", keeps_pages=False, needed=False)
    guest.progress.problem, guest.ended.is_set.return_value = "", False
    daemon._migrations["one"] = guest
    if which == "sender":
        daemon._active.add("one")
    assert await daemon._drain()
    assert "web (preflight)" in told[-1]
    assert all(text.endswith("web (preflight)") for text in caplog.messages)


async def test_a_receiver_that_is_being_stopped_undoes_what_it_takes_back(tmp_path: Path) -> None:
    """Found by chaos (seed 33000082): the domain and its memory were left over."""
    journal = Journal(tmp_path / "receiver")
    daemon = ReceiverDaemon(cast(Any, None), tmp_path / "s", Config(), journal)
    daemon._migrations["one"] = guest = Mock(
        id="one", phase="precopy", needed=False, ended=trio.Event()
    )
    guest.progress.problem = ""
    assert await daemon._drain()
    guest.requests.cancel.assert_called_once()
    guest.ended.set()
    assert not await daemon._drain()


def test_a_daemon_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    with loopback_world(64 * MIB, daemons=False) as world:
        socket_path = tmp_path / "s"
        command = [sys.executable, "-m", "migrate.cli", "receiver", "--listen", "127.0.0.1:0"]
        command += [
            "--socket",
            str(socket_path),
            "--simulated",
            str(world.directory / "destination.sock"),
        ]
        ignoring = ["env", "--ignore-signal=HUP", *command]
        with subprocess.Popen(ignoring, stderr=subprocess.PIPE, text=True) as daemon:
            try:
                assert (
                    daemon.stderr is not None and "receiver listening" in daemon.stderr.readline()
                )
                daemon.send_signal(signal.SIGHUP)
                with ControlClient(socket_path) as client:
                    assert client.call(command="list")["migrations"] == []
                daemon.terminate()
                assert daemon.wait(TIMEOUT_S) == 0
            finally:
                daemon.kill()


async def test_an_error_in_stopping_ends_no_daemon_that_a_guest_needs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[bool | Exception] = [True, KeyError("a bug"), True, False]
    monkeypatch.setattr(lifecycle, "DRAIN_EVERY_S", 0.001)
    for module, setting in ((sys, "setswitchinterval"), (gc, "freeze"), (resource, "setrlimit")):
        monkeypatch.setattr(module, setting, lambda *_arguments: None)
    limiter = trio.to_thread.current_default_thread_limiter()

    async def serve() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    async def drain() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    tokens, hang_up = limiter.total_tokens, signal.getsignal(signal.SIGHUP)
    with trio.fail_after(WAIT_S):
        await lifecycle.until_stopped(serve, drain)
    os.kill(os.getpid(), signal.SIGHUP)  # a terminal closes while the process is ending
    signal.signal(signal.SIGHUP, hang_up)
    limiter.total_tokens = tokens
    assert answers == []
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "guests may need it" in record.getMessage()


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_daemon_whose_socket_is_taken_takes_nothing_up(which: str) -> None:
    """Its migrations would be cut off again at once."""
    other, host = ("receiver", "source") if which == "sender" else ("sender", "destination")
    with loopback_world(128 * MIB) as world:
        boot(world)
        begin(world, "guest")
        until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
        kill(world, which)
        before = journal(world, which).read_bytes()
        command = [
            *PROGRAM, which, "--listen", "127.0.0.1:0", "--config", str(world.config_file),
            "--socket", str(world.directory / f"{other}.sock"),
            "--simulated", str(world.directory / f"{host}.sock"),
        ]  # fmt: skip
        ended = zygote.run(command, timeout=WAIT_S)
        assert ended.returncode == 1 and "another process listens there" in ended.stderr
        assert journal(world, which).read_bytes() == before
