# SPDX-License-Identifier: GPL-2.0-or-later
"""A host has no descriptor, no thread or no writable state left for a daemon: what a guest depends
on is done as soon as it is possible, and nothing else ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from migrate import tasks
from migrate.cli.world import World, verify_migrated, wait_for_steps
from migrate.errors import GuestEndedError, MigrationError
from migrate.service import lifecycle as daemons
from migrate.service.config import Config
from migrate.service.journal import Journal
from migrate.tasks import isolated
from receiver import recovery
from receiver.daemon import ReceiverDaemon
from receiver.migration import IncomingMigration
from sender.daemon import SenderDaemon
from sender.migration import OutgoingMigration
from sender.toolstack import XlToolstack
from tests.conftest import MIB, Boot
from tests.support import inprocess
from tests.support.daemons import migrates, world
from tests.support.guests import busy
from tests.support.left import left_by_a_receiver, left_by_a_sender
from tests.support.waiting import until_async as until
from xenbackend.contract import Hypervisor
from xenbackend.errors import XenError
from xenbackend.simulated.guest import GuestSpec

__all__ = ["world"]


def test_without_a_descriptor_the_watchdog_is_fed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    daemons.notify("READY=1")  # no process receives this

    def exhausted(*_arguments: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        monkeypatch.setattr(socket, "socket", exhausted)
        daemons.notify("WATCHDOG=1")
        assert told.recv(100) == b"WATCHDOG=1"
        daemons._notify_socket().close()
        daemons._notify_socket.cache_clear()
        daemons.notify("WATCHDOG=1")  # this cannot be sent, and ends nothing


def test_a_sender_with_a_thousand_descriptors_sees_that_xl_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``select`` fails for descriptors from 1024 on."""
    pidfd_open = os.pidfd_open

    def beyond(pid: int) -> int:
        with open(pidfd_open(pid)) as pidfd:
            return fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 1500)

    monkeypatch.setattr(os, "pidfd_open", beyond)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as xl:
        tools = XlToolstack("guest", Path("/nowhere"), None, xl.pid)
        assert tools.may_decide()
        xl.communicate()
        assert not tools.may_decide()
        tools.close()


def test_a_read_only_state_directory_refuses_new_entries_and_fails_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = Journal(tmp_path)
    before.write("kept", {"step": "handed over"})
    before.write("stale", {"step": "begun"})
    (tmp_path / "stale.json").write_text('\n{"boot": "an earlier one"}')

    def refuse(*_arguments: object, **_options: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    opened = os.open

    def open_only_to_read(path: Path, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            refuse()
        return opened(path, flags, *arguments, **options)

    status = os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, os.ST_RDONLY, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: status)
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    monkeypatch.setattr(os, "open", open_only_to_read)
    monkeypatch.setattr(Path, "unlink", refuse)
    journal = Journal(tmp_path)
    journal.own()
    assert "is on a read-only file system: new migrations are refused" in caplog.text
    assert journal.entries()["kept"]["step"] == "handed over"
    with pytest.raises(MigrationError, match="Read-only file system"):
        journal.write("new", {"step": "begun"})
    journal.write("kept", {"step": "completing"}, needed=False)
    journal.erase("new")
    caplog.clear()
    journal.erase("kept")
    assert "cannot erase" in caplog.text
    assert json.loads((tmp_path / "kept.json").read_text())["step"] == "handed over"


async def test_descriptors_used_up_by_strangers_are_not_missed_by_migrations(world: World) -> None:
    spec = GuestSpec("bystander", 8 * MIB, 2, workload="random", zero_permille=0, rate=2000)
    guest = world.source.create_guest(spec.to_bytes())
    await trio.to_thread.run_sync(wait_for_steps, guest, 50)
    guest.close()
    client = world.control("sender")
    client.send(
        command="migrate", domain="bystander", destination=f"127.0.0.1:{world.port}",
        strategy="postcopy", bandwidth=4 * MIB,
    )  # fmt: skip
    client.answer()

    def phase() -> str:
        lines = world.ask("receiver", command="list")["migrations"]
        return str(lines[0]["phase"]) if lines else ""

    await until(lambda: phase() == "postcopy")
    pid = world.processes["receiver"].popen.pid
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (200, 200))
    with contextlib.ExitStack() as stack:
        for number in range(400):
            with contextlib.suppress(OSError):
                stranger = stack.enter_context(socket.socket())
                stranger.bind((f"127.0.1.{number % 200 + 1}", 0))
                stranger.settimeout(5)
                stranger.connect(("127.0.0.1", world.port))
        await until(
            lambda: (
                "a connection is refused: the descriptors"
                in world.processes["receiver"].log.read_text()
            )
        )
        assert phase() in ("postcopy", "completing", "completed")  # a request is answered meanwhile
        await until(lambda: phase() == "completed")
    await trio.to_thread.run_sync(list, client.answers())  # the source has released the guest
    client.close()
    verification, _view = await trio.to_thread.run_sync(verify_migrated, world, spec)
    assert verification.problems == []
    assert (
        world.processes["receiver"]
        .log.read_text()
        .count("a connection is refused: the descriptors")
        == 1
    )
    await migrates(world)


def no_threads(patch: pytest.MonkeyPatch, *, times: int) -> list[object]:
    """Make the first starts of threads fail.  Returns a list, to which each failed thread is
    added.
    """
    original, failed = trio.to_thread.run_sync, list[object]()

    async def start(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if len(failed) < times:
            failed.append(call)
            raise RuntimeError("can't start new thread")
        return await original(call, *arguments, **options)

    patch.setattr(trio.to_thread, "run_sync", start)
    return failed


async def test_a_host_without_threads_is_named_and_waited_for(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest depends on the daemons, so work that needs a thread is done as soon as there is
    one.
    """
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    monkeypatch.setattr(recovery, "CARRY_ON_AGAIN_S", 0.01)
    failed = list[object]()

    async def meanwhile(outcome: inprocess.Outcome, _link: object) -> None:
        nonlocal failed
        await until(lambda: outcome.migration.context.entry.ran)
        failed = no_threads(monkeypatch, times=30)

    outcome = await inprocess.migrate(clean_hosts, busy(name), meanwhile=meanwhile)
    assert outcome.error is None and len(failed) == 30
    assert (await inprocess.verification(clean_hosts, busy(name))).problems == []
    assert "internal error" not in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("daemon", [SenderDaemon, ReceiverDaemon])
async def test_a_host_without_threads_can_be_asked_what_its_daemons_do(
    daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = list[dict[str, Any]]()

    class Connection:
        async def answer(self, _event: str, **fields: Any) -> None:
            answers.append(fields)

    asked = daemon(cast(Hypervisor, None), tmp_path / "socket", Config(), Journal(tmp_path))
    no_threads(monkeypatch, times=1)
    await asked._handle({"command": "list"}, Connection())
    assert answers == [{"migrations": [], "kept": []}]


async def test_what_a_guest_depends_on_is_done_as_soon_as_a_thread_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    failed = no_threads(monkeypatch, times=3)

    async def work() -> int:
        return await trio.to_thread.run_sync(os.getpid)

    await isolated("a connection", work)
    assert "a connection is given up: this host gives the daemon no further thread" in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    assert await tasks.as_soon_as_threads_start(work) == os.getpid() and len(failed) == 3
    with pytest.raises(RuntimeError, match="another"):
        await tasks.as_soon_as_threads_start(fail_otherwise)


async def fail_otherwise() -> None:
    raise RuntimeError("another")


@pytest.mark.parametrize("end", ["sender", "receiver"])
async def test_a_successor_takes_a_guest_up_when_it_can(
    clean_hosts: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    """If a thread cannot be started at first, the journal is not erased, and the guest is not given
    up.
    """
    for module, pause in ((tasks, "AGAIN_S"), (recovery, "LAST_START_AGAIN_S")):
        monkeypatch.setattr(module, pause, 0.01)
    journal, reached = Journal(tmp_path), list[str]()

    def reach(*_arguments: object, **_options: object) -> None:
        reached.append("reached")
        raise GuestEndedError("reached")

    migration: IncomingMigration | OutgoingMigration
    if end == "receiver":
        migration = left_by_a_receiver(clean_hosts.destination, journal, "taken over")
        monkeypatch.setattr(type(clean_hosts.destination), "reopen_incoming", reach)
    else:
        migration = left_by_a_sender(clean_hosts.source, journal, "handed over")
        monkeypatch.setattr(type(clean_hosts.source), "open", reach)
    failed = no_threads(monkeypatch, times=3)
    with contextlib.suppress(MigrationError):
        await migration.run()
    assert reached and len(failed) == 3


def test_a_host_without_a_descriptor_answers_that_and_keeps_its_clients(
    boot: Boot, clean_hosts: World
) -> None:
    (_spec, guest), pid = boot(), clean_hosts.processes["source"].popen.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    config = GuestSpec("another", 4 * MIB).domain_config()
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, limits[1]))
    try:
        with pytest.raises(XenError) as error:
            clean_hosts.source.create_incoming(config)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert (error.value.operation, error.value.errno) == ("create_incoming", errno.EMFILE)
    assert guest.info().domid == guest.domid
    assert len(os.listdir(f"/proc/{pid}/fd")) == fds
    clean_hosts.source.create_incoming(config)
