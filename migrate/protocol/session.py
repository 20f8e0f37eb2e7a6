# SPDX-License-Identifier: GPL-2.0-or-later
"""The session: which end may send which message, and when.  Sans-IO: messages in, errors out.

Both ends keep a :class:`Session` and pass to it every message that they send or receive.  The
phases:

    HELLO --offer--> PREFLIGHT --accepted--> PRECOPY --suspended--> SWITCHOVER
          --handover--> POSTCOPY --complete--> COMPLETE --completed--> CLOSED

If a toolstack decides at which end the guest runs, there is one phase more:

    SWITCHOVER --entrust--> DECISION --handover--> POSTCOPY

In this phase the receiver is already the pager of a guest that may or may not run.  Each end finds
the decision only in what the toolstack does to the domain at its own host.

The end that sends a message enters the next phase at once; the other end enters it when the message
arrives.  An end may therefore receive a message that its peer sent in the phase before.  ``RULES``
gives for each message the end that sends it, and the phases in which that end may do so.  A
receiver also allows the messages that the peer sent before the peer entered the phase.

If the lanes of a session are lost after ``ready``, the session is resumed on new lanes:

    REJOIN --rejoined--> SWITCHOVER, DECISION or POSTCOPY, whichever the receiver has reached

From there, each message that the receiver has not received is sent again.  The receiver alone
reports what is outstanding, together with its phase, so neither end needs a record of what was in
transit.

Some messages are allowed only once, and in this order: the complete context, ``ready``,
``handover``, ``resumed``.  After ``handover`` there is no way back.  ``failed`` then reports only
that the receiver, which keeps the guest, needs help, and ``abort`` is not allowed any more.  The
exception is the first message on new lanes: a sender whose journal has lost the handover aborts,
and its guest runs.
"""

from __future__ import annotations

import hmac
import secrets
import uuid
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from migrate.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane, Message
from xenbackend.pages import PfnArray


class Role(IntEnum):
    SENDER = 0
    RECEIVER = 1


class Phase(IntEnum):
    HELLO = 0
    PREFLIGHT = 1
    PRECOPY = 2
    SWITCHOVER = 3
    DECISION = 4
    POSTCOPY = 5
    COMPLETE = 6
    CLOSED = 7
    FAILED = 8
    REJOIN = 9


P = Phase
BEFORE_HANDOVER = (P.HELLO, P.PREFLIGHT, P.PRECOPY, P.SWITCHOVER, P.DECISION)
PAGING = (P.DECISION, P.POSTCOPY)
"""The phases in which the receiver is the pager."""
RECEIVER_AT = {"switchover": P.SWITCHOVER, "decision": P.DECISION, "postcopy": P.POSTCOPY}
"""The phase that each name in ``rejoined`` stands for."""


@dataclass(frozen=True)
class Rule:
    sent_by: Role
    phases: tuple[Phase, ...]
    """The phases in which that end may send the message."""
    then: Phase | None = None
    lane: Lane | None = Lane.PUSH
    """The lane on which the message may be sent; ``None``: both."""


S, R = Role.SENDER, Role.RECEIVER
RULES: dict[type[Message], Rule] = {
    m.Offer: Rule(S, (P.HELLO,), P.PREFLIGHT),
    # In COMPLETE as well: while a batch was being read, faults may have fetched each of its pages.
    m.Pages: Rule(S, (P.PRECOPY, P.SWITCHOVER, *PAGING, P.COMPLETE), lane=None),
    m.Defer: Rule(S, (P.PRECOPY,)),
    m.Barrier: Rule(S, (P.PRECOPY,)),
    m.Suspended: Rule(S, (P.PRECOPY,), P.SWITCHOVER),
    m.Missing: Rule(S, (P.SWITCHOVER,)),
    m.Context: Rule(S, (P.SWITCHOVER,)),
    m.Entrust: Rule(S, (P.SWITCHOVER,), P.DECISION),
    m.Handover: Rule(S, (P.SWITCHOVER, P.DECISION), P.POSTCOPY),
    m.Kept: Rule(S, (P.POSTCOPY,)),
    m.Rejoin: Rule(S, (P.REJOIN,)),
    m.Completed: Rule(S, (P.COMPLETE, P.REJOIN), P.CLOSED),
    m.Abort: Rule(S, (*BEFORE_HANDOVER, P.REJOIN), P.FAILED),
    m.Lost: Rule(S, (P.REJOIN,), P.FAILED),
    m.Recall: Rule(S, (P.REJOIN,), P.FAILED),
    m.Accepted: Rule(R, (P.PREFLIGHT,), P.PRECOPY),
    m.Refused: Rule(R, (P.PREFLIGHT,), P.FAILED),
    m.Passed: Rule(R, (P.PRECOPY,)),
    m.Ready: Rule(R, (P.SWITCHOVER,)),
    m.Resumed: Rule(R, PAGING),
    m.Loaded: Rule(R, PAGING),
    m.Dropped: Rule(R, PAGING),
    m.Report: Rule(R, PAGING),
    m.Waits: Rule(R, PAGING),
    m.Written: Rule(R, (P.POSTCOPY,)),
    m.Checkpoint: Rule(R, (P.POSTCOPY,)),
    m.Unprotected: Rule(R, (P.POSTCOPY, P.COMPLETE)),
    m.Outstanding: Rule(R, (P.REJOIN,)),
    m.Rejoined: Rule(R, (P.REJOIN,)),
    m.Complete: Rule(R, (P.POSTCOPY, P.REJOIN), P.COMPLETE),
    m.Ended: Rule(R, (*PAGING, P.COMPLETE, P.REJOIN)),
    m.Failed: Rule(R, (*BEFORE_HANDOVER, P.POSTCOPY, P.COMPLETE, P.REJOIN)),
    m.Fault: Rule(R, PAGING, lane=Lane.PULL),
    m.Ahead: Rule(R, PAGING, lane=Lane.PULL),
}


class Session:
    """One end's view of one migration."""

    def __init__(self, role: Role):
        self.role = role
        self.phase = P.HELLO
        self.nr_pfns = 0
        self.paging = False
        self.protected = False
        """The receiver sends checkpoints back."""
        self._checkpoint_whole = False
        self._barriers: set[int] = set()
        self._context_complete = False
        self._ready = False
        self._resumed = False
        self._asked_to_rejoin = False
        self.handed_over = False
        """``handover`` was sent or received.  There is no way back, even if it has not arrived."""
        self.decided = False
        """At the receiver: ``handover`` has not arrived, but an operator has decided for it."""
        self._entrusted = False
        """A toolstack starts the guest, and may leave the guest paused."""
        self._rules = {
            (message, lane): (rule, self._phases_of(rule, lane))
            for message, rule in RULES.items()
            for lane in Lane
            if rule.lane in (None, lane)
        }

    @classmethod
    def of_predecessor(
        cls, role: Role, nr_pfns: int, *, handed_over: bool, protected: bool, entrusted: bool
    ) -> Session:
        """Return the session of a process that has died after ``ready``.  The caller resumes the
        session with :meth:`rejoin`.
        """
        session = cls(role)
        session.nr_pfns, session.paging, session.handed_over = nr_pfns, True, handed_over
        session.protected, session._entrusted = protected, entrusted
        return session

    def rejoin(self) -> None:
        """Resume the session on new lanes, after ``ready``.  What was in transit on the old lanes
        is lost.
        """
        self.phase = P.REJOIN
        self._barriers.clear()
        self._context_complete = self._ready = True
        self._resumed = self._asked_to_rejoin = self._checkpoint_whole = False

    @property
    def resumed(self) -> bool:
        """Whether ``resumed`` was sent or received on these lanes."""
        return self._resumed

    @property
    def serving(self) -> bool:
        """Whether the guest may run at the destination, while its missing pages are fetched."""
        return self.phase is P.DECISION or self.handed_over

    def sent(self, message: Message, lane: Lane) -> None:
        """Check and note a message that is about to be sent.  Raises
        :class:`LocalProtocolError`.
        """
        try:
            self._step(message, lane, self.role)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"refusing to send: {error}") from error

    def received(self, message: Message, lane: Lane) -> None:
        """Check and note a message that has arrived.  Raises :class:`RemoteProtocolError` if the
        peer must not send it now.
        """
        self._step(message, lane, Role(1 - self.role))

    def _step(self, message: Message, lane: Lane, sent_by: Role) -> None:
        found = self._rules.get((type(message), lane))
        if found is None or found[0].sent_by is not sent_by:
            who = "sender" if sent_by is Role.SENDER else "receiver"
            raise RemoteProtocolError(f"{message.type} from the {who} on the {lane.value} lane")
        rule, phases = found
        if self.phase not in phases:
            raise RemoteProtocolError(f"{message.type} in phase {self.phase.name.lower()}")
        self._check(message, lane)
        if rule.then is not None:
            self.phase = rule.then

    def _phases_of(self, rule: Rule, lane: Lane) -> tuple[Phase, ...]:
        """Return the phases in which this end may send the message or, if the peer sends it, the
        phases in which this end may receive it.  The latter include phases that this end has
        entered before the peer.
        """
        allowed = rule.phases
        if lane is Lane.PULL and P.POSTCOPY in allowed:
            # Neither end waits with one lane for the other lane.
            allowed = (*allowed, P.COMPLETE, P.CLOSED)
        if rule.sent_by is self.role:
            return allowed
        if rule.sent_by is Role.RECEIVER and P.PRECOPY in allowed:
            allowed = (*allowed, P.SWITCHOVER)  # ``passed`` and ``suspended`` may have crossed
        return allowed

    def _check(self, message: Message, lane: Lane) -> None:
        """Check what the message's rule cannot express, and keep what later checks need."""
        match message:
            case m.Pages():
                self._check_pages(message, lane)
            case m.Fault() | m.Ahead() | m.Loaded() | m.Dropped():
                self._bounded(message, message.pfns)
            case m.Missing():
                self._paged(message)
                self._bounded(message, message.pfns)
            case m.Defer():
                self._paged(message)
                self._window(message)
            case m.Checkpoint():
                self._check_checkpoint(message)
                self._checkpoint_whole = message.last
            case m.Unprotected():
                self._protected(message)
            case m.Kept():
                self._after("kept", self._checkpoint_whole, "the checkpoint")
                self._checkpoint_whole = False
            case m.Offer():
                self.nr_pfns = message.nr_pfns
                self.paging = message.paging
                self.protected = message.checkpoint_ms > 0
            case m.Barrier() | m.Passed():
                self._check_barrier(message)
            case m.Context():
                self._once("context", self._context_complete)
                self._context_complete = message.last
            case m.Ready():
                self._after("ready", self._context_complete, "the context")
                self._once("ready", self._ready)
                self._ready = True
            case m.Entrust() | m.Handover():
                self._after(message.type, self._ready, "ready")
                self.handed_over = self.handed_over or isinstance(message, m.Handover)
                self._entrusted = self._entrusted or isinstance(message, m.Entrust)
            case m.Abort():
                self._check_abort()
            case _ if self.phase is P.REJOIN:
                self._check_rejoining(message)
            case m.Resumed():
                self._once("resumed", self._resumed)
                self._resumed = True
            case m.Complete():
                self._after("complete", self._resumed or self._entrusted, "resumed")

    def _check_pages(self, message: m.Pages, lane: Lane) -> None:
        if lane is Lane.PULL and not self.serving:
            raise RemoteProtocolError("pages on the pull lane before the switchover")
        for pfns in (message.pfns, message.zeros, message.holes):
            self._bounded(message, pfns)
        if isinstance(message, m.Written):
            self._check_checkpoint(message)
        elif self.serving and len(message.holes):
            raise RemoteProtocolError("pages: holes after the switchover")

    def _check_barrier(self, message: m.Barrier | m.Passed) -> None:
        number = message.number
        if isinstance(message, m.Barrier):
            if number in self._barriers or len(self._barriers) >= 16:
                raise RemoteProtocolError(f"barrier {number}: in use, or too many")
            self._barriers.add(number)
        else:
            if number not in self._barriers:
                raise RemoteProtocolError(f"passed {number}: there was no such barrier")
            self._barriers.remove(number)

    def _check_abort(self) -> None:
        # A sender whose journal has lost the handover sends ``abort`` instead of ``rejoin``.
        lost = self.role is Role.RECEIVER and not self._asked_to_rejoin
        if self.handed_over and not self.decided and not lost:
            raise RemoteProtocolError("abort after the handover")

    def _check_rejoining(self, message: Message) -> None:
        if isinstance(message, m.Rejoin):
            self._once("rejoin", self._asked_to_rejoin)
            self._asked_to_rejoin = True
        elif not isinstance(message, m.Completed | m.Lost | m.Recall):
            self._after(message.type, self._asked_to_rejoin, "rejoin")
        if isinstance(message, m.Outstanding):
            self._paged(message)
            self._window(message)
        elif isinstance(message, m.Rejoined):
            phase = RECEIVER_AT.get(message.phase)
            if phase is None or (phase is P.POSTCOPY and not self.handed_over):
                raise RemoteProtocolError(f"rejoined in phase {message.phase!r}")
            self.phase = phase

    def _protected(self, message: Message) -> None:
        if not self.protected:
            raise RemoteProtocolError(
                f"{message.type}: this migration was offered without checkpoints"
            )

    def _check_checkpoint(self, message: Message) -> None:
        self._protected(message)
        if self._checkpoint_whole:
            raise RemoteProtocolError(f"{message.type} before the last checkpoint was kept")

    def _bounded(self, message: Message, pfns: PfnArray) -> None:
        if len(pfns) and int(pfns[-1]) >= self.nr_pfns:
            raise RemoteProtocolError(
                f"{message.type}: pfn {int(pfns[-1]):#x}, but the domain ends at {self.nr_pfns:#x}"
            )

    def _paged(self, message: Message) -> None:
        if not self.paging:
            raise RemoteProtocolError(f"{message.type}: this migration was offered without paging")

    def _window(self, message: m.Defer | m.Outstanding) -> None:
        if message.base % 8 or not message.bitmap:
            raise RemoteProtocolError(
                f"{message.type}: a window begins at a multiple of 8 and is not empty"
            )
        excess = message.base + len(message.bitmap) * 8 - self.nr_pfns
        if excess > 0:
            beyond = np.unpackbits(
                np.frombuffer(message.bitmap, dtype=np.uint8), bitorder="little"
            )[-excess:]
            if excess >= 8 or beyond.any():
                raise RemoteProtocolError(
                    f"{message.type}: a window beyond the domain's end at {self.nr_pfns:#x}"
                )

    @staticmethod
    def _once(name: str, already: bool) -> None:
        if already:
            raise RemoteProtocolError(f"{name} a second time")

    @staticmethod
    def _after(name: str, condition: bool, what: str) -> None:
        if not condition:
            raise RemoteProtocolError(f"{name} before {what}")


def new_id() -> str:
    return uuid.uuid4().hex


def is_session_id(text: str) -> bool:
    """Whether ``text``, which a peer has chosen, can be a session's identifier.  The identifier
    becomes the name of a file.
    """
    return text.isascii() and text.isalnum()


def new_token() -> bytes:
    """Return a random token, which one lane uses once."""
    return secrets.token_bytes(32)


def rejoin_token(key: bytes, number: int) -> bytes:
    """Return the token with which a push lane resumes a session for the ``number``-th time.
    ``key``: the key of the offer.
    """
    counted = number.to_bytes(4, "big")
    return counted + hmac.digest(key, b"rejoin" + counted, "sha256")[:28]


def number_of_rejoin(key: bytes, token: bytes) -> int:
    """Return the number in a token of :func:`rejoin_token`, or 0 if ``token`` is none."""
    number = int.from_bytes(token[:4], "big")
    return number if hmac.compare_digest(token, rejoin_token(key, number)) else 0


def answer_token(key: bytes, token: bytes) -> bytes:
    """Return the token with which a lane that resumes a session is answered.  ``key``: the key of
    the offer.  ``token``: the token of the hello that is answered, which nobody uses twice.
    """
    return hmac.digest(key, b"answer" + token, "sha256")


def is_answer(key: bytes, token: bytes, answer: bytes) -> bool:
    """Whether ``answer`` is the token of :func:`answer_token`."""
    return hmac.compare_digest(answer, answer_token(key, token))


def negotiate(theirs: m.Hello) -> int:
    """Return the protocol version that both ends use.  Raises :class:`ProtocolError` if they have
    no version in common.
    """
    version = min(theirs.newest, m.PROTOCOL_VERSION)
    if not theirs.oldest <= version <= theirs.newest or version < m.PROTOCOL_VERSION:
        raise ProtocolError(
            f"the peer speaks protocol versions {theirs.oldest} to {theirs.newest} and this end "
            f"speaks {m.PROTOCOL_VERSION}: install the same release of xen-postcopy at both ends"
        )
    unknown = set(theirs.requires) - m.CAPABILITIES
    if unknown:
        raise ProtocolError(
            "the peer requires capabilities that this end does not have: "
            f"{', '.join(sorted(unknown))}"
        )
    return version


def hello(
    lane: Lane, session: str, token: bytes = b"", *, requires: tuple[str, ...] = ()
) -> m.Hello:
    from migrate import __version__

    return m.Hello(
        m.PROTOCOL_VERSION,
        m.PROTOCOL_VERSION,
        lane.value,
        session,
        token,
        requires,
        tuple(sorted(m.CAPABILITIES)),
        f"xen-postcopy {__version__}",
    )
