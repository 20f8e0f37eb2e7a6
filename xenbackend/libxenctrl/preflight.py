# SPDX-License-Identifier: GPL-2.0-or-later
"""The reasons why postcopy is refused: for each reason one sentence that includes the remedy.
Sans-IO.

Xen's own reasons are the errors of XEN_DOMCTL_VM_EVENT_OP_PAGING (xen/common/vm_event.c).  Reasons
that can be found without enabling a ring are found first, so that nothing is changed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

NO_PAGING = (
    "this hypervisor is built without memory paging: install the package xen-hypervisor-paging "
    "(docs/hypervisor.md) and boot it, or migrate with --strategy precopy"
)
DOM0_NOT_PV = (
    "dom0 is an HVM or PVH domain, and Xen lets only a PV dom0 page: boot Xen without dom0=pvh"
)
NO_HAP_HOST = (
    "this host's processors have no nested page tables (EPT or NPT), or they are off: turn them on "
    "in its firmware"
)
NOT_HVM = (
    'it is a PV guest: only PVH and HVM guests can be paged; set type="pvh" or migrate with '
    "--strategy precopy"
)
NO_HAP = "it runs on shadow page tables: set hap=1 in its configuration and start it anew"
POD = (
    "populate-on-demand is active (it was started with memory below maxmem): wait until it has "
    "ballooned down, or set memory equal to maxmem"
)
IOMMU = (
    'it uses the IOMMU: detach its PCI devices, and set passthrough="disabled" in its configuration'
)
RING_TAKEN = (
    "its paging ring is in use by another pager: end that one (xenpaging, or another migration) "
    "first"
)

ENABLE_ERRORS = {
    errno.ENOSYS: NO_PAGING,
    errno.EOPNOTSUPP: DOM0_NOT_PV,
    errno.ENODEV: NO_HAP,
    errno.EMLINK: IOMMU,
    errno.EXDEV: POD,
    errno.EBUSY: RING_TAKEN,
}
"""The reasons for the errors with which enabling a ring fails."""


@dataclass(frozen=True)
class HostFacts:
    paging: bool
    dom0_hvm: bool
    hap: bool
    populate_evicted: bool
    free_pages: int

    def problems(self) -> list[str]:
        """Return the reasons.  If one makes the others pointless, only that one is returned."""
        if not self.paging:
            return [NO_PAGING]
        found = ((self.dom0_hvm, DOM0_NOT_PV), (not self.hap, NO_HAP_HOST))
        return [text for is_so, text in found if is_so]

    @property
    def way(self) -> str:
        """How pages are evicted: the value of ``Preflight.populate_evicted``."""
        return "none" if not self.paging else "native" if self.populate_evicted else "fallback"


@dataclass(frozen=True)
class DomainFacts:
    hvm: bool
    hap: bool
    pod_entries: int
    pci_devices: bool
    ring_taken: bool

    def problems(self) -> list[str]:
        if not self.hvm:
            return [NOT_HVM]
        found = (
            (not self.hap, NO_HAP),
            (self.pci_devices, IOMMU),
            (self.pod_entries > 0, POD),
            (self.ring_taken, RING_TAKEN),
        )
        return [text for is_so, text in found if is_so]
