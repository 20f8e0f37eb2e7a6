# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path of a fault through both ends, in native code (``native/internal.h`` explains it).

Each end puts the fast path before its slow path.  Native code receives and answers what it can.
When it returns, Python does the accounting, and the slow path handles what native code hands back.
Both paths do the same steps (``migrate/fastpath/page_states.py``), under the lock of the pages.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from migrate.fastpath._fault import ffi, lib
from migrate.fastpath.lock import NativeLock
from migrate.fastpath.page_states import DestinationPages, SourcePages, Waiting
from migrate.protocol import frames
from migrate.protocol.messages import Fault, Message, Pages
from migrate.protocol.pfns import NO_PFNS, pfn_array
from xenbackend.pages import PAGE_SIZE, NativePages, PfnArray
from xenbackend.ring import NativeRing, PagingRequest, PagingRing, paging_request

RING, ASKED, LANE, LOADED = lib.FAULT_RING, lib.FAULT_ASKED, lib.FAULT_LANE, lib.FAULT_LOADED


class NativeRecords(NamedTuple):
    """A TLS connection, and the addresses of the calls by which native code sends and receives over
    it (``migrate/lanes/native/records_api.h``).
    """

    records: Any
    send: int
    receive: int
    are_buffered: int


class NativeLane(NamedTuple):
    """A lane whose frames go through a socket unchanged or, with ``records``, over TLS."""

    fd: int
    sending: NativeLock
    checked: bool
    """Checksums cover pages."""
    records: NativeRecords | None


def _kind(message: Message, pages: int = 0) -> Any:
    """Return the kind of the frames that differ from this message's frame in the pfn only."""
    frame = frames.encode(message.header(), [memoryview(bytes(PAGE_SIZE))] * pages)
    at = frame.index(struct.pack("<Q", _SOME_PFN))
    kind = ffi.new("struct fault_frame *", {"size": len(frame), "pfn_at": at})
    ffi.buffer(kind.bytes)[: len(frame)] = frame
    return kind


_SOME_PFN = 0x5A5A5A5A5A
_SOME_PFNS = pfn_array([_SOME_PFN])
FAULT, PAGE, ZERO = (
    _kind(Fault(_SOME_PFNS)),
    _kind(Pages(_SOME_PFNS), 1),
    _kind(Pages(NO_PFNS, _SOME_PFNS)),
)


def _call(pointer: Any, address: int) -> Any:
    """Return an address as a function of the pointer's type."""
    return ffi.cast(ffi.typeof(pointer), address)


def lane_of(into: Any, lane: NativeLane) -> None:
    into.fd, into.sending = lane.fd, lane.sending.native
    into.fault, into.page, into.zero = FAULT[0], PAGE[0], ZERO[0]
    into.page.covers_page = lane.checked
    if lane.records is not None:
        into.records = ffi.cast("struct records *", lane.records.records)
        into.records_send = _call(into.records_send, lane.records.send)
        into.records_receive = _call(into.records_receive, lane.records.receive)
        into.records_are_buffered = _call(into.records_are_buffered, lane.records.are_buffered)


class NativeFaultServer:
    """The sender's fast path, with which :class:`sender.faults.FaultServer` receives.

    Before :meth:`open` it answers no fault.
    """

    def __init__(self, lane: NativeLane):
        self._lane = lane
        self._native = ffi.new("struct fault_source *")
        lane_of(self._native.lane, lane)

    def open(self, domain: NativePages, pages: SourcePages) -> None:
        """Answer faults from here on.  Another thread may be in :meth:`serve`."""
        native = self._native
        native.domain = ffi.cast("void *", domain.domain)
        native.look = ffi.cast("int (*)(void *, uint64_t, const void **)", domain.look)
        native.looked = ffi.cast("void (*)(void *, const void *)", domain.looked)
        native.pages = pages.native
        self._keep = pages
        lib.fault_lane_open(ffi.addressof(native, "lane"))

    def serve(self, vacant: memoryview, *, wait: bool) -> int:
        """Answer faults until something else comes or, without ``wait``, until nothing comes.

        Returns the number of bytes of what else has come, 0 at the connection's end, or a negative
        errno (EAGAIN if nothing comes).
        """
        into = ffi.from_buffer(vacant, require_writable=True)
        return int(lib.fault_serve(self._native, into, len(vacant), wait))

    def sent(self) -> tuple[int, int, int, int]:
        """Return what was sent since the last call: pages, zero pages among them, and bytes; and
        the errno of a send that failed, or 0.
        """
        native = self._native
        counts = native.nr_sent, native.nr_zeros, native.lane.sent, native.lane.error
        native.nr_sent = native.nr_zeros = native.lane.sent = native.lane.error = 0
        return counts


class NativePager:
    """The receiver's fast path, with which :class:`receiver.pager.Pager` waits."""

    def __init__(
        self,
        lane: NativeLane,
        domain: NativePages,
        ring: NativeRing,
        pages: DestinationPages,
        *,
        wake_fd: int,
        ring_fd: int,
    ):
        self._keep = lane, pages
        self._native = native = ffi.new("struct fault_pager *")
        lane_of(native.lane, lane)
        native.wake_fd, native.ring_fd = wake_fd, ring_fd
        native.ring = ffi.cast("void *", ring.ring)
        native.consume = ffi.cast("int (*)(void *, struct ring_request *)", ring.consume)
        native.respond = ffi.cast("int (*)(void *, const struct ring_request *, int)", ring.respond)
        native.domain = ffi.cast("void *", domain.domain)
        native.load = ffi.cast("int (*)(void *, uint64_t, const void *)", domain.load)
        native.pages = pages.native

    def open(self) -> None:
        """Request pages from here on, because the guest may run."""
        lib.fault_lane_open(ffi.addressof(self._native, "lane"))

    def wait(self, vacant: memoryview) -> int:
        """Wait for an event, and handle it if it is one of the fast path.

        Returns the events (a sum of the constants above), or a negative errno.
        """
        into = ffi.from_buffer(vacant, require_writable=True)
        return int(lib.fault_wait(self._native, into, len(vacant)))

    # ---- the results of the last wait() ----
    @property
    def requests(self) -> list[PagingRequest]:
        """For RING: the requests that the caller has to handle.  Raises ``XenError`` for a corrupt
        ring.
        """
        count = self._native.nr_requests
        PagingRing.check(count)
        return [paging_request(request) for request in self._native.requests[0:count]]

    def asked(self) -> tuple[list[int], int, int, int]:
        """For ASKED: the pfns that vCPUs touched, the number of pages that were requested, the
        number of bytes that were sent for this, and the errno of the send, or 0.
        """
        native, actions = self._native, self._native.actions
        sent, error = native.lane.sent, native.lane.error
        native.lane.sent = native.lane.error = 0
        return ffi.unpack(actions.touched, actions.nr_touched), actions.nr_ask, sent, error

    @property
    def received(self) -> int:
        """For LANE: the same as the result of :meth:`NativeFaultServer.serve`."""
        return int(self._native.received)

    @property
    def has_results(self) -> bool:
        """For LOADED or ASKED: whether :meth:`finished` or :meth:`answered` is not empty."""
        return bool(self._native.nr_finished or self._native.nr_answered)

    def finished(self) -> tuple[PfnArray, NDArray[np.int32]]:
        """Return the pages that are READY or DROPPED now, and the result for each: 0 or
        ``-ENOENT``.
        """
        native, count = self._native, self._native.nr_finished
        pfns = pfn_array(ffi.unpack(native.finished, count))
        return pfns, np.array(ffi.unpack(native.results, count), dtype=np.int32)

    def answered(self) -> list[Waiting]:
        """Return the requests that were answered, and for how many seconds each had waited."""
        native = self._native
        answered = native.answered[0 : native.nr_answered]
        return [(paging_request(w.request), w.until - w.since) for w in answered]
