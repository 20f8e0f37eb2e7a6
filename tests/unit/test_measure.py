# SPDX-License-Identifier: GPL-2.0-or-later
"""The measurement of a guest's writes beside another program that uses log-dirty."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from migrate.errors import MigrationError, OccupiedError
from sender import measure
from sender.measure import GuestMeasure
from xenbackend.contract import DomainId, DomainState, Hypervisor
from xenbackend.errors import XenError

PFNS = 16


class Guest:
    """A guest, and the host on which it is alone.  ``looks``: what log-dirty has at each look."""

    nr_pfns = PFNS

    def __init__(self, looks: Sequence[Sequence[int]], *, is_used: bool = False):
        self._looks = iter(looks)
        self.is_on, self._is_used = False, is_used
        self.is_noted = False

    @contextlib.contextmanager
    def open(self, _domid: int, _handle: bytes) -> Iterator[Guest]:
        yield self

    def info(self) -> Any:
        return SimpleNamespace(paged_pages=0, state=DomainState.RUNNING, name="guest")

    def has_pager(self) -> bool:
        return False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        assert not self.is_on, "it is noted after it was switched on"
        self.is_noted = True
        yield
        self.is_noted = False

    def log_dirty_enable(self) -> None:
        if self._is_used:
            self.is_on = True
            raise XenError("logdirty", errno.EBUSY)
        assert self.is_noted, "it is switched on before it is noted"
        self.is_on = True

    def log_dirty_disable(self) -> None:
        assert self.is_noted, "it is noted no more before it is switched off"
        self.is_on = False

    def log_dirty_is_on(self) -> bool:
        return self.is_on

    def log_dirty(self, *, clean: bool) -> Any:
        assert not clean
        written = np.zeros(PFNS, dtype=bool)
        written[list(next(self._looks))] = True
        return np.packbits(written, bitorder="little")


@pytest.fixture(autouse=True)
def _no_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_content_share", lambda _domain: 1.0)


def measured(guest: Guest) -> list[int]:
    target = DomainId(1, bytes(16), "guest")
    found = GuestMeasure(cast(Hypervisor, guest), target, 0.01, guest.noted)
    found.run()
    return [pages for _at_s, pages in found.dirtied]


def test_log_dirty_is_off_afterwards() -> None:
    guest = Guest([[1], [1, 2], [1, 2, 3], [1, 2, 3, 9]])
    assert measured(guest) == [1, 2, 3, 4]
    assert not guest.is_on


def test_a_guest_may_give_written_pages_away() -> None:
    guest = Guest([[1, 2, 3], [2, 3], [2, 3], [2, 3, 4]])
    assert measured(guest) == [3, 2, 2, 3]
    assert not guest.is_on


def test_log_dirty_is_left_to_a_program_that_has_emptied_it() -> None:
    """libxc switches log-dirty off and on again if it is on, and then empties the record."""
    guest = Guest([[1, 2, 3], [1, 2, 3], [7]])
    with pytest.raises(MigrationError, match="or emptied its record"):
        measured(guest)
    assert guest.is_on


@pytest.mark.parametrize("before", [True, False])
def test_log_dirty_of_another_program_is_left_on(before: bool) -> None:
    """The program may switch it on just before the measurement does."""
    guest = Guest([], is_used=True)
    guest.is_on = before
    with pytest.raises(OccupiedError, match="log-dirty is on for guest"):
        measured(guest)
    assert guest.is_on
