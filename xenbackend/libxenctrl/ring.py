# SPDX-License-Identifier: GPL-2.0-or-later
"""The paging ring of the real Xen: its page is a foreign mapping, its event channel is one of
Xen's.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from typing import Any

from xenbackend.errors import XenError
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.pages import PAGE_SIZE
from xenbackend.ring import NativeRing, PagingRequest, PagingRing


class XenPagingRing(PagingRing):
    """``pager``: a ``struct xen_pager`` of an enabled ring."""

    def __init__(self, pager: Any, *, resume: bool):
        page = ffi.buffer(pager.ring_page, PAGE_SIZE)
        super().__init__(page, -1, -1, resume=resume, channel=pager.remote_port)
        self._pager = pager
        self._readable = select.poll()
        self._readable.register(pager.event_fd, select.POLLIN)
        if resume:  # the dead pager may have answered without sending an event
            self._check(lib.xen_event_notify(pager))

    def native(self) -> NativeRing | None:
        plain = super().native()
        if plain is None:
            return None
        self._native = ffi.new("struct xen_ring *")
        self._native.pager = self._pager
        self._native.ring = ffi.cast("void *", plain.ring)
        self._native.consume = ffi.cast("int (*)(void *, void *)", plain.consume)
        self._native.respond = ffi.cast("int (*)(void *, const void *, int)", plain.respond)
        calls = ffi.addressof(lib, "xen_ring_consume"), ffi.addressof(lib, "xen_ring_respond")
        return NativeRing(
            *(int(ffi.cast("uintptr_t", pointer)) for pointer in (self._native, *calls))
        )

    def fileno(self) -> int:
        fd: int = self._pager.event_fd
        return fd

    def requests(self) -> list[PagingRequest]:
        if self._readable.poll(0):
            # Before the ring is read: otherwise the event of a later request could be consumed.
            self._check(lib.xen_event_take(self._pager))
        return super().requests()

    def respond(self, requests: Iterable[PagingRequest]) -> None:
        batch = list(requests)
        super().respond(batch)
        if batch:
            self._check(lib.xen_event_notify(self._pager))

    @staticmethod
    def _check(rc: int) -> None:
        if rc:
            raise XenError("event channel", -rc)
