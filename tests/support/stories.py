# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of each kind, and sessions from their beginning to their end."""

from __future__ import annotations

import dataclasses

from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.pfns import pfn_array
from migrate.protocol.session import (
    Role,
    Session,
)

EXAMPLES: list[m.Message] = [
    m.Hello(1, 1, "push", "abc", b"t", ("x",), ("y", "z"), "test"),
    m.Alive(),
    m.Host("built without memory paging", "none", 2**40, "host2:8014", "receiver"),
    m.Offer("guest", 1024, 1000, 2, b"config", True, b"key", 1000),
    m.Pages(pfn_array([1, 5]), pfn_array([2]), pfn_array([9])),
    m.Defer(0, b"\xff"),
    m.Barrier(7),
    m.Suspended(),
    m.Missing(pfn_array([8])),
    m.Context(b"registers", True),
    m.Entrust(),
    m.Handover(),
    m.Kept(""),
    m.Rejoin(),
    m.Completed(),
    m.Abort("because"),
    m.Accepted("native", b"token"),
    m.Refused("no", False),
    m.Passed(7),
    m.Ready(),
    m.Resumed(),
    m.Loaded(pfn_array([1, 2])),
    m.Dropped(pfn_array([3])),
    m.Report(10, 20, 30),
    m.Waits(40),
    m.Written(pfn_array([1, 5]), pfn_array([2]), pfn_array([9])),
    m.Checkpoint(b"registers", True),
    m.Unprotected("another program has switched its log-dirty off"),
    m.Outstanding(0, b"\xff"),
    m.Rejoined("postcopy", b"token"),
    m.Complete(b"{}"),
    m.Ended(True, "it was destroyed"),
    m.Failed("help"),
    m.Lost("gone with the sender"),
    m.Recall("an operator has decided so"),
    m.Fault(pfn_array([4])),
    m.Ahead(pfn_array([5, 6])),
]


S, R = Role.SENDER, Role.RECEIVER


PUSH, PULL = Lane.PUSH, Lane.PULL


ONE = pfn_array([1])


OFFER = m.Offer("guest", 1024, 1024, 1, b"", True, b"key", 0)


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
    (R, m.Waits(0), PUSH),
    (R, m.Complete(b"{}"), PUSH),
    (S, m.Completed(), PUSH),
]


UNDER_XL = [
    *STORY[: next(i for i, sent in enumerate(STORY) if isinstance(sent[1], m.Handover))],
    (S, m.Entrust(), PUSH),
]


DECIDED = [
    *UNDER_XL, (R, m.Fault(ONE), PULL), (S, m.Pages(ONE), PULL), (R, m.Resumed(), PUSH),
    (S, m.Pages(ONE), PUSH), (R, m.Loaded(ONE), PUSH), (R, m.Report(0, 0, 0), PUSH),
    (S, m.Handover(), PUSH), (R, m.Complete(b"{}"), PUSH), (S, m.Completed(), PUSH),
]  # fmt: skip


LOST: tuple[Role, m.Message, Lane] = (S, m.Rejoin(), PUSH)
"""The first message on new lanes, when both ends have lost theirs."""


def rejoined(reached: str) -> list[tuple[Role, m.Message, Lane]]:
    return [LOST, (R, m.Outstanding(0, b"\x02"), PUSH), (R, m.Rejoined(reached, b"t"), PUSH)]


def play(story: list[tuple[Role, m.Message, Lane]]) -> dict[Role, Session]:
    ends = {S: Session(S), R: Session(R)}
    for sent_by, message, lane in story:
        if message is LOST[1]:
            for end in ends.values():
                end.rejoin()
        ends[sent_by].sent(message, lane)
        ends[Role(1 - sent_by)].received(message, lane)
    return ends


PROTECTED = [
    (S, dataclasses.replace(OFFER, checkpoint_ms=1000), PUSH),
    *STORY[1 : next(i for i, sent in enumerate(STORY) if isinstance(sent[1], m.Complete))],
    (R, m.Written(ONE, holes=pfn_array([3])), PUSH), (R, m.Checkpoint(b"a", False), PUSH),
    (R, m.Checkpoint(b"b", True), PUSH), (S, m.Kept(""), PUSH), (R, m.Written(ONE), PUSH),
    (R, m.Checkpoint(b"c", True), PUSH), (S, m.Kept(""), PUSH),
    (R, m.Unprotected("no log-dirty"), PUSH), (R, m.Complete(b"{}"), PUSH),
    (S, m.Completed(), PUSH),
]  # fmt: skip
