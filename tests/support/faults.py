# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of the fault path without daemons, over a pair of sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrate.fastpath._fault import ffi
from migrate.fastpath.page_states import OUTSTANDING, READY
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.tls import TlsSocket
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.messages import Fault, Lane, Message, Pages
from migrate.protocol.pfns import NO_PFNS, pfn_array
from migrate.protocol.session import Role, Session, hello
from receiver.outstanding import OutstandingPages
from receiver.pager import Pager
from receiver.statistics import PagerStatistics
from tests.support.front_end import FrontEnd
from tests.support.sockets import Over, connected
from tests.support.stories import STORY
from xenbackend.pages import PAGE_SIZE, Buffer, NativePages, PageStatus, PfnArray

NR = 48


def contents(pfn: int) -> bytes:
    return bytes([pfn % 255 + 1]) * PAGE_SIZE


def encoded(message: Message, *pages: bytes, checked: bool = False) -> bytes:
    payload = [memoryview(page) for page in pages]
    return frames.encode(message.header(), payload, checked=checked) + b"".join(pages)


@contextlib.contextmanager
def lanes(over: Over = Over.PLAIN) -> Iterator[tuple[LaneConnection, LaneConnection]]:
    ours, theirs = (LaneConnection(sock, Terms()) for sock in connected(over))
    if over is Over.CHECKED:
        for lane in (ours, theirs):
            lane.agree([hello(Lane.PULL, "s", requires=(m.CHECKSUMS,))])
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def put(lane: LaneConnection, *data: bytes) -> None:
    """Send data in one packet, or in one TLS record."""
    if isinstance(lane._socket, TlsSocket):
        lane._socket.sendmsg([memoryview(b"".join(data))])
    else:
        lane._socket.sendall(b"".join(data))


def arrived(lane: LaneConnection) -> Iterator[tuple[Message, memoryview]]:
    """Yield all messages that have arrived completely."""
    while lane.readable():
        lane.fill()
        while (received := lane.pending()) is not None:
            yield received


def session_at(role: Role, last: type[Message] = m.Resumed) -> Session:
    session = Session(role)
    for who, message, lane in STORY:
        (session.sent if who is role else session.received)(message, lane)
        if isinstance(message, last):
            break
    return session


class Memory:
    """A domain in this process.  It has ``contents`` and zeros in every third page, or what was
    loaded.
    """

    def __init__(self, *, native: bool):
        self._native = native
        self._kept: list[Any] = [ffi.new("char[]", contents(pfn)) for pfn in range(NR)]
        self.loaded: dict[int, bytes] = {}
        self.given_away: set[int] = set()
        self.looking: list[Any] = []
        """The addresses of the pages that are being read."""
        self.refusals = 0
        """The number of loads that will fail because there is no memory."""
        self.no_frames: set[int] = set()
        """The pfns for which there is no memory."""

    @staticmethod
    def is_zero(pfn: int) -> bool:
        return pfn % 3 == 0

    def map_pages(self, pfns: PfnArray) -> Any:
        wanted = pfns.tolist()
        statuses = [PageStatus.ZERO if self.is_zero(pfn) else PageStatus.DATA for pfn in wanted]
        data = [memoryview(contents(pfn)) for pfn in wanted if not self.is_zero(pfn)]
        return contextlib.nullcontext(
            SimpleNamespace(status=np.array(statuses, dtype=np.uint8), data=data)
        )

    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        views = [
            None if pages is None else memoryview(pages)[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            for i in range(len(pfns))
        ]
        return np.array(
            [self._load(pfn, view) for pfn, view in zip(pfns.tolist(), views, strict=True)],
            dtype=np.int32,
        )

    def _load(self, pfn: int, page: memoryview | None) -> int:
        if self.refusals:
            self.refusals -= 1
            return -errno.ENOMEM
        if pfn in self.no_frames:
            return -errno.ENOMEM
        if pfn in self.given_away:
            return -errno.ENOENT
        assert pfn not in self.loaded, f"page {pfn} is loaded twice"
        self.loaded[pfn] = bytes(PAGE_SIZE) if page is None else bytes(page)
        return 0

    def native_pages(self) -> NativePages | None:
        if not self._native:
            return None

        @ffi.callback("int(void *, uint64_t, const void **)")  # type: ignore[untyped-decorator]
        def look(_domain: Any, pfn: int, page: Any) -> int:
            page[0] = self._kept[pfn]
            if pfn % 7 == 5:
                return int(PageStatus.BROKEN)  # the slow path handles this page
            if not self.is_zero(pfn):
                self.looking.append(page[0])
            return int(PageStatus.ZERO if self.is_zero(pfn) else PageStatus.DATA)

        @ffi.callback("int(void *, uint64_t, const void *)")  # type: ignore[untyped-decorator]
        def load(_domain: Any, pfn: int, page: Any) -> int:
            return self._load(
                pfn, None if page == ffi.NULL else memoryview(ffi.buffer(page, PAGE_SIZE))
            )

        @ffi.callback("void(void *, const void *)")  # type: ignore[untyped-decorator]
        def looked(_domain: Any, page: Any) -> None:
            self.looking.remove(page)

        self._kept += [look, looked, load]
        return NativePages(
            0, *(int(ffi.cast("uintptr_t", function)) for function in (look, looked, load))
        )


class Destination:
    """A pager, with a model of Xen at its ring and of the sender at its lane.  Each step is
    completed before the next.
    """

    def __init__(
        self,
        ours: LaneConnection,
        theirs: LaneConnection,
        missing: set[int],
        *,
        native: bool,
        session: Session | None = None,
    ):
        self.memory = Memory(native=native)
        self.xen = FrontEnd()
        self.event_fd, self.notify_fd = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.pages = OutstandingPages(NR)
        self.pages.add(pfn_array(sorted(missing)))
        self.sent: list[Any] = []
        self.statistics = PagerStatistics()
        self.ours, self.theirs = ours, theirs
        domain: Any = self.memory
        ring = self.xen.pager(event_fd=self.event_fd, notify_fd=self.notify_fd)
        self.pager = Pager(
            domain, ring, session or session_at(Role.RECEIVER), self.pages, self.statistics,
            self.sent.append
        )  # fmt: skip
        self.asked: Counter[int] = Counter()
        self.requested: set[int] = set()
        """The requests that the sender has not answered yet."""
        self.poll = select.poll()
        self.poll.register(self.event_fd, select.POLLIN)
        self.poll.register(ours, select.POLLIN)
        self.begin()
        if self.pager._session.serving:
            self.pager.begin()

    def close(self) -> None:
        self.pager.close()
        os.close(self.event_fd)
        os.close(self.notify_fd)

    def begin(self) -> None:
        """Begin to use these lanes."""
        self.pager._pull = self.ours
        self.pager._repeat_requests()
        self.pager._prepare_fast_path()
        self.receive()

    def end(self) -> None:
        self.pager._leave_fast_path()
        self.pager.rejoin()

    def turn(self) -> None:
        """Handle what has happened."""
        while self.poll.poll(0) or self.ours.readable() or self.pager.short_of_memory:
            self.pager._turn(self.poll)
        self.xen.take_answers()
        self.receive()
        for pfn in self.asked - Counter(self.xen.answered):
            assert OUTSTANDING <= self.pages.states[pfn] < READY, "it waits for what is there"

    def receive(self) -> None:
        for message, _payload in arrived(self.theirs):
            if isinstance(message, Fault):
                self.requested |= set(message.pfns.tolist())

    def touch(self, pfn: int, vcpu: int, flags: int = 0) -> None:
        if self.xen.ask(pfn, vcpu, flags):
            self.asked[pfn] += 1
            os.eventfd_write(self.event_fd, 1)

    def answer(self, pfns: list[int], piece: int) -> None:
        """Send the sender's answer, one message for each page, in packets of so many bytes."""
        data = b"".join(
            encoded(Pages(NO_PFNS, pfn_array([pfn])))
            if Memory.is_zero(pfn)
            else encoded(Pages(pfn_array([pfn])), contents(pfn), checked=self.ours._decoder.checked)
            for pfn in pfns
        )
        self.requested -= set(pfns)

        def send() -> None:
            for at in range(0, len(data), piece):
                put(self.theirs, data[at : at + piece])
                time.sleep(0.0001)  # so that the pager receives each packet by itself

        sender = threading.Thread(target=send)
        sender.start()
        while sender.is_alive():
            self.turn()
        sender.join()
        self.turn()

    def push(self, pfns: list[int]) -> None:
        data, zeros = (
            [pfn for pfn in pfns if Memory.is_zero(pfn) == zero] for zero in (False, True)
        )
        self.pager.pushed(
            Pages(pfn_array(data), pfn_array(zeros)),
            memoryview(b"".join(map(contents, data))),
            lambda _s: False,
        )
        self.xen.take_answers()
