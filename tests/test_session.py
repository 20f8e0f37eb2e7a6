"""The session machine: two ends joined in memory follow the protocol, and neither lets the other leave it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import messages as m
from migrate.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from migrate.messages import Lane
from migrate.pfns import pfn_array
from migrate.session import RULES, Phase, Role, Session, hello, negotiate
from tests.test_messages import EXAMPLES

S, R = Role.SENDER, Role.RECEIVER
PUSH, PULL = Lane.PUSH, Lane.PULL
ONE = pfn_array([1])
OFFER = m.Offer("guest", 1024, 1024, 1, b"", True)

STORY: list[tuple[Role, m.Message, Lane]] = [
    (S, OFFER, PUSH),
    (R, m.Accepted("native", b"t"), PUSH),
    (S, m.Pages(ONE), PUSH),
    (S, m.Defer(0, b"\x02"), PUSH),
    (S, m.Barrier(1), PUSH),
    (R, m.Passed(1), PUSH),
    (S, m.Suspended(), PUSH),
    (S, m.Pages(ONE, holes=pfn_array([3])), PUSH),
    (S, m.Missing(pfn_array([2])), PUSH),
    (S, m.Context(b"a", False), PUSH),
    (S, m.Context(b"b", True), PUSH),
    (R, m.Ready(), PUSH),
    (S, m.Handover(), PUSH),
    (R, m.Resumed(), PUSH),
    (R, m.Fault(ONE), PULL),
    (R, m.Ahead(ONE), PULL),
    (S, m.Pages(ONE), PULL),
    (S, m.Pages(ONE), PUSH),
    (R, m.Loaded(ONE), PUSH),
    (R, m.Dropped(ONE), PUSH),
    (R, m.Report(0, 0, 0), PUSH),
    (R, m.Complete(b"{}"), PUSH),
    (S, m.Completed(), PUSH),
]


UNDER_XL = [
    *STORY[: next(i for i, said in enumerate(STORY) if isinstance(said[1], m.Handover))],
    (S, m.Entrust(), PUSH),
]
DECIDED = [
    *UNDER_XL, (R, m.Fault(ONE), PULL), (S, m.Pages(ONE), PULL), (R, m.Resumed(), PUSH), (S, m.Pages(ONE), PUSH),
    (R, m.Loaded(ONE), PUSH), (R, m.Report(0, 0, 0), PUSH), (S, m.Handover(), PUSH), (R, m.Complete(b"{}"), PUSH),
    (S, m.Completed(), PUSH),
]  # fmt: skip


def play(story: list[tuple[Role, m.Message, Lane]]) -> dict[Role, Session]:
    ends = {S: Session(S), R: Session(R)}
    for speaker, message, lane in story:
        ends[speaker].sent(message, lane)
        ends[Role(1 - speaker)].received(message, lane)
    return ends


def test_a_whole_migration_is_allowed() -> None:
    ends = play(STORY)
    assert ends[S].phase == ends[R].phase == Phase.CLOSED
    assert ends[S].handed_over


def test_a_toolstack_may_decide_who_has_the_guest() -> None:
    ends = play(UNDER_XL)
    assert ends[S].phase == ends[R].phase == Phase.DECISION
    assert ends[S].serving and not ends[S].handed_over
    ends = play(DECIDED)
    assert ends[S].phase == ends[R].phase == Phase.CLOSED
    assert ends[R].handed_over


@pytest.mark.parametrize(
    ("speaker", "message"),
    [(S, m.Abort("xl resumed it")), (R, m.Ended(False, "xl destroyed it")), (R, m.Ended(True, "it crashed"))],
)
def test_while_it_decides_each_end_may_say_what_it_sees(speaker: Role, message: m.Message) -> None:
    play([*UNDER_XL, (speaker, message, PUSH)])


@pytest.mark.parametrize(
    ("story", "speaker", "message", "what"),
    [
        (STORY[:5], S, m.Entrust(), "entrust in phase precopy"),
        (UNDER_XL, S, m.Entrust(), "entrust in phase decision"),
        (UNDER_XL, R, m.Complete(b"{}"), "complete in phase decision"),
        (UNDER_XL, S, m.Pages(ONE, holes=pfn_array([2])), "holes after the switchover"),
        (DECIDED[:-2], S, m.Abort("no"), "abort in phase postcopy"),
    ],
)
def test_but_nothing_else(
    story: list[tuple[Role, m.Message, Lane]], speaker: Role, message: m.Message, what: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        play(story)[Role(1 - speaker)].received(message, PUSH)


def test_every_message_has_its_rule() -> None:
    assert set(RULES) | {m.Hello} == set(m.TYPES.values())


@given(st.integers(0, len(STORY)), st.sampled_from(EXAMPLES), st.sampled_from([PUSH, PULL]), st.sampled_from([S, R]))
def test_at_any_point_any_message_is_allowed_by_its_rule_or_refused(
    length: int, message: m.Message, lane: Lane, hearer: Role
) -> None:
    end = play(STORY[:length])[hearer]
    before = end.phase
    try:
        end.received(message, lane)
    except RemoteProtocolError as error:
        assert message.type in str(error)
        assert end.phase == before
    else:
        rule = RULES[type(message)]
        assert rule.speaker != hearer
        assert rule.lane in (None, lane)
        assert before <= max(rule.phases) or before in (Phase.COMPLETE, Phase.CLOSED, Phase.SWITCHOVER)


def after(message_type: type[m.Message]) -> list[tuple[Role, m.Message, Lane]]:
    """The story up to and with the last message of a type."""
    last = max(i for i, (_speaker, message, _lane) in enumerate(STORY) if type(message) is message_type)
    return STORY[: last + 1]


@pytest.mark.parametrize(
    ("story", "speaker", "message", "lane", "why"),
    [
        (after(m.Handover), S, m.Handover(), PUSH, "handover in phase postcopy"),
        (after(m.Handover), S, m.Abort("no"), PUSH, "abort in phase postcopy"),
        (after(m.Context), S, m.Handover(), PUSH, "handover before ready"),
        (after(m.Missing), R, m.Ready(), PUSH, "ready before the context"),
        (after(m.Ready), R, m.Ready(), PUSH, "a second time"),
        (after(m.Context), S, m.Context(b"", True), PUSH, "a second time"),
        (after(m.Handover), R, m.Complete(b"{}"), PUSH, "complete before resumed"),
        (after(m.Resumed), R, m.Resumed(), PUSH, "a second time"),
        (after(m.Accepted), S, m.Pages(ONE), PULL, "pull lane before the switchover"),
        (after(m.Resumed), S, m.Pages(ONE, holes=pfn_array([2])), PUSH, "holes after the switchover"),
        (after(m.Resumed), R, m.Fault(pfn_array([1024])), PULL, "ends at 0x400"),
        (after(m.Resumed), R, m.Fault(ONE), PUSH, "on the push lane"),
        (after(m.Resumed), R, m.Ahead(pfn_array([1024])), PULL, "ends at 0x400"),
        (after(m.Accepted), S, m.Pages(pfn_array([5000])), PUSH, "ends at"),
        (after(m.Accepted), S, m.Defer(1024, b"\x01"), PUSH, "beyond"),
        (after(m.Accepted), S, m.Defer(4, b"\x01"), PUSH, "multiple of 8"),
        (after(m.Accepted), R, m.Passed(9), PUSH, "no such barrier"),
        (after(m.Barrier), S, m.Barrier(1), PUSH, "in use"),
        (after(m.Ready), R, m.Loaded(ONE), PUSH, "loaded in phase switchover"),
        (STORY, S, m.Pages(ONE), PUSH, "in phase closed"),
        ([], S, m.Pages(ONE), PUSH, "in phase hello"),
        ([], R, OFFER, PUSH, "from the receiver"),
    ],
)
def test_what_is_out_of_order_is_refused_at_both_ends(
    story: list[tuple[Role, m.Message, Lane]], speaker: Role, message: m.Message, lane: Lane, why: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        play(story)[Role(1 - speaker)].received(message, lane)
    with pytest.raises(LocalProtocolError, match=why):
        play(story)[speaker].sent(message, lane)


def test_messages_that_cross_are_allowed() -> None:
    """What the peer said before it could know that we had gone on."""
    sender = play(after(m.Barrier))[S]
    sender.sent(m.Suspended(), PUSH)
    sender.received(m.Passed(1), PUSH)
    receiver = play(after(m.Complete))[R]
    for lane in (PUSH, PULL):
        receiver.received(m.Pages(ONE), lane)
    sender = play(STORY)[S]
    sender.received(m.Fault(ONE), PULL)


def test_without_paging_nothing_can_be_missing() -> None:
    story = [(S, m.Offer("guest", 1024, 1024, 1, b"", False), PUSH), STORY[1]]
    with pytest.raises(RemoteProtocolError, match="without paging"):
        play(story)[R].received(m.Defer(0, b"\x01"), PUSH)


def test_versions_and_capabilities_are_negotiated() -> None:
    ours = hello(PUSH, "s")
    assert negotiate(ours) == m.PROTOCOL_VERSION
    for oldest, newest in itertools.product((2, 9), (9, 12)):
        with pytest.raises(ProtocolError, match="same release"):
            negotiate(m.Hello(oldest, newest, "push", "s", b"", (), (), "other"))
    with pytest.raises(ProtocolError, match="teleportation"):
        negotiate(m.Hello(1, 1, "push", "s", b"", ("teleportation",), (), "other"))
    newer = m.Hello(1, 7, "push", "s", b"", (), ("teleportation",), "newer, but it still speaks ours")
    assert negotiate(newer) == 1
