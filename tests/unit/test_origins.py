# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each page of a guest came from."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import pytest

from migrate.fastpath.page_states import DROPPED, LOADING, OUTSTANDING, READY, REQUESTED, Waiting
from migrate.protocol.pfns import pfn_array
from receiver import origins
from receiver.origins import Origin, Origins
from receiver.outstanding import OutstandingPages
from xenbackend.ring import VM_EVENT_FLAG_VCPU_PAUSED, PagingRequest

NR = 64


def states(**of: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    found = np.zeros(NR, dtype=np.uint8)
    for pfn, state in of.items():
        found[int(pfn[1:])] = state
    return found


def drawn(summary: dict[str, Any]) -> list[int]:
    return list(zlib.decompress(base64.b64decode(summary["map"])))


def waited(*pfns: int) -> list[Waiting]:
    return [(PagingRequest(pfn, 0, 0, 0, 0), 1.0) for pfn in pfns]


def test_each_page_has_the_origin_that_was_noted_last() -> None:
    found = Origins(NR)
    found.note(pfn_array([0, 1, 2, 3]), Origin.PRECOPY)
    found.note(pfn_array([1]), Origin.SWITCHOVER)
    found.note_loaded(pfn_array([2, 5]), waited(2), pulled=False)
    found.note_loaded(pfn_array([6, 7]), waited(7, 40), pulled=True)
    found.note(pfn_array([8]), Origin.GIVEN_AWAY)
    summary = found.summary(states(p2=READY, p8=DROPPED))
    assert summary["pages"] == {
        "nothing": NR - 8, "precopy": 2, "switchover": 1, "pushed": 2, "fault": 1, "read_ahead": 1,
        "given_away": 1, "missing": 0, "unknown": 0,
    }  # fmt: skip
    assert (summary["pages_per_cell"], summary["cells"]) == (1, NR)
    assert drawn(summary)[:9] == [1, 2, 3, 1, 0, 3, 5, 4, 6]


def test_a_page_that_has_still_to_come_is_missing_whatever_came_before() -> None:
    found = Origins(NR)
    found.note(pfn_array(range(NR)), Origin.PRECOPY)
    summary = found.summary(states(p0=OUTSTANDING, p1=REQUESTED, p2=LOADING, p3=READY))
    assert summary["pages"]["missing"] == 3 and summary["pages"]["precopy"] == NR - 3
    assert drawn(summary)[:4] == [7, 7, 7, 1]


def test_a_successor_does_not_know_what_came_before_it() -> None:
    found = Origins(NR)
    found.others = Origin.UNKNOWN
    found.note_loaded(pfn_array([4]), [], pulled=False)
    pages = found.summary(states())["pages"]
    assert (pages["unknown"], pages["pushed"], pages["nothing"]) == (NR - 1, 1, 0)


@pytest.mark.parametrize(("nr_pfns", "per_cell"), [(16, 1), (17, 2), (33, 3), (16 * 50 + 1, 51)])
def test_the_map_is_bounded_and_its_counts_are_exact(
    monkeypatch: pytest.MonkeyPatch, nr_pfns: int, per_cell: int
) -> None:
    monkeypatch.setattr(origins, "MOST_CELLS", 16)
    monkeypatch.setattr(origins, "CHUNK", 5)
    found = Origins(nr_pfns)
    found.note(pfn_array(range(nr_pfns // 2)), Origin.PUSHED)
    summary = found.summary(np.zeros(nr_pfns, dtype=np.uint8))
    assert summary["pages_per_cell"] == per_cell
    assert len(drawn(summary)) == summary["cells"] <= 16
    assert summary["pages"]["pushed"] == nr_pfns // 2
    assert sum(summary["pages"].values()) == nr_pfns


def test_a_map_of_a_large_guest_shows_about_the_right_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the guest's memory is as regular as the map."""
    monkeypatch.setattr(origins, "MOST_CELLS", 1024)
    nr_pfns = 1024 * 64
    found = Origins(nr_pfns)
    found.note(pfn_array(range(0, nr_pfns, 4)), Origin.FAULT)
    cells = drawn(found.summary(np.zeros(nr_pfns, dtype=np.uint8)))
    assert 0.2 < cells.count(Origin.FAULT) / len(cells) < 0.3


def test_a_guest_without_memory_has_an_empty_map() -> None:
    assert drawn(Origins(0).summary(np.zeros(0, dtype=np.uint8))) == []


def test_the_pages_that_are_to_come_have_their_summary() -> None:
    pages = OutstandingPages(NR)
    pages.add(pfn_array([1, 2]))
    counts = pages.summary_of_origins()["pages"]
    assert (counts["missing"], counts["nothing"]) == (2, NR - 2)


def test_a_vcpu_that_waits_has_waited_until_now() -> None:
    pages = OutstandingPages(NR)
    pages.add(pfn_array([1, 2, 3]))
    assert pages.pages.waits_s(5.0) == {}
    # For the second page no vCPU waits.
    waits = PagingRequest(1, 4, VM_EVENT_FLAG_VCPU_PAUSED, 0, 0)
    pages.requests([waits, PagingRequest(2, 5, 0, 0, 0)], 5.0)
    assert pages.pages.waits_s(5.5) == {4: 0.5}
    pages.claim(pfn_array([1]))
    pages.finished(pfn_array([1]), np.zeros(1, dtype=np.int32))
    assert pages.pages.waits_s(6.0) == {}
