"""Memory paging on the real Xen: run in dom0 by ``make xenlab``."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.xenlab.dom0.conftest import KIND
from tests.xenlab.dom0.guests import Guest, guest
from xenbackend.contract import PAGE_SIZE, PfnArray
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.ring import XenPagingRing

FIRST_HOLE = 0x20000
BATCHED = pytest.mark.hypervisors("populate-evicted")
PAGING = pytest.mark.hypervisors("populate-evicted", "paging")


@dataclass
class Paged:
    """A domain with a ring."""

    host: Any
    guest: Guest
    pager: Any = field(default_factory=lambda: ffi.new("struct xen_pager *"))

    @property
    def domid(self) -> int:
        return self.guest.domid

    def info(self) -> Any:
        info = ffi.new("struct xen_info *")
        assert lib.xen_domain_info(self.host, self.domid, info) == 0
        return info

    def batch(self, call: Any, gfns: PfnArray) -> tuple[int, int]:
        """Result and how many were done."""
        done = ffi.new("size_t *")
        rc = call(self.host, self.domid, ffi.from_buffer("uint64_t[]", gfns), len(gfns), done)
        return rc, done[0]

    def load(self, gfn: int, page: bytes) -> int:
        result = ffi.new("int32_t *")
        lib.xen_load(self.host, self.domid, ffi.new("uint64_t *", gfn), 1, ffi.from_buffer("uint8_t[]", page), result)
        rc: int = result[0]
        return rc

    def read(self, gfns: PfnArray) -> dict[int, bytes]:
        """Contents of those that can be mapped."""
        pages = {}
        for at in range(0, len(gfns), 512):
            part = np.ascontiguousarray(gfns[at : at + 512])
            address, errors = ffi.new("void **"), ffi.new("int[]", len(part))
            assert (
                lib.xen_map(self.host, self.domid, ffi.from_buffer("uint64_t[]", part), len(part), address, errors) == 0
            )
            for i, gfn in enumerate(part.tolist()):
                if not errors[i]:
                    pages[gfn] = bytes(ffi.buffer(address[0] + i * PAGE_SIZE, PAGE_SIZE))
            assert lib.xen_unmap(self.host, address[0], len(part)) == 0
        return pages


def span(first: int, count: int) -> PfnArray:
    return np.arange(first, first + count, dtype=np.uint64)


@pytest.fixture(scope="module")
def host() -> Iterator[Any]:
    out = ffi.new("struct xen_host **")
    assert lib.xen_host_open(out) == 0
    yield out[0]
    lib.xen_host_close(out[0])


@pytest.fixture
def paged(host: Any) -> Iterator[Paged]:
    """A guest that has not run, with a ring."""
    with guest("paged", paused=True) as made:
        domain = Paged(host, made)
        assert lib.xen_paging_enable(host, domain.domid, domain.pager) == 0
        yield domain


@BATCHED
@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 20_000])
def test_holes_become_paged_out(paged: Paged, count: int) -> None:
    assert paged.batch(lib.xen_populate_evicted, span(FIRST_HOLE, count)) == (0, count)
    assert paged.info().paged_pages == count


@BATCHED
def test_populated_pages_become_paged_out_and_their_frames_are_given_back(paged: Paged) -> None:
    before = paged.info().tot_pages
    assert paged.batch(lib.xen_populate_evicted, span(0x4000, 100)) == (0, 100)
    assert (paged.info().tot_pages, paged.info().paged_pages) == (before - 100, 100)


@BATCHED
def test_a_batch_stops_at_a_pfn_that_is_paged_out_already(paged: Paged) -> None:
    assert paged.batch(lib.xen_populate_evicted, span(FIRST_HOLE + 1500, 1)) == (0, 1)
    assert paged.batch(lib.xen_populate_evicted, span(FIRST_HOLE, 3000)) == (-errno.EBUSY, 1500)
    assert paged.info().paged_pages == 1501


@BATCHED
def test_a_pfn_twice_in_a_batch_fails_the_second_time(paged: Paged) -> None:
    twice = np.array([FIRST_HOLE, FIRST_HOLE + 1, FIRST_HOLE], dtype=np.uint64)
    assert paged.batch(lib.xen_populate_evicted, twice) == (-errno.EBUSY, 2)


@BATCHED
def test_a_pfn_beyond_physical_addresses_is_invalid(paged: Paged) -> None:
    assert paged.batch(lib.xen_populate_evicted, span(1 << 45, 1)) == (-errno.EINVAL, 0)


@BATCHED
def test_a_mapped_page_is_not_evicted(paged: Paged) -> None:
    gfns = span(0x4000, 3)
    address, errors = ffi.new("void **"), ffi.new("int[]", 1)
    assert lib.xen_map(paged.host, paged.domid, ffi.from_buffer("uint64_t[]", gfns[1:2]), 1, address, errors) == 0
    assert paged.batch(lib.xen_populate_evicted, gfns) == (-errno.EBUSY, 1)
    assert lib.xen_unmap(paged.host, address[0], 1) == 0
    assert paged.batch(lib.xen_populate_evicted, gfns[1:]) == (0, 2)


@PAGING
def test_a_page_is_loaded_once_with_its_contents(paged: Paged) -> None:
    gfn = FIRST_HOLE
    assert lib.xen_set_max_pages(paged.host, paged.domid, 65536) == 0
    paged.batch(lib.xen_evict_one_by_one, span(gfn, 1))
    content = bytes(range(256)) * 16
    assert paged.load(gfn, content) == 0
    assert paged.load(gfn, bytes(PAGE_SIZE)) == -errno.ENOENT
    assert paged.read(span(gfn, 1)) == {gfn: content}
    assert paged.load(gfn + 1, content) == -errno.ENOENT  # a hole


@PAGING
def test_one_by_one_does_the_same(paged: Paged) -> None:
    assert lib.xen_set_max_pages(paged.host, paged.domid, 65536) == 0
    assert paged.batch(lib.xen_evict_one_by_one, span(FIRST_HOLE, 300)) == (0, 300)
    assert paged.batch(lib.xen_evict_one_by_one, span(0x4000, 300)) == (0, 300)
    assert paged.info().paged_pages == 600
    # It cannot tell a paged-out pfn from a hole: that is populated, and evicted again.
    assert paged.batch(lib.xen_evict_one_by_one, span(0x4000, 1)) == (0, 1)
    assert paged.info().paged_pages == 600


@PAGING
def test_the_batched_operation_is_found_by_asking_for_nothing(paged: Paged) -> None:
    expected = 0 if KIND == "populate-evicted" else -errno.ENOSYS
    assert lib.xen_probe_populate_evicted(paged.host, paged.domid) == expected


@pytest.mark.hypervisors("debian")
def test_without_paging_in_the_hypervisor_nothing_is_enabled(host: Any) -> None:
    with guest("unpaged", paused=True) as made:
        before = Paged(host, made).info()
        assert lib.xen_paging_enable(host, made.domid, ffi.new("struct xen_pager *")) == -errno.ENOSYS
        assert Paged(host, made).info().tot_pages == before.tot_pages


@PAGING
def test_a_domain_has_one_pager(paged: Paged) -> None:
    assert lib.xen_paging_enable(paged.host, paged.domid, ffi.new("struct xen_pager *")) == -errno.EBUSY


@BATCHED
def test_a_running_guest_is_paged_out_and_served_back_without_an_error(host: Any) -> None:
    """All of its memory that can be, while it writes and checks; faults come over the real ring."""
    with guest("running") as made:
        made.wait_for_heartbeats(4)
        domain = Paged(host, made)
        assert lib.xen_paging_enable(host, domain.domid, domain.pager) == 0
        ring = XenPagingRing(domain.pager)
        assert lib.xen_pause(host, domain.domid) == 0
        contents = domain.read(span(0, domain.info().nr_gfns))
        evicted = _evict_what_can_be(domain, np.array(sorted(contents), dtype=np.uint64))
        assert len(evicted) > 0.9 * len(contents)
        beats = len(made.heartbeats())
        assert lib.xen_unpause(host, domain.domid) == 0
        served = 0
        left = set(evicted)
        deadline = time.monotonic() + 200
        while left:
            assert time.monotonic() < deadline, f"{len(left)} pages are still out"
            requests = ring.requests()
            for request in requests:
                if request.pfn in left:
                    assert domain.load(request.pfn, contents[request.pfn]) == 0
                    left.discard(request.pfn)
                    served += 1
            ring.respond(requests)
            if not requests:  # in the background, as a push would bring them
                for gfn in list(left)[:8]:
                    assert domain.load(gfn, contents[gfn]) == 0
                    left.discard(gfn)
        assert lib.xen_pause(host, domain.domid) == 0
        ring.respond(ring.requests())
        assert lib.xen_paging_disable(host, domain.domid, domain.pager) == 0
        assert lib.xen_unpause(host, domain.domid) == 0
        after = made.wait_for_heartbeats(4)
        print(
            f"{len(evicted)} of {len(contents)} pages were out; {served} came back by faults, {len(evicted) - served} pushed"
        )
        assert served > 10 and len(after) > beats
        assert [beat.errors for beat in after] == [0] * len(after)


def _evict_what_can_be(domain: Paged, gfns: PfnArray) -> list[int]:
    """Leaving out what somebody holds: those at which a batch stops."""
    evicted: list[int] = []
    while len(gfns):
        rc, done = domain.batch(lib.xen_populate_evicted, np.ascontiguousarray(gfns))
        evicted += gfns[:done].tolist()
        assert rc in (0, -errno.EBUSY)
        gfns = gfns[done + 1 :]
    return evicted
