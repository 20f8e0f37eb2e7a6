# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages: each is the same after encoding and decoding, and each field has its limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import RemoteProtocolError
from migrate.protocol import messages as m
from migrate.protocol.pfns import pfn_array
from tests.support.stories import EXAMPLES

VERSION_1 = {
    "hello": "oldest newest lane session token requires offers software",
    "alive": "",
    "offer": "name nr_pfns max_pages vcpus platform paging key checkpoint_ms",
    "pages": "pfns zeros holes",
    "defer": "base bitmap",
    "barrier": "number",
    "suspended": "",
    "missing": "pfns",
    "context": "data last",
    "entrust": "",
    "handover": "",
    "kept": "problem",
    "rejoin": "",
    "completed": "",
    "abort": "reason",
    "accepted": "populate_evicted token",
    "refused": "reason unknown",
    "passed": "number",
    "ready": "",
    "resumed": "",
    "loaded": "pfns",
    "dropped": "pfns",
    "report": "outstanding faults latency_us",
    "written": "pfns zeros holes",
    "checkpoint": "data last",
    "outstanding": "base bitmap",
    "rejoined": "phase token",
    "complete": "statistics",
    "ended": "ran reason",
    "failed": "reason",
    "fault": "pfns",
    "ahead": "pfns",
    "lost": "reason",  # only with the capability of that name
    "unprotected": "reason",  # only with the capability of that name
    "recall": "reason",  # only with the capability of that name
    "waits": "longest_us",  # only with the capability of that name
    "host": "problem populate_evicted free_bytes sender end",  # only with the capability preflight
}
"""Each message of the protocol's version 1, with its fields."""
PROTOCOL = Path(__file__).parents[2] / "docs/protocol.md"


def over_the_wire(message: m.Message) -> m.Message:
    payload_bytes = len(message.pfns) * 4096 if isinstance(message, m.Pages) else 0
    return m.parse(msgpack.unpackb(msgpack.packb(message.header())), payload_bytes)


def test_the_messages_are_those_of_the_protocol_s_version() -> None:
    assert m.PROTOCOL_VERSION == 1, (
        "Add the messages of the new version to the table, or replace those of version 1."
    )
    assert {name: " ".join(m.FIELDS[cls]) for name, cls in m.TYPES.items()} == VERSION_1, (
        "A receiver of version 1 refuses a message or field that it does not have.  So what is "
        "added needs a capability in "
        '`hello`, or a new PROTOCOL_VERSION: see CONTRIBUTING.md, "Changing the protocol".  Then '
        "change docs/protocol.md, and VERSION_1 in this file."
    )


@pytest.mark.parametrize("name", m.TYPES)
def test_the_protocol_s_document_describes_each_message_and_its_fields(name: str) -> None:
    """A row of a table, or a paragraph, begins with the message's name."""
    described = re.findall(
        rf"^(?:\| )?`{name}`.*?(?=\n\||\n\n)", PROTOCOL.read_text(), re.MULTILINE | re.DOTALL
    )
    assert described, (
        f"docs/protocol.md has no row or paragraph that begins with `{name}`: describe the message "
        "there."
    )
    missing = [field for field in m.FIELDS[m.TYPES[name]] if f"`{field}`" not in "".join(described)]
    assert missing == [], (
        f"docs/protocol.md does not name these fields of `{name}`: describe them in its row."
    )


def test_the_examples_cover_every_message() -> None:
    assert {type(example) for example in EXAMPLES} == set(m.TYPES.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.type)
def test_a_message_survives_the_wire(message: m.Message) -> None:
    assert over_the_wire(message) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.type)
def test_fields_can_neither_be_missing_nor_added_nor_of_another_type(message: m.Message) -> None:
    header = msgpack.unpackb(msgpack.packb(message.header()))
    with pytest.raises(RemoteProtocolError, match="fields"):
        m.parse({**header, "surplus": 1})
    for field in set(header) - {"type"}:
        with pytest.raises(RemoteProtocolError, match="fields"):
            m.parse({key: value for key, value in header.items() if key != field})
        with pytest.raises(RemoteProtocolError, match=field):
            m.parse({**header, field: {"a": "map"}})


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({"type": "unheard-of"}, "unknown"),
        ({"type": 5}, "unknown"),
        ({}, "unknown"),
        ({"type": "loaded", "pfns": b"1234567"}, "pfns"),
        ({"type": "loaded", "pfns": bytes(8 * (m.MAX_PFNS + 1))}, "at most"),
        ({"type": "loaded", "pfns": np.array([2, 1], dtype="<u8").tobytes()}, "ascending"),
        ({"type": "loaded", "pfns": np.array([2, 2], dtype="<u8").tobytes()}, "ascending"),
        ({"type": "loaded", "pfns": np.array([2**64 - 1], dtype="<u8").tobytes()}, "ascending"),
        ({"type": "barrier", "number": -1}, "number"),
        ({"type": "barrier", "number": True}, "number"),
        ({"type": "abort", "reason": "two\nlines"}, "reason"),
        ({"type": "abort", "reason": "x" * 5000}, "reason"),
        ({"type": "pages", "pfns": b"", "zeros": b"", "holes": b""}, "none"),
    ],
)
def test_bad_messages_are_named(header: dict[str, Any], what: str) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        m.parse(header)


def test_the_payload_belongs_to_the_pfns() -> None:
    header = m.Pages(pfn_array([1, 2])).header()
    for payload_bytes in (0, 4096, 3 * 4096):
        with pytest.raises(RemoteProtocolError, match="payload"):
            m.parse(header, payload_bytes)
    with pytest.raises(RemoteProtocolError, match="payload"):
        m.parse(m.Ready().header(), 4096)


json_like: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=9)
    | st.binary(max_size=33),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.sampled_from(EXAMPLES), st.data())
def test_any_field_values_give_a_message_or_a_protocol_error(
    example: m.Message, data: st.DataObject
) -> None:
    header = {
        key: value if key == "type" else data.draw(json_like)
        for key, value in example.header().items()
    }
    try:
        parsed = m.parse(header)
    except RemoteProtocolError:
        return
    assert over_the_wire(parsed) == parsed


@given(
    st.sampled_from(EXAMPLES),
    st.text(min_size=1) | st.sampled_from(["\x1b[31m", "a\nb", "\u202eevil", "x" * 5000]),
)
def test_no_text_of_a_peer_is_unprintable(example: m.Message, text: str) -> None:
    """Invariant 10: a name or a reason reaches a terminal and a log."""
    header = {
        key: text
        if isinstance(value, str) and key != "type"
        else [text]
        if isinstance(value, list | tuple)
        else value
        for key, value in example.header().items()
    }
    try:
        parsed = m.parse(header)
    except RemoteProtocolError as error:
        assert str(error).isprintable()
        return
    assert header == example.header() or (text.isprintable() and len(text) <= m.MAX_TEXT)
    assert all(value.isprintable() for value in vars(parsed).values() if isinstance(value, str))


def test_reasons_are_made_printable() -> None:
    assert m.printable("a\nb\x00" + "x" * 5000) == "a b " + "x" * (m.MAX_TEXT - 4)
