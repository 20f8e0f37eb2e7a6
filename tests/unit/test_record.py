# SPDX-License-Identifier: GPL-2.0-or-later
"""What is recorded of a migration over time: its bounds, and the files that outlive a daemon."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from migrate.service import records
from migrate.service.encoding import encoded, is_nested
from migrate.service.history import MOST_ENTRIES, History
from migrate.service.record import (
    FIRST_PAUSE_S,
    FORMAT,
    MOST_MARKS,
    MOST_SAMPLES,
    MOST_VCPUS,
    Record,
    Samples,
)
from migrate.service.records import MOST_OF_TEXT, MOST_RECORDS, Records

NOTHING: dict[int, float] = {}


def filled(number: int) -> Samples:
    """Return samples as a daemon takes them: one after each pause."""
    samples, at = Samples(["bytes"]), 1000.0
    for count in range(number):
        samples.add(at, [count], NOTHING)
        at += samples.pause_s
    return samples


def test_samples_are_bounded_however_long_a_migration_takes() -> None:
    samples = filled(20 * MOST_SAMPLES)
    assert len(samples) <= MOST_SAMPLES
    taken = samples.taken()
    assert len(taken["at"]) == len(taken["bytes"]) == len(samples)
    assert taken["at"][0] == 1000.0 and taken["bytes"][0] == 0
    distances = {round(d, 2) for d in np.diff(taken["at"]).tolist()}
    assert distances == {round(samples.pause_s, 2)}  # they stay evenly spaced
    hours = 24 * 3600
    long_one, at = Samples([]), 0.0
    while at < hours:
        long_one.add(at, [], NOTHING)
        at += long_one.pause_s
    assert MOST_SAMPLES // 2 <= len(long_one) <= MOST_SAMPLES


def test_a_short_migration_has_twenty_samples_a_second() -> None:
    assert filled(MOST_SAMPLES).pause_s == FIRST_PAUSE_S == 0.05


def test_a_value_that_is_unknown_is_not_zero() -> None:
    samples = Samples(["bytes", "faults"])
    samples.add(1.0, [5, None], NOTHING)
    assert samples.taken() == {"at": [1.0], "bytes": [5], "faults": [None], "vcpu_block_s": {}}


def test_what_an_operator_asked_for_is_kept_and_the_newest_of_very_much() -> None:
    record = Record([])
    record.mark(1.23456, "pause")
    record.mark(2.0, "set", {"bandwidth_bytes_per_s": None})
    assert record.taken()["marks"] == [
        {"at": 1.235, "asked": "pause", "values": {}},
        {"at": 2.0, "asked": "set", "values": {"bandwidth_bytes_per_s": None}},
    ]
    for number in range(1000):
        record.mark(number, "resume")
    marks = record.taken()["marks"]
    assert (len(marks), marks[-1]["at"]) == (MOST_MARKS, 999)


def test_each_vcpu_that_has_waited_has_a_series() -> None:
    samples = Samples([])
    samples.add(1.0, [], NOTHING)
    samples.add(2.0, [], {2: 0.5})
    samples.add(3.0, [], {0: 0.25, 2: 1.5})
    waits = samples.taken()["vcpu_block_s"]
    assert waits == {"0": [0.0, 0.0, 0.25], "2": [0.0, 0.5, 1.5]}


def test_no_number_of_a_vcpu_takes_memory() -> None:
    """The number is that of a request in the ring."""
    samples = Samples([])
    samples.add(1.0, [], {2**32 - 1: 1.0, -1: 1.0, MOST_VCPUS: 1.0, MOST_VCPUS - 1: 2.0})
    assert samples.taken()["vcpu_block_s"] == {str(MOST_VCPUS - 1): [2.0]}


def test_nothing_was_sampled_yet() -> None:
    assert Samples(["bytes"]).taken() == {"at": [], "bytes": [], "vcpu_block_s": {}}


def test_the_steps_of_the_switchover_follow_each_other() -> None:
    record = Record([])
    record.end_step("before the first one", 1.0)
    assert record.steps() == []
    record.begin_steps(10.0)
    record.end_step("suspend", 10.25)
    record.end_step("send", 10.75)
    record.end_step("start", 11.0, is_last=True)
    record.end_step("hand over", 12.0)  # the other end was quicker
    taken = [(one["step"], one["s"]) for one in record.steps()]
    assert taken == [("suspend", 0.25), ("send", 0.5), ("start", 0.25)]
    record.begin_steps(20.0)
    record.end_step("suspend", 20.5)
    assert record.steps() == [{"step": "suspend", "s": 0.5}]
    for count in range(1000):
        record.end_step("again", 21.0 + count)
    assert len(record.steps()) < 50


# ---- the files ----
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "records"


def of(number: int) -> str:
    return f"{number:032d}"


def test_a_record_is_read_as_it_was_written(folder: Path) -> None:
    record = Record(["bytes"])
    record.samples.add(1.0, [5], {0: 0.5})
    Records(folder).write(of(1), record.taken(), [of(1)])
    assert Records(folder).read(of(1)) == record.taken()
    assert Records(folder).read(of(2)) is None
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())] == [0o700, 0o600]


def test_the_records_of_the_newest_migrations_are_kept(folder: Path) -> None:
    written = Records(folder)
    for number in range(MOST_RECORDS + 5):
        written.write(of(number), Record([]).taken(), [of(one) for one in range(number + 1)])
    assert len([*folder.iterdir()]) == MOST_RECORDS <= MOST_ENTRIES
    assert written.read(of(4)) is None and written.read(of(5)) is not None
    (folder / "left-over.new").write_bytes(b"of a killed daemon")
    written.write(of(200), Record([]).taken(), [of(200)])  # the history knows no other one
    assert [path.name for path in folder.iterdir()] == [f"{of(200)}.json.gz"]


def test_a_record_that_is_too_large_is_left_out(folder: Path) -> None:
    noise = os.urandom(records.MOST_BYTES).hex()
    Records(folder).write(of(1), {**Record([]).taken(), "noise": noise}, [of(1)])
    assert Records(folder).read(of(1)) is None and [*folder.iterdir()] == []


def largest() -> dict[str, Any]:
    """Return a record in which each vCPU waits all the time."""
    random = np.random.default_rng(1)
    record, waits = Record([f"column{n}" for n in range(5)]), np.zeros(MOST_VCPUS)
    for at in range(MOST_SAMPLES):
        waits += random.random(MOST_VCPUS) * 0.05
        values = random.integers(0, 2**40, 5).tolist()
        record.samples.add(1.8e9 + at * 0.05, values, dict(enumerate(waits.tolist())))
    return record.taken()


def test_the_largest_record_fits_a_file(folder: Path) -> None:
    Records(folder).write(of(1), largest(), [of(1)])
    assert Records(folder).read(of(1)) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.none(), inner)
    ),
)  # fmt: skip


@given(JSON)
def test_a_large_value_is_encoded_as_any_other(value: Any) -> None:
    assert encoded(value) == json.dumps(value)


def test_no_call_encodes_much_of_the_largest_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call would keep the event loop waiting."""
    record, lengths = largest(), list[int]()
    dumps = json.dumps

    def measured(value: Any) -> str:
        text = dumps(value)
        lengths.append(len(text))
        return text

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", measured)
        text = encoded(record)
    assert json.loads(text) == record
    assert max(lengths) < 16 * 1024 < len(text) / 50


@pytest.mark.parametrize(
    ("value", "levels"), [(1, 0), ([], 1), ({"a": 1}, 1), ([1, {"a": [2]}], 3), ([[], [[]]], 3)]
)
def test_levels_are_counted(value: Any, levels: int) -> None:
    assert not is_nested(value, levels)
    assert levels == 0 or is_nested(value, levels - 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:20] + b"x" * 20 + data[40:],
        lambda _data: b"",
        lambda _data: b"no file of ours",
        lambda _data: gzip.compress(b"{"),
        lambda _data: gzip.compress(b"[1, 2]"),
        lambda _data: gzip.compress(b'{"format": 99}'),
        lambda _data: gzip.compress(b"[" * 100000),
        lambda _data: gzip.compress(b'{"format": 1, "steps": ' + b"[" * 50 + b"]" * 50 + b"}"),
    ],
)
def test_a_damaged_record_is_none(folder: Path, damage: Any) -> None:
    Records(folder).write(of(1), Record([]).taken(), [of(1)])
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert Records(folder).read(of(1)) is None


def test_no_name_leads_out_of_the_folder(folder: Path) -> None:
    folder.mkdir()
    (folder.parent / "secret.json.gz").write_bytes(
        gzip.compress(json.dumps({"format": 1}).encode())
    )
    assert Records(folder).read("../secret") is None


def test_a_fifo_in_its_place_is_not_waited_for(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / f"{of(1)}.json.gz")
    assert Records(folder).read(of(1)) is None


def test_a_full_disk_leaves_no_part_of_a_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _to: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        Records(folder).write(of(1), Record([]).taken(), [of(1)])
    assert [*folder.iterdir()] == []


def shown(number: int) -> dict[str, Any]:
    """Return what ``show`` answers."""
    return {
        "id": of(number), "direction": "outgoing", "domain": "web", "peer": "",
        "phase": "completed", "problem": "", "outstanding": 0, "unknown": [], "details": {},
    }  # fmt: skip


async def test_the_history_keeps_a_record_of_each_migration(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    await history.add(shown(1), Record(["bytes"]).taken)
    await history.add(shown(2))
    again = History(tmp_path / "history.jsonl")
    again.load()
    assert await trio.to_thread.run_sync(again.records.read, of(1)) == Record(["bytes"]).taken()
    assert await trio.to_thread.run_sync(again.records.read, of(2)) is None


async def test_a_record_that_cannot_be_made_costs_no_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> dict[str, Any]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    history = History(tmp_path / "history.jsonl")
    await history.add(shown(1), fails)
    assert "Input/output error" in caplog.text
    again = History(tmp_path / "history.jsonl")
    again.load()
    assert of(1) in again


def test_what_is_no_record_is_left_alone_and_costs_no_descriptor(tmp_path: Path) -> None:
    """Folders and foreign files stay, and the records beside them are written and removed."""
    records = Records(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / f"{of(1)}.json.gz").mkdir()
    (tmp_path / "foreign").write_text("text")
    before = os.listdir("/proc/self/fd")
    assert records.read(of(1)) is None
    assert os.listdir("/proc/self/fd") == before
    records.write(of(2), {"format": FORMAT}, [of(2)])
    records.write(of(3), {"format": FORMAT}, [of(3)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"folder", f"{of(1)}.json.gz", "foreign", f"{of(3)}.json.gz"}


def test_a_record_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    text = b"[" + b" " * (MOST_OF_TEXT + 1) + b"]"
    (tmp_path / f"{of(1)}.json.gz").write_bytes(gzip.compress(text))
    assert Records(tmp_path).read(of(1)) is None
