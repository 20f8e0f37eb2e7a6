# SPDX-License-Identifier: GPL-2.0-or-later
"""How the kernel schedules the calling thread: threads that a guest waits for (faults, the
switchover) run before bulk.

A thread that moves pages in bulk uses SCHED_BATCH, so that it does not preempt others when it wakes
up.  This made the median fault a tenth faster.

A thread that serves faults has a higher priority and requests short time slices.  Since Linux 6.12,
a thread that wakes up preempts at once only a thread with a longer slice.  Otherwise it waits until
that slice ends, whatever the priorities are (EEVDF, ``PREEMPT_SHORT`` in kernel/sched/features.h).
Beside a saturating push, 99% of faults take less than 2.7 ms with short slices, and less than 3.2
ms without.  Older kernels ignore slices.  Two urgent threads do not preempt each other, so during
the switchover only the threads that receive are urgent.

If the process lacks the permission, or the kernel is not Linux, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr`` (sched_setattr(2)): size, policy, flags, nice, priority, and in nanoseconds
runtime (the slice), deadline and period.
"""
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
    """Schedule the calling thread as any other thread."""
    _set(os.SCHED_OTHER, 0, 0)


def _set(policy: int, nice: int, slice_ns: int) -> None:
    number = SYS_SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attributes = SCHED_ATTR.pack(SCHED_ATTR.size, policy, 0, nice, 0, slice_ns, 0, 0)
        _libc.syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))
