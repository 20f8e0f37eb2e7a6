# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer has counted is checked before a terminal, a log or JSON has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import RemoteProtocolError
from receiver.statistics import PagerStatistics
from sender.inbox import receiver_statistics
from sender.statistics import from_peer


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
