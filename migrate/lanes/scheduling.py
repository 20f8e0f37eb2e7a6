# SPDX-License-Identifier: GPL-2.0-or-later
"""How the kernel schedules the calling thread: threads that a guest waits for (faults, the
switchover) run before bulk, and leave a CPU to other programs.

A thread that moves pages in bulk uses SCHED_BATCH, so that it does not preempt others when it wakes
up.  This made the median fault a tenth faster.

A thread that serves faults has a higher priority and requests short time slices.  Since Linux 6.12,
a thread that wakes up preempts at once only a thread with a longer slice.  Otherwise it waits until
that slice ends, whatever the priorities are (EEVDF, ``PREEMPT_SHORT`` in kernel/sched/features.h).
Beside a saturating push, 99% of faults take less than 2.7 ms with short slices, and less than 3.2
ms without.  Older kernels ignore slices.  Two urgent threads do not preempt each other, so during
the switchover only the threads that receive are urgent.

The higher priority is bounded, because the toolstack, the back ends and QEMU have nice 0, and the
guest needs them as well.  In the downtime the bound is its length.  Afterwards fewer threads of a
process have the higher priority than there are CPUs, so the others always have one CPU to share.  A
thread beyond this number, and each thread of a dom0 with one CPU, shares the CPUs as equals do, and
has only the short slices (docs/decisions/0030-a-cpu-for-the-others.md).

If the process lacks the permission, or the kernel is not Linux, nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

from migrate.tasks import in_stoppable_thread

Result = TypeVar("Result")
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
_raised: set[int] = set()
"""The threads that serve faults at the higher priority."""
_raising = threading.Lock()


def be_urgent() -> None:
    """Have the calling thread run before others, because a guest is suspended until the thread has
    done its work.
    """
    _leave_raised()
    _set(os.SCHED_OTHER, URGENT_NICE, URGENT_SLICE_NS)


def be_prompt() -> None:
    """Have the calling thread, which serves faults, run soon, and before others if a CPU is left to
    them.
    """
    with _raising:
        this = threading.get_ident()
        _raised.discard(this)
        nice = prompt_nice(len(_raised), len(os.sched_getaffinity(0)))
        if nice:
            _raised.add(this)
    _set(os.SCHED_OTHER, nice, URGENT_SLICE_NS)


def prompt_nice(raised: int, cpus: int) -> int:
    """Return the nice value of a thread that serves faults beside ``raised`` others of the higher
    priority.
    """
    return URGENT_NICE if raised + 1 < cpus else 0


def be_bulk() -> None:
    _leave_raised()
    _set(os.SCHED_BATCH, 0, BULK_SLICE_NS)


def reset() -> None:
    """Schedule the calling thread as any other thread."""
    _leave_raised()
    _set(os.SCHED_OTHER, 0, 0)


async def run_in_thread(
    main: Callable[[], Result],
    stop: Callable[[], None],
    schedule: Callable[[], None] = be_bulk,
) -> Result:
    """Run ``main`` in a thread of its own, at the priority that ``schedule`` gives to the thread,
    and return its result.  ``stop`` makes ``main`` return, and is called when this task is
    cancelled.
    """

    def scheduled() -> Result:
        schedule()
        try:
            return main()
        finally:
            reset()  # trio reuses its threads

    # trio gives the thread this name, whose first 15 characters `top -H` shows.
    named = main.func if isinstance(main, functools.partial) else main
    scheduled.__name__ = getattr(named, "__qualname__", scheduled.__name__)
    return await in_stoppable_thread(scheduled, stop)


def _leave_raised() -> None:
    with _raising:
        _raised.discard(threading.get_ident())


def _set(policy: int, nice: int, slice_ns: int) -> None:
    number = SYS_SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attributes = SCHED_ATTR.pack(SCHED_ATTR.size, policy, 0, nice, 0, slice_ns, 0, 0)
        _libc.syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))
