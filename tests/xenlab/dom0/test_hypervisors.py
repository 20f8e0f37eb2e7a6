# SPDX-License-Identifier: GPL-2.0-or-later
"""The differences between the hypervisors, as an administrator sees them.  Run in dom0 by ``make
xenlab``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support import zygote
from tests.support.pages import memory_of, pfns, span
from tests.xenlab.dom0.conftest import KIND
from tests.xenlab.dom0.daemons import daemons
from tests.xenlab.dom0.guests import STEPS_PER_S, STUB, Guest, guest
from tests.xenlab.dom0.lab import EMPTY_PLATFORM
from tests.xenlab.dom0.waiting import WAIT_S, until
from xenbackend import release
from xenbackend.contract import DomainConfig
from xenbackend.errors import XenError
from xenbackend.libxenctrl import features
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import XenDomain, gfn_array
from xenbackend.libxenctrl.hypervisor import XenHypervisor
from xenbackend.libxenctrl.params import HVM_PARAM_PAGING_RING_PFN
from xenbackend.libxenctrl.platform import Platform
from xenbackend.pages import PfnArray

PAGING = pytest.mark.hypervisors("populate-evicted", "paging")


@pytest.fixture
def xen() -> Iterator[XenHypervisor]:
    with contextlib.closing(XenHypervisor()) as made:
        yield made


def xen_postcopy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return zygote.run([sys.executable, "-m", "migrate.cli", *arguments], timeout=WAIT_S)


def empty(xen: XenHypervisor, *, hap: bool = True) -> XenDomain:
    platform = dataclasses.replace(EMPTY_PLATFORM, hap=hap, handle=os.urandom(16))
    return xen.create_incoming(DomainConfig("empty", 4096, 4096, 1, platform.pack()))


@pytest.mark.gate
@pytest.mark.hypervisors("debian")
def test_without_paging_preflight_says_so_in_one_line_and_nothing_is_touched(
    xen: XenHypervisor,
) -> None:
    told = xen_postcopy("preflight")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.count("\n") == 1 and "built without memory paging" in told.stderr
    assert "install the package xen-hypervisor-paging" in told.stderr
    with guest("unpaged", paused=True) as made:
        domain = xen.open(made.domid)
        before = (
            domain.info(),
            domain.param(HVM_PARAM_PAGING_RING_PFN),
            memory_of(domain).tolist(),
        )
        told = xen_postcopy("preflight", "unpaged")
        assert told.returncode == 1 and "built without memory paging" in told.stderr
        for call in (
            domain.paging_enable,
            domain.paging_attach,
            lambda: domain.populate_evicted(span(0x4000, 10)),
        ):
            with pytest.raises(XenError) as info:
                call()
            assert info.value.errno in (errno.ENOSYS, errno.ENODEV)
        assert before == (
            domain.info(),
            domain.param(HVM_PARAM_PAGING_RING_PFN),
            memory_of(domain).tolist(),
        )


@pytest.mark.gate
@PAGING
def test_preflight_says_how_pages_are_evicted() -> None:
    told = xen_postcopy("preflight")
    assert told.returncode == 0, told.stderr
    assert ("in batches" if KIND == "populate-evicted" else "one by one") in told.stdout
    assert "under xl: when xl has destroyed" in told.stdout


@PAGING
def test_what_xen_does_not_page_is_refused_before_it_is_tried(xen: XenHypervisor) -> None:
    domain = empty(xen, hap=False)
    (problem,) = domain.preflight().problems
    assert "shadow page tables" in problem
    with pytest.raises(XenError, match="shadow page tables"):
        domain.paging_enable()
    domain.destroy()
    with guest("pod", extra="maxmem = 160\n", paused=True) as made:
        domain = xen.open(made.domid)
        (problem,) = domain.preflight().problems
        assert "populate-on-demand" in problem
        with pytest.raises(XenError, match="populate-on-demand"):
            domain.paging_enable()
        told = xen_postcopy("preflight", "pod")
        assert told.returncode == 1 and "maxmem" in told.stderr
    domain = empty(xen)
    ring = domain.paging_enable()
    other = xen.open(domain.domid)
    (problem,) = other.preflight().problems
    assert "another pager" in problem
    ring.close()
    domain.destroy()


def with_avx512f(leaves: bytes) -> bytes:
    """Return the leaves of a CPU policy with a feature that no emulated processor has."""
    changed = b""
    for leaf in features.LEAF.iter_unpack(leaves):
        number, subleaf, eax, ebx, ecx, edx = leaf
        avx512f = 1 << 16 if (number, subleaf) == (7, 0) else 0
        changed += features.LEAF.pack(number, subleaf, eax, ebx | avx512f, ecx, edx)
    return changed


@pytest.mark.hypervisors("paging", "debian")
def test_a_feature_that_this_host_lacks_is_named_before_anything_moves(xen: XenHypervisor) -> None:
    with guest("fit", kind=STUB, paused=True) as made:
        domain = xen.open(made.domid)
        config = domain.config()
        xen.create_incoming(config).destroy()
        platform = Platform.unpack(config.platform)
        other = dataclasses.replace(platform, leaves=with_avx512f(platform.leaves)).pack()
        before = len(xen.domains())
        with pytest.raises(XenError, match="this host has no avx512f, which"):
            xen.create_incoming(dataclasses.replace(config, platform=other))
        assert len(xen.domains()) == before


@pytest.mark.gate
@PAGING
def test_one_by_one_does_the_same(xen: XenHypervisor) -> None:
    """The fallback does the same as populate_evicted, also on a hypervisor that has the latter."""
    domain = empty(xen)
    domain.paging_enable()
    domain.populate(span(0, 100))
    done = ffi.new("size_t *")

    def one_by_one(*gfns: int) -> tuple[int, int]:
        rc = lib.xen_evict_one_by_one(
            xen.host.native, domain.domid, gfn_array(pfns(*gfns)), len(gfns), done
        )
        return rc, done[0]

    assert one_by_one(*range(50, 150)) == (0, 100)
    assert domain.present(span(50, 100)).all()
    assert one_by_one(10, 60, 20) == (-errno.EBUSY, 1)  # the page is paged out already
    assert one_by_one(200, 201, 200) == (-errno.EBUSY, 2)
    assert one_by_one(20, 60, 301, 302) == (-errno.EBUSY, 1)
    domain.populate(span(301, 2))  # the pfns behind the failed one have stayed holes
    assert one_by_one(500, 1 << 50) == (-errno.EINVAL, 1)
    assert not domain.load(span(50, 100), None).any()
    assert domain.load(span(0, 1), None).tolist() == [-errno.ENOENT]
    domain.destroy()


def listed_of(xen: XenHypervisor, domain: XenDomain) -> set[int]:
    """Return the pinned set, as Xen lists it."""
    out = np.empty(1024, dtype=np.uint64)
    into = ffi.from_buffer("uint64_t[]", out)
    count = lib.xen_list_pinned(xen.host.native, domain.domid, into)
    assert count >= 0
    return set(out[:count].tolist())


def recognised_in(xen: XenHypervisor, domain: XenDomain, gfns: PfnArray) -> set[int]:
    """Return those of ``gfns`` whose contents are like those of the pinned set."""
    out = np.empty(len(gfns), dtype=np.uint64)
    into = ffi.from_buffer("uint64_t[]", out)
    count = lib.xen_recognise_pinned(
        xen.host.native, domain.domid, gfn_array(gfns), len(gfns), into
    )
    assert count >= 0
    return set(out[:count].tolist())


@pytest.mark.hypervisors("populate-evicted")
def test_the_pinned_set_is_recognised_where_xen_does_not_report_it(xen: XenHypervisor) -> None:
    """The search finds all pages that the patched hypervisor lists, for a running guest and for a
    suspended one.
    """
    with guest("pinned") as made:
        made.wait_for_heartbeats(2)
        domain = xen.open(made.domid)
        there = memory_of(domain)
        for _ in range(2):
            listed, recognised = listed_of(xen, domain), recognised_in(xen, domain, there)
            print(f"listed {sorted(map(hex, listed))}, recognised {sorted(map(hex, recognised))}")
            assert listed and listed <= recognised
            assert len(recognised) < len(there) // 1000
            assert listed <= set(domain.pinned(there).tolist())
            if domain.info().state.value == "running":
                domain.suspend()


@pytest.mark.hypervisors("populate-evicted", "paging")
def test_pages_that_dom0_has_mapped_are_not_part_of_the_pinned_set(xen: XenHypervisor) -> None:
    with guest("mapped") as made:
        made.wait_for_heartbeats(2)
        domain = xen.open(made.domid)
        there = memory_of(domain)
        before = domain.pinned(there)
        mapped = np.setdiff1d(there, before)[-500:]
        with contextlib.closing(XenHypervisor()) as dom0, dom0.open(made.domid).map_pages(mapped):
            pinned, held = domain.pinned(there), domain.held(there)
        print(f"{len(before)} pages are pinned, {len(pinned)} when 500 pages are mapped")
        assert len(np.intersect1d(pinned, mapped)) < 10  # some may look like one
        reported = np.intersect1d(held, mapped)
        assert len(reported) == (len(mapped) if KIND == "populate-evicted" else 0)


def test_the_areas_that_a_guest_registers_belong_to_the_pinned_set(xen: XenHypervisor) -> None:
    """From Xen 4.18 on a guest can register areas for run states and times by their addresses."""
    by_address = 0 if release.release_of(release.running()) >= (4, 18) else -errno.ENOSYS
    with guest("areas", kind=STUB, options=f"rate={STEPS_PER_S} areas=1") as made:
        made.wait_for_heartbeats(2)
        first, results = made.areas()
        assert results == [0, by_address, by_address]
        registered = {first + n for n, result in enumerate(results) if result == 0}
        domain = xen.open(made.domid)
        for _ in range(2):
            there = memory_of(domain)
            pinned = set(domain.pinned(there).tolist())
            print(f"registered {sorted(registered)}, pinned {sorted(pinned)}")
            assert registered <= pinned
            # The guest runs on while many pages are read before those of its areas.
            late = np.concatenate([np.repeat(there[:1], 20 * 1024), there])
            assert registered - {first} <= recognised_in(xen, domain, late)
            if domain.info().state.value == "running":
                domain.suspend()


def test_a_destroyed_domain_is_there_as_long_as_its_pages_are_held(xen: XenHypervisor) -> None:
    domain = empty(xen)
    domain.populate(span(0, 3000))
    domain.hold(span(0, 3000))
    with contextlib.closing(XenHypervisor()) as toolstack:
        toolstack.host.destroy(domain.domid)

    def pages_left() -> int | None:
        info = ffi.new("struct xen_info *")
        rc = lib.xen_domain_info(xen.host.native, domain.domid, info)
        assert rc in (0, -errno.ESRCH) and (rc or info.dying)
        return None if rc else int(info.tot_pages)

    assert pages_left() == 3000
    domain.release(span(0, 1500))  # one chunk, and half of the next
    assert pages_left() == 3000 - 1024
    domain.release(span(0, 2048))
    assert pages_left() == 3000 - 2048
    domain.close()
    assert pages_left() is None


def test_the_daemons_move_a_guest(xen: XenHypervisor, tmp_path: Path) -> None:
    """Sender and receiver are processes on one host.  The guest leaves the domain that xl made for
    one that the receiver makes.

    Without paging, postcopy is refused and the guest continues; precopy is possible.
    """
    with guest("moving") as made, daemons(tmp_path) as running:
        made.wait_for_heartbeats(2)
        sender = str(tmp_path / "sender")
        migrate = (
            "migrate",
            "moving",
            f"127.0.0.1:{running.port}",
            "--socket",
            sender,
            "--strategy",
        )
        told = xen_postcopy(*migrate, "hybrid")
        if KIND == "debian":
            assert told.returncode == 1 and "built without memory paging" in told.stderr
            made.wait_for_heartbeats(2)
            told = xen_postcopy(*migrate, "precopy")
        print(told.stdout, told.stderr)
        assert told.returncode == 0
        names = {info.name: info.domid for info in xen.domains()}
        assert "moving" not in names
        arrived = Guest("moving--incoming", names["moving--incoming"])
        try:
            beats = arrived.wait_for_heartbeats(3)
            assert [beat.errors for beat in beats] == [0] * len(beats)
            assert beats[0].number > made.heartbeats()[0].number
        finally:
            xen.host.destroy(arrived.domid)


@PAGING
def test_daemons_are_killed_in_postcopy_and_their_successors_continue(
    xen: XenHypervisor, tmp_path: Path
) -> None:
    """The guest waits at missing pages, and loses none."""
    with guest("orphan") as made, daemons(tmp_path) as running:
        made.wait_for_heartbeats(2)
        # The command ends when the sender is killed.
        command = [
            sys.executable,
            "-m",
            "migrate.cli",
            "migrate",
            "orphan",
            f"127.0.0.1:{running.port}",
        ]
        options = [
            "--socket",
            str(tmp_path / "sender"),
            "--strategy",
            "postcopy",
            "--bandwidth",
            "2M",
        ]
        asked = zygote.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            for role, other in (("receiver", "sender"), ("sender", "receiver")):
                until(lambda: running.phase("receiver") == "postcopy", "no postcopy")
                running.kill(role)
                until(lambda: running.phase(other) == "interrupted", "it was not noticed")
                running.start(role)
            until(
                lambda: running.phase("receiver") == running.phase("sender") == "completed",
                "it does not end",
            )
        finally:
            asked.kill()
            asked.wait()
        names = {info.name: info.domid for info in xen.domains()}
        assert "orphan" not in names
        arrived = Guest("orphan--incoming", names["orphan--incoming"])
        try:
            beats = arrived.wait_for_heartbeats(3)
            assert [beat.errors for beat in beats] == [0] * len(beats)
            assert not any((tmp_path / "state").rglob("*.json"))
        finally:
            xen.host.destroy(arrived.domid)


@pytest.mark.hypervisors("populate-evicted")  # the result does not depend on how pages are evicted
def test_a_protected_guest_outlives_its_destination(xen: XenHypervisor, tmp_path: Path) -> None:
    """The guest continues at the source, in a new domain, as it was at the last checkpoint."""
    with guest("phoenix") as made, daemons(tmp_path) as running:
        made.wait_for_heartbeats(2)
        command = [
            sys.executable,
            "-m",
            "migrate.cli",
            "migrate",
            "phoenix",
            f"127.0.0.1:{running.port}",
        ]
        options = [
            "--strategy",
            "postcopy",
            "--bandwidth",
            "1M",
            "--protect",
            "--checkpoint-every",
            "2",
        ]
        asked = zygote.Popen([*command, *options, "--socket", str(tmp_path / "sender")])
        try:
            until(lambda: running.line("sender").get("checkpoints", 0) > 0, "no checkpoint")
            running.kill("receiver")
            xen.host.destroy(
                next(info.domid for info in xen.domains() if info.name == "phoenix--incoming")
            )
            until(lambda: running.phase("sender") == "interrupted", "it was not noticed")
            running.ask("sender", command="decide", migration="phoenix", here=True)
            until(lambda: running.phase("sender") == "failed", "it does not go back")
        finally:
            asked.kill()
            asked.wait()
        assert "as it was when the last checkpoint was made" in running.line("sender")["problem"]
        (domid,) = (info.domid for info in xen.domains() if info.name.startswith("phoenix"))
        assert domid != made.domid
        try:
            beats = Guest("phoenix", domid).wait_for_heartbeats(3)
            assert [beat.errors for beat in beats] == [0] * len(beats)
        finally:
            xen.host.destroy(domid)


@pytest.mark.hypervisors("populate-evicted")
def test_a_guest_that_is_destroyed_leaves_its_neighbour_alone(
    xen: XenHypervisor, tmp_path: Path
) -> None:
    """Two guests arrive at once, and neither is migrated twice.  The destination of one is
    destroyed.
    """
    names = ("doomed", "spared")
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(guest(name)) for name in names]
        running = stack.enter_context(daemons(tmp_path))
        socket = ("--socket", str(tmp_path / "sender"))
        for one in made:
            one.wait_for_heartbeats(2)
        for name in names:
            command = ["migrate", name, f"127.0.0.1:{running.port}", *socket, "--bandwidth", "1M"]
            asked = zygote.Popen[bytes]([sys.executable, "-m", "migrate.cli", *command])
            stack.callback(asked.wait)
            stack.callback(asked.kill)

        def phase(role: str, name: str) -> str:
            lines = running.ask(role, command="list")["migrations"]
            return str(next((line["phase"] for line in lines if line["domain"] == name), ""))

        for name, one in zip(names, made, strict=True):
            until(lambda: phase("sender", name) == "precopy", "no precopy")
            for again in (name, str(one.domid)):
                told = xen_postcopy("migrate", again, f"127.0.0.1:{running.port}", *socket)
                assert told.returncode == 1 and "migrated already" in told.stderr
        for name in names:
            assert xen_postcopy("postcopy-now", name, *socket).returncode == 0
            until(lambda: phase("receiver", name) == "postcopy", "no postcopy")
        domids = {info.name: info.domid for info in xen.domains()}
        spared = Guest("spared--incoming", domids["spared--incoming"])
        stack.callback(xen.host.destroy, spared.domid)
        xen.host.destroy(domids["doomed--incoming"])
        for role in ("receiver", "sender"):
            until(lambda: phase(role, "doomed") == "failed", "not noticed")
            until(lambda: phase(role, "spared") == "completed", "it does not end")
        beats = spared.wait_for_heartbeats(3)
        assert [beat.errors for beat in beats] == [0] * len(beats)
        assert not {info.name for info in xen.domains()} & {*names, "doomed--incoming"}
