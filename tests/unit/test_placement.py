# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the guests of an evacuation go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.cli.evacuate.placement import Wanted, place


def test_the_largest_guest_goes_where_the_most_memory_is() -> None:
    guests = [Wanted(1, 2), Wanted(2, 5), Wanted(3, 2)]
    assert place(guests, {"a": 10, "b": 6}) == {2: "a", 1: "b", 3: "a"}


def test_guests_are_packed_if_they_would_not_fit_otherwise() -> None:
    """The first guest takes the room of two others if it goes where the most memory is."""
    guests = [Wanted(1, 6), Wanted(2, 5), Wanted(3, 5)]
    assert place(guests, {"a": 10, "b": 6}) == {1: "b", 2: "a", 3: "a"}


def test_a_guest_does_not_go_where_it_was_refused() -> None:
    assert place([Wanted(1, 1, frozenset("a"))], {"a": 10, "b": 6}) == {1: "b"}
    assert place([Wanted(1, 1, frozenset("ab"))], {"a": 10, "b": 6}) == {}


@given(
    st.lists(st.integers(0, 20), max_size=8),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 60)),
)
def test_no_destination_is_given_more_than_it_has(sizes: list[int], rooms: dict[str, int]) -> None:
    guests = [Wanted(number, size) for number, size in enumerate(sizes)]
    placed = place(guests, rooms)
    for name, free in rooms.items():
        assert sum(sizes[key] for key, where in placed.items() if where == name) <= free
    left = {
        name: free - sum(sizes[k] for k, w in placed.items() if w == name)
        for name, free in rooms.items()
    }
    for number, size in enumerate(sizes):
        assert number in placed or all(size > free for free in left.values())
