# SPDX-License-Identifier: GPL-2.0-or-later
"""The empty domain that a guest is restored into.

Under xl, libxl makes the domain with its devices, and lends the domain to us (:func:`bind`).
Otherwise we make the domain ourselves (:func:`create`), with what every guest has: memory, vCPUs,
xenstore and a console.  The ``platform`` of the source's ``DomainConfig`` defines the domain's
properties.
"""

from __future__ import annotations

import errno

from xenbackend.contract import DomainConfig, ToolstackPorts
from xenbackend.errors import XenError
from xenbackend.libxenctrl import features
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import XenDomain
from xenbackend.libxenctrl.host import XenHost, check
from xenbackend.libxenctrl.params import (
    HVM_PARAM_CONSOLE_EVTCHN,
    HVM_PARAM_PAGING_RING_PFN,
    HVM_PARAM_STORE_EVTCHN,
)
from xenbackend.libxenctrl.platform import Platform
from xenbackend.libxenctrl.wiring import OwnWiring, Wiring

SPARE_PAGES = 256
"""Frames beyond what the guest may own, for the ring; libxl leaves the same room."""


def create(host: XenHost, config: DomainConfig, *, reserve: bool) -> XenDomain:
    """Make the domain.  Raises ``XenError``; nothing of the domain is left then."""
    platform = Platform.unpack(config.platform)
    domid = ffi.new("uint32_t *")
    info = ffi.new(
        "struct xen_info *",
        {"vcpus": config.vcpus, "hap": platform.hap, "emulation_flags": platform.emulation_flags,
         "misc_flags": platform.misc_flags, "handle": list(platform.handle)},
    )  # fmt: skip
    check("createdomain", lib.xen_create(host.native, info, domid))
    made = int(domid[0])
    try:
        check("setmaxmem", lib.xen_set_max_pages(host.native, made, config.max_pages + SPARE_PAGES))
        check("paging pool", lib.xen_paging_pool(host.native, made, paging_pool_mib(config)))
        if reserve:
            check("claim_pages", lib.xen_claim(host.native, made, config.max_pages))
        _prepare(host, made, config, platform)
        host.store_write(f"/local/domain/{made}/name", config.name)
        return XenDomain(host, made, config.nr_pfns, OwnWiring(host, config, platform))
    except BaseException:
        host.destroy(made)
        raise


def bind(host: XenHost, domid: int, config: DomainConfig, ports: ToolstackPorts) -> XenDomain:
    """Raises ``XenError``."""
    platform = Platform.unpack(config.platform)
    with XenDomain(host, domid, config.nr_pfns) as domain:
        info = domain.native_info()
    if not info.hvm or info.vcpus != config.vcpus:
        why = "the domain that the toolstack made is of another kind than the source"
        raise XenError("bind", errno.EINVAL, why=why)
    if info.emulation_flags != platform.emulation_flags:
        why = features.other_devices(platform.emulation_flags, info.emulation_flags)
        raise XenError("bind", errno.EINVAL, why=why)
    _prepare(host, domid, config, platform)
    # A new object, because the domain has a place for a ring only now.
    return XenDomain(host, domid, config.nr_pfns, Wiring(host, ports))


def reopen(host: XenHost, domid: int, config: DomainConfig, *, lent: bool) -> XenDomain:
    """Raises ``XenError``."""
    domain = XenDomain(host, domid, config.nr_pfns)
    if not lent and host.store_read(f"/local/domain/{domid}/store/port") is not None:
        return domain  # it has been introduced, and started
    with domain:
        ports = ToolstackPorts(
            domain.param(HVM_PARAM_STORE_EVTCHN), domain.param(HVM_PARAM_CONSOLE_EVTCHN)
        )
    platform = Platform.unpack(config.platform)
    wiring = Wiring(host, ports) if lent else OwnWiring(host, config, platform, ports)
    return XenDomain(host, domid, config.nr_pfns, wiring)


def _prepare(host: XenHost, domid: int, config: DomainConfig, platform: Platform) -> None:
    """Set what the source defines for any domain: the CPU policy and the place of a ring."""
    _set_cpu_policy(host, domid, platform)
    ring_pfn = platform.ring_pfn or config.nr_pfns
    check(
        "hvm_param_set", lib.xen_param_set(host.native, domid, HVM_PARAM_PAGING_RING_PFN, ring_pfn)
    )


def _set_cpu_policy(host: XenHost, domid: int, platform: Platform) -> None:
    """Raises ``XenError`` if the guest would not find each feature here that it has found at its
    source.
    """
    leaves, msrs = (ffi.from_buffer("uint8_t[]", data) for data in (platform.leaves, platform.msrs))
    counts = len(leaves) // lib.XEN_CPUID_LEAF_BYTES, len(msrs) // lib.XEN_MSR_ENTRY_BYTES
    refused = ffi.new("struct xen_policy_error *")
    set_policy = lib.xen_set_cpu_policy
    rc = set_policy(host.native, domid, leaves, counts[0], msrs, counts[1], refused)
    if rc and refused.leaf & refused.msr != features.NONE:
        why = features.refusal(refused.leaf, refused.subleaf, refused.msr)
        raise XenError("cpu policy", -rc, why=why)
    check("cpu policy", rc)
    with XenDomain(host, domid, 0) as domain:
        here, _ = domain.cpu_policy()
    if names := features.lost(platform.leaves, here):
        raise XenError("cpu policy", errno.EINVAL, why=features.complaint(names))


def paging_pool_mib(config: DomainConfig) -> int:
    """Return the memory for page tables: 1 MiB for each vCPU and 8 KiB for each MiB of memory, as
    libxl computes it, and some more for the ring and for holes.
    """
    return config.vcpus + (config.max_pages >> 8) // 128 + 2
