# SPDX-License-Identifier: GPL-2.0-or-later
"""The pager's end of the paging ring: it takes requests out, and puts one response for each in.

The ring is the same for every backend: the page has Xen's layout (``native/vm_event.h``), and the
event channel is a file descriptor that becomes readable.  No call waits.  Open requests are noted
in the page itself, so that a pager that was killed can have a successor.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, NamedTuple

from xenbackend._ring import ffi, lib
from xenbackend.errors import XenError

VM_EVENT_FLAG_VCPU_PAUSED = 1
MEM_PAGING_DROP_PAGE = 1
VM_EVENT_SLOTS = 8
"""The number of requests that can be open at once (4 KiB ring, 400-byte events)."""


class PagingRequest(NamedTuple):
    """One request (``struct ring_request``); hand the same object to :meth:`PagingRing.respond`."""

    pfn: int
    vcpu: int
    flags: int
    paging_flags: int
    p2m_type: int

    @property
    def is_drop(self) -> bool:
        """Whether the guest gave the page away; no vCPU waits then."""
        return bool(self.paging_flags & MEM_PAGING_DROP_PAGE)

    @property
    def vcpu_waits(self) -> bool:
        return bool(self.flags & VM_EVENT_FLAG_VCPU_PAUSED)


def paging_request(native: Any) -> PagingRequest:
    """Return the request in a ``struct ring_request``."""
    return PagingRequest(native.gfn, native.vcpu_id, native.flags, native.paging_flags, native.p2mt)


class NativeRing(NamedTuple):
    """The addresses of a ring and of its calls ``ring_consume`` and ``ring_respond``
    (``native/ring_api.h``).
    """

    ring: int
    consume: int
    respond: int


class PagingRing:
    """A ring on ``page``, the shared page (anything with the buffer protocol, writable, 4096
    bytes).

    ``event_fd`` and ``notify_fd`` are the two directions of an event channel that consists of
    eventfds.  With ``resume``, this is the successor of a pager that has died, and the first
    :meth:`requests` begins with the requests that the predecessor had taken and not answered.
    Without ``resume``, the ring was just enabled, and ``channel`` is noted for a successor.

    Raises ``XenError`` (EPROTO) if ``resume`` finds no predecessor.
    """

    def __init__(
        self, page: Any, event_fd: int, notify_fd: int, *, resume: bool = False, channel: int = 0
    ):
        self._page = ffi.from_buffer(page, require_writable=True)
        self._state = ffi.new(
            "struct ring_state *",
            {"page": self._page, "event_fd": event_fd, "notify_fd": notify_fd},
        )
        self._batch = ffi.new("struct ring_request[]", VM_EVENT_SLOTS)
        self._event_fd = event_fd
        self._inherited: list[PagingRequest] = []
        if resume:
            self._inherited = self._take(lib.ring_resume)
        else:
            lib.ring_begin(self._state, channel)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there may be requests."""
        return self._event_fd

    def requests(self) -> list[PagingRequest]:
        """Return all requests since the last call.  Raises ``XenError`` (EPROTO) for a corrupt
        ring.
        """
        inherited, self._inherited = self._inherited, []
        return inherited + self._take(lib.ring_consume)

    def native(self) -> NativeRing | None:
        """Return addresses for native code that replaces this object for as long as this object
        exists; ``None`` if requests have to be taken here first.
        """
        if self._inherited:
            return None
        calls = ffi.addressof(lib, "ring_consume"), ffi.addressof(lib, "ring_respond")
        return NativeRing(
            *(int(ffi.cast("uintptr_t", pointer)) for pointer in (self._state, *calls))
        )

    def _take(self, call: Any) -> list[PagingRequest]:
        self._check_open()
        n: int = call(self._state, self._batch)
        self.check(n)
        return [paging_request(self._batch[i]) for i in range(n)]

    @staticmethod
    def check(n: int) -> None:
        """Check what ``ring_consume`` returned.  Raises ``XenError``."""
        if n < 0:
            corrupt = "the ring is corrupt, of another interface version, or of an unknown pager"
            raise XenError("paging ring", -n, why=corrupt if -n == errno.EPROTO else "")

    def respond(self, requests: Iterable[PagingRequest]) -> None:
        """Answer requests, so that their vCPUs continue.  Raises ``XenError`` (EINVAL) for an
        answer for which no vCPU waits.
        """
        batch = list(requests)
        if not batch:
            return
        self._check_open()
        rc = lib.ring_respond(self._state, ffi.new("struct ring_request[]", batch), len(batch))
        if rc:
            raise XenError(
                "paging ring",
                -rc,
                why="a response to no open request" if -rc == errno.EINVAL else "",
            )

    def _check_open(self) -> None:
        if self._state.page == ffi.NULL:
            raise XenError("paging ring", errno.ENODEV, why="it was given up")

    def close(self) -> None:
        """Release the shared page.  The ring itself is not changed.  A second call does nothing."""
        self._state.page = ffi.NULL
        ffi.release(self._page)
