# SPDX-License-Identifier: GPL-2.0-or-later
"""Any contents of a journal's file and any request of a client: a daemon acts on it, or names what
is wrong, and fails in no other way.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from migrate.control.server import ControlConnection, _answer
from migrate.errors import MigrationError
from migrate.service.config import Config
from migrate.service.journal import BOOT_ID, Journal
from receiver.daemon import ReceiverDaemon
from receiver.migration import IncomingMigration
from sender.daemon import SenderDaemon
from sender.migration import OutgoingMigration
from xenbackend.errors import NoSuchDomainError

BOOT = BOOT_ID.read_text().strip()
GOOD: dict[str, dict[str, Any]] = {
    "sender": {
        "step": "handed over", "xl": False, "domid": 9, "handle": "09" * 16, "domain": "guest",
        "key": "00", "dials": None, "rejoins": 0, "proven": False, "strategy": "postcopy",
        "bandwidth": None, "checkpoints": None, "successor": None, "ran": True,
        "recall": False, "max_pages": 0, "applied": False, "postcopy_bandwidth": None,
        "paused": False,
    },
    "receiver": {
        "step": "taken over", "xl": False, "domid": 9, "handle": "09" * 16, "key": "00",
        "dials": None, "rejoins": 0, "proven": True, "unprotected": "",
        "decided": False, "raised": [0, 0],
        "offer": {
            "name": "guest", "nr_pfns": 64, "max_pages": 64, "vcpus": 1, "platform": "",
            "paging": True, "checkpoint_ms": 0,
        },
    },
}  # fmt: skip
REQUESTS: list[dict[str, Any]] = [
    {"command": "list"},
    {"command": "status"},
    {"command": "domains"},
    {"command": "guests", "names": ["guest"]},
    *(
        {"command": word, "migration": "guest"}
        for word in (
            "show",
            "cancel",
            "postcopy-now",
            "reconnect",
            "pause",
            "resume",
        )
    ),
    {"command": "decide", "migration": "guest", "here": True, "force": False},
    {"command": "set", "migration": "guest", "values": {"downtime_target_ms": 5.0}},
    {"command": "check-decision", "migration": "guest", "here": True, "force": False},
    {"command": "await-memory", "domid": 7},
    {
        "command": "migrate",
        "domain": "guest",
        "destination": "127.0.0.1:1",
        "strategy": "hybrid",
        "policy": {"max_rounds": 2},
        "bandwidth": None,
        "checkpoint_every_s": None,
    },
    {"command": "save", "domid": 7, "strategy": "hybrid", "xl": 0},
    {
        "command": "restore",
        "session": "s",
        "address": ["127.0.0.1", 1],
        "token": "00",
        "domid": 7,
        "ports": {"store": 1, "console": 2},
    },
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """Return an entry in which a few values are changed or missing, or which has an unknown key."""
    changes = draw(st.dictionaries(st.sampled_from([*good, "colour"]), ANYTHING, max_size=3))
    missing = draw(st.sets(st.sampled_from(list(good)), max_size=1))
    return {key: value for key, value in {**good, **changes}.items() if key not in missing}


def take_up(which: str, facts: dict[str, Any], journal: Journal) -> None:
    lanes = cast(Any, Mock())
    if which == "sender":
        OutgoingMigration.of_predecessor("session", cast(Any, None), lanes, journal, facts)
    else:
        IncomingMigration.of_predecessor(cast(Any, None), "session", lanes, journal, facts)


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_good_entry_is_taken_up(which: str, tmp_path: Path) -> None:
    take_up(which, GOOD[which], Journal(tmp_path))
    take_up(which, {**GOOD[which], "colour": "red"}, Journal(tmp_path))


@pytest.mark.parametrize("which", ["sender", "receiver"])
@given(data=st.data())
def test_an_entry_is_taken_up_or_refused_by_a_reason(which: str, data: st.DataObject) -> None:
    facts = data.draw(changed(GOOD[which]))
    with tempfile.TemporaryDirectory() as directory:
        try:
            take_up(which, facts, Journal(Path(directory)))
        except (ValueError, MigrationError) as error:
            assert str(error)


@given(
    text=st.binary(max_size=200)
    | changed(GOOD["sender"]).map(lambda facts: json.dumps({"boot": BOOT, **facts}).encode()),
    cut=st.integers(0, 400),
)
@example(text=b"\n" + b"[" * 100_000, cut=100_001)
@example(text=b'\n{"boot": 7}', cut=100)
def test_any_file_is_an_entry_or_is_left(text: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "session.json")
        path.write_bytes(text[:cut])
        journal = Journal(Path(directory))
        assert set(journal.entries()) <= {"session"}


class Stopped(MigrationError):
    """A request that would begin a migration."""


def daemon(which: str, directory: Path) -> SenderDaemon | ReceiverDaemon:
    hypervisor = Mock()
    hypervisor.domains.return_value = []
    hypervisor.open.side_effect = NoSuchDomainError("open", 2)
    kind: Any = SenderDaemon if which == "sender" else ReceiverDaemon
    made = kind(hypervisor, directory / "s", Config(), Journal(directory / "journal"))
    made._nursery = Mock()
    made._nursery.start_soon.side_effect = Stopped("it begins")
    return cast(SenderDaemon | ReceiverDaemon, made)


@pytest.mark.parametrize("which", ["sender", "receiver"])
@given(request=st.sampled_from(REQUESTS).flatmap(changed) | st.dictionaries(st.text(), ANYTHING))
def test_any_request_is_answered_once(which: str, request: dict[str, Any]) -> None:
    async def ask(directory: Path) -> bytes:
        ours, theirs = memory_stream_pair()
        connection = ControlConnection(cast(Any, theirs))
        await ours.send_all(json.dumps(request).encode() + b"\n")
        with trio.fail_after(30):
            await _answer(connection, daemon(which, directory)._handle)
        await theirs.aclose()
        return b"".join([piece async for piece in ours])

    with tempfile.TemporaryDirectory() as directory:
        answered = trio.run(ask, Path(directory))
    (answer,) = map(json.loads, answered.splitlines())
    assert answer["event"] in ("result", "error")
    assert "internal error" not in answer.get("message", "")
