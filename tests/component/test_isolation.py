# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing that happens in one connection, one migration or one ended migration ends a daemon."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import resource
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from migrate import logs, tasks
from migrate.cli.world import (
    World,
    loopback_world,
    start_receiver,
    start_sender,
    verify_migrated,
    wait_for_steps,
)
from migrate.errors import (
    GuestEndedError,
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
from migrate.service import lifecycle as daemons
from migrate.service.config import Config
from migrate.service.journal import BOOT_ID, Journal
from migrate.service.lifecycle import serve_connections
from migrate.tasks import isolated
from receiver import recovery, rollback
from receiver.context import Context
from receiver.daemon import ReceiverDaemon
from receiver.entry import Entry
from receiver.migration import IncomingMigration
from receiver.ownership import Ownership
from receiver.peer import Peer
from receiver.progress import IncomingProgress
from receiver.statistics import PagerStatistics
from receiver.switchover import Switchover
from receiver.toolstack import OwnToolstack
from sender.daemon import SenderDaemon
from sender.inbox import receiver_statistics
from sender.migration import OutgoingMigration
from sender.statistics import from_peer
from sender.toolstack import XlToolstack
from tests.conftest import MIB
from tests.support import inprocess
from tests.support.guests import busy
from tests.support.left import NoLanes, left_by_a_receiver, left_by_a_sender
from tests.support.waiting import until_async as until
from xenbackend.contract import Hypervisor
from xenbackend.errors import XenError
from xenbackend.simulated.guest import GuestSpec

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


# ---- migrations that have ended ----
class Ends(NoLanes):
    """Lanes that fail to deliver the final message, each time for another reason.  At last the
    other end does not need the message any more.
    """

    dials, peer = ("peer", 1), "peer"

    def __init__(self, errors: list[Exception]):
        self.errors = errors

    async def again(self, note: object) -> LaneConnection:
        await trio.lowlevel.checkpoint()
        raise self.errors.pop(0)


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
        await rollback.linger(incoming, m.Abort("never mind"))
    assert lanes.errors == []
    assert journal.entries() == {}


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_daemon_goes_on_when_a_migration_fails_in_every_way(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hypervisor, journal = cast(Hypervisor, None), Journal(tmp_path)
    daemon: Any = (SenderDaemon if which == "sender" else ReceiverDaemon)(
        hypervisor, tmp_path / "socket", Config(), journal
    )

    class Failing:
        id, domain_name, session = "session", "guest", None

        class Progress:
            phase, problem, domain = "postcopy", "", "guest"

        progress = Progress()
        has_ended = False

        async def run(self) -> None:
            raise KeyError("the run's bug")

        async def linger(self) -> None:
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


# ---- what a daemon finds at its start ----
ENTRIES: dict[str, str | dict[str, Any]] = {
    "garbage": "\n\x00\x00\x00",
    "of another form": '\n{"boot": "BOOT", "phase": 7}',
    "of other types": '\n{"boot": "BOOT", "dials": 5, "step": [], "domid": "x", "offer": 1, '
    '"key": 2, "xl": 0, "domain": 3}',
    "deep": "\n" + "[" * 100_000,
    "empty": "",
    "of another step": {"step": "warming"},
    "of a strange domid": {"domid": "x"},
    "of a domid too large": {"domid": 10**30},
    "of a handle too short": {"handle": "0909"},
    "without a key": {"key": ""},
    "of a strange address": {"dials": ["nowhere", 99999999]},
}
FACTS: dict[str, dict[str, Any]] = {
    "sender": {
        "step": "handed over",
        "xl": False,
        "domid": 9,
        "handle": "09" * 16,
        "domain": "guest",
        "key": "00",
        "dials": None,
        "strategy": "postcopy",
        "bandwidth": None,
        "checkpoints": None,
        "successor": None,
    },
    "receiver": {
        "step": "taken over",
        "xl": False,
        "domid": 9,
        "handle": "09" * 16,
        "key": "00",
        "dials": None,
        "offer": {
            "name": "guest",
            "nr_pfns": 64,
            "max_pages": 64,
            "vcpus": 1,
            "platform": "",
            "paging": True,
            "checkpoint_ms": 0,
        },
    },
}


def entry(which: str, text: str | dict[str, Any]) -> str:
    """Return an entry.  ``text``: the entry itself, or its differences from a valid one."""
    if isinstance(text, str):
        return text.replace("BOOT", BOOT_ID.read_text().strip())
    return "\n" + json.dumps({"boot": BOOT_ID.read_text().strip(), **FACTS[which], **text})


@pytest.fixture
def world() -> Iterator[World]:
    with loopback_world(256 * MIB) as made:
        yield made


async def test_an_entry_of_another_release_is_left_and_its_session_is_not_called_unknown(
    world: World,
) -> None:
    """If a peer is answered that a session is unknown, it releases what it keeps for the session.
    Nor is a new session of that name received (without a token), which would replace the entry.
    """
    files = {}
    for which, start in (("sender", start_sender), ("receiver", start_receiver)):
        world.stop(which)
        state = (
            world.directory
            / f"{'source' if which == 'sender' else 'destination'}.sock.state"
            / which
        )
        for number, text in enumerate(ENTRIES.values()):
            path = state / f"session{number}.json"
            files[path] = entry(which, text)
            path.write_text(files[path])
        start(world)
        port = world.ask(which, command="status")["port"]
        for number, token in itertools.product(range(len(ENTRIES)), (b"token", b"")):
            lanes = DialledLanes(("127.0.0.1", port), f"session{number}", Terms(), token)
            with pytest.raises(
                RefusedError,
                match="journal of that session was not resumed: `xen-postcopy list`",
            ) as caught:
                await lanes.push()
            assert not isinstance(caught.value, UnknownSessionError)
        assert world.ask(which, command="list")["migrations"] == []
    await migrates(world)
    assert {path: path.read_text() for path in files} == files
    for which in ("sender", "receiver"):
        assert (
            "this release does not have the step 'warming'"
            in (world.directory / f"{which}.log").read_text()
        )


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_value_that_no_release_has_written_is_not_acted_on(
    which: str, clean_hosts: World, tmp_path: Path
) -> None:
    """If a wrong domid were taken for the number of a domain that has ended, what a guest needs
    would be given up.
    """

    def take_up(facts: dict[str, Any]) -> None:
        journal, lanes = Journal(tmp_path), cast(Any, Ends([]))
        if which == "sender":
            OutgoingMigration.of_predecessor("session", clean_hosts.source, lanes, journal, facts)
        else:
            IncomingMigration.of_predecessor(
                clean_hosts.destination, "session", lanes, journal, facts
            )

    good = FACTS[which]
    take_up(good)
    for name in good:
        with pytest.raises((ValueError, MigrationError)):
            take_up({**good, name: b"neither"})
        with pytest.raises((ValueError, MigrationError)):
            take_up({key: value for key, value in good.items() if key != name and name != "handle"})


async def migrates(world: World, name: str = "another") -> None:
    """Migrate another guest, for which nothing must have changed."""
    spec = GuestSpec(name, 4 * MIB, 1, workload="random")
    world.source.create_guest(spec.to_bytes()).close()

    def migrate() -> None:
        world.ask(
            "sender",
            command="migrate",
            domain=name,
            destination=f"127.0.0.1:{world.port}",
            strategy="postcopy",
        )

    await trio.to_thread.run_sync(migrate)
    verification, _view = await trio.to_thread.run_sync(verify_migrated, world, spec)
    assert verification.problems == []
    world.check_alive()


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


# ---- the messages of a peer ----
def test_what_a_peer_counted_is_taken_by_key_and_type() -> None:
    ours = PagerStatistics()
    ours.answered(1, 0.001)
    ours.populate_evicted = "native"
    assert from_peer(json.loads(json.dumps(ours.summary()))) == ours.summary()
    nothing = from_peer({})
    assert nothing.keys() == ours.summary().keys() and nothing["fault_latency_us"]["count"] == 0
    lies = {
        "domain": "\x1b[31mweb",
        "downtime_s": 0,
        "id": "x",
        "pull": [],
        "dropped_pages": -1,
        "vcpu_block_s": {"\x1b": 1, "0": 2},
        "populate_evicted": "\x1b]0;x\x07" * 9,
        "checkpoints": {"kept": True, "pages": 1e400, "pause_s": float("nan")},
        "fault_latency_us": {
            "count": "9",
            "p50": None,
            "max": 2**63,
            "mean": 1.5,
            "histogram": {str(n): 1 for n in range(9999)},
        },
    }
    found = from_peer(lies)
    assert found.keys() == nothing.keys()
    assert found["vcpu_block_s"] == {"0": 2}
    assert found["populate_evicted"].isprintable() and len(found["populate_evicted"]) == 16
    assert found["checkpoints"] == nothing["checkpoints"] and found["pull"] == nothing["pull"]
    histogram = found["fault_latency_us"].pop("histogram")
    assert (
        found["fault_latency_us"] == {"count": 0, "mean": 1.5, "p50": 0, "p99": 0, "max": 0}
        and len(histogram) == 512
    )
    others: tuple[object, ...] = (None, [], 5, "x")
    for told in others:
        assert from_peer(told) == nothing


numbers = st.integers() | st.floats() | st.booleans()
words = st.text(max_size=30) | st.sampled_from(["\x1b]0;x\x07", "\n", "0", "9" * 30, "\u202e"])
anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
COUNTED = (
    "fault_latency_us",
    "vcpu_block_s",
    "pull",
    "dropped_pages",
    "populate_evicted",
    "checkpoints",
)
told_by_peer = st.dictionaries(st.sampled_from(COUNTED) | words, anything, max_size=8)


def leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *leaves(inner))
    else:
        yield value


@given(told_by_peer | anything)
def test_whatever_a_peer_counted_is_checked_before_anybody_sees_it(told: object) -> None:
    """Invariant 10: the counters reach a terminal, a log and JSON."""
    try:
        found = receiver_statistics(json.dumps(told).encode())
    except RemoteProtocolError:
        return
    assert found.keys() == set(COUNTED)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for leaf in leaves(found):
        if isinstance(leaf, str):
            assert leaf.isprintable() and len(leaf) < 20
        else:
            assert (
                isinstance(leaf, int | float) and not isinstance(leaf, bool) and 0 <= leaf < 2**63
            )


@pytest.mark.parametrize("data", [b"[" * 60_000, b"\xff", b"9" * 5000 + b"x"])
def test_statistics_that_are_not_json_are_the_peer_s_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="statistics are not JSON"):
        receiver_statistics(data)


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
    assert (
        "a connection is given up: this host lets the daemon have no further thread" in caplog.text
    )
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
