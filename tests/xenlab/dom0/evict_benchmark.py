"""The RFC's figure, on this machine: unpopulated gfns made paged out, in batches and one by one.

Run in dom0 (``make xenlab-bench``).  The RFC had 8.535 s and 1.590 s for 512k gfns, a ratio of 5.4.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from tests.xenlab.dom0.guests import guest
from xenbackend.libxenctrl._xen import ffi, lib

FIRST_HOLE = 0x20000
"""A gfn (512 MiB) beyond the memory of the guest."""


def check(what: str, rc: int) -> None:
    if rc:
        raise OSError(-rc, what)


def seconds(call: object, host: object, domid: int, first: int, count: int) -> float:
    gfns = np.arange(first, first + count, dtype=np.uint64)
    done = ffi.new("size_t *")
    began = time.monotonic()
    rc = call(host, domid, ffi.from_buffer("uint64_t[]", gfns), count, done)  # type: ignore[operator]
    took = time.monotonic() - began
    check(f"gfn {first + done[0]:#x} after {done[0]}", rc)
    assert done[0] == count, done[0]
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gfns", type=int, default=65536)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    host_out = ffi.new("struct xen_host **")
    check("open", lib.xen_host_open(host_out))
    host = host_out[0]
    batched, one_by_one = [], []
    for run in range(options.runs):
        with guest(f"evict{run}", paused=True) as domain:
            pager = ffi.new("struct xen_pager *")
            check("paging_enable", lib.xen_paging_enable(host, domain.domid, pager))
            check("setmaxmem", lib.xen_set_max_pages(host, domain.domid, 65536 + options.gfns))
            check("populate_evicted", lib.xen_probe_populate_evicted(host, domain.domid))
            batched.append(seconds(lib.xen_populate_evicted, host, domain.domid, FIRST_HOLE, options.gfns))
            second = FIRST_HOLE + options.gfns
            # As well as it can be done without: the holes populated in batches, then nominate and evict for each.
            populating = seconds(lib.xen_populate, host, domain.domid, second, options.gfns)
            one_by_one.append(populating + seconds(lib.xen_evict_one_by_one, host, domain.domid, second, options.gfns))
            print(f"run {run + 1}: populate_evicted {batched[-1]:.2f} s, one by one {one_by_one[-1]:.2f} s", flush=True)
            check("paging_disable", lib.xen_paging_disable(host, domain.domid, pager))
    few, many = statistics.median(batched), statistics.median(one_by_one)
    print(
        f"{options.gfns} unpopulated gfns: {many / few:.1f} times faster in batches ({few:.2f} s, {many:.2f} s); the RFC: 5.4"
    )


if __name__ == "__main__":
    main()
