# SPDX-License-Identifier: GPL-2.0-or-later
"""The real Xen for the conformance suite.  One guest of a kind serves as many tests as leave it
undamaged.

Empty domains are made besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator

import numpy as np

from migrate.protocol.pfns import pfn_array
from tests.support.labs import Lab, until
from tests.xenlab.dom0.guests import LINUX, STEPS_PER_S, STUB, Guest, Kind, create
from xenbackend import release
from xenbackend.contract import Domain, DomainConfig, DomainState
from xenbackend.errors import XenError
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import XenDomain
from xenbackend.libxenctrl.hypervisor import XenHypervisor
from xenbackend.libxenctrl.params import (
    HVM_PARAM_BUFIOREQ_PFN,
    HVM_PARAM_CONSOLE_PFN,
    HVM_PARAM_IOREQ_PFN,
    HVM_PARAM_STORE_PFN,
)
from xenbackend.libxenctrl.platform import Platform
from xenbackend.pages import PfnArray

XEN_X86_EMU_LAPIC = 1
OPTIONS = f"rate={STEPS_PER_S} beat=100"
EMPTY_PLATFORM = Platform(True, XEN_X86_EMU_LAPIC, 0, bytes(16), 0, b"", b"")
"""The platform of a PVH domain."""


class XenLab(Lab):
    beyond = 1 << 45
    enough, still_s = 2, 0.9  # heartbeats

    def __init__(self) -> None:
        self.xen = XenHypervisor()
        self.hypervisor = self.xen
        self.requests_pinned = release.release_of(release.running()) >= (4, 18)
        self.attach: list[str] = []
        self._guests: dict[Kind, Guest] = {}
        self._used: set[Kind] = set()
        self._count = 0

    def guest(self, *, kernel: bool = False) -> Domain:
        kind = LINUX if kernel else STUB
        self._used.add(kind)
        if kind not in self._guests:
            self._count += 1
            self._guests[kind] = create(f"guest{self._count}", kind, options=OPTIONS)
            self._guests[kind].wait_for_heartbeats(1)
        return self.xen.open(self._guests[kind].domid)

    def close(self) -> None:
        """Remove what a test has made, except guests that can be used again."""
        self.xen.close()
        self.hypervisor = self.xen = XenHypervisor()
        for kind in self._used & set(self._guests):
            if not self._is_well(self._guests[kind]):
                del self._guests[kind]
        self._used.clear()
        kept = {guest.domid for guest in self._guests.values()}
        for info in self.xen.domains():
            if info.domid not in kept:
                self.xen.host.destroy(info.domid)
        until(
            lambda: not remnants(self.xen),
            "pages of domains that are gone are still held",
        )

    def _is_well(self, guest: Guest) -> bool:
        try:
            with contextlib.closing(self.xen.open(guest.domid)) as domain:
                if domain.info().state is not DomainState.RUNNING or domain.preflight().problems:
                    return False
                return guest.wait_for_heartbeats(1, timeout_s=5)[-1].errors == 0
        except (XenError, TimeoutError):
            return False

    def config(self, nr_pfns: int = 1024) -> DomainConfig:
        self._count += 1
        platform = dataclasses.replace(EMPTY_PLATFORM, handle=os.urandom(16))
        return DomainConfig(f"empty{self._count}", nr_pfns, nr_pfns, 1, platform.pack())

    def config_beside(self, source: Domain) -> DomainConfig:
        config = source.config()
        self._count += 1
        return DomainConfig(
            f"restored{self._count}",
            config.nr_pfns,
            config.max_pages,
            config.vcpus,
            config.platform,
        )

    def another(self) -> XenHypervisor:
        return XenHypervisor()

    def work(self, domain: Domain) -> int:
        return len(self._found(domain).heartbeats())

    def errors(self, domain: Domain) -> int:
        beats = self._found(domain).heartbeats()
        return beats[-1].errors

    def _found(self, domain: Domain) -> Guest:
        return Guest(domain.info().name, domain.domid)

    def toolstack_pages(self, domain: Domain) -> PfnArray:
        assert isinstance(domain, XenDomain)
        own = (
            HVM_PARAM_STORE_PFN,
            HVM_PARAM_CONSOLE_PFN,
            HVM_PARAM_IOREQ_PFN,
            HVM_PARAM_BUFIOREQ_PFN,
        )
        return pfn_array(sorted(domain.param(index) for index in own))

    @contextlib.contextmanager
    def hold(self, domain: Domain, pfn: int) -> Iterator[None]:
        with domain.map_pages(np.array([pfn], dtype=np.uint64)):
            yield


@functools.cache
def the_lab() -> XenLab:
    return XenLab()


def remnants(xen: XenHypervisor) -> list[int]:
    """Return the destroyed domains that still exist because a process holds their pages."""
    info = ffi.new("struct xen_info[]", 256)
    count = lib.xen_domain_list(xen.host.native, 1, info, len(info))
    return [info[i].domid for i in range(count) if info[i].dying]
