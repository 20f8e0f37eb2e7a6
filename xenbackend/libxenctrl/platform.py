# SPDX-License-Identifier: GPL-2.0-or-later
"""The properties with which a domain is created, as the two ends of a migration exchange them
(``DomainConfig.platform``).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import msgpack

from xenbackend.errors import XenError
from xenbackend.pages import PfnArray

PLATFORM_FORMAT = "xen-platform 1"
DEVICE_PFNS = 0xF0000, 0xFEFF0
"""The pfns between the memory below 4 GiB and Xen's special pages, where hvmloader places the
memory of emulated devices (``HVM_BELOW_4G_MMIO_START`` in xen/include/public/hvm/e820.h).
"""


def device_memory(pfns: PfnArray) -> PfnArray:
    """Return those of a guest's pfns, which all have memory, that are memory of a device."""
    first, stop = DEVICE_PFNS
    return pfns[(pfns >= first) & (pfns < stop)]


def is_uint(value: object, bits: int) -> bool:
    """Whether a value of a peer is a number without a sign of at most so many bits."""
    return type(value) is int and 0 <= value < 1 << bits


@dataclass(frozen=True)
class Platform:
    """The properties with which a domain is created."""

    hap: bool
    emulation_flags: int
    misc_flags: int
    handle: bytes
    """The UUID of the domain."""
    ring_pfn: int
    """The pfn at which the memory map leaves room for a paging ring.  0: there is none, and the
    ring is placed behind the memory.
    """
    leaves: bytes
    msrs: bytes
    """The CPU policy: ``xen_cpuid_leaf_t[]``, ``xen_msr_entry_t[]``."""

    def pack(self) -> bytes:
        return bytes(msgpack.packb([PLATFORM_FORMAT, *self.__dict__.values()]))

    @classmethod
    def unpack(cls, data: bytes) -> Platform:
        """Return the properties in these bytes.  Raises ``XenError`` (EINVAL)."""
        try:
            form, *fields = msgpack.unpackb(data)
            platform = cls(*fields)
            if (
                form != PLATFORM_FORMAT
                or type(platform.hap) is not bool
                or not is_uint(platform.emulation_flags, 32)
                or not is_uint(platform.misc_flags, 32)
                or not is_uint(platform.ring_pfn, 52)
                or type(platform.handle) is not bytes
                or len(platform.handle) != 16
                or type(platform.leaves) is not bytes
                or type(platform.msrs) is not bytes
            ):
                raise ValueError
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise XenError(
                "create", errno.EINVAL, why="not the platform of an HVM or PVH domain"
            ) from error
        return platform
