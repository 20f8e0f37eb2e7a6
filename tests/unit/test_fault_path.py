# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path of a fault beside the slow path: both send the same frames and take the same
decisions.  What the fast path does not handle it leaves unchanged.
"""

from __future__ import annotations

import contextlib
import socket
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import PeerClosedError, RemoteProtocolError
from migrate.fastpath._fault import ffi, lib
from migrate.fastpath.api import FAULT, PAGE, ZERO
from migrate.fastpath.page_states import DROPPED, READY, SENT
from migrate.lanes.connection import LaneConnection
from migrate.protocol import messages as m
from migrate.protocol.messages import Ahead, Fault, Lane, Message, Pages
from migrate.protocol.pfns import MAX_PFN, NO_PFNS, pfn_array
from migrate.protocol.session import Role, Session, hello
from receiver import loading
from sender.backlog import Backlog
from sender.bandwidth import BandwidthCap
from sender.faults import FaultServer
from sender.pause import Pause
from sender.statistics import SenderStatistics
from tests.support.faults import (
    NR,
    Destination,
    Memory,
    arrived,
    contents,
    encoded,
    lanes,
    put,
    session_at,
)
from tests.support.sockets import Over
from tests.support.waiting import until_async as until
from xenbackend.pages import PAGE_SIZE, PfnArray
from xenbackend.ring import MEM_PAGING_DROP_PAGE

PFNS = st.integers(0, NR - 1)


class TestFrames:
    KINDS = (
        (FAULT, lambda pfns: encoded(Fault(pfns))),
        (PAGE, lambda pfns: encoded(Pages(pfns), contents(0))[:-PAGE_SIZE]),
        (ZERO, lambda pfns: encoded(Pages(NO_PFNS, pfns))),
    )

    @given(st.sampled_from(KINDS), st.integers(0, MAX_PFN))
    def test_they_are_the_codecs(
        self, kind: tuple[Any, Callable[[PfnArray], bytes]], pfn: int
    ) -> None:
        native, encode = kind
        frame = ffi.new("uint8_t[]", native.size)
        lib.fault_frame_make(native, pfn, ffi.NULL, frame)
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
        assert all(
            lib.fault_frame_pfn(other, ffi.new("uint8_t[]", encode(pfn_array([pfn])))) == -1
            for other in others
        )

    CHECKED = ffi.new("struct fault_frame *", PAGE[0])
    CHECKED.covers_page = 1

    @given(st.integers(0, MAX_PFN), st.binary(min_size=1), st.data())
    def test_a_page_that_is_checked(self, pfn: int, begin: bytes, data: Any) -> None:
        page = (begin * PAGE_SIZE)[:PAGE_SIZE]
        expected = encoded(Pages(pfn_array([pfn])), page, checked=True)
        frame = ffi.new("uint8_t[]", PAGE.size)
        lib.fault_frame_make(self.CHECKED, pfn, page, frame)
        assert bytes(ffi.buffer(frame)) + page == expected
        assert lib.fault_frame_pfn(self.CHECKED, frame) == pfn
        assert lib.fault_frame_is_whole(self.CHECKED, frame, page)
        damaged = bytearray(expected)
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        frame, page = bytes(damaged[: PAGE.size]), bytes(damaged[PAGE.size :])
        assert lib.fault_frame_pfn(self.CHECKED, frame) == -1 or not lib.fault_frame_is_whole(
            self.CHECKED, frame, page
        )

    @given(st.binary(max_size=600), st.integers(0, 63), st.integers(0, 2**32 - 1))
    def test_the_checksum_is_zlib_s(self, data: bytes, skipped: int, before: int) -> None:
        """At each size, and at each address modulo the width of a load."""
        memory = ffi.new("uint8_t[]", bytes(skipped) + data)
        found = lib.fault_checksum(before, memory + skipped, len(data))
        assert found == zlib.crc32(data, before)


# ---- the sender ----
class Source:
    """A fault server for some missing pages, with the receiver's end of its lane."""

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
        self.pause = Pause()
        self.server = FaultServer(
            domain, ours, session, self.statistics, BandwidthCap(None), self.pause
        )
        if session.serving:
            self.server.open(self.backlog)

    def ask(self, *messages: Message) -> None:
        put(self.lane, *map(encoded, messages))

    def answers(self) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for message, payload in arrived(self.lane):
            assert isinstance(message, Pages)
            found += [
                (pfn, bytes(payload[i * PAGE_SIZE :][:PAGE_SIZE]))
                for i, pfn in enumerate(message.pfns.tolist())
            ]
            found += [(pfn, bytes(PAGE_SIZE)) for pfn in message.zeros.tolist()]
        return found

    def state(self) -> tuple[object, ...]:
        backlog, counted = self.backlog, self.statistics
        return (
            backlog._state.tolist(), backlog._left.tolist(), backlog.unsent, backlog.pages.cursor,
            backlog.unacknowledged, counted.pull_pages, counted.pull_zero_pages,
        )  # fmt: skip


SENDER_STEP = st.one_of(
    st.tuples(st.just("faults"), st.lists(PFNS, min_size=1, max_size=12)),
    st.tuples(st.just("fault"), st.lists(PFNS, min_size=1, max_size=4)),
    st.tuples(st.just("ahead"), st.lists(PFNS, min_size=1, max_size=4)),
    st.tuples(st.just("push"), st.lists(PFNS, min_size=1, max_size=1)),
    st.tuples(st.just("loaded"), st.lists(PFNS, min_size=1, max_size=4)),
)


def sender_goes(
    missing: set[int],
    steps: list[tuple[str, list[int]]],
    *,
    native: bool,
    over: Over = Over.PLAIN,
) -> list[object]:
    """Return everything that can be observed of a run."""
    seen: list[object] = []
    with lanes(over) as (ours, theirs):
        source = Source(ours, theirs, missing, native=native)
        fast = source.server._native
        assert (fast is None) == (over is Over.PYTHON)
        assert fast is None or fast._native.lane.open == native
        for step, chosen in steps:
            pfns = pfn_array(sorted(set(chosen)))
            if step == "push":
                seen.append(source.backlog.next_batch(5).tolist())
                continue
            if step == "loaded":
                source.backlog.loaded(
                    pfn_array(np.flatnonzero(source.backlog._state[: max(chosen)] == SENT))
                )
                continue
            asked: dict[str, list[Message]] = {
                "faults": [Fault(pfn_array([pfn])) for pfn in chosen],
                "fault": [Fault(pfns)],
                "ahead": [Ahead(pfns)],
            }
            source.ask(*asked[step])
            try:
                source.server._ahead.append(NO_PFNS)  # so that the server does not wait for more
                source.server._receive()
            except RemoteProtocolError as error:
                seen.append(str(error))
                break
            source.server._ahead.remove(NO_PFNS)
            seen += [
                source.answers(),
                source.state(),
                [pfns.tolist() for pfns in source.server._ahead],
            ]
            source.server._ahead.clear()
        assert not source.memory.looking
    return seen


@given(st.sets(PFNS, min_size=NR - 3), st.lists(SENDER_STEP, max_size=12))
def test_the_sender_does_the_same_either_way(
    missing: set[int], steps: list[tuple[str, list[int]]]
) -> None:
    expected = sender_goes(missing, steps, native=False)
    for over in Over:
        assert sender_goes(missing, steps, native=True, over=over) == expected


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
async def test_the_sender_does_not_wait_for_more_than_a_fault_behind_the_hello(
    native: bool,
) -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=native)
        put(theirs, encoded(hello(Lane.PULL, "s")), encoded(Fault(pfn_array([1]))))
        await ours.receive_hello()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.server.serve)
            await until(theirs.readable)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("native", [True, False])
def test_in_a_pause_the_sender_answers_faults_and_reads_nothing_ahead(native: bool) -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2, 3}, native=native)
        source.pause.begin(0.0)
        source.ask(Ahead(pfn_array([2, 3])), Fault(pfn_array([1])))
        theirs._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerClosedError, match=r"closed the connection$"):
            source.server._serve()
        assert source.answers() == [(1, contents(1))]
        assert source.backlog.next_batch(5).tolist() == [2, 3]  # they are pushed later


def test_the_sender_receives_the_end() -> None:
    with lanes() as (ours, theirs):
        source = Source(ours, theirs, {1, 2}, native=True)
        source.ask(Fault(pfn_array([1])))
        theirs._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerClosedError, match=r"closed the connection$"):
            source.server._serve()
        assert source.answers() == [(1, contents(1))]
        assert (source.statistics.pull_pages, ours.bytes_sent) == (
            1,
            len(encoded(Pages(pfn_array([1])), contents(1))),
        )


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


RECEIVER_STEP = st.one_of(
    st.tuples(
        st.just("touch"), st.lists(st.tuples(PFNS, st.integers(0, 1)), min_size=1, max_size=10)
    ),
    st.tuples(st.just("drop"), PFNS),
    st.tuples(
        st.just("answer"), st.tuples(st.integers(1, 10), st.sampled_from([1000, 5000, 10**6]))
    ),
    st.tuples(st.just("push"), st.sets(PFNS, min_size=1, max_size=6)),
    st.tuples(st.just("short of memory"), st.integers(1, 3)),
    st.tuples(st.just("given away"), PFNS),
    st.tuples(st.just("other lanes"), st.none()),
)


async def receiver_goes(
    missing: set[int],
    steps: list[tuple[str, Any]],
    *,
    native: bool,
    over: Over = Over.PLAIN,
) -> object:
    with (
        lanes(over) as (ours, theirs),
        contextlib.closing(Destination(ours, theirs, missing, native=native)) as end,
    ):
        assert (end.pager._native is not None) == (native and over is not Over.PYTHON)
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
        end.pager._leave_fast_path()
        assert waiting == end.pages.waiting == sum(end.asked.values()) - len(end.xen.answered)
        end.begin()
        for batch in np.array_split(sorted(missing), 5):
            end.push(batch.tolist())
        # No page is lost or loaded twice, and every request is answered once.
        assert Counter(end.xen.answered) == end.asked
        assert end.pages.count == 0
        assert {pfn for pfn in range(NR) if end.pages.states[pfn]} == missing
        assert set(np.unique(end.pages.states[sorted(missing)]).tolist()) <= {READY, DROPPED}
        assert missing - given_away <= set(end.memory.loaded) <= missing
        for pfn, page in end.memory.loaded.items():
            assert page == (bytes(PAGE_SIZE) if Memory.is_zero(pfn) else contents(pfn))
        end.pager.acknowledge()
        # A rejoin reports some of the pages.
        if "other lanes" not in [step for step, _chosen in steps]:
            assert sorted(pfn for message in end.sent for pfn in message.pfns.tolist()) == sorted(
                missing
            )
        return (
            end.statistics.requests,
            end.statistics.pulled_pages,
            end.pages.states.tolist(),
        )


@pytest.mark.parametrize("over", Over)
@pytest.mark.parametrize("native", [True, False])
@given(st.sets(PFNS, min_size=30), st.lists(RECEIVER_STEP, max_size=15))
def test_the_receiver_loses_nothing(
    native: bool, over: Over, missing: set[int], steps: list[tuple[str, Any]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "FIRST_RETRY_S", 0)
        patch.setattr(loading, "LAST_RETRY_S", 0)

        async def run() -> None:
            seen = await receiver_goes(missing, steps, native=native, over=over)
            if native or over is not Over.PLAIN:
                assert seen == await receiver_goes(missing, steps, native=False)

        trio.run(run)


async def test_no_page_is_taken_from_the_pull_lane_before_the_handover() -> None:
    with lanes() as (ours, theirs):
        session = session_at(Role.RECEIVER, m.Ready)
        with contextlib.closing(
            Destination(ours, theirs, {1, 2}, native=True, session=session)
        ) as end:
            assert end.pager._native is not None
            put(theirs, encoded(Pages(pfn_array([1])), contents(1)))
            with pytest.raises(RemoteProtocolError, match="before the switchover"):
                end.turn()
            assert not end.memory.loaded and end.pages.count == 2
