# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages: the contents of frames.  Each message is one class; its fields are its wire format.

A message is a frozen dataclass whose fields carry their limits.  :func:`parse` makes a message of a
frame's header, or raises :class:`RemoteProtocolError` with the name of the field.
``docs/protocol.md`` defines the meaning of each message and when it may be sent;
:mod:`migrate.protocol.session` enforces when.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from migrate.errors import RemoteProtocolError
from migrate.options import MAX_CHECKPOINT_MS
from migrate.protocol.fields import (
    InvalidFieldError,
    Parser,
    bytes_field,
    flag_field,
    pfns_field,
    text_field,
    texts_field,
    uint_field,
)
from migrate.protocol.frames import MAX_HEADER_BYTES, MAX_PAYLOAD_PAGES
from migrate.protocol.pfns import MAX_PFN, NO_PFNS, WINDOW_PFNS
from xenbackend.pages import PAGE_SIZE, PfnArray

PROTOCOL_VERSION = 1
MAX_PFNS = 8192
"""The most pfns in one list of one message."""
MAX_FAULT_PFNS = 64
MAX_AHEAD_PFNS = 1024
MAX_CONTEXT_CHUNK = 128 * 1024
MAX_TEXT = 1024
CHECKSUMS = "checksums"
PAUSED = "paused"
"""Allows ``complete`` without ``resumed``: a toolstack has left the guest paused, and all its
memory has arrived.
"""
LOST, UNPROTECTED, RECALL, WAITS = "lost", "unprotected", "recall", "waits"
"""The messages of these names."""
ALIVE_EACH_SECOND = "alive-each-second"
"""This end pauses for at most a second between two messages on a lane."""
PROOF = "proof"
"""This end proves that it has the session's key when it answers a lane that resumes the session."""
PREFLIGHT = "preflight"
"""An end that requires it in its hello begins no session: it asks for ``host``."""
TRIAL = "trial"
"""An end that requires it besides :data:`PREFLIGHT` tries the other host after ``host``: its offers
are judged and not carried out, and its pages are discarded.
"""
CAPABILITIES = frozenset({
    CHECKSUMS, PAUSED, LOST, UNPROTECTED, RECALL, ALIVE_EACH_SECOND, PROOF, WAITS, PREFLIGHT, TRIAL,
})  # fmt: skip
"""What this end can do.  A capability is used if one end requires it or both ends offer it."""


class Lane(StrEnum):
    PUSH = "push"
    PULL = "pull"


@dataclass(frozen=True, eq=False)
class Message:
    type: ClassVar[str]

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"type": self.type}
        for name in FIELDS[type(self)]:
            value = getattr(self, name)
            header[name] = (
                value.astype("<u8", copy=False).tobytes()
                if isinstance(value, np.ndarray)
                else value
            )
        return header

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.header() == other.header()

    __hash__ = None  # type: ignore[assignment]


# ---- both ends ----
@dataclass(frozen=True, eq=False)
class Hello(Message):
    """The first message on every lane, from both ends; the end that dials sends first."""

    type = "hello"
    oldest: int = uint_field(2**16, 1)
    newest: int = uint_field(2**16, 1)
    lane: str = text_field(8)
    session: str = text_field(64)
    token: bytes = bytes_field(32)
    """On the push lane: the token that the toolstack gave the receiver, otherwise empty.  On the
    pull lane: the token of ``accepted``.
    """
    requires: tuple[str, ...] = texts_field(32)
    """Capabilities without which this end ends the connection."""
    offers: tuple[str, ...] = texts_field(32)
    software: str = text_field(64)


@dataclass(frozen=True, eq=False)
class Alive(Message):
    """Keeps an idle lane alive.  The lane itself sends and consumes it; no session sees it."""

    type = "alive"


@dataclass(frozen=True, eq=False)
class Host(Message):
    """What the host that was dialled could take in.  Answers a hello that requires
    :data:`PREFLIGHT`, on a connection of its own; nothing follows, except a :data:`TRIAL`.
    """

    type = "host"
    problem: str = text_field(MAX_TEXT)
    """Why no guest can be paged there; empty if guests can."""
    populate_evicted: str = text_field(16)
    free_bytes: int = uint_field(2**63)
    """The memory that new guests can have."""
    sender: str = text_field(300)
    """Where receivers of other hosts reach the sender there; empty if it listens for its own host
    only.
    """
    end: str = text_field(16)
    """The daemon that answers: ``sender`` or ``receiver``."""


# ---- sender to receiver, push lane ----
@dataclass(frozen=True, eq=False)
class Offer(Message):
    """The domain; answered by ``accepted`` or ``refused`` before anything else is sent."""

    type = "offer"
    name: str = text_field(64)
    nr_pfns: int = uint_field(MAX_PFN, 1)
    max_pages: int = uint_field(MAX_PFN, 1)
    vcpus: int = uint_field(512, 1)
    platform: bytes = bytes_field(64 * 1024)
    paging: bool = flag_field()
    """Postcopy is possible: the receiver must be able to page."""
    key: bytes = bytes_field(32)
    """The secret with which the session can be resumed when its lanes were lost."""
    checkpoint_ms: int = uint_field(MAX_CHECKPOINT_MS)
    """The interval at which the receiver sends checkpoints back, until completion.  0: no
    checkpoints.
    """


@dataclass(frozen=True, eq=False)
class Pages(Message):
    """Contents of pages.  ``pfns`` have their contents in the payload, in order.  ``zeros`` are
    filled with zeros.  ``holes`` have no memory any more.
    """

    type = "pages"
    pfns: PfnArray = pfns_field(MAX_PAYLOAD_PAGES)
    zeros: PfnArray = pfns_field(MAX_PFNS, default_factory=lambda: NO_PFNS)
    holes: PfnArray = pfns_field(MAX_PFNS, default_factory=lambda: NO_PFNS)


@dataclass(frozen=True, eq=False)
class Defer(Message):
    """A window of pfns to be evicted now.  Each of them is missing, unless ``pages`` has its
    contents before the handover.
    """

    type = "defer"
    base: int = uint_field(MAX_PFN)
    bitmap: bytes = bytes_field(WINDOW_PFNS // 8)


@dataclass(frozen=True, eq=False)
class Barrier(Message):
    """The receiver answers ``passed`` when it has done all that was sent before."""

    type = "barrier"
    number: int = uint_field(2**32)


@dataclass(frozen=True, eq=False)
class Suspended(Message):
    """The guest is suspended: the pages that follow are final."""

    type = "suspended"


@dataclass(frozen=True, eq=False)
class Missing(Message):
    """pfns whose contents come after the handover, besides those that were deferred."""

    type = "missing"
    pfns: PfnArray = pfns_field(MAX_PFNS)


@dataclass(frozen=True, eq=False)
class Context(Message):
    """A piece of the vCPU and device context."""

    type = "context"
    data: bytes = bytes_field(MAX_CONTEXT_CHUNK)
    last: bool = flag_field()


@dataclass(frozen=True, eq=False)
class Entrust(Message):
    """A toolstack is about to decide at which end the guest runs.  The receiver becomes the guest's
    pager, in case the guest runs there.
    """

    type = "entrust"


@dataclass(frozen=True, eq=False)
class Handover(Message):
    """The receiver owns the guest.  The source will never run it again."""

    type = "handover"


@dataclass(frozen=True, eq=False)
class Kept(Message):
    """The sender has the whole checkpoint, and can restore the guest from it.  The receiver may
    make another one.
    """

    type = "kept"
    problem: str = text_field(MAX_TEXT)
    """If not empty: why neither this checkpoint nor a later one is kept."""


@dataclass(frozen=True, eq=False)
class Rejoin(Message):
    """The first message on the new lanes of a session that is resumed: it asks what is
    outstanding.
    """

    type = "rejoin"


@dataclass(frozen=True, eq=False)
class Completed(Message):
    """The sender agrees that nothing is outstanding, and gives up the source domain."""

    type = "completed"


@dataclass(frozen=True, eq=False)
class Abort(Message):
    """The guest stays at the source.  Sent before ``handover``, or first on new lanes."""

    type = "abort"
    reason: str = text_field(MAX_TEXT)


@dataclass(frozen=True, eq=False)
class Lost(Message):
    """The missing pages of the guest no longer exist at any host."""

    type = "lost"
    reason: str = text_field(MAX_TEXT)


@dataclass(frozen=True, eq=False)
class Recall(Message):
    """An operator has decided that the guest continues at the source, although it was handed over.
    The guest must not run at the destination any more.
    """

    type = "recall"
    reason: str = text_field(MAX_TEXT)


# ---- receiver to sender, push lane ----
@dataclass(frozen=True, eq=False)
class Accepted(Message):
    type = "accepted"
    populate_evicted: str = text_field(16)
    token: bytes = bytes_field(32)
    """The token that the pull lane's hello must contain; valid for one connection."""


@dataclass(frozen=True, eq=False)
class Refused(Message):
    type = "refused"
    reason: str = text_field(MAX_TEXT)
    unknown: bool = flag_field()
    """There is no such session, or there is none any more."""


@dataclass(frozen=True, eq=False)
class Passed(Message):
    type = "passed"
    number: int = uint_field(2**32)


@dataclass(frozen=True, eq=False)
class Ready(Message):
    """All that the guest needs to run is at the receiver, except the handover."""

    type = "ready"


@dataclass(frozen=True, eq=False)
class Resumed(Message):
    type = "resumed"


@dataclass(frozen=True, eq=False)
class Loaded(Message):
    """The receiver has loaded these pfns; the sender may release them."""

    type = "loaded"
    pfns: PfnArray = pfns_field(MAX_PFNS)


@dataclass(frozen=True, eq=False)
class Dropped(Message):
    """The guest gave these pfns away; their contents are not needed any more."""

    type = "dropped"
    pfns: PfnArray = pfns_field(MAX_PFNS)


@dataclass(frozen=True, eq=False)
class Report(Message):
    """For the sender's progress display, a few times a second."""

    type = "report"
    outstanding: int = uint_field(MAX_PFN)
    faults: int = uint_field(2**63)
    latency_us: int = uint_field(2**63)
    """The median latency of the faults so far."""


@dataclass(frozen=True, eq=False)
class Waits(Message):
    """What ``report`` lacks.  Sent only to a peer that offers :data:`WAITS`."""

    type = "waits"
    longest_us: int = uint_field(2**63)
    """The longest that a vCPU has waited for a page, or has been waiting for one."""


@dataclass(frozen=True, eq=False)
class Written(Pages):
    """Pages of a checkpoint, which the guest has written at the destination; as :class:`Pages`."""

    type = "written"


@dataclass(frozen=True, eq=False)
class Checkpoint(Message):
    """A piece of the context of a checkpoint, which belongs to the ``written`` pages.  The last
    piece completes the checkpoint.
    """

    type = "checkpoint"
    data: bytes = bytes_field(MAX_CONTEXT_CHUNK)
    last: bool = flag_field()


@dataclass(frozen=True, eq=False)
class Unprotected(Message):
    """No further checkpoints follow; the last kept checkpoint stays valid.  Sent only to a peer
    that offers :data:`UNPROTECTED`.
    """

    type = "unprotected"
    reason: str = text_field(MAX_TEXT)


@dataclass(frozen=True, eq=False)
class Outstanding(Message):
    """A window of pfns that the receiver still lacks.  All other pfns it has, or does not need."""

    type = "outstanding"
    base: int = uint_field(MAX_PFN)
    bitmap: bytes = bytes_field(WINDOW_PFNS // 8)


@dataclass(frozen=True, eq=False)
class Rejoined(Message):
    """The list of what is outstanding is complete.  The sender then repeats each message that the
    receiver, by its phase, has not received.
    """

    type = "rejoined"
    phase: str = text_field(16)
    """``switchover``, ``decision`` or ``postcopy``."""
    token: bytes = bytes_field(32)
    """The token for the pull lane, as in ``accepted``."""


@dataclass(frozen=True, eq=False)
class Complete(Message):
    """Nothing is outstanding at the receiver; its statistics, as JSON."""

    type = "complete"
    statistics: bytes = bytes_field(MAX_HEADER_BYTES // 2)


@dataclass(frozen=True, eq=False)
class Ended(Message):
    """The guest's domain at the receiver no longer exists; nothing more of the guest is needed."""

    type = "ended"
    ran: bool = flag_field()
    """The guest has run at the receiver, so it must not be resumed elsewhere."""
    reason: str = text_field(MAX_TEXT)


ALL_ARRIVED = "all of its pages are at the destination"
"""The reason of ``failed`` in answer to ``lost``, if the guest lacks no page."""


@dataclass(frozen=True, eq=False)
class Failed(Message):
    """The receiver cannot continue.  Before the handover the receiver has cleaned up.  After the
    handover the receiver keeps the guest as it is.
    """

    type = "failed"
    reason: str = text_field(MAX_TEXT)


# ---- receiver to sender, pull lane ----
@dataclass(frozen=True, eq=False)
class Fault(Message):
    """vCPUs wait for these pfns; answered with ``pages`` on the same lane."""

    type = "fault"
    pfns: PfnArray = pfns_field(MAX_FAULT_PFNS)


@dataclass(frozen=True, eq=False)
class Ahead(Message):
    """Pages that vCPUs may need next.  Those that have not been sent yet are sent on the same lane,
    after the pages of faults.
    """

    type = "ahead"
    pfns: PfnArray = pfns_field(MAX_AHEAD_PFNS)


TYPES: dict[str, type[Message]] = {
    cls.type: cls
    for cls in (
        Hello, Alive, Host, Offer, Pages, Defer, Barrier, Suspended, Missing, Context, Entrust,
        Handover, Kept, Rejoin, Completed, Abort, Lost, Recall, Accepted, Refused, Passed, Ready,
        Resumed, Loaded, Dropped, Report, Waits, Written, Checkpoint, Unprotected, Outstanding,
        Rejoined, Complete, Ended, Failed, Fault, Ahead,
    )
}  # fmt: skip
FIELDS: dict[type[Message], dict[str, Parser]] = {
    cls: {field.name: field.metadata["parse"] for field in dataclasses.fields(cls)}
    for cls in TYPES.values()
}


def parse(header: dict[str, Any], payload_bytes: int = 0) -> Message:
    """Return the message in a frame.  Raises :class:`RemoteProtocolError` for anything else."""
    name = header.get("type")
    cls = TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RemoteProtocolError(f"unknown message {name!r}"[:200])
    fields = FIELDS[cls]
    if len(header) != len(fields) + 1 or not header.keys() >= fields.keys():
        raise RemoteProtocolError(f"{name}: its fields are {', '.join(fields) or 'none'}")
    values = []
    for field, parse_field in fields.items():
        try:
            values.append(parse_field(header[field]))
        except InvalidFieldError as error:
            raise RemoteProtocolError(f"{name}: {field} must be {error}") from None
    message = cls(*values)
    expected = 0
    if isinstance(message, Pages):
        expected = len(message.pfns) * PAGE_SIZE
        if not expected and not len(message.zeros) and not len(message.holes):
            raise RemoteProtocolError(f"{name}: none")
    if payload_bytes != expected:
        raise RemoteProtocolError(
            f"{name}: a payload of {payload_bytes} bytes where {expected} belong"
        )
    return message


def printable(text: str) -> str:
    """Return ``text`` as the protocol allows it: one line of limited length."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_TEXT]
