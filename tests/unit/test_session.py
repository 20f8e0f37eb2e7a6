# SPDX-License-Identifier: GPL-2.0-or-later
"""The session machine: two ends joined in memory follow the protocol, and each refuses what the
protocol does not allow.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.pfns import pfn_array
from migrate.protocol.session import (
    RULES,
    Phase,
    Role,
    Session,
    answer_token,
    hello,
    is_answer,
    is_session_id,
    negotiate,
    new_id,
    new_token,
    number_of_rejoin,
    rejoin_token,
)
from tests.support.stories import (
    DECIDED,
    EXAMPLES,
    LOST,
    OFFER,
    ONE,
    PROTECTED,
    PULL,
    PUSH,
    STORY,
    UNDER_XL,
    R,
    S,
    play,
    rejoined,
)


def test_a_whole_migration_is_allowed() -> None:
    ends = play(STORY)
    assert ends[S].phase == ends[R].phase == Phase.CLOSED
    assert ends[S].handed_over


def test_a_guest_may_be_protected() -> None:
    assert play(PROTECTED)[S].phase is Phase.CLOSED


@pytest.mark.parametrize(
    ("until", "sent", "complaint"),
    [
        (m.Resumed, (R, m.Written(pfn_array([2000])), PUSH), "the domain ends at"),
        (m.Ready, (R, m.Written(ONE), PUSH), "written in phase switchover"),
        (m.Ready, (R, m.Checkpoint(b"", True), PUSH), "checkpoint in phase switchover"),
        (m.Resumed, (S, m.Kept(""), PUSH), "kept before the checkpoint"),
        (m.Resumed, (S, m.Written(ONE), PUSH), "written from the sender"),
        (m.Checkpoint, (R, m.Written(ONE), PUSH), "written before the last checkpoint was kept"),
        (m.Complete, (R, m.Written(ONE), PUSH), "written in phase complete"),
    ],
)
def test_checkpoints_out_of_order(
    until: type[m.Message], sent: tuple[Role, m.Message, Lane], complaint: str
) -> None:
    last = max(
        i for i, (_speaker, message, _lane) in enumerate(PROTECTED) if isinstance(message, until)
    )
    ends = play(PROTECTED[: last + 1])
    with pytest.raises(RemoteProtocolError, match=complaint):
        ends[Role(1 - sent[0])].received(sent[1], sent[2])


def test_checkpoints_that_were_not_agreed_on() -> None:
    ends = play(STORY[: next(i for i, sent in enumerate(STORY) if isinstance(sent[1], m.Complete))])
    for message in (m.Written(ONE), m.Checkpoint(b"", True), m.Unprotected("")):
        with pytest.raises(RemoteProtocolError, match="offered without checkpoints"):
            ends[S].received(message, PUSH)


def test_a_toolstack_may_decide_who_has_the_guest() -> None:
    ends = play(UNDER_XL)
    assert ends[S].phase == ends[R].phase == Phase.DECISION
    assert ends[S].serving and not ends[S].handed_over
    ends = play(DECIDED)
    assert ends[S].phase == ends[R].phase == Phase.CLOSED
    assert ends[R].handed_over


def test_a_toolstack_may_leave_the_guest_paused() -> None:
    """All of the guest's memory has arrived, and ``resumed`` was never sent."""
    ends = play([sent for sent in DECIDED if not isinstance(sent[1], m.Resumed)])
    assert ends[S].phase == ends[R].phase == Phase.CLOSED


@pytest.mark.parametrize(
    ("sent_by", "message"),
    [
        (S, m.Abort("xl resumed it")),
        (R, m.Ended(False, "xl destroyed it")),
        (R, m.Ended(True, "it crashed")),
    ],
)
def test_while_it_decides_each_end_may_say_what_it_sees(sent_by: Role, message: m.Message) -> None:
    play([*UNDER_XL, (sent_by, message, PUSH)])


@pytest.mark.parametrize(
    ("story", "sent_by", "message", "what"),
    [
        (STORY[:5], S, m.Entrust(), "entrust in phase precopy"),
        (UNDER_XL, S, m.Entrust(), "entrust in phase decision"),
        (UNDER_XL, R, m.Complete(b"{}"), "complete in phase decision"),
        (UNDER_XL, S, m.Pages(ONE, holes=pfn_array([2])), "holes after the switchover"),
        (DECIDED[:-2], S, m.Abort("no"), "abort in phase postcopy"),
    ],
)
def test_but_nothing_else(
    story: list[tuple[Role, m.Message, Lane]], sent_by: Role, message: m.Message, what: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        play(story)[Role(1 - sent_by)].received(message, PUSH)


@pytest.mark.parametrize("asked", [False, True])
def test_a_sender_may_say_on_new_lanes_that_the_pages_are_lost(asked: bool) -> None:
    ends = play(
        [*STORY[: STORY.index(next(sent for sent in STORY if isinstance(sent[1], m.Handover))) + 1]]
    )
    for end in ends.values():
        end.rejoin()
    if asked:
        ends[R].received(m.Rejoin(), PUSH)
    ends[R].received(m.Lost("gone"), PUSH)
    assert ends[R].phase is Phase.FAILED
    with pytest.raises(RemoteProtocolError, match="lost in phase postcopy"):
        play(after(m.Resumed))[R].received(m.Lost("gone"), PUSH)


def test_every_message_has_its_rule() -> None:
    assert set(RULES) | {m.Hello, m.Alive, m.Host} == set(m.TYPES.values())


@given(
    st.integers(0, len(STORY)),
    st.sampled_from(EXAMPLES),
    st.sampled_from([PUSH, PULL]),
    st.sampled_from([S, R]),
)
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
        assert rule.sent_by != hearer
        assert rule.lane in (None, lane)
        assert before <= max(rule.phases) or before in (
            Phase.COMPLETE,
            Phase.CLOSED,
            Phase.SWITCHOVER,
        )


def after(message_type: type[m.Message]) -> list[tuple[Role, m.Message, Lane]]:
    """Return the story up to the last message of a type, inclusive."""
    last = max(
        i for i, (_speaker, message, _lane) in enumerate(STORY) if type(message) is message_type
    )
    return STORY[: last + 1]


@pytest.mark.parametrize(
    ("story", "sent_by", "message", "lane", "why"),
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
        (
            after(m.Resumed),
            S,
            m.Pages(ONE, holes=pfn_array([2])),
            PUSH,
            "holes after the switchover",
        ),
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
    story: list[tuple[Role, m.Message, Lane]],
    sent_by: Role,
    message: m.Message,
    lane: Lane,
    why: str,
) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        play(story)[Role(1 - sent_by)].received(message, lane)
    with pytest.raises(LocalProtocolError, match=why):
        play(story)[sent_by].sent(message, lane)


@pytest.mark.parametrize("lost_after", [m.Handover, m.Resumed, m.Loaded, m.Complete])
def test_a_session_continues_over_new_lanes(lost_after: type[m.Message]) -> None:
    ends = play([*after(lost_after), *rejoined("postcopy"), *STORY[len(after(m.Handover)) :]])
    assert ends[S].phase == ends[R].phase == Phase.CLOSED


def test_what_the_receiver_did_not_receive_is_sent_again() -> None:
    ends = play(after(m.Ready))
    ends[S].sent(m.Handover(), PUSH)  # this message is lost
    assert ends[S].handed_over
    for end in ends.values():
        end.rejoin()
    for sent_by, message, lane in [*rejoined("switchover"), *STORY[len(after(m.Ready)) :]]:
        ends[sent_by].sent(message, lane)
        ends[Role(1 - sent_by)].received(message, lane)
    assert ends[S].phase == ends[R].phase == Phase.CLOSED


@pytest.mark.parametrize(
    ("sent_by", "message"),
    [
        (S, m.Completed()),
        (R, m.Complete(b"{}")),
        (R, m.Ended(True, "it was destroyed")),
        (R, m.Failed("help")),
    ],
)
def test_instead_of_rejoining_an_end_may_say_how_it_has_ended(
    sent_by: Role, message: m.Message
) -> None:
    first = [LOST] if sent_by is R else []
    ends = play(after(m.Loaded))
    for end in ends.values():
        end.rejoin()
    for who, what, lane in [*first, (sent_by, message, PUSH)]:
        ends[who].sent(what, lane)
        ends[Role(1 - who)].received(what, lane)


def test_a_sender_whose_journal_has_lost_the_handover_may_abort_on_new_lanes() -> None:
    """The receiver has proof of two owners.  A sender that has sent the handover never sends
    this.
    """
    ends = play(after(m.Loaded))
    for end in ends.values():
        end.rejoin()
    with pytest.raises(LocalProtocolError, match="abort after the handover"):
        ends[S].sent(m.Abort("no"), PUSH)
    ends[R].received(m.Abort("no"), PUSH)
    assert ends[R].phase is Phase.FAILED


@pytest.mark.parametrize(
    ("story", "sent_by", "message", "why"),
    [
        ([*after(m.Loaded), LOST], S, m.Rejoin(), "a second time"),
        ([*after(m.Loaded), LOST], S, m.Abort("no"), "abort after the handover"),
        ([*after(m.Loaded), LOST], S, m.Handover(), "handover in phase rejoin"),
        ([*after(m.Loaded), LOST], S, m.Pages(ONE), "pages in phase rejoin"),
        ([*after(m.Loaded), LOST], R, m.Outstanding(1024, b"\x01"), "beyond"),
        ([*after(m.Loaded), LOST], R, m.Rejoined("precopy", b""), "rejoined in phase 'precopy'"),
        ([*after(m.Loaded), LOST], R, m.Loaded(ONE), "loaded in phase rejoin"),
        ([*UNDER_XL, LOST], R, m.Rejoined("postcopy", b""), "rejoined in phase 'postcopy'"),
        ([*after(m.Loaded), *rejoined("postcopy")], S, m.Handover(), "handover in phase postcopy"),
        (
            [*after(m.Loaded), *rejoined("postcopy")],
            R,
            m.Complete(b"{}"),
            "complete before resumed",
        ),
        ([*after(m.Loaded), *rejoined("postcopy")], S, m.Abort("no"), "abort in phase postcopy"),
    ],
)
def test_and_nothing_else(
    story: list[tuple[Role, m.Message, Lane]], sent_by: Role, message: m.Message, why: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        play(story)[Role(1 - sent_by)].received(message, PUSH)


def test_a_receiver_says_nothing_before_it_is_asked() -> None:
    ends = play(after(m.Loaded))
    ends[S].rejoin()
    with pytest.raises(RemoteProtocolError, match="rejoined before rejoin"):
        ends[S].received(m.Rejoined("postcopy", b""), PUSH)


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_restarted_sender_takes_up_the_session_of_its_predecessor(handed_over: bool) -> None:
    sender = Session.of_predecessor(
        S, OFFER.nr_pfns, handed_over=handed_over, protected=False, entrusted=False
    )
    receiver = play(after(m.Resumed if handed_over else m.Ready))[R]
    ends = {S: sender, R: receiver}
    for end in ends.values():
        end.rejoin()
    assert sender.serving == handed_over
    reached, spoken = ("postcopy", m.Handover) if handed_over else ("switchover", m.Ready)
    for sent_by, message, lane in [*rejoined(reached), *STORY[len(after(spoken)) :]]:
        ends[sent_by].sent(message, lane)
        ends[Role(1 - sent_by)].received(message, lane)
    assert sender.resumed
    assert sender.phase is receiver.phase is Phase.CLOSED


@pytest.mark.parametrize("protected", [False, True])
def test_a_predecessor_s_session_allows_checkpoints_only_if_agreed_on(protected: bool) -> None:
    sender = Session.of_predecessor(
        S, OFFER.nr_pfns, handed_over=True, protected=protected, entrusted=False
    )
    sender.rejoin()
    sender.sent(m.Rejoin(), PUSH)
    sender.received(m.Rejoined("postcopy", b""), PUSH)
    if protected:
        sender.received(m.Written(ONE), PUSH)
    else:
        with pytest.raises(RemoteProtocolError, match="offered without checkpoints"):
            sender.received(m.Written(ONE), PUSH)


def test_the_number_of_a_session_can_name_a_file() -> None:
    assert is_session_id(new_id()) and new_id() != new_id()
    for forged in ("", "../etc/passwd", "a/b", "a.b", "a b", "\u0661"):
        assert not is_session_id(forged)


def test_only_who_has_the_key_can_rejoin_and_once() -> None:
    key = new_token()
    assert number_of_rejoin(key, rejoin_token(key, 3)) == 3
    assert number_of_rejoin(new_token(), rejoin_token(key, 3)) == 0
    forged = (4).to_bytes(4, "big") + rejoin_token(key, 3)[4:]
    assert number_of_rejoin(key, forged) == number_of_rejoin(key, b"") == 0


def test_only_the_key_gives_the_answer_to_a_token() -> None:
    key, token = new_token(), rejoin_token(new_token(), 3)
    answer = answer_token(key, token)
    assert is_answer(key, token, answer) and len(answer) == 32
    assert not is_answer(new_token(), token, answer)
    assert not is_answer(key, new_token(), answer)
    assert not is_answer(key, token, b"") and not is_answer(key, token, token)


def test_messages_that_cross_are_allowed() -> None:
    """The peer sent these before it received that we are in the next phase."""
    sender = play(after(m.Barrier))[S]
    sender.sent(m.Suspended(), PUSH)
    sender.received(m.Passed(1), PUSH)
    receiver = play(after(m.Complete))[R]
    for lane in (PUSH, PULL):
        receiver.received(m.Pages(ONE), lane)
    sender = play(STORY)[S]
    sender.received(m.Fault(ONE), PULL)


def test_without_paging_nothing_can_be_missing() -> None:
    story = [(S, m.Offer("guest", 1024, 1024, 1, b"", False, b"key", 0), PUSH), STORY[1]]
    with pytest.raises(RemoteProtocolError, match="without paging"):
        play(story)[R].received(m.Defer(0, b"\x01"), PUSH)


@pytest.mark.parametrize(
    ("nr_pfns", "base", "bitmap", "allowed"),
    [
        (1024, 1016, b"\xff", True),
        (1020, 1016, b"\x0f", True),  # only the bits of the last byte that are below the end
        (1020, 1016, b"\x10", False),
        (1020, 1016, b"\x0f\x00", False),  # a byte that is entirely beyond the end
        (1020, 1016, b"", False),
    ],
)
def test_a_window_ends_where_the_domain_ends(
    nr_pfns: int, base: int, bitmap: bytes, allowed: bool
) -> None:
    story = [(S, dataclasses.replace(OFFER, nr_pfns=nr_pfns), PUSH), STORY[1]]
    receiver = play(story)[R]
    if allowed:
        receiver.received(m.Defer(base, bitmap), PUSH)
    else:
        with pytest.raises(RemoteProtocolError, match="window"):
            receiver.received(m.Defer(base, bitmap), PUSH)


def test_versions_and_capabilities_are_negotiated() -> None:
    ours = hello(PUSH, "s")
    assert negotiate(ours) == m.PROTOCOL_VERSION
    for oldest, newest in itertools.product((2, 9), (9, 12)):
        with pytest.raises(ProtocolError, match="same release"):
            negotiate(m.Hello(oldest, newest, "push", "s", b"", (), (), "other"))
    with pytest.raises(ProtocolError, match="teleportation"):
        negotiate(m.Hello(1, 1, "push", "s", b"", ("teleportation",), (), "other"))
    newer = m.Hello(
        1, 7, "push", "s", b"", (), ("teleportation",), "newer, but it still speaks ours"
    )
    assert negotiate(newer) == 1
