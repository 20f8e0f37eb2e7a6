# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of Xen's end of the paging ring."""

from __future__ import annotations

import mmap
import struct

from xenbackend.pages import PAGE_SIZE
from xenbackend.ring import VM_EVENT_SLOTS, PagingRing

SLOTS, SLOT_BYTES = 64, 400
NOTES, NOTE_BYTES = 3584, 32
"""The layout of ``struct pager_notes`` (xenbackend/native/vm_event.h)."""
FREE, OPEN, ANSWERED = range(3)


class FrontEnd:
    """Xen's end, which puts requests in, and takes answers in the order of their arrival."""

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, PAGE_SIZE)
        self.req_prod = self.rsp_cons = 0
        self.answered: list[int] = []

    def ask(self, pfn: int, vcpu: int = 0, flags: int = 0) -> bool:
        """Put a request into the ring.  ``flags``: ``MEM_PAGING_*``."""
        if self.req_prod - self.rsp_cons >= VM_EVENT_SLOTS:
            return False
        event = struct.pack("<IIIIHHHHQII", 7, 1, 3, vcpu, 0, 0, 0, 0, pfn, 10, flags)
        at = SLOTS + self.req_prod % VM_EVENT_SLOTS * SLOT_BYTES
        self.page[at : at + SLOT_BYTES] = event.ljust(SLOT_BYTES, b"\0")
        self.req_prod += 1
        self.page[0:4] = struct.pack("<I", self.req_prod)
        return True

    def take_answers(self) -> None:
        (rsp_prod,) = struct.unpack("<I", self.page[8:12])
        assert rsp_prod <= self.req_prod
        while self.rsp_cons < rsp_prod:
            at = SLOTS + self.rsp_cons % VM_EVENT_SLOTS * SLOT_BYTES
            self.answered.append(struct.unpack_from("<Q", self.page, at + 24)[0])
            self.rsp_cons += 1

    def note(self, index: int) -> tuple[int, ...]:
        """Return a note: state, number, pfn, vcpu, flags, paging_flags, p2m type."""
        return struct.unpack_from("<IIQIIII", self.page, NOTES + 16 + index * NOTE_BYTES)

    def set_note(self, index: int, state: int, number: int) -> None:
        struct.pack_into("<II", self.page, NOTES + 16 + index * NOTE_BYTES, state, number)

    def pager(self, *, resume: bool = False, event_fd: int = -1, notify_fd: int = -1) -> PagingRing:
        return PagingRing(self.page, event_fd, notify_fd, resume=resume)
