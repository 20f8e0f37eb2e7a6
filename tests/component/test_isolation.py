# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing that happens in one connection, one migration or one ended migration ends a daemon."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from migrate import logs, tasks
from migrate.cli.world import World
from migrate.errors import (
    MigrationError,
    PeerClosedError,
    RefusedError,
    RemoteProtocolError,
    UnknownSessionError,
)
from migrate.lanes.accept import AwaitedLanes
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.dial import LAST_RETRY_S, QUICK_FOR_S, QUICK_RETRY_S, DialledLanes
from migrate.lanes.pairs import rejoining
from migrate.logs import JournalHandler, LineHandler, OneLine
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.session import Role, Session, hello, number_of_rejoin, rejoin_token
from migrate.service.config import Config
from migrate.service.journal import Journal
from migrate.service.lifecycle import serve_connections
from migrate.service.progress import keep_measuring
from migrate.tasks import isolated, kept_up
from receiver import rollback
from receiver.context import Context
from receiver.daemon import ReceiverDaemon
from receiver.entry import Entry
from receiver.ownership import Ownership
from receiver.peer import Peer
from receiver.progress import IncomingProgress
from receiver.switchover import Switchover
from receiver.toolstack import OwnToolstack
from sender.daemon import SenderDaemon
from tests.support import inprocess
from tests.support.guests import busy
from tests.support.left import Ends, left_by_a_sender
from xenbackend.contract import Hypervisor
from xenbackend.errors import XenError

BUGS = [
    KeyError("a bug"),
    TypeError("a bug"),
    OSError(errno.EMFILE, "no descriptor"),
    AssertionError(),
    RecursionError(),
]


# ---- tasks ----
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
async def test_a_task_s_error_is_logged_with_its_traceback_and_ends_no_other(
    bug: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise bug

    async def fail_in_a_group() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(isolated, "one", fail)
        nursery.start_soon(isolated, "another", fail_in_a_group)
    assert [record.exc_info is not None for record in caplog.records] == [True, True]
    assert "internal error in one, which is given up" in caplog.text


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
async def test_what_a_daemon_always_needs_begins_anew_after_each_error(
    bug: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "KEPT_UP_S", 0.001)
    attempts = itertools.count()

    async def fail_often() -> None:
        if (attempt := next(attempts)) < 3:
            raise bug if attempt else ExceptionGroup("several", [bug])

    with trio.fail_after(50):
        await kept_up("the work", fail_often)
    assert next(attempts) == 4
    (record,) = caplog.records
    assert "the work fails: " in record.message and "trying again" in record.message
    assert bool(record.exc_info) is not isinstance(bug, OSError)


async def test_figures_of_a_migration_are_taken_again_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "KEPT_UP_S", 0.001)
    ended, taken = trio.Event(), list[int]()

    def measure() -> None:
        taken.append(1)
        if len(taken) == 1:
            raise MemoryError
        ended.set()

    with trio.fail_after(50):
        await keep_measuring(measure, ended)
    assert len(taken) == 2


async def test_a_task_that_is_cancelled_while_it_fails_is_both_logged_and_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("a bug")

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_when_cancelled)
            nursery.start_soon(trio.sleep_forever)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(isolated, "one", work)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert "a bug" in caplog.text


class Faltering:
    """A listener that fails in the given ways, and then has one connection."""

    def __init__(self, *errors: Exception):
        self._errors = list(errors)
        self._stream, self.peer = trio.socket.socketpair()

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        if self._errors:
            raise self._errors.pop(0)
        if self._stream.fileno() < 0:
            await trio.sleep_forever()
        return trio.SocketStream(self._stream)

    async def __aenter__(self) -> Faltering:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass


@pytest.mark.parametrize("from_strangers", [False, True])
async def test_connections_are_accepted_again_after_any_error_and_it_is_logged_once(
    from_strangers: bool, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    listener = Faltering(
        *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EIO)), *BUGS
    )
    handled = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        handled.set()
        raise KeyError("a bug")

    async with trio.open_nursery() as nursery:
        listeners = cast("list[trio.SocketListener]", [listener])
        serve: Callable[..., Awaitable[None]] = serve_connections
        nursery.start_soon(
            lambda: serve("a connection", handle, listeners, from_strangers=from_strangers)
        )
        await handled.wait()
        # The connection is closed, whatever its handler did.
        assert await listener.peer.recv(1) == b""
        nursery.cancel_scope.cancel()
    assert [
        r.getMessage().split(":")[0]
        for r in caplog.records
        if r.name == "migrate.service.lifecycle"
    ] == ["a connection cannot be accepted"]
    listener.peer.close()


def receiving(hypervisor: Hypervisor, lanes: Any, journal: Journal) -> Context:
    record, progress = Entry(journal, "session", lanes, owns_domain=False), IncomingProgress()
    ownership = Ownership(record.write)
    peer = Peer(lanes, Session(Role.RECEIVER))
    return Context(hypervisor, OwnToolstack(), peer, ownership, record, progress)


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_the_outcome_is_sent_until_the_peer_has_it(which: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    refusals = [PeerClosedError("gone"), RefusedError("no"), RemoteProtocolError("damaged"), *BUGS]
    lanes = cast(Any, Ends([*refusals, UnknownSessionError("unknown session")]))
    hypervisor = cast(Hypervisor, None)
    if which == "sender":
        outgoing = left_by_a_sender(hypervisor, journal, "given up", lanes)
        with pytest.raises(MigrationError, match="given up"):
            await outgoing.run()
        journal.write(outgoing.id, {"step": "given up"})
        await outgoing.linger()
    else:
        incoming = receiving(hypervisor, lanes, journal)
        journal.write("session", {"step": "given up"})
        await rollback.linger(incoming, m.Abort("never mind"), trio.lowlevel.checkpoint)
    assert lanes.errors == []
    assert journal.entries() == {}


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_daemon_continues_when_a_migration_fails_in_every_way(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hypervisor, journal = cast(Hypervisor, None), Journal(tmp_path)
    daemon: Any = (SenderDaemon if which == "sender" else ReceiverDaemon)(
        hypervisor, tmp_path / "socket", Config(), journal
    )

    class Failing:
        id, domain_name, session, phase = "session", "guest", None, "postcopy"

        class Progress:
            phase, problem, domain = "postcopy", "", "guest"

        progress = Progress()
        context = SimpleNamespace(entry=SimpleNamespace(ended_there=False))
        has_ended = False

        async def run(self) -> None:
            raise KeyError("the run's bug")

        async def linger(self, *_amend: object) -> None:
            raise TypeError("the linger's bug")

    migration = Failing()
    daemon._migrations["session"] = migration
    await daemon._carry_out(migration, *([trio.Event()] if which == "sender" else []))
    assert "the run's bug" in caplog.text and "the linger's bug" in caplog.text
    assert all(record.exc_info for record in caplog.records if record.levelno >= logging.ERROR)


@pytest.mark.parametrize("noted", [True, False])
async def test_a_successor_is_received_though_the_clock_went_back(
    monkeypatch: pytest.MonkeyPatch, noted: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """``noted``: the journal has the number.  Earlier releases noted none, and took their numbers
    from the clock.
    """
    key, numbers = b"k" * 32, list[int]()
    awaited = AwaitedLanes()
    awaited.keep(key)

    async def dial(_self: DialledLanes, kind: Lane, token: bytes) -> LaneConnection:
        numbers.append(number_of_rejoin(key, token))
        await awaited.welcome(hello(kind, "session", token))
        return cast(LaneConnection, None)

    monkeypatch.setattr(DialledLanes, "_dial", dial)
    facts: dict[str, Any] = {"dials": ["peer", 1], **({"rejoins": 0} if noted else {})}
    if not noted:  # the last number of an earlier release
        await awaited.welcome(hello(Lane.PUSH, "session", rejoin_token(key, 1_790_000_000)))
    for now in (1_790_000_100, 1_790_000_000, 0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        lanes = rejoining("session", facts, {}, Terms())
        lanes.keep(key)
        for _ in range(3):
            await lanes.again(lambda _note: None)
        facts |= lanes.facts()
    assert numbers == sorted(set(numbers)) and len(numbers) == 9


@pytest.mark.parametrize("proven", [True, False])
def test_a_successor_asks_for_the_proof_that_its_predecessor_was_given(proven: bool) -> None:
    facts = {"dials": ("peer", 1), "rejoins": 2, "proven": proven}
    assert rejoining("session", facts, {}, Terms()).facts()["proven"] is proven
    del facts["proven"]  # an earlier release
    assert rejoining("session", facts, {}, Terms()).facts()["proven"] is False


async def test_a_peer_that_refuses_is_dialled_ever_less_often(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """After a lane that lasted longer than the pause, the pauses begin with the shortest one."""
    lanes, dialled = DialledLanes(("peer", 1), "session", Terms(), b""), list[float]()
    answer: Exception | None = RefusedError("not now")

    async def dial(_self: DialledLanes, _kind: Lane, _token: bytes) -> LaneConnection:
        await trio.lowlevel.checkpoint()
        dialled.append(trio.current_time())
        if answer is not None:
            raise answer
        return cast(LaneConnection, None)

    monkeypatch.setattr(DialledLanes, "_dial", dial)
    for _ in range(60):
        with pytest.raises(RefusedError):
            await lanes.again(lambda _note: None)
    pauses = [after - before for before, after in itertools.pairwise(dialled)]
    assert pauses == pytest.approx(sorted(pauses))
    early = [pause for pause, at in zip(pauses, dialled, strict=False) if at < QUICK_FOR_S / 2]
    assert early[-1] == pytest.approx(QUICK_RETRY_S)
    assert pauses[-1] == pytest.approx(LAST_RETRY_S)
    answer = None
    await lanes.again(lambda _note: None)
    await lanes.again(lambda _note: None)  # this lane is lost at once
    assert dialled[-1] - dialled[-2] == pytest.approx(LAST_RETRY_S)
    await trio.sleep(2 * LAST_RETRY_S)
    lost = trio.current_time()
    await lanes.again(lambda _note: None)
    assert dialled[-1] - lost < 1


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), XenError("getdomaininfo", errno.EAGAIN), MigrationError("no")]
)
async def test_an_error_after_the_handover_ends_neither_the_pager_nor_the_migration(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    follow, failed = Switchover.follow_domain, list[str]()

    async def fail_once(self: Switchover) -> None:
        if not failed:
            await self.handed_over.wait()
            failed.append(name)
            raise error
        await follow(self)

    monkeypatch.setattr(Switchover, "follow_domain", fail_once)
    outcome = await inprocess.migrate(clean_hosts, busy(name))
    assert failed and outcome.error is None
    assert outcome.migration.context.statistics.rejoins == 1
    assert (await inprocess.verification(clean_hosts, busy(name))).problems == []


# ---- logs ----
def record(text: str) -> logging.LogRecord:
    made = logging.LogRecord("pager", logging.WARNING, "pager.py", 7, "guest %s", (text,), None)
    made.about = ""
    return made


def test_a_name_in_a_log_makes_no_line_of_its_own() -> None:
    line = OneLine("%(about)s%(message)s").format(record("web\nERROR: forged \x1b[31m\u202e"))
    assert line == r"guest web\nERROR: forged \x1b[31m\u202e"


def test_a_log_that_nobody_reads_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(logs, "STDERR", writer)
    handler = LineHandler()
    for _ in range(100):
        handler.handle(record("x" * 10_000))
    os.close(reader)
    handler.handle(record("into a closed pipe"))
    os.close(writer)
    handler.handle(record("to a closed descriptor"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        to_journal = JournalHandler(str(tmp_path / "journal"))
        for _ in range(1000):
            to_journal.handle(record("x" * 1_000))
        to_journal.handle(record("x" * 1_000_000))
    to_journal.handle(record("nobody is there"))
    to_journal._socket.close()
