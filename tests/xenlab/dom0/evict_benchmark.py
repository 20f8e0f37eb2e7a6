# SPDX-License-Identifier: GPL-2.0-or-later
"""The RFC's figure, on this machine: unpopulated gfns are paged out, in batches and one by one.

Run in dom0 (``make xenlab-bench``).  The RFC had 8.535 s and 1.590 s for 512k gfns, a ratio of 5.4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from tests.xenlab.dom0.lab import EMPTY_PLATFORM
from xenbackend.contract import DomainConfig
from xenbackend.errors import XenError
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import XenDomain, gfn_array
from xenbackend.libxenctrl.hypervisor import XenHypervisor


def seconds(
    call: Callable[..., int], domain: XenDomain, xen: XenHypervisor, first: int, count: int
) -> float:
    gfns = np.arange(first, first + count, dtype=np.uint64)
    done = ffi.new("size_t *")
    began = time.monotonic()
    rc = call(xen.host.native, domain.domid, gfn_array(gfns), count, done)
    took = time.monotonic() - began
    if rc:
        raise XenError("evict", -rc, pfn=first + done[0])
    assert done[0] == count, done[0]
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gfns", type=int, default=65536)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    xen = XenHypervisor()
    batched, one_by_one = [], []
    for run in range(options.runs):
        nr_pfns = 2 * options.gfns + 1
        config = DomainConfig(f"evict{run}", nr_pfns, nr_pfns, 1, EMPTY_PLATFORM.pack())
        domain = xen.create_incoming(config)
        domain.paging_enable()
        batched.append(seconds(lib.xen_populate_evicted, domain, xen, 0, options.gfns))
        # The fastest way without the operation: populate the holes in batches, then nominate and
        # evict each page.
        one_by_one.append(
            seconds(lib.xen_evict_one_by_one, domain, xen, options.gfns, options.gfns)
        )
        print(
            f"run {run + 1}: populate_evicted {batched[-1]:.2f} s, one by one {one_by_one[-1]:.2f} "
            "s",
            flush=True,
        )
        domain.destroy()
    few, many = statistics.median(batched), statistics.median(one_by_one)
    print(
        f"{options.gfns} unpopulated gfns: {many / few:.1f} times faster in batches ({few:.2f} s, "
        f"{many:.2f} s); the RFC: 5.4"
    )
    if os.environ.get("LAB_HYPERVISOR") != "populate-evicted":
        print("(this hypervisor has no populate_evicted: both ways are the same)")


if __name__ == "__main__":
    main()
