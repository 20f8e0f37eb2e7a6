# SPDX-License-Identifier: GPL-2.0-or-later
"""The real Xen for the conformance suite: one guest for as many tests as leave it well, empty domains besides."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator

import numpy as np

from migrate.pfns import pfn_array
from tests.labs import Lab, until
from tests.xenlab.dom0.guests import Guest, create
from xenbackend.contract import Domain, DomainConfig, DomainState, PfnArray, XenError
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import (
    HVM_PARAM_BUFIOREQ_PFN,
    HVM_PARAM_CONSOLE_PFN,
    HVM_PARAM_IOREQ_PFN,
    HVM_PARAM_STORE_PFN,
    XenDomain,
)
from xenbackend.libxenctrl.hypervisor import XenHypervisor
from xenbackend.libxenctrl.incoming import Platform

XEN_X86_EMU_LAPIC = 1
REMNANTS_S = 30.0
EMPTY_PLATFORM = Platform(True, XEN_X86_EMU_LAPIC, 0, bytes(16), 0, b"", b"")
"""Of a PVH domain."""


class XenLab(Lab):
    beyond = 1 << 45
    enough, still_s = 2, 1.2  # heartbeats, of which there are two a second

    def __init__(self) -> None:
        self.xen = XenHypervisor()
        self.hypervisor = self.xen
        self.attach: list[str] = []
        self._guest: Guest | None = None
        self._used = False
        self._count = 0

    def guest(self) -> Domain:
        self._used = True
        if self._guest is None:
            self._count += 1
            self._guest = create(f"guest{self._count}")
            self._guest.wait_for_heartbeats(1)
        return self.xen.open(self._guest.domid)

    def close(self) -> None:
        """Whatever a test did: nothing is left but a guest that is as good as new."""
        self.xen.close()
        self.hypervisor = self.xen = XenHypervisor()
        if self._used and self._guest is not None and not self._is_well(self._guest):
            self._guest = None
        self._used = False
        for info in self.xen.domains():
            if self._guest is None or info.domid != self._guest.domid:
                self.xen.destroy(info.domid)
        until(lambda: not remnants(self.xen), "somebody holds pages of domains that are gone", REMNANTS_S)

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
        return DomainConfig(f"restored{self._count}", config.nr_pfns, config.max_pages, config.vcpus, config.platform)

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
        own = (HVM_PARAM_STORE_PFN, HVM_PARAM_CONSOLE_PFN, HVM_PARAM_IOREQ_PFN, HVM_PARAM_BUFIOREQ_PFN)
        return pfn_array(sorted(domain.param(index) for index in own))

    @contextlib.contextmanager
    def hold(self, domain: Domain, pfn: int) -> Iterator[None]:
        with domain.map_pages(np.array([pfn], dtype=np.uint64)):
            yield


@functools.cache
def the_lab() -> XenLab:
    return XenLab()


def remnants(xen: XenHypervisor) -> list[int]:
    """Domains that are gone but for pages that somebody holds."""
    info = ffi.new("struct xen_info[]", 256)
    count = lib.xen_domain_list(xen.native, 1, info, len(info))
    return [info[i].domid for i in range(count) if info[i].dying]
