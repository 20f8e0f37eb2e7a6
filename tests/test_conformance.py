"""What every backend must do: one suite, parametrised over them.

A backend's :class:`Lab` brings about the states that the contract speaks of (a running guest, a page with an extra
reference, ...); the tests use nothing but the contract otherwise.
"""

from __future__ import annotations

import dataclasses
import errno
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from migrate.errors import MigrationError
from migrate.loopback import World, wait_for_steps
from migrate.pfns import from_mask, mask_from_bitmap, pfn_array
from tests.conftest import MIB, clear
from xenbackend.contract import PAGE_SIZE, Domain, DomainState, NoSuchDomainError, PageStatus, PfnArray, XenError
from xenbackend.ring import VM_EVENT_SLOTS, PagingRequest, PagingRing
from xenbackend.simulated._sim import lib
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec


class SimulatedLab:
    def __init__(self, world: World, name: str):
        self._world = world
        self._name = name
        self.hypervisor: SimulatedHypervisor = world.source

    def boot(self, memory: int = 4 * MIB, vcpus: int = 2, **options: object) -> SimulatedDomain:
        self.spec = GuestSpec(self._name, memory, vcpus, **options)  # type: ignore[arg-type]
        return self.hypervisor.create_guest(self.spec.to_bytes())

    def incoming(self, nr_pfns: int = 1024, vcpus: int = 1) -> SimulatedDomain:
        config = GuestSpec(self._name + "-in", nr_pfns * PAGE_SIZE, vcpus).domain_config()
        return self.hypervisor.create_incoming(config)

    def wait_for_steps(self, domain: Domain, steps: int) -> None:
        assert isinstance(domain, SimulatedDomain)
        wait_for_steps(domain, steps, timeout_s=20)

    unevictable: tuple[tuple[str, Callable[[SimulatedDomain, int], None]], ...] = (
        ("extra reference", lambda d, pfn: d.set_page(pfn, refs=1)),
        ("type count", lambda d, pfn: d.set_page(pfn, type_count=1)),
        ("mmio", lambda d, pfn: d.set_page(pfn, p2m_type=lib.P2M_MMIO)),
        ("broken", lambda d, pfn: d.set_page(pfn, p2m_type=lib.P2M_BROKEN)),
    )


@pytest.fixture(params=["simulated"])
def lab(request: pytest.FixtureRequest, hosts: World, name: str) -> Iterator[SimulatedLab]:
    yield SimulatedLab(hosts, name)
    clear(hosts)


def pfns(*values: int) -> PfnArray:
    return pfn_array(values)


def span(first: int, count: int) -> PfnArray:
    return np.arange(first, first + count, dtype=np.uint64)


def read(domain: Domain, which: PfnArray) -> tuple[list[int], bytes]:
    with domain.map_pages(which) as mapped:
        return mapped.status.tolist(), b"".join(mapped.data)


def page(fill: int) -> bytes:
    return bytes([fill]) * PAGE_SIZE


def wait_for_requests(ring: PagingRing, count: int, timeout_s: float = 20.0) -> list[PagingRequest]:
    requests: list[PagingRequest] = []
    deadline = time.monotonic() + timeout_s
    while len(requests) < count:
        select.select([ring], [], [], max(deadline - time.monotonic(), 0))
        requests += ring.requests()
        assert time.monotonic() < deadline, f"{len(requests)} of {count} requests"
    return requests


# ---- domains ----
def test_domains_are_found_by_name_and_number(lab: SimulatedLab) -> None:
    domain = lab.boot()
    info = domain.info()
    assert info.state is DomainState.RUNNING
    for key in (info.name, info.domid, str(info.domid)):
        assert lab.hypervisor.open(key).info() == domain.info()
    with pytest.raises(NoSuchDomainError, match="no such domain"):
        lab.hypervisor.open("nobody")
    domain.destroy()
    with pytest.raises(XenError, match="ESRCH"):
        domain.info()


def test_a_name_is_used_once_and_memory_is_finite(lab: SimulatedLab) -> None:
    config = lab.boot().config()
    assert "named" in lab.hypervisor.preflight(config, paging=True).problems[0]
    with pytest.raises(XenError, match="EEXIST"):
        lab.hypervisor.create_incoming(config)
    huge = GuestSpec("huge", 2**40).domain_config()
    assert "not enough memory" in lab.hypervisor.preflight(huge, paging=True).problems[0]
    with pytest.raises(XenError, match="ENOMEM"):
        lab.hypervisor.create_incoming(huge)
    with pytest.raises(XenError, match="EINVAL"):
        lab.hypervisor.create_incoming(dataclasses.replace(config, name="other", platform=b"junk"))


def test_a_suspended_guest_does_not_run_and_a_resumed_one_does(lab: SimulatedLab) -> None:
    domain = lab.boot()
    lab.wait_for_steps(domain, 100)
    domain.suspend()
    before = domain.context()
    time.sleep(0.05)
    assert domain.context() == before
    with pytest.raises(XenError, match="EINVAL"):
        domain.suspend()
    domain.resume()
    lab.wait_for_steps(domain, 100)
    with pytest.raises(XenError, match="EINVAL"):
        domain.context()


def test_a_context_of_something_else_is_refused(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    for junk in (b"", b"\xc1", b"\x90", b"\x91\x94\xff\xff\xff\xff"):
        with pytest.raises(XenError, match="EINVAL"):
            domain.set_context(junk)


# ---- log-dirty ----
def test_log_dirty_records_every_written_page_and_clean_starts_anew(lab: SimulatedLab) -> None:
    domain = lab.boot(workload="sequential", working_set_bytes=64 * PAGE_SIZE)
    domain.log_dirty_enable()
    lab.wait_for_steps(domain, 200)
    domain.suspend()
    peeked = domain.log_dirty(clean=False)
    assert from_mask(mask_from_bitmap(peeked, domain.nr_pfns)).tolist() == list(range(64))
    assert np.array_equal(domain.log_dirty(clean=True), peeked)
    assert not domain.log_dirty(clean=True).any()
    domain.resume()
    lab.wait_for_steps(domain, 200)
    assert mask_from_bitmap(domain.log_dirty(clean=True), domain.nr_pfns)[:64].all()
    domain.log_dirty_disable()
    domain.log_dirty(clean=True)
    lab.wait_for_steps(domain, 200)
    assert not domain.log_dirty(clean=True).any()


def test_no_write_escapes_log_dirty(lab: SimulatedLab) -> None:
    """Copy a running guest's pages as they get dirty: in the end the copy equals the memory."""
    domain = lab.boot(workload="random", working_set_bytes=64 * PAGE_SIZE)
    domain.log_dirty_enable()
    everything = span(0, domain.nr_pfns)
    copy = {}
    todo = everything
    for round_number in range(30):
        if round_number == 29:
            domain.suspend()
            todo = from_mask(mask_from_bitmap(domain.log_dirty(clean=True), domain.nr_pfns))
        for pfn in todo:
            copy[int(pfn)] = read(domain, pfns(pfn))
        if round_number < 28:
            todo = from_mask(mask_from_bitmap(domain.log_dirty(clean=True), domain.nr_pfns))
        else:
            todo = pfns()
    for pfn in everything:
        assert copy[int(pfn)] == read(domain, pfns(pfn)), f"pfn {pfn:#x}"


# ---- pages ----
@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 100_000])
def test_batches_of_any_size(lab: SimulatedLab, count: int) -> None:
    domain = lab.incoming(nr_pfns=max(count, 64))
    domain.paging_enable()
    batch = span(0, count)
    domain.populate(batch)
    data = np.random.default_rng(1).integers(0, 256, count * PAGE_SIZE, dtype=np.uint8).tobytes()
    domain.write_pages(batch, data)
    status, got = read(domain, batch)
    assert status == [PageStatus.DATA] * count
    assert got == data
    domain.populate_evicted(batch)
    assert read(domain, batch) == ([PageStatus.PAGED] * count, b"")
    assert domain.info().tot_pages == 0
    assert not domain.load(batch, data).any()
    assert read(domain, batch) == ([PageStatus.DATA] * count, data)
    assert domain.info().tot_pages == count


def test_reading_says_what_a_pfn_is(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(0, 3))
    domain.write_pages(pfns(1), page(7))
    domain.populate_evicted(pfns(5))
    status, data = read(domain, pfns(0, 1, 4, 5, 5000))
    assert status == [PageStatus.ZERO, PageStatus.DATA, PageStatus.HOLE, PageStatus.PAGED, PageStatus.HOLE]
    assert data == page(7)
    assert domain.present(pfns(0, 1, 4, 5, 5000)).tolist() == [True, True, False, True, False]


def test_zeros_can_be_written_and_loaded_without_a_buffer(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(0, 2))
    domain.write_pages(span(0, 2), page(1) * 2)
    domain.write_pages(pfns(0), None)
    domain.populate_evicted(pfns(1))
    assert domain.load(pfns(1), None).tolist() == [0]
    assert read(domain, span(0, 2))[0] == [PageStatus.ZERO, PageStatus.ZERO]


@pytest.mark.parametrize("operation", ["populate", "depopulate", "write_pages", "populate_evicted"])
def test_a_batch_stops_at_the_pfn_that_fails(lab: SimulatedLab, operation: str) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    if operation in ("depopulate", "write_pages"):
        domain.populate(span(0, 10))
    batch = pfns(0, 1, 2, 999_999, 4)
    call = getattr(domain, operation)
    with pytest.raises(XenError) as info:
        call(batch, page(1) * 5) if operation == "write_pages" else call(batch)
    assert (info.value.errno, info.value.pfn, info.value.done) == (errno.EINVAL, 999_999, 3)


def test_a_duplicate_in_a_batch_fails_where_it_repeats(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    for call, error in ((domain.populate, errno.EINVAL), (domain.populate_evicted, errno.EBUSY)):
        with pytest.raises(XenError) as info:
            call(pfns(20, 21, 20))
        assert (info.value.errno, info.value.done) == (error, 2)
        if call == domain.populate:
            domain.depopulate(pfns(20, 21))
    assert domain.load(pfns(20, 20), page(1) * 2).tolist() == [0, -errno.ENOENT]


def test_populating_over_a_paged_out_pfn_makes_it_memory(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate_evicted(pfns(3))
    domain.populate(pfns(3))
    assert read(domain, pfns(3))[0] == [PageStatus.ZERO]


# ---- paging ----
def test_a_page_that_is_there_is_never_overwritten_by_a_load(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    domain.populate_evicted(pfns(3))
    assert domain.load(pfns(3), page(1)).tolist() == [0]
    assert domain.load(pfns(3), page(2)).tolist() == [-errno.ENOENT]
    assert domain.load(pfns(9), page(2)).tolist() == [-errno.ENOENT]  # a hole
    assert read(domain, pfns(3)) == ([PageStatus.DATA], page(1))


def test_without_a_ring_nothing_is_paged(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    for call in (lambda: domain.populate_evicted(pfns(1)), lambda: domain.load(pfns(1), page(1))):
        with pytest.raises(XenError, match="ENODEV"):
            call()


def test_a_domain_has_one_pager(lab: SimulatedLab) -> None:
    domain = lab.incoming()
    domain.paging_enable()
    with pytest.raises(XenError, match="EBUSY"):
        domain.paging_enable()
    domain.paging_disable()
    domain.paging_enable()


@pytest.mark.parametrize("why", [name for name, _make in SimulatedLab.unevictable])
def test_what_somebody_holds_is_not_evicted(lab: SimulatedLab, why: str) -> None:
    domain = lab.boot(workload="idle", working_set_bytes=PAGE_SIZE)
    domain.paging_enable()
    dict(lab.unevictable)[why](domain, 500)
    with pytest.raises(XenError) as info:
        domain.populate_evicted(pfns(400, 401, 500, 501))
    assert (info.value.errno, info.value.pfn, info.value.done) == (errno.EBUSY, 500, 2)
    assert read(domain, pfns(400, 401, 501))[0][:2] == [PageStatus.PAGED] * 2
    assert read(domain, pfns(501))[0] != [PageStatus.PAGED]


def test_what_the_guest_registered_by_number_is_the_pinned_set(lab: SimulatedLab) -> None:
    domain = lab.boot(vcpus=3)
    assert domain.pinned(span(0, domain.nr_pfns)).tolist() == [1021, 1022, 1023]
    domain.paging_enable()
    with pytest.raises(XenError, match="EBUSY"):
        domain.populate_evicted(domain.pinned(span(0, domain.nr_pfns)))


def test_a_guest_whose_registered_frame_is_paged_out_dies_at_its_start(lab: SimulatedLab) -> None:
    source, target = lab.boot(vcpus=1), lab.incoming(vcpus=1)
    source.suspend()
    target.paging_enable()
    target.populate_evicted(span(0, 1024))
    target.set_context(source.context())
    with pytest.raises(XenError, match="EINVAL"):
        target.start()
    assert target.info().state is DomainState.CRASHED
    assert "register_vcpu_info" in target.info().reason


def test_a_running_guest_s_memory_is_evicted_and_served_back(lab: SimulatedLab) -> None:
    """The whole life of a fault, with the guest checking what it reads."""
    domain = lab.boot(workload="sequential", working_set_bytes=256 * PAGE_SIZE)
    lab.wait_for_steps(domain, 1000)
    ring = domain.paging_enable()
    stored: dict[int, bytes] = {}

    def serve(requests: list[PagingRequest]) -> None:
        for request in requests:
            if request.pfn in stored:  # else another vCPU's request for it came before
                assert domain.load(pfns(request.pfn), stored.pop(request.pfn) or None).tolist() == [0]
        ring.respond(requests)

    for pfn in range(256):
        domain.suspend()
        stored[pfn] = read(domain, pfns(pfn))[1]
        domain.populate_evicted(pfns(pfn))
        domain.resume()
        serve(ring.requests())
    deadline = time.monotonic() + 20
    while stored:
        assert time.monotonic() < deadline
        serve(wait_for_requests(ring, 1))
    ring.respond(ring.requests())
    lab.wait_for_steps(domain, 1000)
    domain.paging_disable()
    lab.wait_for_steps(domain, 1000)
    assert [vcpu["errors"] for vcpu in domain.report()["vcpu"]] == [0, 0]


def restored(lab: SimulatedLab, vcpus: int, **options: Any) -> tuple[SimulatedDomain, SimulatedDomain, PagingRing]:
    """A guest that starts with all but its pinned set absent; returns source, target, ring."""
    source = lab.boot(vcpus=vcpus, **options)
    lab.wait_for_steps(source, 10)
    source.suspend()
    target = lab.incoming(vcpus=vcpus)
    ring = target.paging_enable()
    config = source.config()
    target.destroy()
    target = lab.hypervisor.create_incoming(
        dataclasses.replace(config, name=config.name + "-in", platform=renamed(config.platform))
    )
    ring = target.paging_enable()
    everything = span(0, source.nr_pfns)
    there = everything[source.present(everything)]
    pinned = source.pinned(everything)
    target.populate(pinned)
    for pfn in pinned:
        target.write_pages(pfns(pfn), read(source, pfns(pfn))[1] or None)
    target.populate_evicted(there[~np.isin(there, pinned)])
    target.set_context(source.context())
    return source, target, ring


def renamed(platform: bytes) -> bytes:
    spec = GuestSpec.from_bytes(platform)
    return dataclasses.replace(spec, name=spec.name + "-in").to_bytes()


def test_more_vcpus_than_slots_all_get_their_turn(lab: SimulatedLab) -> None:
    vcpus = 12
    source, target, ring = restored(lab, vcpus, workload="random")
    target.start()
    first = wait_for_requests(ring, VM_EVENT_SLOTS)
    assert len(first) == VM_EVENT_SLOTS
    assert len({request.vcpu for request in first}) == VM_EVENT_SLOTS
    assert ring.requests() == []  # the other vCPUs wait for a slot
    for request in first:
        target.load(pfns(request.pfn), read(source, pfns(request.pfn))[1] or None)
    ring.respond(first)
    seen = {request.vcpu for request in first}
    deadline = time.monotonic() + 20
    while len(seen) < vcpus:
        assert time.monotonic() < deadline
        for request in wait_for_requests(ring, 1):
            seen.add(request.vcpu)
            target.load(pfns(request.pfn), read(source, pfns(request.pfn))[1] or None)
            ring.respond([request])


def test_a_vcpu_goes_on_only_when_it_was_answered(lab: SimulatedLab) -> None:
    source, target, ring = restored(lab, 1, workload="random")
    target.start()
    (request,) = wait_for_requests(ring, 1)
    assert request.vcpu_waits
    before = target.report()["vcpu"][0]["count"]
    target.load(pfns(request.pfn), read(source, pfns(request.pfn))[1] or None)
    time.sleep(0.05)
    assert target.report()["vcpu"][0]["count"] == before
    ring.respond([request])
    deadline = time.monotonic() + 20
    while target.report()["vcpu"][0]["count"] == before:
        assert time.monotonic() < deadline


def test_no_request_is_answered_twice(lab: SimulatedLab) -> None:
    _source, target, ring = restored(lab, 1, workload="random")
    with pytest.raises(XenError, match="no open request"):
        ring.respond([PagingRequest(1, 0, 1, 0, 10)])
    target.start()
    (request,) = wait_for_requests(ring, 1)
    target.load(pfns(request.pfn), None)
    ring.respond([request])
    with pytest.raises(XenError, match="no open request"):
        ring.respond([request, request])


def test_disabling_while_pages_are_out_kills_the_guest(lab: SimulatedLab) -> None:
    _source, target, _ring = restored(lab, 1, workload="random")
    target.paging_disable()
    target.start()
    deadline = time.monotonic() + 20
    while target.info().state is not DomainState.CRASHED:
        assert time.monotonic() < deadline
    assert "nobody serves" in target.info().reason


def test_a_vcpu_whose_request_was_not_answered_stands_still_without_the_ring(lab: SimulatedLab) -> None:
    _source, target, ring = restored(lab, 1, workload="random")
    target.start()
    (request,) = wait_for_requests(ring, 1)
    target.load(pfns(request.pfn), None)
    target.paging_disable()
    with pytest.raises(MigrationError):
        wait_for_steps(target, 1, timeout_s=0.5)
    assert target.info().state is DomainState.RUNNING


def test_a_ring_is_given_up_while_vcpus_are_about_to_ask(lab: SimulatedLab) -> None:
    """Found by the soak: a vCPU had seen its page absent, then that was loaded and the ring disabled, and then it asked."""
    domain = lab.boot(vcpus=2, workload="random", working_set_bytes=64 * PAGE_SIZE)
    everything = span(0, 64)
    for _ in range(200):
        lab.wait_for_steps(domain, 100)
        ring = domain.paging_enable()
        domain.suspend()
        with domain.map_pages(everything) as mapped:
            contents = b"".join(mapped.data)
            data, zeros = everything[mapped.status == PageStatus.DATA], everything[mapped.status == PageStatus.ZERO]
        domain.populate_evicted(everything)
        domain.resume()
        domain.load(data, contents)
        domain.load(zeros, None)
        domain.pause()
        ring.respond(ring.requests())
        domain.paging_disable()
        domain.unpause()
    lab.wait_for_steps(domain, 100)
    assert [vcpu["errors"] for vcpu in domain.report()["vcpu"]] == [0, 0]


def test_a_paused_domain_asks_for_nothing(lab: SimulatedLab) -> None:
    _source, target, ring = restored(lab, 1, workload="random")
    target.pause()
    target.pause()
    target.start()
    target.unpause()
    steps = target.report()["vcpu"][0]["count"]
    with pytest.raises(MigrationError):
        wait_for_steps(target, 1, timeout_s=0.3)
    assert not ring.requests() and target.report()["vcpu"][0]["count"] == steps
    target.unpause()
    wait_for_requests(ring, 1)


def test_a_page_given_away_while_paged_out_is_dropped_with_a_request(lab: SimulatedLab) -> None:
    source, target, ring = restored(
        lab, 1, workload="sequential", working_set_bytes=PAGE_SIZE, balloon_pages=3, balloon_every=10**6
    )
    target.start()
    (request,) = wait_for_requests(ring, 1)
    target.load(pfns(0), read(source, pfns(0))[1])
    ring.respond([request])
    drops = wait_for_requests(ring, 3)
    assert all(drop.is_drop and not drop.vcpu_waits for drop in drops)
    assert [drop.pfn for drop in drops] == [1022, 1021, 1020]
    ring.respond(drops)
    assert not target.present(pfns(1020, 1021, 1022)).any()
    assert target.load(pfns(1020), page(1)).tolist() == [-errno.ENOENT]


def test_evicted_memory_is_given_back(lab: SimulatedLab) -> None:
    import os

    domain = lab.incoming()
    domain.paging_enable()
    domain.populate(span(0, 1024))
    domain.write_pages(span(0, 1024), page(1) * 1024)
    used = os.fstat(domain._memory_fd).st_blocks * 512
    assert used == 1024 * PAGE_SIZE
    domain.populate_evicted(span(0, 1024))
    assert os.fstat(domain._memory_fd).st_blocks == 0


def test_what_a_dead_process_held_is_free_again(lab: SimulatedLab, hosts: World) -> None:
    """A daemon killed in the middle of a hypercall must not leave a vCPU spinning."""
    domain = lab.incoming()
    ring = domain.paging_enable()
    domain.populate_evicted(span(0, 8))
    other = SimulatedHypervisor(hosts.directory / "source.sock")
    theirs = other.open(domain.domid)
    theirs._map.p2m[3] |= other.client_id << 24  # as in the middle of a load
    theirs.close()
    other.close()
    deadline = time.monotonic() + 20
    while domain._map.p2m[3] >> 24:
        assert time.monotonic() < deadline
    assert domain.load(pfns(3), page(9)).tolist() == [0]
    ring.close()
