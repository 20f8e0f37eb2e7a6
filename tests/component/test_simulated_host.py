# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated host beyond the contract: many vCPUs, states that only a test causes, its
memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from migrate.cli import world as cli_world
from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.protocol.pfns import from_mask, mask_from_bitmap
from tests.conftest import MIB, Boot
from tests.support.labs import SimulatedLab, until
from tests.support.pages import page, pfns, read, span
from tests.support.waiting import WAIT_S, ready
from xenbackend.contract import DomainState
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE, PageStatus
from xenbackend.ring import VM_EVENT_SLOTS, PagingRequest, PagingRing
from xenbackend.simulated import rpc
from xenbackend.simulated._sim import lib
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import verify


@pytest.fixture
def lab(hosts: World, name: str) -> Iterator[SimulatedLab]:
    made = SimulatedLab(hosts, name)
    yield made
    made.close()


def test_descriptors_that_do_not_fit_are_an_error_and_none_is_kept(
    boot: Boot, clean_hosts: World
) -> None:
    """Found by chaos: the receiver took the first of three descriptors, and treated its own error
    as a bug.
    """
    _spec, guest = boot()
    only = os.dup(0)  # the lowest free number
    os.close(only)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (only + 1, hard))
    try:
        with pytest.raises(XenError, match="no descriptor left") as error:
            clean_hosts.source.open(guest.domid)
        assert error.value.errno == errno.EMFILE
        os.close(os.dup(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    clean_hosts.source.open(guest.domid).close()


def test_a_domain_whose_maker_has_no_descriptor_left_is_not_left_over(
    clean_hosts: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = clean_hosts.destination

    def no_descriptor(method: str, **_arguments: object) -> None:
        raise XenError(method, errno.EMFILE)

    monkeypatch.setattr(host, "call_fds", no_descriptor)
    with pytest.raises(XenError, match="attach"):
        host.create_incoming(GuestSpec(name, 4 * MIB).domain_config())
    assert host.domains() == []


def test_a_guest_whose_registered_frame_is_paged_out_dies_at_its_start(lab: SimulatedLab) -> None:
    source, target = lab.boot(vcpus=1), lab.incoming()
    source.suspend()
    target.paging_enable()
    target.populate_evicted(span(0, 1024))
    target.set_context(source.context())
    with pytest.raises(XenError, match="EINVAL"):
        target.start()
    assert target.info().state is DomainState.CRASHED
    assert "register_vcpu_info" in target.info().reason


def test_more_vcpus_than_slots_all_get_their_turn(lab: SimulatedLab) -> None:
    vcpus = 12
    source, target, ring = restored(lab, vcpus, workload="random")
    target.start()
    first = wait_for_requests(ring, VM_EVENT_SLOTS)
    assert len(first) == VM_EVENT_SLOTS
    assert len({request.vcpu for request in first}) == VM_EVENT_SLOTS
    assert ring.requests() == []  # the other vCPUs wait for a slot
    before = steps(target)
    answer(source, target, ring, first)
    # The claim is that each vCPU continues, not that each makes a request.  A vCPU that waits for a
    # slot can be overtaken, on the real Xen as well, until all pages of the working set are
    # present.
    deadline = time.monotonic() + WAIT_S
    while any(now <= then for now, then in zip(steps(target), before, strict=True)):
        assert time.monotonic() < deadline, f"{steps(target)} after {before}"
        ready(ring, 0.01)
        answer(source, target, ring, ring.requests())


def test_a_ring_is_given_up_while_vcpus_are_about_to_ask(lab: SimulatedLab) -> None:
    """Found by the soak: a vCPU had found its page absent, then the page was loaded and the ring
    disabled, and then the vCPU made its request.
    """
    domain = lab.boot(vcpus=2, workload="random", working_set_bytes=64 * PAGE_SIZE)
    everything = span(0, 64)
    for _ in range(200):
        wait_for_steps(domain, 100)
        ring = domain.paging_enable()
        domain.suspend()
        with domain.map_pages(everything) as mapped:
            contents = b"".join(mapped.data)
            data, zeros = (
                everything[mapped.status == PageStatus.DATA],
                everything[mapped.status == PageStatus.ZERO],
            )
        domain.populate_evicted(everything)
        domain.resume()
        domain.load(data, contents)
        domain.load(zeros, None)
        domain.pause()
        ring.respond(ring.requests())
        domain.paging_disable()
        domain.unpause()
    wait_for_steps(domain, 100)
    assert [vcpu["errors"] for vcpu in domain.report()["vcpu"]] == [0, 0]


def test_a_page_given_away_while_paged_out_is_dropped_with_a_request_where_xen_does_so(
    name: str,
) -> None:
    with loopback_world(256 * MIB, host_options=("--drop-requests",), daemons=False) as world:
        lab = SimulatedLab(world, name)
        source, target, ring = restored(
            lab, 1, workload="sequential", working_set_bytes=PAGE_SIZE, balloon_pages=3,
            balloon_every=10**6, host=world.destination,
        )  # fmt: skip
        target.start()
        (request,) = wait_for_requests(ring, 1)
        target.load(pfns(0), read(source, pfns(0))[1])
        ring.respond([request])
        # These pages are not at the source.
        given_away = [1022, 1021, 1020][source.report()["balloon_steps"] :]
        drops = wait_for_requests(ring, len(given_away))
        assert all(drop.is_drop and not drop.vcpu_waits for drop in drops)
        assert given_away and [drop.pfn for drop in drops] == given_away
        ring.respond(drops)
        assert not target.present(pfns(1020, 1021, 1022)).any()
        assert target.load(pfns(1020), page(1)).tolist() == [-errno.ENOENT]


def test_a_guest_touches_what_it_gives_away(lab: SimulatedLab) -> None:
    """The simulated guest behaves as Linux, whose balloon scrubs pages, because Xen would refuse a
    page that is paged out.
    """
    source, target, ring = restored(
        lab,
        1,
        workload="sequential",
        working_set_bytes=PAGE_SIZE,
        balloon_pages=1,
        balloon_every=10**6,
    )
    target.start()
    asked = set()

    def given_away() -> bool:
        for request in ring.requests():  # one page may have several requests
            assert request.vcpu_waits
            if request.pfn not in asked:
                target.load(pfns(request.pfn), read(source, pfns(request.pfn))[1] or None)
            asked.add(request.pfn)
            ring.respond([request])
        return not target.present(pfns(1022))[0]

    until(given_away, "the page is not given away")
    assert asked == {0, 1022}


def test_evicted_memory_is_given_back(lab: SimulatedLab) -> None:
    domain = lab.empty()
    domain.paging_enable()
    domain.populate(span(0, 1024))
    domain.write_pages(span(0, 1024), page(1) * 1024)
    used = os.fstat(domain._memory_fd).st_blocks * 512
    assert used == 1024 * PAGE_SIZE
    domain.populate_evicted(span(0, 1024))
    assert os.fstat(domain._memory_fd).st_blocks == 0


def test_what_a_dead_process_held_is_free_again(lab: SimulatedLab, hosts: World) -> None:
    """A daemon that is killed in the middle of a hypercall must not leave a vCPU spinning."""
    domain = lab.empty()
    ring = domain.paging_enable()
    domain.populate_evicted(span(0, 8))
    other = SimulatedHypervisor(hosts.directory / "source.sock")
    theirs = other.open(domain.domid)
    theirs._map.p2m[3] |= other.client_id << 24  # the state in the middle of a load
    theirs.close()
    other.close()
    deadline = time.monotonic() + WAIT_S
    while domain._map.p2m[3] >> 24:
        assert time.monotonic() < deadline
    assert domain.load(pfns(3), page(9)).tolist() == [0]
    ring.close()


# ---- log-dirty ----
def test_log_dirty_records_every_written_page_and_clean_starts_anew(lab: SimulatedLab) -> None:
    domain = lab.boot(workload="sequential", working_set_bytes=64 * PAGE_SIZE)
    domain.log_dirty_enable()
    wait_for_steps(domain, 200)
    domain.suspend()
    peeked = domain.log_dirty(clean=False)
    assert from_mask(mask_from_bitmap(peeked, domain.nr_pfns)).tolist() == list(range(64))
    assert np.array_equal(domain.log_dirty(clean=True), peeked)
    assert not domain.log_dirty(clean=True).any()
    domain.resume()
    wait_for_steps(domain, 200)
    assert mask_from_bitmap(domain.log_dirty(clean=True), domain.nr_pfns)[:64].all()
    domain.log_dirty_disable()
    domain.log_dirty(clean=True)
    wait_for_steps(domain, 200)
    assert not domain.log_dirty(clean=True).any()


UNEVICTABLE: dict[str, dict[str, int]] = {
    "extra reference": {"refs": 1},
    "type count": {"type_count": 1},
    "mmio": {"p2m_type": lib.P2M_MMIO},
    "broken": {"p2m_type": lib.P2M_BROKEN},
}


@pytest.mark.parametrize("why", UNEVICTABLE)
def test_what_somebody_holds_is_not_evicted(lab: SimulatedLab, why: str) -> None:
    domain = lab.boot(workload="idle", working_set_bytes=PAGE_SIZE)
    domain.paging_enable()
    domain.set_page(500, **UNEVICTABLE[why])
    with pytest.raises(XenError) as info:
        domain.populate_evicted(pfns(400, 401, 500, 501))
    assert (info.value.errno, info.value.pfn, info.value.done) == (errno.EBUSY, 500, 2)
    assert read(domain, pfns(400, 401, 501))[0][:2] == [PageStatus.PAGED] * 2
    assert read(domain, pfns(501))[0] != [PageStatus.PAGED]


def test_what_the_guest_registered_by_number_is_the_pinned_set(lab: SimulatedLab) -> None:
    domain = lab.boot(vcpus=3)
    assert domain.pinned(span(0, domain.nr_pfns)).tolist() == [1021, 1022, 1023]
    assert domain.pinned(pfns(1, 1022)).tolist() == [1022]
    domain.paging_enable()
    with pytest.raises(XenError, match="EBUSY"):
        domain.populate_evicted(domain.pinned(span(0, domain.nr_pfns)))


# ---- reports of damage, and of wrong requests ----
def test_a_guest_that_runs_is_not_verified(boot: Boot) -> None:
    spec, domain = boot()
    assert verify(domain, spec).problems == ["the guest is running"]


def test_a_guest_that_went_back_is_reported(boot: Boot) -> None:
    spec, domain = boot()
    wait_for_steps(domain, 5)
    domain.suspend()
    (count,) = steps(domain)
    assert verify(domain, spec, source_positions=[count]).problems == []
    problems = verify(domain, spec, source_positions=[count + 1]).problems
    assert problems == [f"vCPU 0 went back from step {count + 1} to {count}"]


def test_the_first_pages_that_differ_are_listed(boot: Boot) -> None:
    spec, domain = boot()
    domain.suspend()
    domain.write_pages(span(600, 6), page(1) * 6)
    (problem,) = verify(domain, spec).problems
    assert problem.startswith(
        "6 of 1024 pages differ from what the guest wrote (0 still paged out)"
    )
    assert problem.endswith("pfns 0x258, 0x259, 0x25a, 0x25b, 0x25c, ...")


def test_a_crash_is_reported_with_the_pages_that_are_still_out(boot: Boot) -> None:
    spec, domain = boot(workload="sequential", working_set_bytes=PAGE_SIZE)
    # Otherwise a request that the guest made meanwhile would stay in the ring for ever.
    domain.pause()
    ring = domain.paging_enable()
    domain.populate_evicted(pfns(0, 600))
    domain.paging_disable()
    domain.unpause()
    ring.close()
    until(lambda: domain.state() is DomainState.CRASHED, "the guest does not crash")
    crash, pages = verify(domain, spec).problems
    assert crash == (
        "the guest is crashed vCPU 0 touched paged-out pfn 0x0 and nobody serves the paging ring"
    )
    assert pages.startswith("2 of 1024 pages differ from what the guest wrote (2 still paged out)")


def test_a_host_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(XenError, match="is `xen-postcopy simulated-host` running there"):
        SimulatedHypervisor(tmp_path / "none.sock")


def test_a_host_refuses_what_is_no_request_and_continues(lab: SimulatedLab) -> None:
    with pytest.raises(XenError, match="bad request"):
        lab.simulated.call("dance")
    with pytest.raises(XenError, match="bad request"):
        lab.simulated.call("info", wrong=1)
    with pytest.raises(XenError, match="not the description of a simulated guest"):
        lab.simulated.create_guest(b"\x80")
    assert isinstance(lab.simulated.domains(), list)


def test_a_host_refuses_what_contradicts_itself(lab: SimulatedLab) -> None:
    host, spec = lab.simulated, GuestSpec("contradictory", 4 * MIB)
    options = {**dataclasses.asdict(spec), "vcpus": "two"}
    with pytest.raises(XenError, match="not the description of a simulated guest: vcpus"):
        host.create_guest(msgpack.packb(options))
    config = dataclasses.replace(spec.domain_config(), nr_pfns=8)
    with pytest.raises(XenError, match="the configuration contradicts itself"):
        host.create_incoming(config)
    guest = lab.boot(vcpus=1)
    with pytest.raises(XenError, match=f"there is a domain {guest.domid} already"):
        host.call("create", spec=spec.to_bytes(), domid=guest.domid)
    with pytest.raises(XenError, match="the domain is not paused"):
        guest.unpause()
    with pytest.raises(XenError, match="EINVAL"):
        guest.set_page(2**40, refs=1)
    target = lab.incoming()
    guest.suspend()
    [[vcpu, *_more], balloon] = msgpack.unpackb(guest.context())
    for context in ([[vcpu, vcpu, vcpu], balloon], [[[*vcpu[:3], 2**40]] * 2, balloon]):
        with pytest.raises(XenError, match="not a context of this domain"):
            target.set_context(msgpack.packb(context))
    assert [info.domid for info in host.domains()] == [guest.domid, target.domid]


def test_a_host_that_has_no_room_for_the_contents_of_a_guest_refuses_it(lab: SimulatedLab) -> None:
    with pytest.raises(XenError, match=r"this machine has .* MiB available: make it smaller"):
        lab.simulated.create_guest(GuestSpec("large", 2**40, zero_permille=0).to_bytes())


def test_a_host_that_answers_late_is_asked_nothing_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The late answer would be taken for the answer to the next request."""
    monkeypatch.setattr(rpc, "ANSWER_S", 0.2)
    path = tmp_path / "host.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        answers = threading.Thread(target=_answer_one, args=(listener,))
        answers.start()
        with contextlib.closing(rpc.HostConnection(path)) as host:
            for _attempt in range(2):
                with pytest.raises(XenError, match=r"has not answered for 0\.2 s"):
                    host.call("list")
        answers.join(WAIT_S)


def _answer_one(listener: socket.socket) -> None:
    connection, _address = listener.accept()
    with connection:
        connection.recv(4096)
        connection.send(rpc.pack({"ok": {"client": 1}}))
        assert rpc.unpack(connection.recv(4096)) == {"op": "list"}
        connection.settimeout(WAIT_S)
        assert connection.recv(4096) == b""


def test_a_request_that_is_too_large_leaves_the_connection_as_it_was(lab: SimulatedLab) -> None:
    with pytest.raises(XenError, match="the request is too large"):
        lab.simulated.call("info", context=bytes(64 * MIB))
    assert isinstance(lab.simulated.domains(), list)


def test_a_host_that_is_gone_is_an_error() -> None:
    """At the next call the kernel reports that no process listens; a call in progress just ends."""
    with loopback_world(8 * MIB, daemons=False) as world:
        world.processes["source"].popen.kill()
        world.processes["source"].popen.wait()
        for _attempt in range(2):
            with pytest.raises(XenError, match=r"has ended.*then restart the daemons"):
                world.source.domains()
        with pytest.raises(MigrationError, match="source ended with status -9"):
            world.check_alive()


def test_a_world_ends_whatever_its_processes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped does not end at the first request."""
    monkeypatch.setattr(cli_world, "DRAIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(cli_world, "STOP_TIMEOUT_S", 0.1)
    with loopback_world(8 * MIB, daemons=False) as world:
        source = world.processes["source"].popen
        source.send_signal(signal.SIGSTOP)
    assert source.returncode == -signal.SIGKILL
    assert not world.directory.exists()


def test_a_world_that_does_not_come_up_shows_the_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(
            MigrationError, match=r"(?s)receiver did not start:.*there is no such section"
        ) as info,
        loopback_world(8 * MIB, config="[nonsense]"),
    ):
        pass
    assert "--- receiver ---" in info.value.__notes__[0]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("d" * 100)))
    (tmp_path / ("d" * 100)).mkdir()
    with (
        pytest.raises(MigrationError, match=r"choose a shorter one \(see TMPDIR\)"),
        loopback_world(8 * MIB),
    ):
        pass


def test_a_guest_that_runs_at_both_ends_is_reported(hosts: World, name: str) -> None:
    spec = GuestSpec(name, 4 * MIB)
    ends = [host.create_guest(spec.to_bytes()) for host in (hosts.source, hosts.destination)]
    with pytest.raises(MigrationError, match="did not do 1000000000000 steps within 0 s"):
        wait_for_steps(ends[0], 10**12, timeout_s=0)
    problems = verify_migrated(hosts, spec)[0].problems
    assert problems == ["the source domain was not released", "the domain is still at the source"]
    for domain in ends:
        domain.destroy()
        domain.close()


def restored(
    lab: SimulatedLab, vcpus: int, host: SimulatedHypervisor | None = None, **options: Any
) -> tuple[SimulatedDomain, SimulatedDomain, PagingRing]:
    """Return a guest that starts with only its pinned set present: source, target, ring."""
    source = lab.boot(vcpus=vcpus, **options)
    wait_for_steps(source, 10)
    source.suspend()
    target = (host or lab.simulated).create_incoming(lab.config_beside(source))
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


def steps(domain: SimulatedDomain) -> list[int]:
    """Return the number of accesses that each vCPU has completed."""
    return [vcpu["count"] for vcpu in domain.report()["vcpu"]]


def answer(
    source: SimulatedDomain,
    target: SimulatedDomain,
    ring: PagingRing,
    requests: Iterable[PagingRequest],
) -> None:
    for request in requests:
        target.load(pfns(request.pfn), read(source, pfns(request.pfn))[1] or None)
        ring.respond([request])


def wait_for_requests(
    ring: PagingRing, count: int, timeout_s: float = WAIT_S
) -> list[PagingRequest]:
    requests: list[PagingRequest] = []
    deadline = time.monotonic() + timeout_s
    while len(requests) < count:
        ready(ring, deadline - time.monotonic())
        requests += ring.requests()
        assert time.monotonic() < deadline, f"{len(requests)} of {count} requests"
    return requests
