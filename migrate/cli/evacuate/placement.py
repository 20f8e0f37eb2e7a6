# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest goes to which destination, by memory.  Sans-IO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wanted:
    """A guest that needs a place.  ``refused``: the destinations that do not take it in."""

    key: int
    needed_bytes: int
    refused: frozenset[str] = field(default_factory=frozenset)


Choice = Callable[[Sequence[tuple[int, str]]], tuple[int, str]]
"""Chooses one of some destinations, each with its free bytes."""


def place(guests: Sequence[Wanted], free_bytes: Mapping[str, int]) -> dict[int, str]:
    """Return the destination of each guest that has one, the largest guest first.

    Each guest goes to the destination with the most memory left, so that all of them are used.  If
    that leaves a guest without a place, and the destination with the least memory that suffices
    would not, this one is chosen for each guest.
    """
    spread, packed = (_placed(guests, free_bytes, choice) for choice in (max, min))
    return packed if len(packed) > len(spread) else spread


def _placed(
    guests: Sequence[Wanted], free_bytes: Mapping[str, int], choice: Choice
) -> dict[int, str]:
    left, found = dict(free_bytes), dict[int, str]()
    for guest in sorted(guests, key=lambda one: -one.needed_bytes):
        fits = [
            (free, name)
            for name, free in left.items()
            if free >= guest.needed_bytes and name not in guest.refused
        ]
        if fits:
            found[guest.key] = choice(fits)[1]
            left[found[guest.key]] -= guest.needed_bytes
    return found
