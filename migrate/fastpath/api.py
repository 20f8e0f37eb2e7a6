# SPDX-License-Identifier: GPL-2.0-or-later
"""The quick way of a fault through both ends, in native code (``native/fault.c`` has the theory).

Both ends put it before their general way: they let it receive and answer what it can, keep their books when it
comes back, and go the general way with what it hands back.  What must not happen twice at once, by one language and
by the other, is under a :class:`NativeLock`.
"""

from __future__ import annotations

import struct
from types import TracebackType
from typing import Any, NamedTuple

from migrate.fastpath._fault import ffi, lib
from migrate.protocol import frames
from migrate.protocol.messages import Fault, Message, Pages
from migrate.protocol.pfns import NO_PFNS, pfn_array
from xenbackend.pages import PAGE_SIZE, NativePages, PfnArray
from xenbackend.ring import NativeRing, PagingRequest, PagingRing, paging_request

RING, ASKED, LANE, LOADED = lib.FAULT_RING, lib.FAULT_ASKED, lib.FAULT_LANE, lib.FAULT_LOADED


class NativeLock:
    """A lock that native code takes as well.  Not for a thread that has it already."""

    def __init__(self) -> None:
        lock = lib.fault_lock_new()
        if lock == ffi.NULL:
            raise MemoryError
        self.native = ffi.gc(lock, lib.fault_lock_free)

    def __enter__(self) -> None:
        lib.fault_lock_take(self.native)

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        lib.fault_lock_give(self.native)

    def locked(self) -> bool:
        return bool(lib.fault_lock_is_taken(self.native))


class NativeLane(NamedTuple):
    """A lane on which frames go through a socket as they are."""

    fd: int
    sending: NativeLock


def _kind(message: Message, pages: int = 0) -> Any:
    """Of frames that are like this message's, but for the pfn."""
    frame = frames.encode(message.header(), [memoryview(bytes(PAGE_SIZE))] * pages)
    at = frame.index(struct.pack("<Q", _SOME_PFN))
    kind = ffi.new("struct fault_frame *", {"size": len(frame), "pfn_at": at})
    ffi.buffer(kind.bytes)[: len(frame)] = frame
    return kind


_SOME_PFN = 0x5A5A5A5A5A
_SOME_PFNS = pfn_array([_SOME_PFN])
FAULT, PAGE, ZERO = _kind(Fault(_SOME_PFNS)), _kind(Pages(_SOME_PFNS), 1), _kind(Pages(NO_PFNS, _SOME_PFNS))


def lane_of(into: Any, lane: NativeLane) -> None:
    into.fd, into.sending = lane.fd, lane.sending.native
    into.fault, into.page, into.zero = FAULT[0], PAGE[0], ZERO[0]


class FaultAnswerer:
    """The sender's: what :class:`sender.faults.FaultServer` receives with.  Until it is open it answers nothing."""

    def __init__(self, lane: NativeLane):
        self._native = ffi.new("struct fault_source *")
        lane_of(self._native.lane, lane)

    def open(self, pages: NativePages, backlog: tuple[NativeLock, Any, Any, Any]) -> None:
        """The receiver may ask from here on.  Also while a thread is in :meth:`serve`.

        ``backlog``: its lock, the state of its pages, what is unsent of each block, and a pair of int64 (unsent, cursor).
        """
        native = self._native
        lock, state, left, counts = self._keep = backlog
        native.domain = ffi.cast("void *", pages.domain)
        native.look = ffi.cast("int (*)(void *, uint64_t, const void **)", pages.look)
        native.looked = ffi.cast("void (*)(void *, const void *)", pages.looked)
        native.lock = lock.native
        native.state, native.nr_pfns = ffi.from_buffer("uint8_t[]", state), len(state)
        native.left = ffi.from_buffer("int64_t[]", left)
        unsent = ffi.from_buffer("int64_t[]", counts)
        native.unsent, native.cursor = unsent, unsent + 1
        lib.fault_lane_open(ffi.addressof(native, "lane"))

    def serve(self, vacant: memoryview, *, wait: bool) -> int:
        """Answer faults until something else comes, or without ``wait`` as long as there are any.

        Returns the bytes of that, 0 at the connection's end, or a negative errno: EAGAIN where there is nothing more.
        """
        return int(lib.fault_serve(self._native, ffi.from_buffer(vacant, require_writable=True), len(vacant), wait))

    def sent(self) -> tuple[int, int, int, int]:
        """Since the last call: pages, zero pages among them, bytes; and the errno of a send that failed, or 0."""
        native = self._native
        counts = native.pages, native.zeros, native.lane.sent, native.lane.error
        native.pages = native.zeros = native.lane.sent = native.lane.error = 0
        return counts


class FirstResponder:
    """The receiver's: what :class:`receiver.pager.Pager` waits with.

    Requests that it has taken from the ring wait here until their pages are READY or DROPPED in ``state``.
    """

    def __init__(
        self, lane: NativeLane, pages: NativePages, ring: NativeRing, *, wake_fd: int, ring_fd: int,
        lock: NativeLock, state: Any,
    ):  # fmt: skip
        self._keep = lane, lock, state
        self._native = native = ffi.new("struct fault_pager *")
        lane_of(native.lane, lane)
        native.wake_fd, native.ring_fd = wake_fd, ring_fd
        native.ring = ffi.cast("void *", ring.ring)
        native.consume = ffi.cast("int (*)(void *, struct ring_request *)", ring.consume)
        native.respond = ffi.cast("int (*)(void *, const struct ring_request *, int)", ring.respond)
        native.domain = ffi.cast("void *", pages.domain)
        native.load = ffi.cast("int (*)(void *, uint64_t, const void *)", pages.load)
        native.lock = lock.native
        native.state, native.nr_pfns = ffi.from_buffer("uint8_t[]", state), len(state)

    def open(self) -> None:
        """The guest may run from here on."""
        lib.fault_lane_open(ffi.addressof(self._native, "lane"))

    def wait(self, vacant: memoryview) -> int:
        """Wait for something, deal with it where it is the usual.  Returns what it was, or a negative errno."""
        return int(lib.fault_wait(self._native, ffi.from_buffer(vacant, require_writable=True), len(vacant)))

    # ---- what the last wait() has met with ----
    @property
    def requests(self) -> list[PagingRequest]:
        """RING: none of which is waited for here.  Raises ``XenError`` for a corrupt ring."""
        PagingRing.check(self._native.nr_requests)
        return [paging_request(request) for request in self._native.requests[0 : self._native.nr_requests]]

    def asked(self) -> tuple[list[int], int, int, int]:
        """ASKED: pfns that were touched; how many were asked for; bytes sent for that; errno or 0."""
        native = self._native
        sent, error = native.lane.sent, native.lane.error
        native.lane.sent = native.lane.error = 0
        return [request.gfn for request in native.requests[0 : native.nr_requests]], native.asked, sent, error

    @property
    def received(self) -> int:
        """LANE: as :meth:`FaultAnswerer.serve`."""
        return int(self._native.received)

    def loaded(self) -> tuple[PfnArray, list[int]]:
        """LOADED: pages, and what came of it: 0 or ``-ENOENT``."""
        n = self._native.nr_loaded
        return pfn_array(ffi.unpack(self._native.loaded, n)), ffi.unpack(self._native.results, n)

    # ---- under the lock ----
    def answer(self) -> int:
        """Whoever waits for a page that is there.  Returns 0 or a negative errno."""
        return int(lib.fault_answer(self._native))

    def answered(self) -> list[tuple[PagingRequest, float]]:
        """Requests since the last call, answered by anyone, and for how many seconds each had waited."""
        native = self._native
        n, native.nr_answered = native.nr_answered, 0
        return [(paging_request(w.request), (w.until_ns - w.since_ns) / 1e9) for w in native.answered[0:n]]

    @property
    def nr_waiting(self) -> int:
        return int(self._native.nr_waiting)

    def waiting(self) -> list[tuple[PagingRequest, float]]:
        """Who waits, and since when (monotonic seconds); they do not any more, here."""
        native = self._native
        n, native.nr_waiting = native.nr_waiting, 0
        return [(paging_request(w.request), w.since_ns / 1e9) for w in native.waiting[0:n]]
