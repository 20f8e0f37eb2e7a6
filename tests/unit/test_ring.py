# SPDX-License-Identifier: GPL-2.0-or-later
"""The pager's end of the ring, tested with a model of Xen's end, and with pagers that die in
between.
"""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.front_end import ANSWERED, FREE, NOTES, OPEN, SLOTS, FrontEnd
from tests.support.thorough import examples
from xenbackend._ring import ffi, lib
from xenbackend.errors import XenError
from xenbackend.ring import VM_EVENT_SLOTS, PagingRequest

STEP = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 3)),
    st.tuples(st.just("take"), st.just(0)),
    st.tuples(st.just("answer"), st.integers(0, 255)),
    st.tuples(st.just("xen"), st.just(0)),
    st.tuples(st.just("die"), st.just(0)),
)


@settings(max_examples=examples(300))
@given(st.lists(STEP, max_size=80))
def test_every_request_is_answered_once_whoever_dies(steps: list[tuple[str, int]]) -> None:
    """pfns repeat, as in duplicate requests; answers come in any order and number."""
    xen = FrontEnd()
    ring = xen.pager()
    asked: list[int] = []
    open_requests: list[PagingRequest] = []
    for step, choice in steps:
        if step == "ask" and xen.ask(choice):
            asked.append(choice)
        elif step == "take":
            open_requests += ring.requests()
        elif step == "answer":
            chosen = [request for i, request in enumerate(open_requests) if choice >> i & 1]
            open_requests = [
                request for i, request in enumerate(open_requests) if not choice >> i & 1
            ]
            ring.respond(reversed(chosen))
        elif step == "xen":
            xen.take_answers()
        else:
            ring = xen.pager(resume=True)
            open_requests = []  # the successor has only what is in the page
    ring = xen.pager(resume=True)
    while left := ring.requests():
        ring.respond(left)
        xen.take_answers()
    xen.take_answers()
    assert sorted(xen.answered) == sorted(asked)


def test_killed_while_taking_a_request() -> None:
    """The request is noted but not counted, so it is taken again."""
    xen = FrontEnd()
    ring = xen.pager()
    xen.ask(5)
    xen.ask(6)
    assert [request.pfn for request in ring.requests()] == [5, 6]
    struct.pack_into("<I", xen.page, NOTES + 8, 1)  # req_cons as before the second request
    assert [request.pfn for request in xen.pager(resume=True).requests()] == [5, 6]


@pytest.mark.parametrize(("published", "left"), [(False, [5, 6]), (True, [5])])
def test_killed_while_answering(published: bool, left: list[int]) -> None:
    """The second request's answer is the first in the ring.  What decides is whether Xen was
    informed.
    """
    xen = FrontEnd()
    ring = xen.pager()
    xen.ask(5)
    xen.ask(6)
    _first, second = ring.requests()
    if published:
        ring.respond([second])
        assert xen.note(1)[0] == FREE
    xen.set_note(1, ANSWERED, 0)
    successor = xen.pager(resume=True)
    inherited = successor.requests()
    assert sorted(request.pfn for request in inherited) == left
    successor.respond(inherited)
    xen.take_answers()
    assert sorted(xen.answered) == [5, 6]


def test_killed_before_the_answer_was_marked() -> None:
    """The note has only the number of the response so far."""
    xen = FrontEnd()
    ring = xen.pager()
    xen.ask(5)
    ring.requests()
    xen.set_note(0, OPEN, 0)
    assert [request.pfn for request in xen.pager(resume=True).requests()] == [5]


def test_indices_wrap_around() -> None:
    xen = FrontEnd()
    ring = xen.pager()
    for turn in range(100):
        for pfn in range(VM_EVENT_SLOTS):
            assert xen.ask(pfn)
        assert not xen.ask(99)
        requests = ring.requests()
        assert len(requests) == VM_EVENT_SLOTS
        ring.respond(requests[::-1])
        xen.take_answers()
        if turn % 10 == 0:
            ring = xen.pager(resume=True)
            assert ring.requests() == []


def test_a_page_that_is_no_ring_of_ours_has_no_successor() -> None:
    with pytest.raises(XenError, match="EPROTO"):
        FrontEnd().pager(resume=True)


def test_native_code_waits_until_inherited_requests_are_taken() -> None:
    xen = FrontEnd()
    dies = xen.pager()
    assert xen.ask(7)
    assert [request.pfn for request in dies.requests()] == [7]
    successor = xen.pager(resume=True)
    assert successor.native() is None
    assert [request.pfn for request in successor.requests()] == [7]
    assert successor.native() is not None


def test_a_ring_that_was_given_up_is_not_used() -> None:
    ring = FrontEnd().pager()
    ring.close()
    ring.close()
    with pytest.raises(XenError, match="it was given up"):
        ring.requests()
    with pytest.raises(XenError, match="it was given up"):
        ring.respond([PagingRequest(1, 0, 0, 0, 0)])


def test_a_corrupt_ring_is_reported_as_corrupt() -> None:
    xen = FrontEnd()
    ring = xen.pager()
    xen.page[0:4] = struct.pack("<I", 9)
    with pytest.raises(XenError, match="corrupt"):
        ring.requests()
    xen = FrontEnd()
    ring = xen.pager()
    xen.ask(1)
    xen.page[SLOTS : SLOTS + 4] = struct.pack("<I", 8)  # another interface version
    with pytest.raises(XenError, match="corrupt"):
        ring.requests()


def test_an_index_that_goes_back_is_corrupt() -> None:
    """There seem to be more requests than slots.  The ninth has no place in the caller's memory."""
    xen = FrontEnd()
    xen.pager()
    for pfn in range(VM_EVENT_SLOTS):
        xen.ask(pfn)
    state = ffi.new(
        "struct ring_state *", {"page": ffi.from_buffer(xen.page), "event_fd": -1, "notify_fd": -1}
    )
    state.req_cons = VM_EVENT_SLOTS
    xen.page[0:4] = struct.pack("<I", VM_EVENT_SLOTS // 2)
    requests = ffi.new("struct ring_request[]", VM_EVENT_SLOTS + 1)
    requests[VM_EVENT_SLOTS].gfn = 99
    assert lib.ring_consume(state, requests) == -errno.EPROTO
    assert requests[VM_EVENT_SLOTS].gfn == 99
