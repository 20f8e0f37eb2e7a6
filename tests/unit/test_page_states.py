# SPDX-License-Identifier: GPL-2.0-or-later
"""The state machines of pages at both ends: no page is lost or loaded twice, and every request is
answered once.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from migrate.errors import MigrationError, RemoteProtocolError
from migrate.fastpath.page_states import DROPPED, OUTSTANDING, PRESENT, READY, REQUESTED
from migrate.protocol.pfns import NO_PFNS, from_mask, pfn_array
from receiver.outstanding import OutstandingPages
from sender.backlog import Backlog
from sender.source_pages import announce_missing
from tests.support.requests import request
from xenbackend.errors import XenError
from xenbackend.pages import MappedPages, PageStatus
from xenbackend.ring import MEM_PAGING_DROP_PAGE, VM_EVENT_SLOTS, PagingRequest

NR = 64
MEM_PAGING_EVICT_FAIL = 2
"""A flag in ``paging_flags``: the page was touched between nomination and eviction
(xen/vm_event.h).
"""


def mask(*pfns: int, nr_pfns: int = NR) -> np.typing.NDArray[np.bool_]:
    result = np.zeros(nr_pfns, dtype=np.bool_)
    result[list(pfns)] = True
    return result


def backlog_of(*pfns: int, nr_pfns: int = NR) -> Backlog:
    return Backlog(mask(*pfns, nr_pfns=nr_pfns))


class TestBacklog:
    @given(st.sets(st.integers(0, 20_000), min_size=1), st.integers(1, 50))
    def test_every_page_is_pushed_once_in_ascending_batches(
        self, pfns: set[int], most: int
    ) -> None:
        backlog = backlog_of(*pfns, nr_pfns=20_001)
        pushed: list[int] = []
        for batch in backlog.batches(most):
            assert len(batch) <= most
            assert all(np.diff(batch) > 0)
            pushed += batch.tolist()
        assert sorted(pushed) == sorted(pfns)
        assert backlog.unsent == 0
        assert backlog.unacknowledged == len(pfns)

    def test_pages_that_are_to_go_first_do_not_move_the_cursor(self) -> None:
        first = pfn_array([5, 3000, 9000])
        backlog = Backlog(mask(1, 5, 3000, 3001, nr_pfns=10_000), first)
        backlog.fault(pfn_array([3000]))
        assert [batch.tolist() for batch in backlog.batches(2)] == [[5], [3001], [1]]

    def test_pages_that_are_to_go_first_go_in_their_order(self) -> None:
        """Each batch is ascending nevertheless, and no page is sent twice."""
        first = pfn_array([9000, 9001, 9002, 7, 8, 9000])
        backlog = Backlog(mask(1, 7, 8, 9000, 9001, 9002, nr_pfns=10_000), first)
        batches = []
        while len(batch := backlog.next_batch(2)):
            batches.append((batch.tolist(), backlog.has_first))
        assert batches == [
            ([9000, 9001], True), ([7, 9002], True), ([8], False), ([1], False)
        ]  # fmt: skip

    def test_what_is_missing_changes_until_the_handover(self) -> None:
        backlog = Backlog(mask(1, 2, 9000, nr_pfns=10_000))
        backlog.remove(pfn_array([2]))
        backlog.add(pfn_array([3, 5000]))
        assert backlog.are_missing(pfn_array([1, 2, 3, 4])).tolist() == [True, False, True, False]
        assert backlog.unsent == backlog.unacknowledged == 4
        assert [batch.tolist() for batch in backlog.batches(3)] == [[1, 3, 5000], [9000]]

    def test_the_push_continues_from_the_page_that_was_faulted_on(self) -> None:
        backlog = backlog_of(*range(NR))
        assert backlog.next_batch(4).tolist() == [0, 1, 2, 3]
        assert backlog.fault(pfn_array([40])).tolist() == [40]
        assert backlog.next_batch(3).tolist() == [41, 42, 43]
        rest = [pfn for batch in backlog.batches(100) for pfn in batch.tolist()]
        assert rest == [*range(44, NR), *range(4, 40)]

    def test_a_pushed_page_is_sent_again_for_a_fault_but_a_loaded_one_is_not(self) -> None:
        backlog = backlog_of(1, 2)
        backlog.next_batch(2)
        backlog.loaded(pfn_array([1]))
        assert backlog.fault(pfn_array([1, 2])).tolist() == [2]

    def test_a_page_is_sent_one_time_on_the_pull_lane_until_the_link_is_lost(self) -> None:
        backlog = backlog_of(1, 2, 3)
        assert backlog.fault(pfn_array([1])).tolist() == [1]
        assert backlog.fault(pfn_array([1])).tolist() == []
        ahead = backlog.ahead(pfn_array([1, 2, 3]))
        assert ahead.tolist() == [2, 3]
        assert backlog.fault(pfn_array([2])).tolist() == [2]  # before the read-ahead has sent it
        assert backlog.pull(ahead).tolist() == [3]
        assert backlog.fault(pfn_array([2, 3])).tolist() == []
        backlog.loaded(pfn_array([1]))
        backlog.rejoin(mask(2, 3, nr_pfns=NR))
        assert backlog.fault(pfn_array([2, 3])).tolist() == [2, 3]
        backlog.loaded(pfn_array([2, 3]))
        assert backlog.unacknowledged == 0

    def test_a_page_is_kept_until_it_is_acknowledged(self) -> None:
        backlog = backlog_of(1, 2, 3)
        backlog.next_batch(3)
        backlog.loaded(pfn_array([1]))
        assert backlog.unacknowledged == backlog.in_transit == 2
        backlog.dropped(pfn_array([2]))
        backlog.loaded(pfn_array([3]))
        assert backlog.unacknowledged == 0

    def test_a_dropped_page_is_not_pushed(self) -> None:
        backlog = backlog_of(1, 2)
        backlog.dropped(pfn_array([1]))
        assert [batch.tolist() for batch in backlog.batches(8)] == [[2]]

    def test_counts_hold_when_nothing_or_several_blocks_change(self) -> None:
        backlog = backlog_of(1, 5000, 9000, nr_pfns=10_000)
        backlog.remove(NO_PFNS)
        backlog.add(NO_PFNS)
        assert backlog.unsent == 3
        backlog.remove(pfn_array([1, 9000]))
        assert [batch.tolist() for batch in backlog.batches(8)] == [[5000]]

    def test_what_is_read_ahead_is_sent_once_and_the_push_continues_behind_it(self) -> None:
        backlog = backlog_of(*range(0, NR, 2))
        backlog.fault(pfn_array([40]))
        assert backlog.ahead(pfn_array([39, 40, 42, 44])).tolist() == [42, 44]
        assert backlog.ahead(pfn_array([42, 44])).tolist() == []
        assert backlog.next_batch(2).tolist() == [46, 48]
        rest = [pfn for batch in backlog.batches(8) for pfn in batch.tolist()]
        assert rest == [*range(50, NR, 2), *range(0, 40, 2)]

    def test_after_a_lost_link_exactly_what_the_receiver_lacks_is_sent_again(self) -> None:
        backlog = backlog_of(1, 2, 3, 4, 5000, nr_pfns=10_000)
        backlog.next_batch(4)
        backlog.loaded(pfn_array([1]))
        assert backlog.is_done(pfn_array([1, 2])).tolist() == [True, False]
        done = backlog.rejoin(mask(2, 4, 5000, nr_pfns=10_000))
        assert done.tolist() == [3]  # the page was loaded, and its acknowledgement lost
        assert backlog.is_done(pfn_array([1, 2, 3])).tolist() == [True, False, True]
        assert backlog.unsent == backlog.unacknowledged == 3
        assert sorted(pfn for batch in backlog.batches(8) for pfn in batch.tolist()) == [2, 4, 5000]

    def test_the_receiver_cannot_lack_what_it_has_confirmed_or_what_was_never_missing(self) -> None:
        backlog = backlog_of(1, 2)
        backlog.next_batch(2)
        backlog.loaded(pfn_array([1]))
        for pfn in (1, 9):
            with pytest.raises(RemoteProtocolError, match=f"outstanding: pfn {pfn:#x}"):
                backlog.rejoin(mask(2, pfn))
        assert backlog.unacknowledged == 1

    def test_the_receiver_cannot_claim_what_is_not_so(self) -> None:
        backlog = backlog_of(1, 2)
        for pfn in (5, NR):
            with pytest.raises(RemoteProtocolError, match=f"{pfn:#x} is not outstanding"):
                backlog.fault(pfn_array([1, pfn]))
        assert backlog.unsent == 2
        with pytest.raises(RemoteProtocolError, match="not in transit"):
            backlog.loaded(pfn_array([1]))  # the page was never sent
        backlog.fault(pfn_array([1]))
        backlog.loaded(pfn_array([1]))
        with pytest.raises(RemoteProtocolError, match="not in transit"):
            backlog.loaded(pfn_array([1]))  # the page was acknowledged before
        for pfn in (1, 9):
            with pytest.raises(RemoteProtocolError, match="dropped"):
                backlog.dropped(pfn_array([pfn]))


class TestOutstandingPages:
    def pages(self, *pfns: int) -> OutstandingPages:
        pages = OutstandingPages(NR)
        pages.add(pfn_array(pfns))
        return pages

    def load(self, pages: OutstandingPages, *pfns: int, result: int = 0) -> list[PagingRequest]:
        batch = pfn_array(pfns)
        batch = batch[pages.claim(batch)]
        actions = pages.finished(batch, np.full(len(batch), result, dtype=np.int32))
        return [answered for answered, _since in actions.answer]

    def test_several_vcpus_on_one_page_ask_once_and_are_all_answered(self) -> None:
        pages = self.pages(5)
        first, second = request(5, vcpu=0), request(5, vcpu=1)
        assert pages.requests([first], 0.0).ask.tolist() == [5]
        assert pages.requests([second], 0.0).ask.tolist() == []
        assert pages.waiting == 2
        assert self.load(pages, 5) == [first, second]
        assert pages.count == pages.waiting == 0

    def test_what_comes_before_the_guest_runs_is_not_missing(self) -> None:
        pages = self.pages(5, 6, 7)
        pages.remove(pfn_array([4, 5]))
        pages.remove(pfn_array([5]))
        assert pages.count == 2
        assert self.load(pages, 6, 7) == []
        assert pages.count == 0

    def test_a_late_copy_is_ignored(self) -> None:
        pages = self.pages(5, 6)
        self.load(pages, 5)
        assert pages.claim(pfn_array([5, 6])).tolist() == [False, True]

    def test_a_page_is_claimed_by_one_lane_only(self) -> None:
        pages = self.pages(5)
        assert pages.claim(pfn_array([5])).tolist() == [True]
        assert pages.claim(pfn_array([5])).tolist() == [False]

    def test_a_fault_during_the_load_waits_for_it_and_asks_for_nothing(self) -> None:
        pages = self.pages(5)
        pages.claim(pfn_array([5]))
        waiting = request(5)
        actions = pages.requests([waiting], 0.0)
        assert not actions.answer
        assert not len(actions.ask)
        actions = pages.finished(pfn_array([5]), np.zeros(1, dtype=np.int32))
        assert [answered for answered, _since in actions.answer] == [waiting]

    def test_a_request_for_a_page_that_is_there_is_answered_at_once(self) -> None:
        pages = self.pages(5)
        self.load(pages, 5)
        for late in (
            request(5),
            request(7),
            request(NR + 5),
            request(5, flags=MEM_PAGING_EVICT_FAIL),
        ):
            assert [answered for answered, _since in pages.requests([late], 0.0).answer] == [late]

    def test_a_request_from_before_the_eviction_waits_for_the_page(self) -> None:
        """The hypervisor set the flag while the page was nominated, and the page was evicted
        since.
        """
        pages = self.pages(5)
        actions = pages.requests([request(5, flags=MEM_PAGING_EVICT_FAIL)], 0.0)
        assert not actions.answer
        assert actions.ask.tolist() == [5]

    def test_a_drop_answers_itself_and_whoever_waits(self) -> None:
        pages = self.pages(5, 6)
        waiting, drop = request(5), request(5, flags=MEM_PAGING_DROP_PAGE)
        pages.requests([waiting], 0.0)
        actions = pages.requests([drop], 0.0)
        assert {answered for answered, _since in actions.answer} == {waiting, drop}
        assert actions.dropped.tolist() == [5]
        assert pages.count == 1
        assert pages.claim(pfn_array([5])).tolist() == [False]

    def test_a_page_that_is_asked_for_and_dropped_at_once_is_not_fetched(self) -> None:
        pages = self.pages(5)
        actions = pages.requests([request(5), request(5, flags=MEM_PAGING_DROP_PAGE)], 0.0)
        assert not len(actions.ask)
        assert len(actions.answer) == 2

    def test_a_lost_drop_is_found_out_at_the_load(self) -> None:
        pages = self.pages(5)
        batch = pfn_array([5])
        pages.claim(batch)
        actions = pages.finished(batch, np.array([-2], dtype=np.int32))
        assert actions.dropped.tolist() == [5]
        assert not len(actions.loaded)
        assert pages.count == 0

    def test_a_drop_of_a_page_that_is_there_is_answered_and_reported_to_nobody(self) -> None:
        pages = self.pages(5)
        self.load(pages, 5)
        for pfn in (5, 7, NR + 5):
            drop = request(pfn, flags=MEM_PAGING_DROP_PAGE)
            actions = pages.requests([drop], 0.0)
            assert [answered for answered, _since in actions.answer] == [drop]
            assert not len(actions.dropped)
        assert pages.states[5] == READY and pages.states[7] == PRESENT

    def test_pages_are_taken_off_a_list_that_is_empty(self) -> None:
        pages = OutstandingPages(NR)
        pages.remove(pfn_array([5]))
        assert pages.count == 0
        assert pages.claim(NO_PFNS).tolist() == []

    def test_after_a_lost_link_vcpus_wait_on_and_interrupted_loads_are_outstanding(self) -> None:
        pages = self.pages(1, 2, 3, 4, 5)
        waiting = [request(2), request(4)]
        pages.requests(waiting, 0.0)
        self.load(pages, 1)
        pages.claim(pfn_array([3, 4]))  # the load never ends
        pages.requests([request(5, flags=MEM_PAGING_DROP_PAGE)], 0.0)
        assert from_mask(pages.rejoin()).tolist() == [2, 3, 4]
        assert pages.count == 3
        assert pages.requested().tolist() == [2, 4]
        states = pages.states[[1, 2, 3, 4, 5]].tolist()
        assert states == [READY, REQUESTED, OUTSTANDING, REQUESTED, DROPPED]
        assert self.load(pages, 2, 3, 4) == waiting
        assert pages.count == pages.waiting == 0

    def test_each_request_is_answered_with_the_time_at_which_it_was_made(self) -> None:
        pages = self.pages(5, 6)
        pages.requests([request(5), request(6)], 1.5)
        pages.requests([request(5, vcpu=1)], 2.5)
        assert pages.waits_since() == 1.5
        assert pages.requested().tolist() == [5, 6]
        pages.claim(pfn_array([5]))
        assert pages.requested().tolist() == [6]
        actions = pages.finished(pfn_array([5]), np.zeros(1, dtype=np.int32))
        assert actions.answer == [(request(5), 1.5), (request(5, vcpu=1), 2.5)]
        assert pages.waiting == 1

    def test_the_longest_wait_is_of_those_who_wait(self) -> None:
        pages = self.pages(5, 6)
        assert pages.waits_since() is None
        pages.requests([request(5)], 1.5)
        pages.requests([request(6, flags=MEM_PAGING_EVICT_FAIL)], 2.5)
        assert self.load(pages, 5) == [request(5)]
        assert pages.waits_since() == 2.5

    def test_as_many_requests_wait_as_a_ring_has_slots_and_one_more_changes_nothing(self) -> None:
        pages = self.pages(*range(NR))
        first = [request(pfn) for pfn in range(VM_EVENT_SLOTS - 1)]
        pages.requests(first, 0.0)
        with pytest.raises(XenError, match="the ring is corrupt"):
            pages.requests([request(20), request(21)], 0.0)
        assert pages.waiting == VM_EVENT_SLOTS - 1
        assert pages.states[20] == pages.states[21] == OUTSTANDING
        pages.requests([request(20)], 0.0)
        with pytest.raises(XenError, match="the ring is corrupt"):
            pages.requests([request(20, vcpu=1)], 0.0)
        assert self.load(pages, *range(NR)) == [*first, request(20)]

    def test_a_load_that_was_given_up_is_asked_for_only_if_a_vcpu_waits(self) -> None:
        pages = self.pages(1, 2)
        pages.requests([request(1)], 0.0)
        pages.claim(pfn_array([1, 2]))
        pages.pages.unclaim(pfn_array([1, 2]))
        assert pages.states[[1, 2]].tolist() == [REQUESTED, OUTSTANDING]
        assert pages.requests([request(2)], 0.0).ask.tolist() == [2]

    def test_a_page_that_was_never_missing_is_refused(self) -> None:
        pages = self.pages(5)
        for pfn in (7, NR):
            with pytest.raises(RemoteProtocolError, match=f"{pfn:#x} was not announced"):
                pages.claim(pfn_array([5, pfn]))
        assert pages.states[5] == OUTSTANDING


class BothEnds(RuleBasedStateMachine):
    """The two machines, joined by two lanes that deliver at any time."""

    def __init__(self) -> None:
        super().__init__()
        missing = range(0, NR, 2)
        self.backlog = backlog_of(*missing)
        self.pages = OutstandingPages(NR)
        self.pages.add(pfn_array(list(missing)))
        self.push: list[np.typing.NDArray[np.uint64]] = []
        self.pull: list[np.typing.NDArray[np.uint64]] = []
        self.asked: list[np.typing.NDArray[np.uint64]] = []
        self.open: list[PagingRequest] = []
        self.loads: dict[int, int] = {}
        self.gone: set[int] = set()

    def answer(self, answers: list[tuple[PagingRequest, float]]) -> None:
        for answered, _since in answers:
            self.open.remove(answered)  # ValueError if it is answered twice
            assert answered.pfn in self.loads or answered.pfn in self.gone or answered.pfn % 2

    def take(self, requests: list[PagingRequest]) -> None:
        self.open += requests
        actions = self.pages.requests(requests, 0.0)
        self.gone.update(actions.dropped.tolist())
        self.answer(actions.answer)
        if len(actions.ask):
            self.asked.append(actions.ask)
        if len(actions.dropped):
            self.backlog.dropped(actions.dropped)

    @rule(pfn=st.integers(0, NR - 1), vcpu=st.integers(0, 3))
    def touch(self, pfn: int, vcpu: int) -> None:
        if pfn not in self.gone and pfn not in self.loads and len(self.open) < VM_EVENT_SLOTS:
            self.take([request(pfn, vcpu)])

    @rule(pfn=st.integers(0, NR // 2 - 1), told=st.booleans())
    def balloon(self, pfn: int, told: bool) -> None:
        pfn *= 2
        if pfn in self.loads or pfn in self.gone or any(r.pfn == pfn for r in self.open):
            return
        if told and len(self.open) < VM_EVENT_SLOTS:
            self.take([request(pfn, flags=MEM_PAGING_DROP_PAGE)])
        else:
            self.gone.add(pfn)  # the ring is full

    @rule(most=st.integers(1, 8))
    def push_batch(self, most: int) -> None:
        batch = self.backlog.next_batch(most)
        if len(batch):
            self.push.append(batch)

    @rule()
    def serve_fault(self) -> None:
        if self.asked:
            wanted = self.backlog.fault(self.asked.pop(0))
            if len(wanted):
                self.pull.append(wanted)

    @rule(lane=st.sampled_from(["push", "pull"]))
    def deliver(self, lane: str) -> None:
        queue = self.push if lane == "push" else self.pull
        if not queue:
            return
        batch = queue.pop(0)
        batch = batch[self.pages.claim(batch)]
        results = np.array(
            [-2 if pfn in self.gone else 0 for pfn in batch.tolist()], dtype=np.int32
        )
        for pfn in batch[results == 0].tolist():
            self.loads[pfn] = self.loads.get(pfn, 0) + 1
        actions = self.pages.finished(batch, results)
        self.answer(actions.answer)
        if len(actions.loaded):
            self.backlog.loaded(actions.loaded)
        if len(actions.dropped):
            self.backlog.dropped(actions.dropped)

    @invariant()
    def no_page_is_loaded_twice(self) -> None:
        assert all(count == 1 for count in self.loads.values())

    def teardown(self) -> None:
        while self.push or self.pull or self.asked or self.backlog.unsent:
            self.push_batch(8)
            self.serve_fault()
            self.deliver("push")
            self.deliver("pull")
        assert self.pages.count == self.backlog.unacknowledged == 0
        assert not self.open
        assert set(self.loads) | self.gone == set(range(0, NR, 2))


TestBothEnds = BothEnds.TestCase


# ---- pages whose mapping was given up ----
def test_pages_that_have_arrived_meanwhile_are_not_sent_again() -> None:
    """Their mapping is given up as soon as the receiver has loaded them, and then there is a
    hole.
    """
    backlog, pfns = backlog_of(1, 2, 3), pfn_array([1, 2, 3])
    backlog.rejoin(mask(1))
    mapped = MappedPages(
        np.array([PageStatus.DATA, PageStatus.HOLE, PageStatus.HOLE], np.uint8),
        [memoryview(bytes(4096))],
    )
    message = announce_missing(pfns, mapped, backlog)
    assert message is not None and message.pfns.tolist() == [1] and not len(message.holes)
    assert announce_missing(pfns[1:], MappedPages(mapped.status[1:], []), backlog) is None


def test_a_page_that_is_missing_and_not_held_any_more_is_an_error() -> None:
    mapped = MappedPages(np.array([PageStatus.HOLE], np.uint8), [])
    with pytest.raises(
        MigrationError, match="1 missing pages of the guest are not held any more: pfn 0x2"
    ):
        announce_missing(pfn_array([2]), mapped, backlog_of(2))
