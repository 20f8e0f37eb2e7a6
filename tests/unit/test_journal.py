# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal as a successor finds it: which entries count, which are dropped, and which are left
to people.
"""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from migrate.errors import MigrationError
from migrate.service import journal as module
from migrate.service.journal import BOOT_ID, Journal

BOOT = BOOT_ID.read_text().strip()


FACTS = {
    "step": "suspending",
    "domain": 'ünï☃ "}, \U0001f427',
    "dials": ["there", 1],
    "proven": True,
    "xl": None,
    "started_at": 1796044733.25,
    "rate": 1e-09,
    "limit": float("inf"),
    "nested": {"a": {}, "b": [1, -2.5]},
}
"""Every kind of value that JSON has, and a name that needs each kind of escape."""


def test_the_last_entry_that_is_whole_counts(tmp_path: Path) -> None:
    """A full disk may cut an entry off at any byte.  Then the entry before it counts, and later so
    does the entry after it.
    """
    journal = Journal(tmp_path)
    path = tmp_path / "session.json"
    journal.write("session", FACTS | {"step": "first"})
    kept = len(path.read_bytes())
    journal.write("session", FACTS | {"step": "second"})
    whole = path.read_bytes()
    for length in range(kept, len(whole)):
        path.write_bytes(whole[:length])
        assert Journal(tmp_path).entries()["session"] == {"boot": BOOT, **FACTS, "step": "first"}
        Journal(tmp_path).write("session", {"step": "third"})
        assert Journal(tmp_path).entries()["session"]["step"] == "third"
    journal.erase("session")
    assert not path.exists()


def test_a_damaged_last_entry_is_kept_and_no_earlier_one_counts(tmp_path: Path) -> None:
    """By an earlier entry a sender would resume a guest that it has handed over.  A changed `boot`
    looks like an entry of an earlier boot, which is erased.
    """
    journal, path = Journal(tmp_path), tmp_path / "session.json"
    journal.write("session", FACTS)
    before = len(path.read_bytes())
    journal.write("session", FACTS | {"step": "handed over"})
    whole = path.read_text()
    places, others = range(before, len(whole)), '\0}7"\\\n'
    damages = [whole[:at] + c + whole[at + 1 :] for at in places for c in others]
    damages += [whole[:before] + "\0" * (len(whole) - before), "\0" * len(whole)]
    for damaged in damages:
        if damaged == whole:
            continue
        path.write_text(damaged)
        other = Journal(tmp_path)
        assert other.entries() == {}, damaged
        assert path.read_text() == damaged and "is damaged" in other.kept["session"].problem


def test_what_is_no_file_delays_no_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    journal = Journal(tmp_path)
    assert journal.entries() == {}
    assert set(journal.kept) == {"fifo", "folder"}


def test_an_entry_of_a_release_without_checksums_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(f'\n{{"boot": "{BOOT}", "step": "begun"}}')
    assert Journal(tmp_path).entries()["one"]["step"] == "begun"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.new", '\n{"step":'),
        ("one.json", '\n{"boot": "an earlier one", "step": "handed over"}'),
    ],
)
def test_what_binds_nobody_is_dropped(tmp_path: Path, name: str, text: str) -> None:
    """Dropped are a file whose first entry is not whole, and a file of an earlier boot, whose guest
    ended with the host.
    """
    path = tmp_path / name
    path.write_text(text)
    assert Journal(tmp_path).entries() == {}
    assert not path.exists()


def test_what_belongs_to_no_entry_is_removed(tmp_path: Path) -> None:
    """A sender may be killed between the end of a migration and the removal of its checkpoint."""
    journal, names = Journal(tmp_path), ("checkpoint", "new-checkpoint", "stopped")
    for session in ("here", "earlier", "damaged"):
        journal.write(session, {"step": "handed over"})
    (tmp_path / "earlier.json").write_text('\n{"boot": "an earlier one", "step": "handed over"}')
    (tmp_path / "damaged.json").write_text("?")
    for session in ("here", "earlier", "damaged", "ended"):
        for name in names:
            (tmp_path / f"{session}.{name}").touch()
    assert list(Journal(tmp_path).entries()) == ["here"]
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"{one}.{name}" for one in ("here", "damaged") for name in (*names, "json")}


def test_a_file_has_its_name_when_its_first_entry_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file is therefore a damaged one, and a guest may depend on its lost entry."""

    def killed(*_: object) -> int:
        assert not list(tmp_path.glob("*.json"))
        raise KeyboardInterrupt

    journal = Journal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.write("one", {"step": "begun"})
    journal.write("one", {"step": "begun"})
    assert (tmp_path / "one.json").stat().st_mode & 0o777 == 0o600
    assert Journal(tmp_path).entries()["one"]["step"] == "begun"


@pytest.mark.parametrize("text", ["", "\nnot JSON", "\n[1, 2]", '\n{"step": "begun"}', "\n5"])
def test_what_cannot_be_understood_is_reported_and_left_for_people(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "strange.json"
    path.write_text(text)
    (tmp_path / "good.json").write_text("\n" + json.dumps({"boot": BOOT, "step": "begun"}))
    assert list(Journal(tmp_path).entries()) == ["good"]
    assert f"{path}: not a journal of ours" in caplog.text
    assert path.read_text() == text


def test_a_full_disk_fails_a_step_only_if_the_step_needs_its_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one.json").symlink_to("/dev/full")
    journal = Journal(tmp_path)
    with pytest.raises(
        MigrationError, match=r"cannot write the journal .*: No space left on device"
    ):
        journal.write("one", {"step": "begun"})
    assert not caplog.records
    journal.write("one", {"step": "begun"}, needed=False)
    assert "would begin at an earlier step" in caplog.text
    journal.erase("one")


def test_an_entry_that_the_disk_takes_a_part_of_is_not_written(tmp_path: Path) -> None:
    """The disk has room for a few more bytes only."""
    journal = Journal(tmp_path)
    journal.write("one", {"step": "first"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "one.json").stat().st_size + 9, hard))
    try:
        with pytest.raises(
            MigrationError, match=r"cannot write the journal .*: No space left on device"
        ):
            journal.write("one", {"step": "second"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Journal(tmp_path).entries()["one"]["step"] == "first"
    journal.write("one", {"step": "third"})
    assert Journal(tmp_path).entries()["one"]["step"] == "third"


def test_a_state_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to every directory
    with pytest.raises(
        MigrationError, match=r"state directory .*: it cannot be written: choose another one"
    ):
        Journal(tmp_path)


def test_a_state_directory_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MigrationError, match=r"state directory .*/file/state: .*--state"):
        Journal(tmp_path / "file/state")


# ---- measurements ----
HANDLE = bytes(range(16))


def left_by_a_killed_sender(directory: Path) -> Path:
    """Return the note of a measurement that was not ended."""
    context = Journal(directory).measuring(7, HANDLE)
    context.__enter__()
    path = directory / "7.measured"
    text = path.read_bytes()
    context.__exit__(None, None, None)
    assert not path.exists()
    path.write_bytes(text)
    return path


def test_a_measurement_is_noted_for_a_successor_once(tmp_path: Path) -> None:
    left_by_a_killed_sender(tmp_path)
    journal = Journal(tmp_path)
    assert journal.entries() == {}
    assert journal.take_measured() == {7: HANDLE}
    assert journal.take_measured() == {} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (BOOT, "another"), ('"handle": "00', '"handle": "x'), ('"at": ', '"at": -9'), ("at", "to"),
        ('"at"', '"at": "x", "of"'),
    ],
)  # fmt: skip
def test_a_note_that_is_old_or_damaged_is_dropped(tmp_path: Path, old: str, new: str) -> None:
    path = left_by_a_killed_sender(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new).rpartition(', "sum"')[0] + "}")
    assert Journal(tmp_path).take_measured() == {}
    assert not path.exists()


def test_after_a_while_another_program_may_use_log_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_killed_sender(tmp_path)
    monkeypatch.setattr(module, "MEASURED_S", -1.0)
    assert Journal(tmp_path).take_measured() == {}


def test_a_measurement_that_cannot_be_noted_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "7.new").mkdir()
    with (
        pytest.raises(MigrationError, match=r"cannot note the measurement in .*7\.measured: Is a"),
        Journal(tmp_path).measuring(7, HANDLE),
    ):
        pass


def test_a_file_that_has_become_large_has_the_last_entry_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor does not read a file of more than 64 MiB."""
    monkeypatch.setattr(module, "LARGE_BYTES", 10_000)
    journal, path = Journal(tmp_path), tmp_path / "session.json"
    for number in range(100):
        journal.write("session", {"step": str(number), "offer": "x" * 1000})
        assert path.stat().st_size < 12_000
        assert Journal(tmp_path).entries()["session"]["step"] == str(number)
    assert [file.name for file in tmp_path.iterdir()] == ["session.json"]


def test_without_room_for_two_files_an_entry_is_added_to_the_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, path = Journal(tmp_path), tmp_path / "session.json"
    journal.write("session", {"step": "first"})
    monkeypatch.setattr(module, "LARGE_BYTES", 1)

    def is_full(_path: Path, _entry: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_make", is_full)
    journal.write("session", {"step": "second"})
    assert Journal(tmp_path).entries()["session"]["step"] == "second"
    assert path.read_text().count("sum") == 2
