# SPDX-License-Identifier: GPL-2.0-or-later
"""The quick way of a fault beside the general way: the same frames, the same decisions, and what it does not know it leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrate.errors import PeerClosedError, RemoteProtocolError
from migrate.fastpath._fault import ffi, lib
from migrate.fastpath.api import FAULT, PAGE, ZERO
from migrate.lanes.connection import LaneConnection, Terms
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.messages import MAX_PFN, Ahead, Fault, Lane, Message, Pages
from migrate.protocol.pfns import NO_PFNS, pfn_array
from migrate.protocol.session import Role, Session, hello
from receiver import pager as pager_module
from receiver.outstanding import DROPPED, OUTSTANDING, READY, OutstandingPages
from receiver.pager import Pager
from receiver.statistics import PagerStatistics
from sender.backlog import SENT, Backlog
from sender.bandwidth import BandwidthCap
from sender.faults import FaultServer
from sender.statistics import SenderStatistics
from tests.component.test_link_loss import until
from tests.support.front_end import FrontEnd
from tests.unit.test_session import STORY
from xenbackend.pages import PAGE_SIZE, Buffer, NativePages, PageStatus, PfnArray
from xenbackend.ring import MEM_PAGING_DROP_PAGE

NR = 48
PFNS = st.integers(0, NR - 1)


def contents(pfn: int) -> bytes:
    return bytes([pfn % 255 + 1]) * PAGE_SIZE


def encoded(message: Message, *pages: bytes) -> bytes:
    return frames.encode(message.header(), [memoryview(page) for page in pages]) + b"".join(pages)


@contextlib.contextmanager
def lanes() -> Iterator[tuple[LaneConnection, LaneConnection]]:
    ours, theirs = (LaneConnection(sock, Terms()) for sock in socket.socketpair())
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def put(lane: LaneConnection, *data: bytes) -> None:
    """In one packet."""
    assert isinstance(lane._socket, socket.socket)
    lane._socket.sendall(b"".join(data))


def said(lane: LaneConnection) -> Iterator[tuple[Message, memoryview]]:
    """All that has come, which is whole."""
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


class TestFrames:
    KINDS = (
        (FAULT, lambda pfns: encoded(Fault(pfns))),
        (PAGE, lambda pfns: encoded(Pages(pfns), contents(0))[:-PAGE_SIZE]),
        (ZERO, lambda pfns: encoded(Pages(NO_PFNS, pfns))),
    )

    @given(st.sampled_from(KINDS), st.integers(0, MAX_PFN))
    def test_they_are_the_codecs(self, kind: tuple[Any, Callable[[PfnArray], bytes]], pfn: int) -> None:
        native, encode = kind
        frame = ffi.new("uint8_t[]", native.size)
        lib.fault_frame_make(native, pfn, frame)
        assert bytes(ffi.buffer(frame)) == encode(pfn_array([pfn]))
        assert lib.fault_frame_pfn(native, frame) == pfn

    @given(st.sampled_from(KINDS), st.integers(0, MAX_PFN), st.data())
    def test_no_other_is_taken_for_one(
        self, kind: tuple[Any, Callable[[PfnArray], bytes]], pfn: int, data: Any
    ) -> None:
        native, encode = kind
        damaged = bytearray(encode(pfn_array([pfn])))
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        assert lib.fault_frame_pfn(native, ffi.new("uint8_t[]", bytes(damaged))) == -1
        others = [other for other, _encode in self.KINDS if other is not native]
        assert all(lib.fault_frame_pfn(other, ffi.new("uint8_t[]", encode(pfn_array([pfn])))) == -1 for other in others)


class Memory:
    """A domain in this process: with ``contents``, and zeros in every third page, or with what is loaded."""

    def __init__(self, *, native: bool):
        self._native = native
        self._kept: list[Any] = [ffi.new("char[]", contents(pfn)) for pfn in range(NR)]
        self.loaded: dict[int, bytes] = {}
        self.given_away: set[int] = set()
        self.looking: list[Any] = []
        """Where pages lie that are being looked at."""
        self.refusals = 0
        """Loads that will fail for want of memory."""
        self.no_frames: set[int] = set()
        """pfns for which there is no memory."""

    @staticmethod
    def is_zero(pfn: int) -> bool:
        return pfn % 3 == 0

    def map_pages(self, pfns: PfnArray) -> Any:
        wanted = pfns.tolist()
        statuses = [PageStatus.ZERO if self.is_zero(pfn) else PageStatus.DATA for pfn in wanted]
        data = [memoryview(contents(pfn)) for pfn in wanted if not self.is_zero(pfn)]
        return contextlib.nullcontext(SimpleNamespace(status=np.array(statuses, dtype=np.uint8), data=data))

    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        views = [
            None if pages is None else memoryview(pages)[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] for i in range(len(pfns))
        ]
        return np.array([self._load(pfn, view) for pfn, view in zip(pfns.tolist(), views, strict=True)], dtype=np.int32)

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
                return int(PageStatus.BROKEN)  # the general way sees about it
            if not self.is_zero(pfn):
                self.looking.append(page[0])
            return int(PageStatus.ZERO if self.is_zero(pfn) else PageStatus.DATA)

        @ffi.callback("int(void *, uint64_t, const void *)")  # type: ignore[untyped-decorator]
        def load(_domain: Any, pfn: int, page: Any) -> int:
            return self._load(pfn, None if page == ffi.NULL else memoryview(ffi.buffer(page, PAGE_SIZE)))

        @ffi.callback("void(void *, const void *)")  # type: ignore[untyped-decorator]
        def looked(_domain: Any, page: Any) -> None:
            self.looking.remove(page)

        self._kept += [look, looked, load]
        return NativePages(0, *(int(ffi.cast("uintptr_t", function)) for function in (look, looked, load)))


# ---- the sender ----
class Source:
    """A fault server of so many missing pages, and a receiver's end of its lane."""

    def __init__(
        self,
        ours: LaneConnection,
        theirs: LaneConnection,
        missing: set[int],
        *,
        native: bool,
        session: Session | None = None,
    ):
        mask = np.zeros(NR, dtype=np.bool_)
        mask[list(missing)] = True
        self.backlog, self.statistics = Backlog(mask), SenderStatistics()
        self.lane = theirs
        self.memory = Memory(native=native)
        domain: Any = self.memory
        session = session or session_at(Role.SENDER)
        self.server = FaultServer(domain, ours, session, self.statistics, BandwidthCap(None))
        if session.serving:
            self.server.open(self.backlog)

    def ask(self, *messages: Message) -> None:
        put(self.lane, *map(encoded, messages))

    def answers(self) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for message, payload in said(self.lane):
            assert isinstance(message, Pages)
            found += [(pfn, bytes(payload[i * PAGE_SIZE :][:PAGE_SIZE])) for i, pfn in enumerate(message.pfns.tolist())]
            found += [(pfn, bytes(PAGE_SIZE)) for pfn in message.zeros.tolist()]
        return found

    def state(self) -> tuple[object, ...]:
        backlog, counted = self.backlog, self.statistics
        return (
            backlog._state.tolist(), backlog._left.tolist(), backlog.unsent, backlog._cursor, backlog.unacknowledged,
            counted.pull_pages, counted.pull_zero_pages,
        )  # fmt: skip


SENDER_STEP = st.one_of(
    st.tuples(st.just("faults"), st.lists(PFNS, min_size=1, max_size=12)),
    st.tuples(st.just("fault"), st.lists(PFNS, min_size=1, max_size=4)),
    st.tuples(st.just("ahead"), st.lists(PFNS, min_size=1, max_size=4)),
    st.tuples(st.just("push"), st.lists(PFNS, min_size=1, max_size=1)),
    st.tuples(st.just("loaded"), st.lists(PFNS, min_size=1, max_size=4)),
)


def sender_goes(missing: set[int], steps: list[tuple[str, list[int]]], *, native: bool) -> list[object]:
    """All that is to be seen of it."""
    seen: list[object] = []
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, missing, native=native)
        assert source.server._answerer is not None and source.server._answerer._native.lane.open == native
        for step, chosen in steps:
            pfns = pfn_array(sorted(set(chosen)))
            if step == "push":
                seen.append(source.backlog.next_batch(5).tolist())
                continue
            if step == "loaded":
                source.backlog.loaded(pfn_array(np.flatnonzero(source.backlog._state[: max(chosen)] == SENT)))
                continue
            asked: dict[str, list[Message]] = {
                "faults": [Fault(pfn_array([pfn])) for pfn in chosen],
                "fault": [Fault(pfns)],
                "ahead": [Ahead(pfns)],
            }
            source.ask(*asked[step])
            try:
                source.server._ahead.append(NO_PFNS)  # so that it does not wait for more
                source.server._receive()
            except RemoteProtocolError as error:
                seen.append(str(error))
                break
            source.server._ahead.remove(NO_PFNS)
            seen += [source.answers(), source.state(), [pfns.tolist() for pfns in source.server._ahead]]
            source.server._ahead.clear()
        assert not source.memory.looking
    return seen


@given(st.sets(PFNS, min_size=NR - 3), st.lists(SENDER_STEP, max_size=12))
def test_the_sender_does_the_same_either_way(missing: set[int], steps: list[tuple[str, list[int]]]) -> None:
    assert sender_goes(missing, steps, native=True) == sender_goes(missing, steps, native=False)


@pytest.mark.parametrize("native", [True, False])
def test_the_sender_answers_what_came_in_one_packet_with_the_hello(native: bool) -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=native)
        put(theirs, encoded(hello(Lane.PULL, "s")), encoded(Fault(pfn_array([1]))))
        trio.run(ours.receive_hello)
        theirs._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerClosedError, match=r"closed the connection$"):
            source.server._serve()
        assert source.answers() == [(1, contents(1))]


@pytest.mark.parametrize("native", [True, False])
async def test_the_sender_does_not_wait_for_more_than_a_fault_behind_the_hello(native: bool) -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=native)
        put(theirs, encoded(hello(Lane.PULL, "s")), encoded(Fault(pfn_array([1]))))
        await ours.receive_hello()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.server.serve)
            await until(theirs.readable)
            nursery.cancel_scope.cancel()


def test_the_sender_hears_the_end() -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=True)
        source.ask(Fault(pfn_array([1])))
        theirs._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerClosedError, match=r"closed the connection$"):
            source.server._serve()
        assert source.answers() == [(1, contents(1))]
        assert (source.statistics.pull_pages, ours.bytes_sent) == (1, len(encoded(Pages(pfn_array([1])), contents(1))))


def test_the_sender_notices_that_nobody_takes_its_answer() -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=True)
        source.ask(Fault(pfn_array([1])))
        theirs._socket.shutdown(socket.SHUT_RD)
        with pytest.raises(PeerClosedError, match="Broken pipe"):
            source.server._serve()


@pytest.mark.parametrize("piece", [7, 50, 90])
def test_frames_in_pieces_are_put_together(piece: int) -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=True)
        data = encoded(Fault(pfn_array([2]))) + encoded(Fault(pfn_array([1])))
        source.server._ahead.append(NO_PFNS)
        for at in range(0, len(data), piece):
            put(theirs, data[at : at + piece])
            source.server._receive()
        assert source.answers() == [(2, contents(2)), (1, contents(1))]


@pytest.mark.parametrize("native", [True, False])
def test_nobody_may_ask_before_the_handover(native: bool) -> None:
    with lanes() as (ours, theirs):
        session = session_at(Role.SENDER, m.Ready)
        source = Source(ours, theirs, {1, 2}, native=native, session=session)
        source.ask(Fault(pfn_array([1])))
        with pytest.raises(RemoteProtocolError):
            source.server._serve()
        assert not source.answers() and source.backlog.unsent == 2


# ---- the receiver ----
class Destination:
    """A pager, a model of Xen at its ring and of the sender at its lane.  Each step is dealt with before the next."""

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
        self.said: list[Any] = []
        self.statistics = PagerStatistics()
        self.ours, self.theirs = ours, theirs
        domain: Any = self.memory
        ring = self.xen.pager(event_fd=self.event_fd, notify_fd=self.notify_fd)
        self.pager = Pager(
            domain, ring, session or session_at(Role.RECEIVER), self.pages, self.statistics, self.said.append
        )  # fmt: skip
        self.asked: Counter[int] = Counter()
        self.requested: set[int] = set()
        """Of the sender, which has not answered yet."""
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
        """With these lanes."""
        self.pager._pull = self.ours
        self.pager._ask_again()
        self.pager._respond_first()
        self.hear()

    def end(self) -> None:
        self.pager._dismiss()
        self.pager.rejoin()

    def turn(self) -> None:
        """What has happened is dealt with."""
        while self.poll.poll(0) or self.pager.short_of_memory:
            self.pager._turn(self.poll)
        self.xen.take_answers()
        self.hear()
        for pfn in self.asked - Counter(self.xen.answered):
            assert OUTSTANDING <= self.pages.states[pfn] < READY, "it waits for what is there"

    def hear(self) -> None:
        for message, _payload in said(self.theirs):
            if isinstance(message, Fault):
                self.requested |= set(message.pfns.tolist())

    def touch(self, pfn: int, vcpu: int, flags: int = 0) -> None:
        if self.xen.ask(pfn, vcpu, flags):
            self.asked[pfn] += 1
            os.eventfd_write(self.event_fd, 1)

    def answer(self, pfns: list[int], piece: int) -> None:
        """The sender's, for a page each, in packets of so many bytes."""
        data = b"".join(
            encoded(Pages(NO_PFNS, pfn_array([pfn])))
            if Memory.is_zero(pfn)
            else encoded(Pages(pfn_array([pfn])), contents(pfn))
            for pfn in pfns
        )
        self.requested -= set(pfns)

        def send() -> None:
            for at in range(0, len(data), piece):
                put(self.theirs, data[at : at + piece])
                time.sleep(0.0001)  # so that it is seen

        sender = threading.Thread(target=send)
        sender.start()
        while sender.is_alive():
            self.turn()
        sender.join()
        self.turn()

    def push(self, pfns: list[int]) -> None:
        data, zeros = ([pfn for pfn in pfns if Memory.is_zero(pfn) == zero] for zero in (False, True))
        self.pager.pushed(
            Pages(pfn_array(data), pfn_array(zeros)), memoryview(b"".join(map(contents, data))), lambda _s: False
        )
        self.xen.take_answers()


RECEIVER_STEP = st.one_of(
    st.tuples(st.just("touch"), st.lists(st.tuples(PFNS, st.integers(0, 1)), min_size=1, max_size=10)),
    st.tuples(st.just("drop"), PFNS),
    st.tuples(st.just("answer"), st.tuples(st.integers(1, 10), st.sampled_from([1000, 5000, 10**6]))),
    st.tuples(st.just("push"), st.sets(PFNS, min_size=1, max_size=6)),
    st.tuples(st.just("short of memory"), st.integers(1, 3)),
    st.tuples(st.just("given away"), PFNS),
    st.tuples(st.just("other lanes"), st.none()),
)


async def receiver_goes(missing: set[int], steps: list[tuple[str, Any]], *, native: bool) -> object:
    with lanes() as (ours, theirs), contextlib.closing(Destination(ours, theirs, missing, native=native)) as end:
        assert (end.pager._responder is not None) == native
        given_away = set()
        for step, chosen in steps:
            if step == "touch":
                for pfn, vcpu in chosen:
                    end.touch(pfn, vcpu)
                end.turn()
            elif step == "drop":
                end.touch(chosen, 0, MEM_PAGING_DROP_PAGE)
                end.turn()
                given_away.add(chosen)
            elif step == "answer":
                end.answer(sorted(end.requested)[: chosen[0]], chosen[1])
            elif step == "push":
                end.push(sorted(chosen & missing))
            elif step == "short of memory":
                end.memory.refusals = chosen
            elif step == "given away":
                end.memory.given_away.add(chosen)
                given_away.add(chosen)
            else:
                end.end()
                end.begin()
        _report, waiting = end.pager.report()
        end.pager._dismiss()
        assert waiting == end.pages.waiting == sum(end.asked.values()) - len(end.xen.answered)
        end.begin()
        for batch in np.array_split(sorted(missing), 5):
            end.push(batch.tolist())
        # Nothing is lost, nothing twice, every request answered once.
        assert Counter(end.xen.answered) == end.asked
        assert end.pages.count == 0
        assert {pfn for pfn in range(NR) if end.pages.states[pfn]} == missing
        assert set(np.unique(end.pages.states[sorted(missing)]).tolist()) <= {READY, DROPPED}
        assert missing - given_away <= set(end.memory.loaded) <= missing
        for pfn, page in end.memory.loaded.items():
            assert page == (bytes(PAGE_SIZE) if Memory.is_zero(pfn) else contents(pfn))
        end.pager.acknowledge()
        if "other lanes" not in [step for step, _chosen in steps]:  # then a rejoin says some of it
            assert sorted(pfn for message in end.said for pfn in message.pfns.tolist()) == sorted(missing)
        return (
            end.statistics.requests,
            end.statistics.pulled_pages,
            end.pages.states.tolist(),
        )


@pytest.mark.parametrize("native", [True, False])
@given(st.sets(PFNS, min_size=30), st.lists(RECEIVER_STEP, max_size=15))
def test_the_receiver_loses_nothing(native: bool, missing: set[int], steps: list[tuple[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pager_module, "FIRST_RETRY_S", 0)
        patch.setattr(pager_module, "LAST_RETRY_S", 0)

        async def run() -> None:
            seen = await receiver_goes(missing, steps, native=native)
            if native:
                assert seen == await receiver_goes(missing, steps, native=False)

        trio.run(run)


async def test_no_page_is_taken_from_the_pull_lane_before_the_handover() -> None:
    with lanes() as (ours, theirs):
        session = session_at(Role.RECEIVER, m.Ready)
        with contextlib.closing(Destination(ours, theirs, {1, 2}, native=True, session=session)) as end:
            assert end.pager._responder is not None
            put(theirs, encoded(Pages(pfn_array([1])), contents(1)))
            with pytest.raises(RemoteProtocolError, match="before the switchover"):
                end.turn()
            assert not end.memory.loaded and end.pages.count == 2
