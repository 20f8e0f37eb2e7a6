# SPDX-License-Identifier: GPL-2.0-or-later
"""The empty domain that a guest is restored into.

With xl it is libxl that makes it, with its devices, and lends it to us (:func:`bind`).  Otherwise we make it ourselves
(:func:`create`), with what every guest has: memory, vCPUs, xenstore and a console.  What it must be like is the
``platform`` of the source's ``DomainConfig``.
"""

from __future__ import annotations

import errno
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack

from xenbackend.contract import DomainConfig, ToolstackPorts
from xenbackend.errors import XenError
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import (
    HVM_PARAM_CONSOLE_EVTCHN,
    HVM_PARAM_PAGING_RING_PFN,
    HVM_PARAM_STORE_EVTCHN,
    XenDomain,
    check,
)

if TYPE_CHECKING:
    from xenbackend.libxenctrl.hypervisor import XenHypervisor

PLATFORM_FORMAT = "xen-platform 1"
SPARE_PAGES = 256
"""Beyond what the guest may own: the ring, as libxl leaves room for."""


@dataclass(frozen=True)
class Platform:
    """What a domain is created with."""

    hap: bool
    emulation_flags: int
    misc_flags: int
    handle: bytes
    """Its UUID."""
    ring_pfn: int
    """Where its memory map leaves room for a paging ring; 0: nowhere, so behind its memory."""
    leaves: bytes
    msrs: bytes
    """The CPU policy: ``xen_cpuid_leaf_t[]``, ``xen_msr_entry_t[]``."""

    @classmethod
    def of(cls, domain: XenDomain) -> Platform:
        info = domain.native_info()
        return cls(
            bool(info.hap), info.emulation_flags, info.misc_flags, bytes(ffi.buffer(info.handle)),
            domain.param(HVM_PARAM_PAGING_RING_PFN), *domain.cpu_policy(),
        )  # fmt: skip

    def pack(self) -> bytes:
        return bytes(msgpack.packb([PLATFORM_FORMAT, *self.__dict__.values()]))

    @classmethod
    def unpack(cls, data: bytes) -> Platform:
        """Raises ``XenError`` (EINVAL)."""
        types = (bool, int, int, bytes, int, bytes, bytes)
        try:
            form, *fields = msgpack.unpackb(data)
            if form != PLATFORM_FORMAT or not all(map(isinstance, fields, types)) or len(fields) != len(types):
                raise ValueError
            platform = cls(*fields)
            if len(platform.handle) != 16 or not 0 <= platform.ring_pfn < 2**52:
                raise ValueError
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise XenError("create", errno.EINVAL, why="not the platform of an HVM or PVH domain") from error
        return platform


class Plumbing:
    """xenstored's and the console's ends of a domain: those that a toolstack has made."""

    def __init__(self, hypervisor: XenHypervisor, ports: ToolstackPorts):
        self._hypervisor = hypervisor
        self._ports = ports

    def connect(self, domain: XenDomain) -> None:
        """Event channels and grants, as the guest expects them.  The pages of the rings have to be present."""
        host, ports = self._hypervisor.native, self._ports
        for param, port in ((HVM_PARAM_STORE_EVTCHN, ports.store), (HVM_PARAM_CONSOLE_EVTCHN, ports.console)):
            check("hvm_param_set", lib.xen_param_set(host, domain.domid, param, port))
        store, console = domain.toolstack_gfns()
        seeded = lib.xen_seed_grants(host, domain.domid, console, store, ports.console_domid, ports.store_domid)
        check("gnttab seed", seeded)

    def introduce(self, domain: XenDomain) -> None:
        """Tell xenstored and the console's daemon: the toolstack does."""


class OwnPlumbing(Plumbing):
    """Where no toolstack has made them."""

    def __init__(
        self, hypervisor: XenHypervisor, config: DomainConfig, platform: Platform, ports: ToolstackPorts | None = None
    ):
        super().__init__(hypervisor, ports or ToolstackPorts(0, 0))
        self._config, self._platform = config, platform

    def connect(self, domain: XenDomain) -> None:
        store, console = (
            check("evtchn_alloc_unbound", lib.xen_event_channel(self._hypervisor.native, domain.domid))
            for _ in range(2)
        )
        self._ports = ToolstackPorts(store, console)
        super().connect(domain)

    def introduce(self, domain: XenDomain) -> None:
        write, root = self._hypervisor.store_write, f"/local/domain/{domain.domid}"
        handle = str(uuid.UUID(bytes=self._platform.handle))
        store, console = domain.toolstack_gfns()
        memory_kib = self._config.max_pages * 4
        write(f"/vm/{handle}/name", self._config.name)
        for key, value in {
            "vm": f"/vm/{handle}", "domid": domain.domid, "memory/static-max": memory_kib, "memory/target": memory_kib,
            "control/platform-feature-multiprocessor-suspend": 1, "console/backend-id": 0, "console/limit": 1048576,
            "console/type": "xenconsoled", "console/output": "pty", "console/tty": "", "console/ring-ref": console,
            "console/port": self._ports.console, "store/ring-ref": store,
            "store/port": self._ports.store,
        }.items():  # fmt: skip
            write(f"{root}/{key}", str(value))
        for key in ("control/shutdown", "device", "data"):
            write(f"{root}/{key}", "")
            self._hypervisor.store_permit(f"{root}/{key}", owner=domain.domid)
        for key in ("", "/console", "/store", "/memory", "/control"):
            self._hypervisor.store_permit(root + key, owner=0, may_read=domain.domid)
        self._hypervisor.store_introduce(domain.domid, store, self._ports.store)


def create(hypervisor: XenHypervisor, config: DomainConfig, *, reserve: bool) -> XenDomain:
    """Raises ``XenError``; leaves nothing over then."""
    platform = Platform.unpack(config.platform)
    host, domid = hypervisor.native, ffi.new("uint32_t *")
    info = ffi.new(
        "struct xen_info *",
        {"vcpus": config.vcpus, "hap": platform.hap, "emulation_flags": platform.emulation_flags,
         "misc_flags": platform.misc_flags, "handle": list(platform.handle)},
    )  # fmt: skip
    check("createdomain", lib.xen_create(host, info, domid))
    made = int(domid[0])
    try:
        check("setmaxmem", lib.xen_set_max_pages(host, made, config.max_pages + SPARE_PAGES))
        check("paging pool", lib.xen_paging_pool(host, made, paging_pool_mib(config)))
        if reserve:
            check("claim_pages", lib.xen_claim(host, made, config.max_pages))
        _prepare(hypervisor, made, config, platform)
        hypervisor.store_write(f"/local/domain/{made}/name", config.name)
        return XenDomain(hypervisor, made, config.nr_pfns, OwnPlumbing(hypervisor, config, platform))
    except XenError:
        hypervisor.destroy(made)
        raise


def bind(hypervisor: XenHypervisor, domid: int, config: DomainConfig, ports: ToolstackPorts) -> XenDomain:
    """Raises ``XenError``."""
    platform = Platform.unpack(config.platform)
    domain = XenDomain(hypervisor, domid, config.nr_pfns, Plumbing(hypervisor, ports))
    info = domain.native_info()
    if not info.hvm or info.vcpus != config.vcpus or info.emulation_flags != platform.emulation_flags:
        why = "the domain that the toolstack made is of another kind than the source"
        raise XenError("bind", errno.EINVAL, why=why)
    _prepare(hypervisor, domid, config, platform)
    return XenDomain(hypervisor, domid, config.nr_pfns, Plumbing(hypervisor, ports))


def reopen(hypervisor: XenHypervisor, domid: int, config: DomainConfig, *, lent: bool) -> XenDomain:
    """Raises ``XenError``."""
    domain = XenDomain(hypervisor, domid, config.nr_pfns)
    ports = ToolstackPorts(domain.param(HVM_PARAM_STORE_EVTCHN), domain.param(HVM_PARAM_CONSOLE_EVTCHN))
    if lent:
        return XenDomain(hypervisor, domid, config.nr_pfns, Plumbing(hypervisor, ports))
    if hypervisor.store_read(f"/local/domain/{domid}/store/port") is not None:  # it has been introduced, and started
        return domain
    plumbing = OwnPlumbing(hypervisor, config, Platform.unpack(config.platform), ports)
    return XenDomain(hypervisor, domid, config.nr_pfns, plumbing)


def _prepare(hypervisor: XenHypervisor, domid: int, config: DomainConfig, platform: Platform) -> None:
    """What is the source's to say of any domain: its CPU policy, and where a paging ring may be."""
    host = hypervisor.native
    leaves, msrs = (ffi.from_buffer("uint8_t[]", data) for data in (platform.leaves, platform.msrs))
    check(
        "cpu policy",
        lib.xen_set_cpu_policy(
            host, domid, leaves, len(leaves) // lib.XEN_CPUID_LEAF_BYTES, msrs, len(msrs) // lib.XEN_MSR_ENTRY_BYTES
        ),
    )
    ring_pfn = platform.ring_pfn or config.nr_pfns
    check("hvm_param_set", lib.xen_param_set(host, domid, HVM_PARAM_PAGING_RING_PFN, ring_pfn))


def paging_pool_mib(config: DomainConfig) -> int:
    """For page tables, as libxl reckons: a MiB a vCPU, 8 KiB a MiB of memory; and for what is not in it, ring and holes."""
    return config.vcpus + (config.max_pages >> 8) // 128 + 2
