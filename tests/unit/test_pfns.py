# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets and lists of pfns: each form holds the same pfns as every other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.protocol.pfns import (
    WINDOW_PFNS,
    PfnMask,
    batches_of,
    bitmap_of,
    from_bitmap,
    from_mask,
    in_bitmap,
    mask_from_bitmap,
    pfn_array,
    pfns_of_window,
    pieces,
    runs,
    sparseness,
    union,
    windows,
)


def mask_of(pfns: list[int], nr_pfns: int) -> PfnMask:
    mask = np.zeros(nr_pfns, dtype=np.bool_)
    mask[pfns] = True
    return mask


def assert_every_form_is_the_same(pfns: list[int], nr_pfns: int) -> None:
    mask = mask_of(pfns, nr_pfns)
    back = [int(pfn) for base, bitmap in windows(mask) for pfn in pfns_of_window(base, bitmap)]
    assert back == pfns
    assert [pfn for batch in batches_of(mask, 7) for pfn in batch.tolist()] == pfns
    assert [pfn for first, stop in runs(mask) for pfn in range(first, stop)] == pfns
    bitmap = bitmap_of(mask)
    assert len(bitmap) % 8 == 0
    assert mask_from_bitmap(bitmap, nr_pfns).tolist() == mask.tolist()
    assert from_bitmap(bitmap, nr_pfns).tolist() == pfns
    assert in_bitmap(bitmap, np.arange(nr_pfns, dtype=np.uint64)).tolist() == mask.tolist()


@given(st.sets(st.integers(0, 600_000), max_size=30), st.integers(600_001, 700_000))
def test_a_set_of_pfns_survives_each_of_its_forms(pfns: set[int], nr_pfns: int) -> None:
    assert_every_form_is_the_same(sorted(pfns), nr_pfns)


@pytest.mark.parametrize(
    ("pfns", "nr_pfns"),
    [
        ([], 0),
        ([], 100),
        ([0], 1),
        ([0, 1, 2, 63, 64, 99], 100),
        ([*range(100)], 100),
        # With an empty window in between.
        ([5, WINDOW_PFNS - 1, 2 * WINDOW_PFNS], 2 * WINDOW_PFNS + 1),
    ],
)
def test_sets_at_the_limits_survive_each_of_their_forms(pfns: list[int], nr_pfns: int) -> None:
    assert_every_form_is_the_same(pfns, nr_pfns)


def test_an_empty_window_does_not_cross_the_link() -> None:
    mask = mask_of([5, 2 * WINDOW_PFNS], 3 * WINDOW_PFNS)
    assert [base for base, _bitmap in windows(mask)] == [0, 2 * WINDOW_PFNS]


def test_bits_beyond_the_end_of_a_domain_are_no_pfns() -> None:
    bitmap = np.full(8, 0xFF, dtype=np.uint8)
    assert from_bitmap(bitmap, 10).tolist() == [*range(10)]


def assert_united_and_cut_up(lists: list[list[int]], most: int) -> None:
    united = union([pfn_array(pfns) for pfns in lists])
    assert united.tolist() == sorted({pfn for pfns in lists for pfn in pfns})
    cut = [piece.tolist() for piece in pieces(united, most)]
    assert [pfn for piece in cut for pfn in piece] == united.tolist()
    assert all(len(piece) == most for piece in cut[:-1])


@given(st.lists(st.lists(st.integers(0, 100)), min_size=1, max_size=4), st.integers(1, 7))
def test_lists_are_united_and_cut_up(lists: list[list[int]], most: int) -> None:
    assert_united_and_cut_up(lists, most)


@pytest.mark.parametrize("lists", [[[]], [[3, 1], [2, 3]], [[], [1, 1, 1, 1, 2, 3]]])
def test_lists_in_any_order_with_repetitions_are_united(lists: list[list[int]]) -> None:
    assert_united_and_cut_up(lists, 2)


def test_a_mask_is_moved_by_its_base() -> None:
    assert from_mask(mask_of([0, 3], 8), 4096).tolist() == [4096, 4099]


def test_memory_may_be_sparse_up_to_a_bound() -> None:
    gib = 2**18
    assert sparseness(2**20, 256 * 256) == ""  # a small guest with a page behind the hole at 4 GiB
    pages = 41 * gib // 10
    assert sparseness(2**20 + pages - 0xF0000, pages) == ""  # a hole of 256 MiB below 4 GiB
    assert sparseness(2**14 + gib, 2**14) == ""  # 64 MiB beside a hole of 1 GiB
    assert sparseness(70 * gib, 64 * gib) == ""
    assert sparseness(2**22, 1) == ""
    assert "0x400000, and with 1 pages it may be 0x3fffff at most" in sparseness(2**22 + 1, 1)
    assert "too sparse" in sparseness(2**36, 64 * gib)
