# SPDX-License-Identifier: GPL-2.0-or-later
"""What every backend must do: one suite, which runs with the simulated host here and with the real
Xen in its dom0 (make xenlab).

The tests use only the contract and what a :class:`tests.support.labs.Lab` provides (a running
guest, a page that another process holds, ...).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migrate.protocol.pfns import NO_PFNS, from_mask, mask_from_bitmap, pfn_array
from tests.support import zygote
from tests.support.keepers import keepers, lives
from tests.support.labs import LAB_WAIT_S, Lab, until
from tests.support.pages import memory_of, page, pfns, read, span
from tests.support.waiting import ready
from xenbackend.contract import Domain, DomainState, Hypervisor, ToolstackPorts
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.find import find_domain
from xenbackend.keeper import KeptDomain, KeptPages, open_with_keeper
from xenbackend.pages import PAGE_SIZE, PageStatus, PfnArray
from xenbackend.ring import PagingRequest, PagingRing

TREE = Path(__file__).parents[2]
BATCH = 1024


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if "LAB_HYPERVISOR" in os.environ:
        from tests.xenlab.dom0.lab import the_lab

        made: Lab = the_lab()
        yield made
        made.close()
    else:
        from tests.support.labs import SimulatedLab

        made = SimulatedLab(request.getfixturevalue("hosts"), request.getfixturevalue("name"))
        yield made
        made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder whose space is free after the test, even if a process still maps a file in it:
    a guest's memory is large.
    """
    with tempfile.TemporaryDirectory(prefix="conformance-") as name:
        yield Path(name)
        for path in Path(name).rglob("contents"):
            os.truncate(path, 0)


class Contents:
    """The contents of a domain's pages in a file.  The page of a pfn is at its number times
    4096.
    """

    def __init__(self, directory: Path, nr_pfns: int):
        directory.mkdir(exist_ok=True)
        self.path, self.out = directory / "contents", directory / "out.npy"
        self.pages = np.memmap(self.path, dtype=np.uint8, mode="w+", shape=(nr_pfns, PAGE_SIZE))

    def copy(self, domain: Domain, which: PfnArray) -> None:
        for at in range(0, len(which), BATCH):
            batch = which[at : at + BATCH]
            with domain.map_pages(batch) as mapped:
                assert set(mapped.status.tolist()) <= {PageStatus.DATA, PageStatus.ZERO}
                self.pages[batch[mapped.status == PageStatus.ZERO]] = 0
                data, done = batch[mapped.status == PageStatus.DATA], 0
                for piece in mapped.data:
                    count = len(piece) // PAGE_SIZE
                    self.pages[data[done : done + count]] = np.frombuffer(
                        piece, dtype=np.uint8
                    ).reshape(-1, PAGE_SIZE)
                    done += count

    def __getitem__(self, which: PfnArray) -> bytes:
        data: bytes = self.pages[which].tobytes()
        return data


def page_out(domain: Domain, contents: Contents) -> PfnArray:
    """Evict all of a paused guest's memory except the pinned set.  Returns the evicted pfns."""
    there = memory_of(domain)
    contents.copy(domain, there)
    out = np.setdiff1d(there, domain.pinned(there))
    domain.populate_evicted(out)
    return out


def serve(domain: Domain, ring: PagingRing, contents: Contents, out: set[int]) -> int:
    """Answer the requests in the ring."""
    requests = ring.requests()
    for request in requests:
        if request.pfn in out:  # otherwise another request for this page came before
            assert domain.load(pfns(request.pfn), contents[pfns(request.pfn)]).tolist() == [0]
            out.discard(request.pfn)
    ring.respond(requests)
    return len(requests)


def bring_in(domain: Domain, ring: PagingRing, contents: Contents, out: set[int]) -> None:
    """Load all pages that are still paged out, in the background as a push would, and then give the
    ring up.
    """
    left = sorted(out)
    for at in range(0, len(left), 64):
        batch = pfns(*(pfn for pfn in left[at : at + 64] if pfn in out))
        if len(batch):
            assert not domain.load(batch, contents[batch]).any()
            out.difference_update(batch.tolist())
        serve(domain, ring, contents, out)
    give_up(domain, ring)


def give_up(domain: Domain, ring: PagingRing) -> None:
    domain.pause()
    ring.respond(ring.requests())
    domain.paging_disable()
    domain.unpause()


def attach(host: Hypervisor, domid: int) -> Domain:
    """Attach as soon as the hypervisor has noticed the predecessor's end."""
    domain = host.open(domid)

    def attached() -> bool:
        try:
            domain.paging_attach()
        except XenError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    until(attached, "the dead pager is not noticed")
    return domain


class Native:
    """The pages of a domain, by the calls for native code."""

    def __init__(self, domain: Domain):
        pages = domain.native_pages()
        assert pages is not None
        self._domain = pages.domain
        pointer, pfn = ctypes.c_void_p, ctypes.c_uint64
        self._look = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pfn, ctypes.POINTER(pointer))(
            pages.look
        )
        self._looked = (
            ctypes.CFUNCTYPE(None, pointer, pointer)(pages.looked) if pages.looked else None
        )
        self._load = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pfn, ctypes.c_char_p)(pages.load)

    @contextlib.contextmanager
    def looking(self, pfn: int) -> Iterator[tuple[int, int]]:
        """Yield the status and the address of a page."""
        at = ctypes.c_void_p()
        status = self._look(self._domain, pfn, at)
        yield status, at.value or 0
        if status == PageStatus.DATA and self._looked is not None:
            self._looked(self._domain, at)

    def look(self, pfn: int) -> tuple[int, bytes]:
        with self.looking(pfn) as (status, address):
            return status, ctypes.string_at(
                address, PAGE_SIZE
            ) if status == PageStatus.DATA else b""

    def load(self, pfn: int, contents: bytes | None) -> int:
        result: int = self._load(self._domain, pfn, contents)
        return result


def wait_for_requests(ring: PagingRing) -> list[PagingRequest]:
    """Return all requests that vCPUs make before they wait.  A vCPU may request one page several
    times.
    """
    requests: list[PagingRequest] = []

    def asked() -> bool:
        requests.extend(ring.requests())
        return bool(requests)

    until(asked, "no vCPU asked for anything")
    while more := ring.requests():
        requests += more
        time.sleep(0.1)
    time.sleep(0.1)
    return requests + ring.requests()


# ---- domains ----
def test_domains_are_found_by_name_and_number(lab: Lab) -> None:
    domain = lab.incoming()
    info = domain.info()
    assert (info.state, info.tot_pages, domain.nr_pfns) == (DomainState.INCOMING, 0, 1024)
    assert info.domid in [found.domid for found in lab.hypervisor.domains()]
    for text in (info.name, str(info.domid), str(uuid.UUID(bytes=info.handle))):
        assert find_domain(lab.hypervisor.domains(), text).id == info.id
    with pytest.raises(NoSuchDomainError, match="no such domain"):
        find_domain(lab.hypervisor.domains(), "nobody")
    for handle in (None, info.handle):
        found = lab.hypervisor.open(info.domid, handle)
        assert (found.info().name, found.info().domid, found.handle) == (
            info.name,
            info.domid,
            info.handle,
        )
        found.close()
        found.close()
    with pytest.raises(NoSuchDomainError, match="another domain has this number now"):
        lab.hypervisor.open(info.domid, bytes(16))
    with pytest.raises(NoSuchDomainError, match="another domain has this number now"):
        lab.hypervisor.reopen_incoming(info.domid, domain.config(), lent=False, handle=bytes(16))
    with pytest.raises(NoSuchDomainError, match="no such domain"):
        lab.hypervisor.open(max(found.domid for found in lab.hypervisor.domains()) + 1)
    domain.destroy()
    with pytest.raises(NoSuchDomainError):
        domain.info()
    assert info.domid not in [found.domid for found in lab.hypervisor.domains()]


def test_a_guest_has_the_same_handle_wherever_it_is_restored(lab: Lab) -> None:
    source = lab.guest()
    assert any(source.handle)
    for config, same in ((lab.config_beside(source), True), (lab.config(), False)):
        target = lab.hypervisor.create_incoming(config)
        assert (target.handle == source.handle) == same
        target.destroy()


def test_a_name_is_used_once_and_memory_is_finite(lab: Lab) -> None:
    config = lab.config()
    assert lab.hypervisor.preflight(config, paging=True).problems == ()
    lab.hypervisor.create_incoming(config)
    taken = dataclasses.replace(lab.config(), name=config.name)
    assert "named" in lab.hypervisor.preflight(taken, paging=True).problems[0]
    with pytest.raises(XenError, match="EEXIST"):
        lab.hypervisor.create_incoming(taken)
    huge = dataclasses.replace(lab.config(2**28), max_pages=2**28)
    assert "not enough memory" in lab.hypervisor.preflight(huge, paging=True).problems[0]
    with pytest.raises(XenError, match="ENOMEM"):
        lab.hypervisor.create_incoming(huge)
    with pytest.raises(XenError, match="EINVAL"):
        lab.hypervisor.create_incoming(dataclasses.replace(config, name="other", platform=b"junk"))
    assert "other" not in [info.name for info in lab.hypervisor.domains()]


def free_pages(lab: Lab) -> int:
    """Return the most memory that a guest may have if its preflight is to succeed."""
    config, least, most = lab.config(), 1, 2**28
    while most - least > 1:
        pages = (least + most) // 2
        problems = lab.hypervisor.preflight(
            dataclasses.replace(config, max_pages=pages), paging=True
        ).problems
        least, most = (
            (least, pages)
            if any("not enough memory" in text for text in problems)
            else (pages, most)
        )
    return least


def test_memory_that_is_to_arrive_is_reserved_until_it_is_given_back(lab: Lab) -> None:
    noise, before = 200, free_pages(lab)
    target = lab.incoming()
    reserved = free_pages(lab)
    assert before - reserved > 1024 - noise
    target.populate(pfn_array(range(512)))
    assert abs(free_pages(lab) - reserved) < noise  # the memory is taken from what was reserved
    target.depopulate(pfn_array(range(512)))
    target.reserve(1024)
    assert abs(free_pages(lab) - reserved) < noise
    target.reserve(0)
    assert free_pages(lab) - reserved > 1024 - noise
    hog = lab.incoming(free_pages(lab) - noise)
    with pytest.raises(XenError, match="ENOMEM"):
        target.reserve(1024)
    hog.destroy()
    target.reserve(1024)
    target.destroy()


def test_without_memory_a_page_waits_and_the_others_are_loaded(lab: Lab) -> None:
    target = lab.incoming()
    with contextlib.closing(target.paging_enable()):
        pfns = pfn_array(range(8))
        target.populate_evicted(pfns)
        most = target.reservation().max_pages
        target.set_max_pages(target.reservation().tot_pages + 3)
        page = bytes(range(256)) * 16
        results = target.load(pfns, memoryview(page * 8))
        assert results.tolist() == [0] * 3 + [-errno.ENOMEM] * 5
        target.set_max_pages(most)
        assert target.load(pfns[3:], memoryview(page * 5)).tolist() == [0] * 5
        with target.map_pages(pfns) as mapped:
            assert b"".join(mapped.data) == page * 8
    target.destroy()


def test_a_domain_is_found_whose_maker_died_before_it_noted_the_number(lab: Lab) -> None:
    config = lab.config()
    assert lab.hypervisor.abandoned(config) == []
    with contextlib.closing(lab.another()) as maker:
        domid = maker.create_incoming(config).domid
    assert lab.hypervisor.abandoned(lab.config()) == []
    (left,) = lab.hypervisor.abandoned(config)
    assert left.domid == domid
    left.destroy()
    assert lab.hypervisor.abandoned(config) == []


def test_a_domain_that_takes_a_guest_s_place_is_found_as_well_and_the_guest_is_not(
    lab: Lab,
) -> None:
    source = lab.guest()
    config = source.config()
    assert lab.hypervisor.abandoned(config, instead_of=source) == []
    with contextlib.closing(lab.another()) as maker:
        domid = maker.create_incoming(config, instead_of=maker.open(source.domid)).domid
    for _again in range(2):
        (left,) = lab.hypervisor.abandoned(config, instead_of=source)
        assert left.domid == domid
        source.pause()
    left.destroy()
    assert lab.hypervisor.abandoned(config, instead_of=source) == []
    source.unpause()
    source.unpause()
    lab.wait_for_work(source)


def test_preflight_says_how_pages_are_evicted(lab: Lab) -> None:
    preflight = lab.hypervisor.preflight(None, paging=True)
    assert preflight.problems == () and preflight.populate_evicted in ("native", "fallback")
    domain = lab.incoming()
    assert domain.preflight() == preflight
    ring = domain.paging_enable()
    assert domain.preflight() == preflight
    other = lab.hypervisor.open(domain.domid)
    assert other.preflight().problems == () or "another pager" in other.preflight().problems[0]
    other.close()
    ring.close()


def test_what_a_domain_has_reserved_is_not_free(lab: Lab) -> None:
    before = lab.hypervisor.free_bytes()
    domain = lab.incoming(4096)
    reserved = domain.config().max_pages * PAGE_SIZE
    assert reserved <= before - lab.hypervisor.free_bytes() < 2 * reserved
    domain.destroy()
    until(lambda: lab.hypervisor.free_bytes() > before - reserved // 2, "it is not free again")


def test_a_suspended_guest_does_not_run_and_a_resumed_one_does(lab: Lab) -> None:
    domain = lab.guest()
    assert domain.info().state is DomainState.RUNNING
    with pytest.raises(XenError, match="EINVAL"):
        domain.context()
    with pytest.raises(XenError, match="EINVAL"):
        domain.resume()
    domain.suspend()
    assert domain.info().state is DomainState.SUSPENDED
    before = domain.context()
    assert lab.stands_still(domain)
    assert len(domain.context()) == len(before)
    with pytest.raises(XenError, match="EINVAL"):
        domain.suspend()
    domain.resume()
    lab.wait_for_work(domain)


def test_pauses_are_counted(lab: Lab) -> None:
    domain = lab.guest()
    domain.pause()
    domain.pause()
    domain.unpause()
    assert lab.stands_still(domain)
    domain.unpause()
    lab.wait_for_work(domain)


def test_a_context_of_something_else_is_refused(lab: Lab) -> None:
    domain = lab.incoming()
    for junk in (b"", b"\xc1", b"\x90", b"\x91\x94\xff\xff\xff\xff"):
        with pytest.raises(XenError, match="EINVAL"):
            domain.set_context(junk)


def test_what_a_failed_call_was_given_can_be_collected(lab: Lab) -> None:
    """Found by chaos: a memoryview crashed the garbage collector, and with it the daemon."""
    domain = lab.incoming()

    def fail() -> None:
        lost = None
        try:
            domain.write_pages(span(0, 8), memoryview(bytearray(8 * PAGE_SIZE))[: 8 * PAGE_SIZE])
        except XenError as error:
            lost = error  # the error and this frame refer to each other
        assert lost is not None

    for _ in range(3):
        fail()
        gc.collect()  # an error would be raised here


# ---- log-dirty ----
def test_log_dirty_is_peeked_cleaned_and_ended(lab: Lab) -> None:
    domain = lab.guest()

    def dirty(*, clean: bool) -> PfnArray:
        return from_mask(mask_from_bitmap(domain.log_dirty(clean=clean), domain.nr_pfns))

    domain.log_dirty_enable()
    lab.wait_for_work(domain)
    domain.suspend()
    peeked = dirty(clean=False)
    assert len(peeked) > 0
    assert np.array_equal(dirty(clean=True), peeked)
    assert len(dirty(clean=True)) == 0
    domain.resume()
    lab.wait_for_work(domain)
    assert len(dirty(clean=True)) > 0
    domain.log_dirty_disable()
    lab.wait_for_work(domain)


def test_log_dirty_is_refused_to_a_second_user_and_stays_the_first_one_s(lab: Lab) -> None:
    """The first user can find out that log-dirty is on, but not whose it is."""
    domain = lab.guest()
    other = lab.hypervisor.open(domain.domid)
    assert not domain.log_dirty_is_on() and not other.log_dirty_is_on()
    domain.log_dirty_enable()
    for _again in range(2):
        with pytest.raises(XenError, match="log-dirty is on already") as refused:
            other.log_dirty_enable()
        assert refused.value.errno == errno.EBUSY
        assert domain.log_dirty_is_on() and other.log_dirty_is_on()
    lab.wait_for_work(domain)
    assert domain.log_dirty(clean=True).any()
    domain.log_dirty_disable()
    assert not domain.log_dirty_is_on() and not other.log_dirty_is_on()
    lab.wait_for_work(domain)
    domain.log_dirty_enable()  # the check has not changed log-dirty
    lab.wait_for_work(domain)
    assert domain.log_dirty(clean=True).any()
    domain.log_dirty_disable()
    other.close()


def test_a_domain_with_a_ring_has_a_pager_whoever_asks(lab: Lab) -> None:
    domain = lab.incoming()
    other = lab.hypervisor.open(domain.domid)
    assert not other.has_pager()
    ring = domain.paging_enable()
    domain.populate_evicted(span(0, 8))
    assert domain.has_pager() and other.has_pager()
    assert other.info().paged_pages == 8
    assert not domain.load(span(0, 8), None).any()
    domain.paging_disable()
    ring.close()
    assert not domain.has_pager() and not other.has_pager()
    assert other.info().paged_pages == 0
    other.close()


def test_a_page_that_is_loaded_is_not_written(lab: Lab) -> None:
    """What a pager loads need not be sent back."""
    domain = lab.incoming()
    domain.populate(span(0, 64))
    ring = domain.paging_enable()
    domain.populate_evicted(span(0, 64))
    domain.log_dirty_enable()
    domain.log_dirty(clean=True)
    assert not domain.load(span(0, 32), bytes(range(256)) * (32 * PAGE_SIZE // 256)).any()
    assert not domain.load(span(32, 32), None).any()
    assert not domain.log_dirty(clean=True).any()
    domain.log_dirty_disable()
    ring.close()


def test_a_frame_that_comes_is_not_log_dirty(lab: Lab) -> None:
    """A removed frame is not log-dirty either.  Otherwise a step of the sender would not be
    needed.
    """
    domain = lab.incoming()
    domain.populate(span(0, 64))
    domain.log_dirty_enable()
    domain.log_dirty(clean=True)
    domain.depopulate(span(0, 16))
    domain.populate(span(0, 8))
    assert not domain.log_dirty(clean=True).any()
    domain.log_dirty_disable()


def test_a_domain_gets_no_frame_beyond_its_limit(lab: Lab) -> None:
    """A domain that has more frames keeps them."""
    domain = lab.incoming()
    domain.populate(span(0, 64))
    frames = domain.reservation()
    assert frames.tot_pages == 64 and frames.max_pages >= 64 and frames.paged_pages == 0
    domain.set_max_pages(1)
    domain.depopulate(span(60, 4))
    assert domain.reservation()[:2] == (60, 1)
    with pytest.raises(XenError) as raised:
        domain.populate(span(60, 1))
    assert raised.value.errno == errno.ENOMEM
    assert domain.present(span(0, 64)).sum() == 60
    domain.set_max_pages(frames.max_pages)
    domain.populate(span(60, 4))
    assert domain.reservation() == frames


def test_a_guest_moves_into_a_domain_that_takes_its_place(lab: Lab) -> None:
    """Some pages are moved at a time, because there may be no memory for two copies of the
    guest.
    """
    source = lab.guest()
    lab.wait_for_work(source)
    source.suspend()
    context, config, worked = source.context(), source.config(), lab.work(source)
    target = lab.hypervisor.create_incoming(config, instead_of=source)
    for at in range(0, len(there := memory_of(source)), BATCH):
        batch = there[at : at + BATCH]
        with source.map_pages(batch) as mapped:
            status, data = mapped.status, b"".join(mapped.data)
        target.populate(batch)
        target.write_pages(batch[status == PageStatus.DATA], data)
        target.write_pages(batch[status == PageStatus.ZERO], None)
        source.depopulate(batch)
    target.set_context(context)
    target.start()
    source.destroy()
    assert [info.domid for info in lab.hypervisor.domains() if info.name == config.name] == [
        target.domid
    ]
    lab.wait_for_work(target)
    assert lab.work(target) > worked
    assert lab.errors(target) == 0
    target.destroy()


def test_no_write_escapes_log_dirty(lab: Lab, folder: Path) -> None:
    """Copy a running guest's pages as they get dirty; in the end the copy equals the memory.

    The pinned set is excepted, because what the hypervisor itself writes there is not recorded.
    """
    domain = lab.guest()
    copy = Contents(folder, domain.nr_pfns)
    domain.log_dirty_enable()
    there = memory_of(domain)
    copy.copy(domain, there)
    for round_number in range(4):
        if round_number == 3:
            domain.suspend()
        else:
            lab.wait_for_work(domain)
        copy.copy(domain, from_mask(mask_from_bitmap(domain.log_dirty(clean=True), domain.nr_pfns)))
    after = Contents(folder / "after", domain.nr_pfns)
    after.copy(domain, there)
    domain.log_dirty_disable()
    pinned = domain.pinned(there)
    domain.resume()
    for at in range(0, len(there), BATCH):
        batch = np.setdiff1d(there[at : at + BATCH], pinned)
        differs = (copy.pages[batch] != after.pages[batch]).any(axis=1)
        assert batch[differs].tolist() == []


# ---- pages ----
@pytest.mark.parametrize(
    "count",
    [
        1,
        1023,
        *(pytest.param(count, marks=pytest.mark.eviction) for count in (1024, 1025)),
        100_000,
    ],
)
def test_batches_of_any_size(lab: Lab, count: int) -> None:
    domain = lab.incoming(nr_pfns=max(count, 64))
    domain.paging_enable()
    before = domain.info().tot_pages
    batch = span(0, count)
    domain.populate(batch)
    words = np.arange(1, count * PAGE_SIZE // 8 + 1, dtype=np.uint64)
    data = words.view(np.uint8).data

    def check() -> None:
        with domain.map_pages(batch) as mapped:
            assert not mapped.status.any()
            at = 0
            for piece in mapped.data:
                got = np.frombuffer(piece, dtype=np.uint64)
                assert np.array_equal(got, words[at : at + len(got)])
                at += len(got)
            assert at == len(words)

    domain.write_pages(batch, data)
    check()
    domain.populate_evicted(batch)
    assert read(domain, batch) == ([PageStatus.PAGED] * count, b"")
    assert domain.info().tot_pages == before
    assert not domain.load(batch, data).any()
    check()
    assert domain.info().tot_pages == before + count
    domain.depopulate(batch)
    assert domain.info().tot_pages == before
    domain.populate_evicted(batch)  # the same for holes
    assert not domain.load(batch, None).any()
    with domain.map_pages(batch) as mapped:
        assert mapped.status.tolist() == [PageStatus.ZERO] * count


@pytest.mark.eviction
def test_reading_says_what_a_pfn_is(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(1, 3))
    domain.write_pages(span(1, 3), None)
    domain.write_pages(pfns(2), page(7))
    domain.populate_evicted(pfns(5))
    which = pfns(1, 2, 4, 5, 5000, lab.beyond)
    status, data = read(domain, which)
    hole = PageStatus.HOLE
    assert status == [PageStatus.ZERO, PageStatus.DATA, hole, PageStatus.PAGED, hole, hole]
    assert data == page(7)
    assert domain.present(which).tolist() == [True, True, False, True, False, False]
    assert read(domain, NO_PFNS) == ([], b"")
    native = Native(domain)
    assert [native.look(pfn) for pfn in which[:4].tolist()] == [
        (status[0], b""), (status[1], page(7)), (status[2], b""), (status[3], b"")
    ]  # fmt: skip


def test_the_ring_s_own_page_is_no_memory_of_the_guest(lab: Lab) -> None:
    domain = lab.guest()
    there, everything = memory_of(domain), span(0, domain.nr_pfns)
    assert np.array_equal(there, everything[domain.present(everything)])
    ring = domain.paging_enable()
    assert np.array_equal(np.setdiff1d(memory_of(domain), there), NO_PFNS)
    give_up(domain, ring)


def test_zeros_can_be_written_and_loaded_without_a_buffer(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(1, 2))
    domain.write_pages(span(1, 2), page(1) * 2)
    domain.write_pages(pfns(1), None)
    domain.populate_evicted(pfns(2))
    assert domain.load(pfns(2), None).tolist() == [0]
    assert read(domain, span(1, 2))[0] == [PageStatus.ZERO, PageStatus.ZERO]


@pytest.mark.eviction
@pytest.mark.parametrize("operation", ["populate", "depopulate", "write_pages", "populate_evicted"])
def test_a_batch_stops_at_the_pfn_that_fails(lab: Lab, operation: str) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    if operation in ("depopulate", "write_pages"):
        domain.populate(span(1, 10))
    batch = pfns(1, 2, 3, lab.beyond, 5)
    call = getattr(domain, operation)
    with pytest.raises(XenError) as info:
        call(batch, page(1) * 5) if operation == "write_pages" else call(batch)
    assert (info.value.errno, info.value.pfn, info.value.done) == (errno.EINVAL, lab.beyond, 3)


@pytest.mark.eviction
def test_what_is_wrong_with_a_pfn(lab: Lab) -> None:
    """Each call has the documented error at its pfn, and the pfns before it are done."""
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(1, 8))
    domain.populate_evicted(pfns(8))
    hole, paged, there = 20, 8, 3
    for call, wrong, error in (
        (domain.populate, there, errno.EINVAL),
        (domain.depopulate, hole, errno.EINVAL),
        (domain.depopulate, paged, errno.EINVAL),
        (domain.populate_evicted, paged, errno.EBUSY),
        (lambda batch: domain.write_pages(batch, page(1) * 2), paged, errno.ENOENT),
        (lambda batch: domain.write_pages(batch, page(1) * 2), hole, errno.EINVAL),
    ):
        good = pfns(there + 1) if call != domain.populate else pfns(hole + 1)
        with pytest.raises(XenError) as info:
            call(np.concatenate([good, pfns(wrong)]))
        assert (info.value.errno, info.value.pfn, info.value.done) == (error, wrong, 1)
        if call in (domain.depopulate, domain.populate_evicted):
            domain.populate(good)
    assert domain.load(pfns(there, hole, lab.beyond), page(1) * 3).tolist() == [-errno.ENOENT] * 3


@pytest.mark.eviction
def test_a_duplicate_in_a_batch_fails_where_it_repeats(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    before = domain.info().tot_pages
    for call, error in ((domain.populate, errno.EINVAL), (domain.populate_evicted, errno.EBUSY)):
        with pytest.raises(XenError) as info:
            call(pfns(20, 21, 20))
        assert (info.value.errno, info.value.done) == (error, 2)
        if call == domain.populate:
            assert domain.info().tot_pages == before + 2
            domain.depopulate(pfns(20, 21))
    assert domain.load(pfns(20, 20), page(1) * 2).tolist() == [0, -errno.ENOENT]


@pytest.mark.eviction
def test_populating_over_a_paged_out_pfn_makes_it_memory(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate_evicted(pfns(3))
    domain.populate(pfns(3))
    assert read(domain, pfns(3))[0][0] in (PageStatus.ZERO, PageStatus.DATA)
    assert domain.load(pfns(3), page(1)).tolist() == [-errno.ENOENT]


# ---- paging ----
def test_a_page_that_is_there_is_never_overwritten_by_a_load(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate_evicted(pfns(3))
    assert domain.load(pfns(3), page(1)).tolist() == [0]
    assert domain.load(pfns(3), page(2)).tolist() == [-errno.ENOENT]
    assert domain.load(pfns(9), page(2)).tolist() == [-errno.ENOENT]  # a hole
    assert read(domain, pfns(3)) == ([PageStatus.DATA], page(1))


def test_native_code_loads_alike(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate_evicted(pfns(3, 4))
    native = Native(domain)
    assert [native.load(3, page(1)), native.load(4, None)] == [0, 0]
    assert [native.load(3, page(2)), native.load(9, page(2))] == [-errno.ENOENT, -errno.ENOENT]
    assert [native.look(3), native.look(4)] == [(PageStatus.DATA, page(1)), (PageStatus.ZERO, b"")]


@pytest.mark.eviction
def test_without_a_ring_nothing_is_paged(lab: Lab) -> None:
    domain = lab.incoming()
    domain.populate(pfns(1))
    before = domain.info().tot_pages
    for call in (
        lambda: domain.populate_evicted(pfns(1, 2)),
        lambda: domain.load(pfns(1), page(1)),
    ):
        with pytest.raises(XenError, match="ENODEV"):
            call()
    assert domain.info().tot_pages == before
    with pytest.raises(XenError, match="ENODEV"):
        domain.paging_attach()


def test_a_domain_has_one_pager(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    other = lab.hypervisor.open(domain.domid)
    for call in (domain.paging_enable, other.paging_enable, other.paging_attach):
        with pytest.raises(XenError, match="EBUSY"):
            call()
    other.close()
    domain.paging_disable()
    domain.paging_enable()


@pytest.mark.eviction
def test_what_somebody_holds_is_not_evicted(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(1, 10))
    with lab.hold(domain, 5):
        with pytest.raises(XenError) as info:
            domain.populate_evicted(pfns(3, 4, 5, 6))
        assert (info.value.errno, info.value.pfn, info.value.done) == (errno.EBUSY, 5, 2)
    assert read(domain, span(3, 2))[0] == [PageStatus.PAGED] * 2
    assert PageStatus.PAGED not in read(domain, span(5, 2))[0]
    domain.populate_evicted(pfns(5, 6))


@pytest.mark.eviction
def test_a_page_that_only_another_program_maps_is_not_part_of_the_pinned_set(lab: Lab) -> None:
    """The page is reported as held, if the hypervisor reports such pages."""
    domain = lab.incoming()
    domain.populate(span(1, 10))
    reports = lab.hypervisor.preflight(None, paging=True).populate_evicted == "native"
    with lab.hold(domain, 5):
        assert domain.pinned(span(1, 10)).tolist() == []
        assert domain.held(span(1, 10)).tolist() == ([5] if reports else [])
    assert domain.held(span(1, 10)).tolist() == []


def test_a_successor_has_a_ring_to_inherit(lab: Lab) -> None:
    domain = lab.incoming()
    host = lab.another()
    ring = host.open(domain.domid).paging_enable()
    domain.populate_evicted(span(1, 20))
    ring.close()
    host.close()
    host = lab.another()
    successor = attach(host, domain.domid)
    assert domain.load(span(1, 20), page(1) * 20).tolist() == [0] * 20
    successor.paging_disable()
    host.close()


def test_a_vcpu_continues_only_when_it_was_answered(lab: Lab, folder: Path) -> None:
    domain = lab.guest()
    ring = domain.paging_enable()
    domain.pause()
    contents = Contents(folder, domain.nr_pfns)
    out = set(page_out(domain, contents).tolist())
    assert lab.stands_still(domain) and not ring.requests()  # a paused domain makes no requests
    domain.unpause()
    requests = wait_for_requests(ring)
    assert all(
        request.vcpu_waits and request.pfn in out and not request.is_drop for request in requests
    )
    for pfn in {request.pfn for request in requests}:
        domain.load(pfns(pfn), contents[pfns(pfn)])
        out.discard(pfn)
    *others, last = requests
    ring.respond(others)
    assert lab.stands_still(domain)  # only the vCPU of the last request waits
    for answer in ([last, last], [last._replace(pfn=last.pfn + 1)], [*others[:1], last, last]):
        with pytest.raises(XenError, match="no open request"):
            ring.respond(answer)
    assert lab.stands_still(domain)
    ring.respond([last])
    bring_in(domain, ring, contents, out)
    lab.wait_for_work(domain)
    assert lab.errors(domain) == 0


@pytest.mark.eviction
def test_a_running_guest_s_memory_is_evicted_and_served_back(lab: Lab, folder: Path) -> None:
    """All memory except the pinned set is evicted, twice; the guest checks what it reads."""
    domain = lab.guest()
    for faults in (200, 1):
        ring = domain.paging_enable()
        domain.pause()
        contents = Contents(folder, domain.nr_pfns)
        out = set(page_out(domain, contents).tolist())
        assert len(out) > 0.9 * (len(out) + domain.info().tot_pages)
        domain.unpause()
        served, deadline = 0, time.monotonic() + LAB_WAIT_S
        while served < faults:
            assert time.monotonic() < deadline, f"{served} faults served"
            ready(ring, 1)
            served += serve(domain, ring, contents, out)
        bring_in(domain, ring, contents, out)
        lab.wait_for_work(domain)
        assert lab.errors(domain) == 0
        contents.path.unlink()


def test_pages_are_evicted_under_a_running_guest(lab: Lab, folder: Path) -> None:
    """The pages are evicted in batches while the guest runs.  The guest is suspended only from the
    copy of a page until its eviction.
    """
    domain = lab.guest()
    ring = domain.paging_enable()
    contents = Contents(folder, domain.nr_pfns)
    there = memory_of(domain)
    there = np.setdiff1d(there, domain.pinned(there))
    out: set[int] = set()
    for at in range(0, len(there), len(there) // 64):
        batch = there[at : at + len(there) // 64]
        domain.pause()
        contents.copy(domain, batch)
        domain.populate_evicted(batch)
        domain.unpause()
        out.update(batch.tolist())
        serve(domain, ring, contents, out)
    lab.wait_for_work(domain, lambda: serve(domain, ring, contents, out))
    bring_in(domain, ring, contents, out)
    lab.wait_for_work(domain)
    assert lab.errors(domain) == 0


# ---- the pager that dies ----
@contextlib.contextmanager
def pager(
    lab: Lab, domain: Domain, contents: Contents, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a pager in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.support.pager_process",
        *lab.attach,
        *options,
        str(domain.domid),
    ]
    with process_of([*command, str(contents.path), str(contents.out)]) as process:
        yield process


@contextlib.contextmanager
def process_of(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process, and wait until it is ready."""
    process = zygote.Popen(
        command, cwd=TREE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for_line(process, lambda line: line == "ready")
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def wait_for_line(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> None:
    """Wait for a line.  Bytes are read one by one: a line that Python had read ahead would not make
    the descriptor ready.
    """
    assert process.stdout is not None
    deadline, line = time.monotonic() + 2 * LAB_WAIT_S, b""
    while not (line.endswith(b"\n") and wanted(line.decode().strip())):
        assert ready(process.stdout, deadline - time.monotonic()), "the pager is silent"
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, f"the pager has ended: {process.wait()}"
        line = byte if line.endswith(b"\n") else line + byte


def test_a_pager_can_be_killed_and_has_a_successor(lab: Lab, folder: Path) -> None:
    """The guest waits meanwhile, and then continues."""
    domain = lab.guest()
    contents = Contents(folder, domain.nr_pfns)
    with pager(lab, domain, contents) as process:
        domain.pause()
        np.save(contents.out, page_out(domain, contents))
        contents.pages.flush()
        domain.unpause()
        wait_for_line(process, lambda line: line == "served 20")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lab.stands_still(domain)
    put_out = np.load(contents.out)
    still_out = domain.paged_out()
    assert np.isin(still_out, put_out).all()
    assert 0 < len(still_out) < len(put_out)
    for _ in range(2):
        with pager(lab, domain, contents, "--attach") as process:
            wait_for_line(process, lambda line: line == "served 20")
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert lab.stands_still(domain)
    with pager(lab, domain, contents, "--attach") as process:
        assert process.stdin is not None
        process.stdin.write("finish\n")
        process.stdin.flush()
        wait_for_line(process, lambda line: line == "done")
    lab.wait_for_work(domain)
    assert lab.errors(domain) == 0


# ---- a guest that comes from elsewhere ----
def restore(
    lab: Lab, source: Domain, contents: Contents, *, pinned: bool = True
) -> tuple[Domain, PagingRing, set[int]]:
    """Restore the suspended guest on the same host, with all but its pinned set paged out."""
    there = memory_of(source)
    contents.copy(source, there)
    held = source.pinned(there)
    target = lab.hypervisor.create_incoming(lab.config_beside(source))
    ring = target.paging_enable()
    if pinned:
        target.populate(held)
        target.write_pages(held, contents[held])
    out = np.setdiff1d(there, held) if pinned else there
    target.populate_evicted(out)
    return target, ring, set(out.tolist())


def test_a_guest_is_restored_with_its_memory_absent(lab: Lab, folder: Path) -> None:
    source = lab.guest()
    contents = Contents(folder, source.nr_pfns)
    source.suspend()
    target, ring, out = restore(lab, source, contents)
    target.set_context(source.context())
    assert target.info().state is DomainState.INCOMING
    target.start()
    lab.wait_for_work(target, lambda: serve(target, ring, contents, out))
    bring_in(target, ring, contents, out)
    lab.wait_for_work(target)
    assert target.info().state is DomainState.RUNNING
    assert lab.errors(target) == 0
    target.destroy()
    source.resume()
    lab.wait_for_work(source)


# ---- pages that outlive their domain ----
def test_held_pages_are_readable_when_the_domain_is_gone(lab: Lab) -> None:
    domain = lab.incoming()
    domain.populate(span(0, 40))
    domain.write_pages(span(0, 40), b"".join(page(i) for i in range(40)))
    domain.hold(span(0, 20))
    domain.hold(pfns(7))  # again, as after a change
    domain.release(span(0, 5))
    with contextlib.closing(lab.hypervisor.open(domain.domid)) as toolstack:
        toolstack.destroy()
    with pytest.raises(NoSuchDomainError):
        domain.info()
    for which in (span(5, 15), pfns(7), pfns(6, 19)):
        status, contents = read(domain, which)
        assert status == [PageStatus.DATA] * len(which)
        assert contents == b"".join(page(i) for i in which.tolist())
    native = Native(domain)
    assert [native.look(pfn) for pfn in (7, 19)] == [
        (PageStatus.DATA, page(7)),
        (PageStatus.DATA, page(19)),
    ]
    # Release a page while it is being read:
    with domain.map_pages(span(8, 4)) as mapped, native.looking(6) as (_status, address):
        domain.release(span(5, 15))
        assert bytes(mapped.data[0][:1]) == b"\x08"
        assert ctypes.string_at(address, PAGE_SIZE) == page(6)
    domain.close()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGABRT, None])
@pytest.mark.parametrize("gone", [True, False])
def test_a_keeper_has_the_pages_of_a_process_that_has_died(
    lab: Lab, tmp_path: Path, sig: signal.Signals | None, gone: bool
) -> None:
    """The process is killed, or its interpreter ends.  The domain is then destroyed, or not."""
    domain = lab.incoming()
    domain.populate(span(0, 200))
    domain.write_pages(span(0, 200), b"".join(page(i) for i in range(200)))
    path = tmp_path / ("a name that is too long for the address of a socket " * 3)[:120]
    path.mkdir()
    path /= "keeper"
    with holding(lab, domain, 200, path) as process:
        (keeper,) = keepers(process.pid)
        if sig is not None:
            process.send_signal(sig)
        else:
            assert process.stdin is not None
            process.stdin.close()
        process.wait()
    if gone:
        domain.destroy()
    kept = open_with_keeper(path, lab.hypervisor, domain.domid, domain.handle)
    assert isinstance(kept, KeptDomain) and not kept.holds_are_lost()
    if gone:
        with pytest.raises(NoSuchDomainError):
            kept.state()
    else:
        assert kept.info().domid == domain.domid
    for which in (span(1, 199), pfns(7), pfns(150, 3, 199)):
        status, contents = read(kept, which)
        assert status == [PageStatus.DATA] * len(which)
        assert contents == b"".join(page(i) for i in which.tolist())
    if gone:
        assert read(kept, pfns(0, 1))[0] == [PageStatus.HOLE, PageStatus.DATA]
    kept.close()
    kept.close()
    until(lambda: not lives(keeper), "the keeper lives")
    assert not path.exists()
    if not gone:
        domain.destroy()


def test_a_keeper_ends_with_the_handle(lab: Lab, tmp_path: Path) -> None:
    domain = lab.incoming()
    domain.populate(span(0, 4))
    domain.hold(span(0, 4))
    domain.keep(tmp_path / "keeper")
    domain.keep(tmp_path / "keeper")
    (keeper,) = keepers(os.getpid())
    assert not domain.holds_are_lost()
    domain.destroy()
    assert not lives(keeper) and not (tmp_path / "keeper").exists()


def test_a_keeper_that_is_killed_alone_is_replaced(lab: Lab, tmp_path: Path) -> None:
    """The next keeper uses the addresses that the first one was started with."""
    domain = lab.incoming()
    domain.populate(span(0, 4))
    domain.write_pages(span(0, 4), b"".join(page(i) for i in range(4)))
    domain.hold(span(0, 4))
    path, addresses = tmp_path / "keeper", domain.native_pages()
    domain.keep(path)
    assert domain.native_pages() == domain.native_pages() == addresses
    for _ in range(2):
        (killed,) = keepers(os.getpid())
        os.kill(killed, signal.SIGKILL)
        until(lambda: keepers(os.getpid()) not in ([], [killed]), "there is no other keeper")
        with contextlib.closing(KeptPages(path)) as kept, kept.read(pfns(2)) as mapped:
            assert b"".join(mapped.data) == page(2)
    domain.destroy()
    assert not keepers(os.getpid()) and not path.exists()


def test_a_keeper_that_is_killed_is_noticed(lab: Lab, tmp_path: Path) -> None:
    domain = lab.incoming()
    domain.populate(span(0, 4))
    domain.write_pages(span(0, 4), b"".join(page(i) for i in range(4)))
    path = tmp_path / "keeper"
    with holding(lab, domain, 4, path) as process:
        (keeper,) = keepers(process.pid)
        process.kill()
        process.wait()
    kept = open_with_keeper(path, lab.hypervisor, domain.domid, domain.handle)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not lives(keeper), "the keeper lives")
    assert kept.holds_are_lost()
    assert read(kept, pfns(2))[1] == page(2)  # the domain itself is there
    domain.destroy()
    kept.close()
    with pytest.raises(NoSuchDomainError):
        open_with_keeper(path, lab.hypervisor, domain.domid, domain.handle)


@contextlib.contextmanager
def holding(lab: Lab, domain: Domain, pages: int, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the first pages of a domain, with a keeper at ``path``."""
    command = [sys.executable, "-m", "tests.support.holder_process", *lab.attach]
    with process_of([*command, str(domain.domid), str(pages), str(path)]) as process:
        yield process


def test_zero_pages_and_holes_can_be_held(lab: Lab) -> None:
    domain = lab.incoming()
    domain.populate(span(0, 2))
    domain.write_pages(span(0, 2), page(1) + bytes(PAGE_SIZE))
    domain.hold(span(0, 3))
    assert read(domain, span(0, 2))[0] == [PageStatus.DATA, PageStatus.ZERO]
    assert read(domain, span(0, 3))[0] == [PageStatus.DATA, PageStatus.ZERO, PageStatus.HOLE]
    domain.destroy()


def test_what_is_not_here_cannot_be_held(lab: Lab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(0, 4))
    domain.populate_evicted(pfns(2))
    with pytest.raises(XenError) as info:
        domain.hold(span(0, 4))
    assert info.value.errno == errno.EIO
    domain.destroy()


def test_holding_a_guest_s_memory_changes_nothing_for_it(lab: Lab) -> None:
    """The guest runs, is suspended, and continues; what this process holds does not count as
    pinned or held.
    """
    domain = lab.guest()
    there = memory_of(domain)
    before = domain.pinned(there), domain.held(there)
    for _again in range(2):
        domain.hold(there)
        # The guest runs, and may have registered some.
        assert len(np.setdiff1d(domain.pinned(there), before[0])) < 20
        assert len(np.setdiff1d(domain.held(there), before[1])) < 20
    lab.wait_for_work(domain)
    domain.suspend()
    domain.hold(there)
    domain.resume()
    lab.wait_for_work(domain)
    domain.release(there)
    assert lab.errors(domain) == 0
    domain.close()


# ---- a domain that a toolstack made ----
def test_a_toolstack_s_guest_is_incoming_until_it_has_run(lab: Lab) -> None:
    """An administrator may have paused the guest when a restarted daemon opens its domain again."""

    def found(made: Domain) -> tuple[DomainState, bool]:
        with lab.hypervisor.reopen_incoming(made.domid, made.config(), lent=True) as reopened:
            return reopened.state(), reopened.has_run()

    assert found(lab.incoming()) == (DomainState.INCOMING, False)
    guest = lab.guest()
    guest.pause()
    assert found(guest) == (DomainState.PAUSED, True)
    guest.unpause()
    lab.wait_for_work(guest)


def test_a_toolstack_s_domain_is_bound_to_be_restored_into(lab: Lab) -> None:
    config = lab.config()
    made = lab.hypervisor.create_incoming(config)
    domain = lab.hypervisor.bind_incoming(made.domid, config, ToolstackPorts(1, 2))
    assert domain.info().state is DomainState.INCOMING
    assert not domain.preflight().problems
    ring = domain.paging_enable()
    domain.populate_evicted(span(0, 10))
    assert not domain.load(span(0, 10), None).any()
    domain.paging_disable()
    ring.close()
    domain.close()
    with pytest.raises(XenError) as info:
        lab.hypervisor.bind_incoming(
            made.domid, dataclasses.replace(config, vcpus=2), ToolstackPorts(1, 2)
        )
    assert info.value.errno == errno.EINVAL
    made.destroy()
    with pytest.raises(NoSuchDomainError):
        lab.hypervisor.bind_incoming(made.domid, config, ToolstackPorts(1, 2))


def test_a_guest_without_its_pinned_set_dies(lab: Lab, folder: Path) -> None:
    """With its pinned set, and nothing else, the guest lives.

    Up to Xen 4.17 the hypervisor refuses the guest's call, and requests nothing.  From 4.18 on it
    refuses the call and requests the page; what becomes of the guest depends on its kernel.
    """
    source = lab.guest(kernel=True)
    contents = Contents(folder, source.nr_pfns)
    source.suspend()
    context = source.context()
    target, ring, out = restore(lab, source, contents)
    target.set_context(context)
    target.start()
    bring_in(target, ring, contents, out)
    lab.wait_for_work(target)
    assert lab.errors(target) == 0
    target.destroy()
    target, ring, out = restore(lab, source, contents)
    source_pinned = source.pinned(memory_of(source))
    own = np.setdiff1d(source_pinned, lab.toolstack_pages(source))
    assert len(own) > 0
    target.depopulate(own)
    target.populate_evicted(own)
    out |= set(own.tolist())
    target.set_context(context)
    with contextlib.suppress(XenError):  # a simulated guest is dead at once
        target.start()

    def noticed() -> bool:
        serve(target, ring, contents, out)
        if lab.requests_pinned:
            return bool(set(own.tolist()) - out)
        return target.info().state is DomainState.CRASHED

    until(noticed, "the guest lives, and nothing of its pinned set is requested")
    target.destroy()
    source.resume()
    lab.wait_for_work(source)


def test_disabling_while_pages_are_out_kills_the_guest(lab: Lab, folder: Path) -> None:
    domain = lab.guest()
    domain.paging_enable()
    domain.pause()
    page_out(domain, Contents(folder, domain.nr_pfns))
    domain.paging_disable()
    domain.unpause()
    until(lambda: domain.info().state is DomainState.CRASHED, "the guest lives")
    domain.destroy()


def test_a_vcpu_whose_request_was_not_answered_waits_without_the_ring(
    lab: Lab, folder: Path
) -> None:
    domain = lab.guest()
    ring = domain.paging_enable()
    domain.pause()
    contents = Contents(folder, domain.nr_pfns)
    out = page_out(domain, contents)
    domain.unpause()
    wait_for_requests(ring)
    for at in range(0, len(out), BATCH):
        assert not domain.load(out[at : at + BATCH], contents[out[at : at + BATCH]]).any()
    domain.paging_disable()
    assert lab.stands_still(domain)
    assert domain.info().state is DomainState.RUNNING
    domain.destroy()
