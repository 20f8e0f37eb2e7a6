# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that are fetched before they are requested, by the pattern of the faults."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.protocol.pfns import pfn_array
from receiver.outstanding import OutstandingPages
from receiver.readahead import FIRST_WINDOW, MAX_WINDOW
from tests.support.requests import request

NR = 1 << 16


class Guest:
    """A guest whose pages arrive as soon as they are requested, by a fault or ahead."""

    def __init__(self, missing: object):
        self.pages = OutstandingPages(NR)
        self.pages.add(pfn_array(missing))
        self.there = np.ones(NR, dtype=np.bool_)
        self.there[pfn_array(missing)] = False
        self.faults = self.touched = self.ahead = 0

    def touch(self, pfn: int) -> None:
        self.touched += 1
        if self.there[pfn]:
            return
        self.faults += 1
        actions = self.pages.requests([request(pfn)], 0.0)
        ahead = self.pages.ahead(actions.touched)
        assert pfn not in ahead
        self.ahead += len(ahead)
        self.load(np.union1d(actions.ask, ahead))

    def load(self, pfns: np.typing.NDArray[np.uint64]) -> None:
        assert not self.there[pfns].any()
        self.pages.finished(pfns[self.pages.claim(pfns)], np.zeros(len(pfns), dtype=np.int32))
        self.there[pfns] = True


@pytest.mark.parametrize("step", [1, -1, 2, 16, -16, 100])
def test_a_stream_is_fetched_before_it_comes(step: int) -> None:
    guest = Guest(range(NR))
    for n in range(500):
        guest.touch(10000 + n * step)
    assert guest.faults <= 10 + 500 * 0.02
    assert guest.ahead <= 500 + 2 * MAX_WINDOW + 3 * FIRST_WINDOW


def test_interleaved_streams_are_distinguished() -> None:
    guest = Guest(range(NR))
    for n in range(400):
        for vcpu, step in enumerate((1, 8, -1)):
            guest.touch(10000 * (vcpu + 1) + n * step)
    assert guest.faults <= guest.touched * 0.03


def test_a_stream_through_few_missing_pages() -> None:
    """After a precopy most pages are present, and windows are counted in missing pages."""
    guest = Guest(range(0, NR, 5))
    for pfn in range(20000):
        guest.touch(pfn)
    assert guest.faults <= 20000 / 5 * 0.02


def fetched_ahead(missing: object, *touched: int) -> list[list[int]]:
    """Return what is fetched ahead for a guest that touches these pages, one after the other,
    before any page has arrived.
    """
    pages = OutstandingPages(NR)
    pages.add(pfn_array(missing))
    return [pages.ahead([pfn]).tolist() for pfn in touched]


def test_a_fault_within_the_window_that_is_on_its_way_doubles_the_next_window_only() -> None:
    """A vCPU may be faster than the link.  What was requested is not requested again."""
    ahead = fetched_ahead(range(NR), 10, 11, 13)
    assert ahead == [[], [12, 13, 14, 15], [*range(16, 24)]]


@pytest.mark.parametrize("touched", [(NR - 2, NR - 1), (1, 0)])
def test_a_stream_ends_at_the_end_of_memory(touched: tuple[int, int]) -> None:
    assert fetched_ahead(range(NR), *touched) == [[], []]


def test_a_window_in_which_nothing_is_missing_leaves_the_stream_where_it_was() -> None:
    near_and_far = [*range(12), *range(1000, 1100)]
    assert fetched_ahead(near_and_far, 10, 11, 12) == [[], [], []]


def test_without_a_pattern_little_is_fetched_that_nobody_needs() -> None:
    guest = Guest(range(NR))
    generator = np.random.default_rng(1)
    for pfn in generator.permutation(NR)[:200].tolist():
        guest.touch(pfn)
    assert guest.ahead <= guest.faults * FIRST_WINDOW * 1.2


@given(
    st.lists(st.integers(0, NR + 10), max_size=60), st.sets(st.integers(0, NR - 1), max_size=200)
)
def test_only_missing_pages_are_fetched_each_once_in_order(
    touched: list[int], missing: set[int]
) -> None:
    pages = OutstandingPages(NR)
    pages.add(pfn_array(sorted(missing)))
    for group in (touched[at : at + 3] for at in range(0, len(touched), 3)):
        ahead = pages.ahead(group).tolist()
        assert ahead == sorted(set(ahead))
        assert set(ahead) <= missing
