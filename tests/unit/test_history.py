# SPDX-License-Identifier: GPL-2.0-or-later
"""The history of ended migrations: what outlives a daemon, what bounds it, and what no damage to
its file can do.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from migrate.errors import UnknownMigrationError
from migrate.service import history
from migrate.service.history import FORMAT, MOST_BYTES, MOST_ENTRIES, MOST_LINES, RECENT, History
from tests.support.waiting import WAIT_S


def shown(number: int, domain: str = "web", **others: Any) -> dict[str, Any]:
    """Return what ``show`` answers."""
    return {
        "id": f"{number:032d}", "direction": "outgoing", "domain": domain, "peer": "host2:8013",
        "phase": "completed", "problem": "", "outstanding": 0, "unknown": [],
        "details": {"downtime_s": 0.003}, "known": "nothing", **others,
    }  # fmt: skip


def loaded(path: Path) -> History:
    found = History(path)
    found.load()
    return found


def numbers(found: History, *, of_predecessors: bool = True) -> list[int]:
    return [int(line["id"]) for line in found.lines(of_predecessors=of_predecessors, but=())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


async def test_ended_migrations_outlive_their_daemon(path: Path) -> None:
    before = loaded(path)
    await before.add(shown(1))
    await before.add(shown(2, "mail", phase="failed", problem="no memory"))
    assert numbers(before, of_predecessors=False) == [1, 2]
    after = loaded(path)
    assert numbers(after) == [1, 2] and numbers(after, of_predecessors=False) == []
    await after.add(shown(3))
    assert numbers(after) == [1, 2, 3] and numbers(after, of_predecessors=False) == [3]
    failed = after.find({}, "mail", ())
    assert isinstance(failed, history.Ended)
    assert failed.shown["details"] == {"downtime_s": 0.003} and failed.shown["ended_at"]
    assert not {"details", "known"} & failed.line.keys() and failed.line["problem"] == "no memory"


async def test_a_migration_has_one_end(path: Path) -> None:
    """A successor ends once more what its predecessor had given up."""
    added = list[dict[str, Any]]()
    first = loaded(path)
    first.added = added.append
    await first.add(shown(1, problem="cancelled"))
    await first.add(shown(1, problem="given up"))
    assert len(added) == 1
    again = loaded(path)
    await again.add(shown(1, problem="given up"))
    (line,) = loaded(path).lines(of_predecessors=True, but=())
    assert line["problem"] == "cancelled"


def ending(number: int, phase: str, problem: str) -> Any:
    """Return a migration that has ended."""
    progress = SimpleNamespace(problem=problem)
    return SimpleNamespace(id=f"{number:032d}", phase=phase, progress=progress)


async def test_what_becomes_known_after_the_end_replaces_the_entry(path: Path) -> None:
    found, migration = loaded(path), ending(1, "completed", "")
    await found.add(shown(1))
    await found.add(shown(2))
    amend = found.follow(migration)
    await amend()
    assert path.read_bytes().count(b"\n") == 2  # nothing has become known
    migration.phase, migration.progress.problem = "failed", "it runs twice"
    await amend()
    await amend()
    assert path.read_bytes().count(b"\n") == 3
    for one in (found, loaded(path)):
        assert numbers(one) == [1, 2]
        first, _second = one.lines(of_predecessors=True, but=())
        assert [first[key] for key in ("phase", "outcome", "problem")] == [
            "failed", "failed", "it runs twice",
        ]  # fmt: skip
        assert first["ended_at"] == found.ended_at(first["id"])
        ended = one.find({}, first["id"], ())
        assert isinstance(ended, history.Ended) and ended.shown["details"]


async def test_a_successor_amends_only_what_has_become_known_since(path: Path) -> None:
    await loaded(path).add(shown(1, phase="failed", problem="cancelled by the operator"))
    found, migration = loaded(path), ending(1, "failed", "given up before the restart")
    amend = found.follow(migration)
    await amend()
    (line,) = found.lines(of_predecessors=True, but=())
    assert line["problem"] == "cancelled by the operator"
    assert numbers(found, of_predecessors=False) == []
    migration.progress.problem += "; the destination has forgotten"
    await amend()
    (line,) = found.lines(of_predecessors=False, but=())
    assert line["problem"] == migration.progress.problem


async def test_a_request_is_answered_by_how_the_migration_has_ended(path: Path) -> None:
    await loaded(path).add(shown(7, phase="failed", problem="cancelled by the operator"))
    found = loaded(path)
    for name in ("web", f"{7:032d}"[:8]):
        ended = found.find({}, name, ())
        assert isinstance(ended, history.Ended)
        refusal = str(ended.refusal("cancel"))
        assert (
            "web has ended (cancelled by the operator)" in refusal
            and "nothing to cancel" in refusal
        )
        assert "nothing to switch over" in str(ended.refusal("postcopy-now"))
    with pytest.raises(UnknownMigrationError):
        found.find({}, "mail", ())


# ---- bounds ----
async def test_memory_and_file_are_bounded(path: Path) -> None:
    found = loaded(path)
    for number in range(MOST_LINES + 1):
        await found.add(shown(number))
    assert numbers(found) == [*range(MOST_LINES + 1)][-MOST_ENTRIES:]
    assert numbers(found, of_predecessors=False) == numbers(found)[-RECENT:]
    assert path.read_bytes().count(b"\n") == MOST_ENTRIES
    assert numbers(loaded(path)) == numbers(found)
    assert os.listdir(path.parent) == [path.name]


async def test_the_file_is_bounded_in_bytes(path: Path) -> None:
    found, sizes = loaded(path), list[int]()
    large = {"reason": "x" * 60_000}
    for number in range(MOST_BYTES // 60_000 + 5):
        await found.add(shown(number, details=large))
        sizes.append(path.stat().st_size)
    assert MOST_BYTES // 2 < max(sizes) <= MOST_BYTES and sizes[-1] < max(sizes)
    newest = numbers(loaded(path))
    assert newest == numbers(found)[-len(newest) :] and len(newest) > 20


async def test_what_was_measured_is_left_out_of_an_entry_that_is_too_large(path: Path) -> None:
    await loaded(path).add(shown(1, details={"histogram": {str(n): n for n in range(10_000)}}))
    found = loaded(path).find({}, "web", ())
    assert isinstance(found, history.Ended) and found.shown["details"] == {}


async def test_of_a_file_that_is_larger_than_a_history_the_end_is_read(path: Path) -> None:
    line = b"\n" + json.dumps({**shown(1), "format": FORMAT}).encode()
    path.write_bytes(line * (MOST_BYTES // len(line) * 3))
    path.write_bytes(path.read_bytes() + line.replace(b"%032d" % 1, b"%032d" % 2))
    found = loaded(path)
    assert numbers(found) == [1, 2]
    await found.add(shown(3))
    assert path.stat().st_size < MOST_BYTES and numbers(loaded(path)) == [1, 2, 3]


# ---- damage ----
async def test_an_entry_that_was_cut_off_is_read_past(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = loaded(path)
    await found.add(shown(1))
    kept = path.stat().st_size
    await found.add(shown(2))
    whole = path.read_bytes()
    for length in (kept + 2, kept + 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        caplog.clear()
        after = loaded(path)
        assert numbers(after) == [1] and "1 of 2 lines were cut off" in caplog.text
        await after.add(shown(3))
        assert numbers(loaded(path)) == [1, 3]


@pytest.mark.parametrize(
    "line",
    [
        b"nothing of ours",
        b"[" * 100_000,
        b"\x00" * 4096,
        b"[1, 2]",
        b'{"format": 1}',
        json.dumps({**shown(9), "format": FORMAT + 1}).encode(),
        json.dumps({**shown(9), "format": FORMAT, "details": "none"}).encode(),
        json.dumps({**shown(9), "format": FORMAT, "id": 9}).encode(),
        json.dumps({**shown(9), "format": FORMAT, "started_at": float("nan")}).encode(),
    ],
)
async def test_what_another_release_wrote_is_read_past(
    path: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    await loaded(path).add(shown(1))
    path.write_bytes(path.read_bytes() + b"\n" + line)
    found = loaded(path)
    assert numbers(found) == [1] and "are left out" in caplog.text
    await found.add(shown(2))
    assert line in path.read_bytes()  # for the other release


async def test_a_later_release_may_add_keys(path: Path) -> None:
    entry = {**shown(1), "format": FORMAT, "timeline": [1, 2]}
    path.write_bytes(b"\n" + json.dumps(entry).encode())
    found = loaded(path).find({}, "web", ())
    assert isinstance(found, history.Ended) and found.shown["timeline"] == [1, 2]


@pytest.mark.parametrize("kind", ["directory", "fifo"])
async def test_what_is_no_file_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    found = loaded(path)
    assert "cannot read the history" in caplog.text
    await found.add(shown(1))
    assert "cannot write the history" in caplog.text
    assert numbers(found) == [1] and not path.is_file()


# ---- disks ----
async def test_a_full_disk_costs_the_entry_and_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = loaded(path)
    await found.add(shown(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        await found.add(shown(2))
        await found.add(shown(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len([text for text in caplog.messages if "cannot write the history" in text]) == 1
    await found.add(shown(4))
    assert numbers(found) == [1, 2, 3, 4] and numbers(loaded(path)) == [1, 4]


async def test_a_history_that_cannot_be_made_anew_does_not_grow(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(history, "MOST_LINES", 3)
    found = loaded(path)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        for number in range(9):
            await found.add(shown(number))
        assert path.read_bytes().count(b"\n") == 3 and os.listdir(path.parent) == [path.name]
    await found.add(shown(9))
    assert numbers(loaded(path)) == [*range(10)]


async def test_on_a_read_only_disk_the_history_is_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await loaded(path).add(shown(1))
    opened = os.open

    def open_only_to_read(name: Path, flags: int, *arguments: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(name, flags, *arguments)

    monkeypatch.setattr(os, "open", open_only_to_read)
    found = loaded(path)
    await found.add(shown(2))
    assert numbers(found) == [1, 2]
    assert caplog.messages == [f"cannot write the history {path}: Read-only file system"]


async def test_a_disk_that_does_not_answer_holds_no_migration_up(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The daemon waits for some seconds, and the thread ends when the disk answers."""
    answers, ended = threading.Event(), threading.Event()
    write = history._write_all

    def hang(file: int, data: bytes) -> None:
        answers.wait(WAIT_S)
        write(file, data)
        ended.set()

    found = loaded(path)
    with monkeypatch.context() as hanging:
        hanging.setattr(history, "_write_all", hang)
        before = trio.current_time()
        await found.add(shown(1))
        assert trio.current_time() - before == pytest.approx(history.PATIENCE_S)
        assert "the disk has not answered for 5 s" in caplog.text and numbers(found) == [1]
        answers.set()
        assert ended.wait(WAIT_S)


async def test_a_daemon_that_is_being_stopped_writes_the_entry_first(path: Path) -> None:
    found = loaded(path)
    with trio.CancelScope() as scope:
        scope.cancel()
        await found.add(shown(1))
    assert numbers(loaded(path)) == [1]


async def test_a_host_without_threads_is_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def no_thread(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(history, "in_abandoned_thread", no_thread)
    found = loaded(path)
    await found.add(shown(1))
    assert numbers(found) == [1] and "can't start new thread" in caplog.text
