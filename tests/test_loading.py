# SPDX-License-Identifier: GPL-2.0-or-later
"""Loading pages on a host that has no memory for a while: nothing is lost, and nothing is taken for given away."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from numpy.typing import NDArray

from migrate.pfns import pfn_array
from receiver import pager
from xenbackend.contract import PAGE_SIZE, Buffer, PfnArray, XenError


class ShortOfMemory:
    """A domain that has frames for so many pages in each call."""

    def __init__(self, frames: int, gone: set[int] | None = None):
        self.frames, self.gone = frames, gone or set()
        self.loaded: dict[int, bytes] = {}
        self.error = errno.ENOMEM

    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        results, left = np.zeros(len(pfns), dtype=np.int32), self.frames
        for i, pfn in enumerate(pfns.tolist()):
            if pfn in self.gone:
                results[i] = -errno.ENOENT
            elif left == 0:
                results[i] = -self.error
            else:
                assert pfn not in self.loaded
                left -= 1
                self.loaded[pfn] = bytes(pages[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) if pages is not None else b""
        return results


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "NO_MEMORY_RETRY_S", 0)


@pytest.mark.parametrize("zeros", [False, True])
def test_pages_are_loaded_as_soon_as_there_is_memory(zeros: bool) -> None:
    domain = ShortOfMemory(3, gone={12})
    pfns = pfn_array(range(10, 20))
    pages = None if zeros else memoryview(b"".join(bytes([pfn]) * PAGE_SIZE for pfn in range(10, 20)))
    results = pager.load(domain, pfns, pages)  # type: ignore[arg-type]
    assert results.tolist() == [0, 0, -errno.ENOENT, 0, 0, 0, 0, 0, 0, 0]
    assert domain.loaded == {pfn: b"" if zeros else bytes([pfn]) * PAGE_SIZE for pfn in range(10, 20) if pfn != 12}


def test_what_waiting_does_not_help_is_an_error() -> None:
    domain = ShortOfMemory(2)
    domain.error = errno.EFAULT
    with pytest.raises(XenError, match=r"pfn 0x7.*EFAULT"):
        pager.load(domain, pfn_array([5, 6, 7]), None)  # type: ignore[arg-type]
