# SPDX-License-Identifier: GPL-2.0-or-later
"""How the kernel schedules the calling thread, by what it does: what a guest waits for (faults, the switchover) before bulk.

What moves pages in bulk tells the scheduler that it need not run the moment it can (SCHED_BATCH): the median fault got a tenth
faster.  What serves faults has a higher priority, and asks for short time slices: since Linux 6.12 a thread that wakes up
takes the CPU at once only from one whose slice is longer; otherwise it waits for the end of that, whatever their priorities
(EEVDF, ``PREEMPT_SHORT`` in kernel/sched/features.h).  99% of faults beside a saturating push: below 2.7 ms instead of 3.2.
Older kernels take no notice of slices.  Two urgent threads do not preempt each other, so during the switchover
only the threads that receive are urgent.

Where the process may not, or the kernel is another's, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr`` (sched_setattr(2)): size, policy, flags, nice, priority, runtime (ns: the slice), deadline, period."""
URGENT_NICE = -10
URGENT_SLICE_NS = 100_000
BULK_SLICE_NS = 200_000
"""``sched_yield`` in ``native/bulk.c`` moves a thread back by one slice."""

_libc = ctypes.CDLL(None)


def be_urgent() -> None:
    _set(os.SCHED_OTHER, URGENT_NICE, URGENT_SLICE_NS)


def be_bulk() -> None:
    _set(os.SCHED_BATCH, 0, BULK_SLICE_NS)


def reset() -> None:
    """As any other thread."""
    _set(os.SCHED_OTHER, 0, 0)


def _set(policy: int, nice: int, slice_ns: int) -> None:
    number = SYS_SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attributes = SCHED_ATTR.pack(SCHED_ATTR.size, policy, 0, nice, 0, slice_ns, 0, 0)
        _libc.syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))
