# SPDX-License-Identifier: GPL-2.0-or-later
"""One outgoing migration, from hello to completed.

The order of things is in :meth:`OutgoingMigration.run`, one method a phase.  Two rules hold it together:

- Until ``handover`` is about to be sent, every way out leads through :meth:`_give_up`, which leaves the guest running
  at the source as if nothing had happened.
- From then on nothing does: the domain stays suspended and its pages are kept until the receiver has confirmed
  each of them, whatever fails (invariants 1 and 6).  When the lanes are lost, the session is taken up again on others
  (:meth:`OutgoingMigration._rejoin`).

What it owes it writes into the journal before it says so, for the daemon's successor (:meth:`OutgoingMigration.of_predecessor`).

Where a toolstack decides at which end the guest runs, there is a time between the two in which nobody here knows: the domain
stays as it is, and its pages are kept, until the toolstack has resumed or destroyed it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import trio

from migrate import logs
from migrate.control.client import ENDED
from migrate.errors import (
    GuestEndedError,
    MigrationError,
    OccupiedError,
    PeerClosedError,
    RemoteProtocolError,
    UnknownSessionError,
)
from migrate.lanes.connection import (
    EXPLANATION_S,
    LINGER_S,
    STEP_TIMEOUT_S,
    LaneConnection,
    run_in_thread,
    step_timeout,
)
from migrate.lanes.pairs import Lanes
from migrate.options import LEAST_BANDWIDTH, MigrationOptions, Strategy
from migrate.protocol import messages as m
from migrate.protocol.pfns import (
    PfnMask,
    from_bitmap,
    in_bitmap,
    pfns_of_window,
    pieces,
    sparseness,
    union,
)
from migrate.protocol.session import Phase, Role, Session, new_token
from migrate.service.journal import Journal, check_facts, remove
from migrate.service.lifecycle import ended
from migrate.tasks import as_soon_as_threads_start, first, in_thread, is_bug, is_final, task_group
from sender.backlog import Backlog
from sender.bandwidth import BandwidthCap
from sender.checkpoints import CheckpointStore
from sender.dirty import WrittenPages, limit_of
from sender.faults import FaultServer
from sender.policy import DefaultPolicy, Policy
from sender.precopy import Precopy, Remainder
from sender.progress import Progress
from sender.push import BATCH_PAGES, PushLane
from sender.source_pages import announce_missing, count_pages, hold
from sender.statistics import SenderStatistics, from_peer
from sender.toolstack import OwnToolstack, StaysHereError, Toolstack, XlToolstack
from xenbackend.contract import Domain, DomainId, DomainState, Hypervisor
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.pages import PAGE_SIZE, PfnArray

log = logging.getLogger(__name__)

SWITCHOVER_BATCH_PAGES = 128
"""Instead of :data:`BATCH_PAGES` while the guest stands still: there the destination had better begin at once."""
GO_BACK_AGAIN_S = 5.0
WENT_BACK = "the guest goes on here, as it was when the last checkpoint was made"
LOGGING = ("begun", "suspending")
"""Steps in the journal before the handover: log-dirty may be on."""
INHERITED = {
    "begun": "precopy", "suspending": "switchover", "deciding": "deciding", "handed over": "interrupted",
    "completing": "completing", "going back": "interrupted", "decided here": "interrupted",
    "decided elsewhere": "interrupted", "given up": "connecting",
}  # fmt: skip
"""The phase that is shown of a predecessor's migration until it is taken up, by the step in the journal."""
NUMBER_OR_NONE = (int, float, type(None))
FACTS: dict[str, tuple[type, ...]] = {
    "domain": (str,), "strategy": (str,), "bandwidth": NUMBER_OR_NONE, "checkpoints": NUMBER_OR_NONE,
    "successor": (int, type(None)), "ran": (bool,), "recall": (bool,), "max_pages": (int,),
    "applied": (bool,),
}  # fmt: skip
"""What this end notes in the journal besides the facts that both ends note."""
NOT_ALWAYS_NOTED = ("handle", "rejoins", "ran", "recall", "max_pages", "applied")
"""An earlier release did not."""
HOT_PAGES = 256
"""Frequently written pages that are sent during the downtime although the guest could fetch them later: 1 MiB takes
less than a millisecond on most links, where each fault takes about half of one."""


@dataclass
class _Signals:
    """What the receiver has told us so far."""

    ready: threading.Event = field(default_factory=threading.Event)
    """Waited for in a thread; the others are not."""
    resumed: trio.Event = field(default_factory=trio.Event)
    complete: trio.Event = field(default_factory=trio.Event)


class OutgoingMigration:
    """``session_id``: what ``lanes`` is for (:func:`migrate.protocol.session.new_id`)."""

    def __init__(
        self, session_id: str, hypervisor: Hypervisor, domain: DomainId, lanes: Lanes, options: MigrationOptions,
        journal: Journal, *, toolstack: Toolstack | None = None, policy: Policy | None = None,
    ):  # fmt: skip
        self.id = session_id
        self._journal = journal
        self._inherited = ""
        """How far a predecessor had come."""
        self._max_pages = 0
        """The domain's own limit of frames, which is another one while the guest is copied.  0: the
        limit is not known and is not restored.
        """
        self.target = domain
        self.domain_name = domain.name
        self.lanes = lanes
        self.options = options
        self.progress = Progress()
        self.statistics = SenderStatistics(strategy=options.strategy.value)
        self.receiver_statistics: dict[str, Any] = {}
        self.session = Session(Role.SENDER)
        self._toolstack = toolstack or OwnToolstack()
        self._precopy = Precopy(
            options,
            policy or DefaultPolicy(options.strategy, options.policy),
            self._toolstack,
            self.progress,
            self.statistics,
        )
        self._hypervisor = hypervisor
        self._cap = BandwidthCap(options.bandwidth_bytes_per_s)
        self._signals = _Signals()
        self._scope = trio.CancelScope()
        self._cancel_reason = ""
        self._verdict: MigrationError | None = None
        self._decision = ""
        """An operator's, as the journal has it."""
        self._decided = trio.Event()
        """The journal has the decision, or the decision came too late."""
        self._stuck = False
        """The guest was to go on here, and at least one attempt has failed."""
        self._otherwise = trio.Event()
        """An operator has then decided that nothing of the guest is needed here."""
        self._went = trio.Event()
        """The attempts have ended in either way."""
        self._over = False
        """:meth:`run` has ended."""
        self._suspended = False
        self._domain: Domain
        self._written: WrittenPages
        self._push: PushLane | None = None
        self._pull: LaneConnection | None = None
        self._backlog: Backlog
        self._faults: FaultServer | None = None
        self._checkpoints: CheckpointStore | None = None
        self._successor: int | None = None
        """The domid of the domain in which the guest goes on as it was at a checkpoint."""
        self._applied = False
        """The source domain has pages of a checkpoint, or has lost pages to the successor: the guest
        cannot be resumed in the source domain.
        """
        self._key = new_token()
        self._given_away = trio.Event()
        """A toolstack that decides has decided so."""
        self._may_be_ready = False
        """The receiver, or what its successor makes of its journal: it may wait for the handover."""
        self._deciding = threading.Lock()
        """At which end the guest goes on, while it is suspended: one of these two becomes true."""
        self._stays = False
        self._entrusted = False
        """The guest may be running at the destination."""
        self._last_word: m.Message | None = None
        self._recall = False
        """An operator has the guest go on here, though it was handed over."""
        self._ran = False
        """The receiver has reported that the guest runs there."""
        self._lost_at = 0.0
        """When the receiver was last in touch."""

    @classmethod
    def of_predecessor(
        cls,
        session_id: str,
        hypervisor: Hypervisor,
        lanes: Lanes,
        journal: Journal,
        facts: dict[str, Any],
    ) -> OutgoingMigration:
        """What a daemon has left that died, by its journal; ``lanes`` are for rejoining only.

        Raises ``ValueError`` or :class:`MigrationError` for an entry that this release must not act on.
        """
        check_facts(facts, INHERITED, FACTS, NOT_ALWAYS_NOTED)
        toolstack = XlToolstack(facts["domain"]) if facts["xl"] else None
        options = MigrationOptions(
            Strategy(facts["strategy"]),
            # An earlier release accepted less than a page a second.
            bandwidth_bytes_per_s=None
            if facts["bandwidth"] is None
            else max(facts["bandwidth"], LEAST_BANDWIDTH),
            checkpoint_every_s=facts["checkpoints"],
        )
        handle = facts.get("handle")  # a release before this one did not note handles
        domain = DomainId(
            facts["domid"], None if handle is None else bytes.fromhex(handle), facts["domain"]
        )
        migration = cls(
            session_id, hypervisor, domain, lanes, options, journal, toolstack=toolstack
        )
        migration._key = bytes.fromhex(facts["key"])
        migration._inherited, migration._successor = facts["step"], facts["successor"]
        migration._max_pages = facts.get("max_pages", 0)
        # A release that did not note this has applied the checkpoint that is there.
        there = facts["step"] == "going back" or journal.checkpoint(session_id).exists()
        migration._applied = facts.get("applied", there)
        migration._ran, migration._recall = facts.get("ran", False), facts.get("recall", False)
        migration._may_be_ready = True  # for all we know
        # Whoever asks before the migration is taken up has the answer that follows from the
        # journal.
        step = facts["step"]
        migration.progress.phase = INHERITED[step]
        migration._entrusted = step not in (*LOGGING, "given up")
        migration.session.handed_over = migration._entrusted and step != "deciding"
        if step in ("going back", "decided here", "decided elsewhere"):
            migration._decision = "decided here" if step == "going back" else step
        # A release that did not note handles did not note the step before the suspension either.
        migration._suspended = facts["step"] != "begun" or handle is None
        lanes.keep(migration._key)
        return migration

    def _record(self, step: str, *, needed: bool = False) -> None:
        """Raises :class:`MigrationError` where the journal cannot be written, and the entry is
        ``needed`` or the guest can still stay here.
        """
        self._journal.write(
            self.id,
            {
                "step": step, "domain": self.domain_name, "domid": self._domain.domid,
                "handle": self._domain.handle.hex(), "key": self._key.hex(),
                "dials": self.lanes.dials, "rejoins": self.lanes.rejoins,
                "xl": self._toolstack.decides, "strategy": self.options.strategy.value,
                "bandwidth": self.options.bandwidth_bytes_per_s, "checkpoints": self.options.checkpoint_every_s,
                "successor": self._successor, "ran": self._ran, "recall": self._recall, "max_pages": self._max_pages,
                "applied": self._applied,
            },
            needed=needed or not self._entrusted,
        )  # fmt: skip

    # ---- what others may ask ----
    def postcopy_now(self) -> None:
        """Raises :class:`MigrationError` where there is no postcopy to switch to."""
        if self.has_ended:
            raise MigrationError(
                ended(self.domain_name, self.progress.phase, self.progress.problem, "switch over")
            )
        if not self.options.strategy.pages_after_handover:
            raise MigrationError("this migration was started with --strategy precopy")
        if self._suspended:
            raise MigrationError(
                f"{self.domain_name} is past its precopy: it is {self.progress.phase}"
            )
        self._precopy.postcopy_asked = True

    def cancel(self, reason: str) -> None:
        """Give up; the guest goes on here.  Raises :class:`MigrationError` after the handover."""
        self._stay()
        if self._entrusted and self._toolstack.decides and not self.session.handed_over:
            raise MigrationError(
                "too late to cancel: it is for xl to decide now at which end the guest runs"
            )
        if self._entrusted:
            raise MigrationError(
                "too late to cancel: the guest runs at the destination, and its memory is following"
            )
        self._cancel_reason = reason
        self._scope.cancel()

    def reconnect(self) -> None:
        """Dial the destination at once.  Raises :class:`MigrationError` if no peer is wanted, or if
        the destination dials.
        """
        name, phase = self.domain_name, self.progress.phase
        if self.has_ended and self._last_word is None:
            raise MigrationError(ended(name, phase, self.progress.problem, "reconnect"))
        if self._over and not self.has_ended:
            raise MigrationError(f"nothing comes of that: {self.progress.problem}")
        if not self.has_ended and phase != "interrupted":
            raise MigrationError(
                f"there is nothing to reconnect: the migration of {name} is {phase}"
            )
        if self.lanes.dials is None:
            raise MigrationError(
                f"the destination dials, and tries by itself: ask its receiver to reconnect {name}"
            )
        self.lanes.hurry()

    def ask_to_cancel(self) -> None:
        """For an operator.  Raises :class:`MigrationError` where it is too late."""
        if self.has_ended:
            raise MigrationError(
                ended(self.domain_name, self.progress.phase, self.progress.problem, "cancel")
            )
        try:
            self.cancel("cancelled by the operator")
        except MigrationError as error:
            if self.progress.phase == "interrupted" and self.session.handed_over:
                raise MigrationError(
                    f"{error}; if the other host never comes back: `xen-postcopy decide`"
                ) from None
            raise

    @property
    def known_of_peer(self) -> str:
        """For whoever decides."""
        ran = self._ran
        known = [
            f"the destination {'has' if ran else 'has not'} reported that {self.domain_name} runs there"
        ]
        if self._signals.complete.is_set():
            known.append("it has reported that all memory has arrived")
        elif self.progress.outstanding:
            known.append(
                f"when it was last heard of, {self.progress.outstanding} pages were missing there"
            )
        if self._lost_at:
            known.append(f"it was last in touch {time.monotonic() - self._lost_at:.0f} s ago")
        if self.progress.checkpoint_at:
            known.append(
                f"the last checkpoint came {time.monotonic() - self.progress.checkpoint_at:.0f} s ago"
            )
        return "; ".join(known)

    async def decide(self, *, here: bool, force: bool = False) -> None:
        """Carry out an operator's decision, where the receiver cannot be reached: the guest does
        not run there and never will (``here``), or nothing of the guest is needed at the source.

        Raises :class:`MigrationError` if there is nothing to decide, or if the decision is known to
        be wrong and not forced.
        """
        certain, obstacle = await trio.to_thread.run_sync(self._way_back) if here else (False, "")
        gone = await trio.to_thread.run_sync(self._is_gone)
        self._check_decision(here=here, certain=force or certain, obstacle=obstacle)
        if here and gone:
            raise MigrationError(
                f"the domain of {self.domain_name} does not exist here any more: there is nothing that could go on; "
                "`xen-postcopy decide ... elsewhere` ends the migration"
            )
        if self._stuck:
            self._otherwise.set()
            await self._went.wait()
            if self._decision != "decided elsewhere":
                raise MigrationError(f"too late: in the meantime {self.domain_name} went on here")
            return
        decision = "decided here" if here else "decided elsewhere"
        self._decision = decision  # from here on another decision is refused
        if self._over:
            try:
                await self._carry_out(decision)
            except BaseException:
                self._decision = ""  # and can be tried again
                raise
            return
        self._verdict = _decision(decision)
        self._scope.cancel()
        await self._decided.wait()

    def _is_gone(self) -> bool:
        """True if somebody has destroyed the source domain.  Called in a thread."""
        domain: Domain | None = self.__dict__.get("_domain")  # not opened yet: nothing is known
        try:
            if domain is not None:
                domain.state()
        except NoSuchDomainError:
            return True
        except XenError as error:
            log.warning("%s: the state of its domain is not known: %s", self.domain_name, error)
        return False

    async def _is_lost(self) -> bool:
        """True if pages that the destination may lack have gone with the source domain.

        Where a toolstack decides, the toolstack destroys the domain, and this process holds the pages.
        """
        if self._toolstack.decides or not (self._inherited or self._backlog.unacknowledged):
            return False
        return await in_thread(self._is_gone)

    def _way_back(self) -> tuple[bool, str]:
        """Whether the guest was protected to the end and its last checkpoint can be read, and why the
        guest cannot go on here at all (empty if it can).  Called in a thread.
        """
        if self._checkpoints is None:
            return False, ""
        problem = _unreadable(self._checkpoints)
        return not problem and not self.progress.unprotected, problem if self._applied else ""

    def _check_decision(self, *, here: bool, certain: bool, obstacle: str = "") -> None:
        """``certain``: to go on here is right even if the guest has run at the destination.
        ``obstacle``: why it is impossible to go on here.
        """
        name, phase = self.domain_name, self.progress.phase
        if self.has_ended:
            raise MigrationError(ended(name, phase, self.progress.problem, "decide"))
        if not self._entrusted:
            raise MigrationError(
                f"there is nothing to decide: the migration of {name} is {phase}, and the guest runs here; "
                "`xen-postcopy cancel` takes it back"
            )
        if not self.session.handed_over:
            raise MigrationError(
                f"there is nothing to decide here: xl does, and has not yet; {name} is {phase}"
            )
        if here if self._stuck else self._decision:
            raise MigrationError(
                f"that was {self._decision or 'decided here'} already, which is being carried out: see `xen-postcopy list`"
            )
        if phase != "interrupted":
            raise MigrationError(
                f"there is nothing to decide here: both ends are in touch, and {name} is {phase}"
            )
        if here and self._toolstack.decides:
            raise MigrationError(
                "xl has destroyed the domain here: there is nothing that could go on; "
                "`xen-postcopy decide ... elsewhere` lets its pages go"
            )
        if here and obstacle:
            raise MigrationError(
                f"{name} cannot go on here, with --force neither: {obstacle}; without it the memory here is that of "
                "no instant, because checkpoints were written into it; the guest goes on where it is as soon as the "
                f"destination is back; if the guest is lost: `xen-postcopy decide {name} elsewhere` lets its pages go"
            )
        # A final answer proves nothing.  A receiver with another state directory does not have the
        # session, and the guest may run there nevertheless.
        if here and self._ran and not certain:
            raise MigrationError(
                f"{self.known_of_peer}: if it still runs there, it would run twice; if it does not, it would continue here "
                f"from its suspension, without what it did there: --force; `elsewhere` destroys what is left of it here"
            )

    async def _carry_out(self, decision: str) -> None:
        """After an error that nothing comes of trying again, and that has ended :meth:`run`."""
        verdict = _decision(decision)
        assert verdict is not None
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._record, decision)
            await self._failed(verdict)
            await trio.to_thread.run_sync(self._domain.close)
        self._give_back()

    def result(self) -> dict[str, Any]:
        """The JSON keys that docs/commands.md explains."""
        ours, theirs = self.statistics.summary(), self.receiver_statistics
        return {**theirs, "id": self.id, "domain": self.domain_name, **ours}

    # ---- the order of things ----
    async def run(self) -> None:
        """Raises :class:`MigrationError` or ``XenError``; ``session.handed_over`` tells where the guest is then."""
        logs.migration.set(self.id)
        self.statistics.started = time.monotonic()
        if self._inherited == "given up":
            self._last_word = m.Abort("the guest stays at the source")
            raise MigrationError("given up, before the sender was started anew")
        try:
            self._domain = await as_soon_as_threads_start(self._open)
        except NoSuchDomainError as error:
            if not self._inherited:
                raise
            self.progress.phase = "failed"
            gone = f"{self.domain_name} is gone, and was here before the sender died"
            if self._inherited in ("deciding", "handed over"):
                # The journal stays until the destination has been told.
                raise MigrationError(self._lose(gone)) from error
            await trio.to_thread.run_sync(self._journal.erase, self.id)
            if self._inherited == "completing":  # killed when all was done
                self.progress.phase = "completed"
                log.info("%s completed", self.domain_name)
                return
            if self._inherited in ("going back", "decided elsewhere"):  # likewise
                left = self._journal.checkpoint(self.id)
                await trio.to_thread.run_sync(remove, left)
                raise _decision(self._inherited) or StaysHereError(WENT_BACK) from error
            raise MigrationError(f"{gone}: it was destroyed") from error
        logging = LOGGING if self._toolstack.decides else (*LOGGING, "handed over", "decided here")
        self._written = WrittenPages(
            self._domain, self._max_pages, enabled=self._inherited in logging
        )
        if self.options.checkpoint_every_s is not None:
            self._checkpoints = CheckpointStore(
                self._journal.checkpoint(self.id), self._domain, self._applying
            )
        try:
            with self._scope:
                if self._inherited:
                    await self._go_on_for_predecessor()
                else:
                    await self._migrate()
            if self._scope.cancelled_caught:
                if self._decision:
                    # Noted before the operator has the answer, so that a successor carries it out.
                    await trio.to_thread.run_sync(self._record, self._decision)
                    self._decided.set()
                raise self._verdict or MigrationError(f"cancelled: {self._cancel_reason}")
        except BaseException as error:
            phase = self.progress.phase
            await as_soon_as_threads_start(functools.partial(self._failed, error))
            logs.abnormal_end(self.domain_name, phase, self.progress.problem, self.result())
            raise
        finally:
            self._over = True
            self._toolstack.close()
            self._decided.set()
            self._close_lanes()
            if not self.keeps_pages:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._domain.close)
                self._give_back()

    async def _open(self) -> Domain:
        """Raises ``XenError``; if a guest elsewhere may need this domain's pages, only if it is
        gone.
        """
        while True:
            try:
                return await trio.to_thread.run_sync(
                    self._hypervisor.open, self.target.domid, self.target.handle
                )
            except NoSuchDomainError:
                raise
            except XenError as error:
                if not self._inherited:
                    raise
                self.progress.problem = (
                    f"what was left here cannot be taken up yet: {error}; trying again"
                )
                log.error("%s: %s", self.domain_name, self.progress.problem)
                await trio.sleep(GO_BACK_AGAIN_S)

    @property
    def has_ended(self) -> bool:
        """Nothing more comes of it."""
        return self.progress.phase in ENDED

    @property
    def keeps_pages(self) -> bool:
        """The guest lives at the destination, and some of its pages only here."""
        return self.progress.phase == "interrupted"

    @property
    def holds_pages(self) -> bool:
        """And the domain is gone: they live by this process."""
        return self.keeps_pages and self._toolstack.decides

    def _give_back(self) -> None:
        """What is as large as the guest: ``list`` shows this migration for long after its end."""
        self._faults = self._checkpoints = None
        self._precopy.give_back()
        for large in ("_backlog", "_written"):
            self.__dict__.pop(large, None)

    def _close_lanes(self) -> None:
        for connection in self._connections():
            self.statistics.bytes_sent += connection.bytes_sent
            connection.close()
        self._push = self._pull = None

    def _connections(self) -> list[LaneConnection]:
        push = None if self._push is None else self._push.connection
        return [connection for connection in (push, self._pull) if connection is not None]

    def _push_lane(self, connection: LaneConnection) -> PushLane:
        return PushLane(
            connection, self.session, self._domain, self._cap, self.progress, self.statistics
        )

    async def _go_on_for_predecessor(self) -> None:
        if self._inherited in LOGGING:
            raise MigrationError("the sender was ended in the middle of it")
        if self._inherited == "completing":
            await self._finish()
            return
        if self._inherited == "going back":
            raise StaysHereError(WENT_BACK)
        if decision := _decision(self._inherited):
            raise decision
        handed_over = self.session.handed_over
        protected = self._checkpoints is not None
        self.session = Session.of_predecessor(
            Role.SENDER, self._domain.nr_pfns, handed_over=handed_over, protected=protected,
            entrusted=self._toolstack.decides,
        )  # fmt: skip
        if self._checkpoints is not None:
            await trio.to_thread.run_sync(self._take_up_checkpoint, self._checkpoints)
        nothing = np.zeros(self._domain.nr_pfns, dtype=np.bool_)
        self._backlog = await in_thread(Backlog, nothing)
        async with task_group() as tasks:
            if self._toolstack.decides:
                tasks.start_soon(self._follow_decision)
            then = "postcopy" if handed_over else "deciding"
            await self._rejoin(PeerClosedError("the sender was started anew"), then)
            await self._migrate_over_lanes(tasks)
            tasks.cancel_scope.cancel()
        await self._finish()

    async def _finish(self) -> None:
        self.statistics.finished = time.monotonic()
        await self._let_source_go()
        await in_thread(self._forget)
        self.progress.phase = "completed"
        log.info("%s completed", self.domain_name)

    async def _let_source_go(self) -> None:
        """However long it takes: what fails may pass."""
        while True:
            try:
                await as_soon_as_threads_start(self._let_successor_go)
                await as_soon_as_threads_start(
                    functools.partial(self._toolstack.finish, self._domain)
                )
                break
            except NoSuchDomainError:  # somebody else has done it
                break
            except XenError as error:
                self.progress.problem = f"the source cannot be destroyed: {error}; trying again"
                log.error("%s: %s", self.domain_name, self.progress.problem)
                await trio.sleep(GO_BACK_AGAIN_S)
        self.progress.problem = ""

    async def _let_successor_go(self) -> None:
        """The domain that was made to go back to a checkpoint, if the guest never ran in it."""
        if self._successor is None:
            return
        with contextlib.suppress(NoSuchDomainError):
            successor = await trio.to_thread.run_sync(self._reincarnated)
            if await trio.to_thread.run_sync(successor.state) is DomainState.INCOMING:
                await trio.to_thread.run_sync(successor.destroy)
        self._successor = None

    def _forget(self) -> None:
        """Nothing is owed any more."""
        self._journal.erase(self.id)
        if self._checkpoints is not None:
            self._checkpoints.close()

    async def _migrate(self) -> None:
        info = await trio.to_thread.run_sync(self._domain.info)
        self.domain_name = info.name or self.domain_name
        await trio.to_thread.run_sync(functools.partial(check_free, self._domain, self.options))
        self.statistics.memory_bytes = info.tot_pages * PAGE_SIZE
        await self._connect()
        async with task_group() as tasks:  # what does not end with the lanes
            await self._migrate_over_lanes(tasks)
            tasks.cancel_scope.cancel()
        await self._finish()

    async def _migrate_over_lanes(self, tasks: trio.Nursery) -> None:
        """One pair after the other, from the switchover on."""
        while True:
            try:
                assert self._push is not None
                async with task_group() as lane_tasks:
                    for connection in self._connections():
                        lane_tasks.start_soon(connection.keep_alive)
                    if not self._signals.complete.is_set():
                        lane_tasks.start_soon(self._hear, self._push)
                    if self._pull is not None:
                        # From now on, though nobody may ask yet: a guest that has just been started over there
                        # faults at once, and a thread takes milliseconds to start.
                        self._faults = FaultServer(
                            self._domain, self._pull, self.session, self.statistics, self._cap
                        )
                        lane_tasks.start_soon(self._serve_faults, self._faults)
                    if self._entrusted:
                        self._open_to_faults()
                    else:
                        await self._switch_over(
                            tasks, self._push, await self._copy_while_it_runs(self._push)
                        )
                    await self._feed(lane_tasks, self._push)
                    lane_tasks.cancel_scope.cancel()
                return
            except Exception as error:
                if not self._entrusted or is_final(error) or await self._is_lost():
                    raise
                await self._rejoin(error, self.progress.phase)

    async def _hear(self, push: PushLane) -> None:
        hear = functools.partial(self._receive_push_lane, push)
        await run_in_thread(
            hear, push.connection.stop_receiving, urgent=True
        )  # for some of it a guest stands still

    async def _feed(self, lane_tasks: trio.Nursery, push: PushLane) -> None:
        """The destination with what it lacks."""
        if self._toolstack.decides:
            lane_tasks.start_soon(self._hand_over_when_decided, push)
            # Until xl has decided, nobody needs the pages, and libxl needs the CPU to finish its
            # work. xl may then leave the guest paused for long (``xl migrate -p``); its memory
            # follows nevertheless.
            await first(self._signals.resumed.wait, self._given_away.wait)
        await self._push_pages(push)
        if self.session.handed_over:
            self.progress.phase = "completing"
        await self._signals.complete.wait()
        if self._backlog.unacknowledged:
            # Invariant 8: nothing is called a success that is none, whatever the receiver claims.
            raise RemoteProtocolError(
                f"complete, but {self._backlog.unacknowledged} pages were never confirmed"
            )
        # From here on the receiver may forget the session.
        await in_thread(self._record, "completing")
        with contextlib.suppress(PeerClosedError):  # then it knows as much
            await push.say(m.Completed())
            await self._push_lane_closed(push)

    async def _connect(self) -> None:
        """hello, preflight and the pull lane."""
        self._push = self._push_lane(await self.lanes.push())
        self.progress.phase = "preflight"
        config = await trio.to_thread.run_sync(self._domain.config)
        if problem := sparseness(config.nr_pfns, config.max_pages):
            raise MigrationError(problem)
        paging = self.options.strategy.pages_after_handover
        checkpoint_ms = math.ceil((self.options.checkpoint_every_s or 0) * 1000)
        await self._push.say(
            m.Offer(
                config.name, config.nr_pfns, config.max_pages, config.vcpus, config.platform, paging, self._key, checkpoint_ms
            )
        )  # fmt: skip
        with step_timeout("the destination did not answer the preflight"):
            answer = await self._push.hear()
        if isinstance(answer, m.Refused | m.Failed):
            raise MigrationError(f"the destination refuses: {answer.reason}")
        if not isinstance(answer, m.Accepted):
            raise RemoteProtocolError(f"{answer.type} instead of accepted or refused")
        self._pull = await self.lanes.pull(answer.token)
        self.lanes.keep(self._key)
        await self._toolstack.agreed()

    # ---- precopy ----
    async def _copy_while_it_runs(self, push: PushLane) -> Remainder:
        self._written.max_pages = self._max_pages = await trio.to_thread.run_sync(
            limit_of, self._domain
        )
        await trio.to_thread.run_sync(self._record, "begun")
        self.progress.phase = "precopy"
        return await self._precopy.run(self._domain, push, self._written)

    # ---- switchover ----
    async def _switch_over(self, tasks: trio.Nursery, push: PushLane, remainder: Remainder) -> None:
        self.progress.phase = "switchover"
        self._backlog = Backlog(remainder.deferred)
        try:
            await push.send_in_thread(
                functools.partial(self._hand_over, push, remainder), self._stay
            )
            await trio.lowlevel.checkpoint_if_cancelled()
        finally:
            if self._entrusted and self._toolstack.decides:
                tasks.start_soon(self._follow_decision)
                with trio.CancelScope(shield=True):
                    await self._toolstack.switched_over()

    def _hand_over(self, push: PushLane, remainder: Remainder) -> None:
        """All that the guest stands still for.  In one thread: going from one to another is a tenth of a millisecond each time.

        It takes as long as what changed since the last look is large, not the guest.
        Nothing is sorted, since it may have written all that it has.
        """
        domain, stats, missing = self._domain, self.statistics, self._backlog
        if (state := domain.state()) is not DomainState.RUNNING:
            raise MigrationError(
                f"{self.domain_name} is {state.value}, which somebody else has brought about"
            )
        self._record("suspending")
        stats.suspended = time.monotonic()
        self._suspended = True
        try:
            self._toolstack.suspend(domain)
        except XenError as error:
            self._suspended = error.errno != errno.EINVAL  # which says that it did not run
            raise
        log.info("suspended")
        self._may_be_ready = True
        push.say_blocking(m.Suspended())
        written = self._written.last_look()
        unsent = remainder.unsent
        unsent |= written  # in place: memory that has yet to be mapped takes longer than the pass
        changed, gone = push.send_holes(from_bitmap(unsent, domain.nr_pfns))
        missing.remove(gone[missing.are_missing(gone)])
        new = changed[~missing.are_missing(changed)]
        if missing.unsent or not self._precopy.stop_and_copy_fits(len(new)):
            hot = self._written.hottest(changed[in_bitmap(written, changed)], HOT_PAGES)
            now = union([remainder.pinned, domain.pinned(changed), hot])
            missing.add(new)
            now = now[missing.are_missing(now)]
            missing.remove(now)
        else:
            now = new

        def sent(_pfns: PfnArray, message: m.Pages) -> bool:
            stats.switchover_pages += count_pages(message)
            return not self._stays

        # Whatever the bandwidth cap: to hold it back would be downtime.
        push.send_all(pieces(now, SWITCHOVER_BATCH_PAGES), sent)
        if self._stays:
            return  # without the context the destination is not ready, whoever says what there
        stats.missing_pages = missing.unsent
        new = new[missing.are_missing(new)]
        for pfns in pieces(new, m.MAX_PFNS):
            push.say_blocking(m.Missing(pfns))
        context = domain.context()
        for at in range(0, len(context), m.MAX_CONTEXT_CHUNK):
            chunk = context[at : at + m.MAX_CONTEXT_CHUNK]
            push.say_blocking(m.Context(chunk, at + len(chunk) == len(context)))
        if self._toolstack.decides:
            # What was written since it was held may be another frame now.
            domain.hold(changed[missing.are_missing(changed)])
            self._toolstack.track_device_model(False)
            self._written.disable()
        if not self._signals.ready.wait(STEP_TIMEOUT_S):
            raise PeerClosedError(
                f"the guest stands still, and the destination was not ready within {STEP_TIMEOUT_S:g} s"
            )
        self.progress.pages_total = stats.missing_pages
        self._count_down()
        self._entrust(push)
        log.info(
            "ready, %d pages in downtime, %d missing", stats.switchover_pages, stats.missing_pages
        )

    def _stay(self) -> None:
        """The guest goes on here, if it is not too late for that."""
        with self._deciding:
            self._stays = not self._entrusted
        if self._stays:
            self._signals.ready.set()  # nobody needs to wait for that any more

    def _entrust(self, push: PushLane) -> None:
        """Said is done, even where it does not arrive: it is said again then."""
        with self._deciding:
            if self._stays:
                return
            self._record("deciding" if self._toolstack.decides else "handed over")
            self._entrusted = True
        self.progress.phase = "deciding" if self._toolstack.decides else "postcopy"
        self._open_to_faults()
        push.say_blocking(self._last_of_switchover())

    def _last_of_switchover(self) -> m.Message:
        return m.Entrust() if self._toolstack.decides else m.Handover()

    async def _follow_decision(self) -> None:
        """Seen here, or else as the receiver sees it."""
        given_away = True
        async with task_group() as tasks:

            async def believe_the_receiver() -> None:
                await self._signals.resumed.wait()
                await self._toolstack.has_left()
                tasks.cancel_scope.cancel()

            tasks.start_soon(believe_the_receiver)
            given_away = await self._toolstack.decision(self._domain)
            tasks.cancel_scope.cancel()
        if not given_away:
            raise StaysHereError("xl resumed the guest here")
        await trio.to_thread.run_sync(self._record, "handed over")
        self._given_away.set()

    async def _hand_over_when_decided(self, push: PushLane) -> None:
        await self._given_away.wait()
        if self.session.phase is Phase.DECISION:
            self.progress.phase = "postcopy"
            await push.say(m.Handover())

    # ---- postcopy ----
    async def _push_pages(self, push: PushLane) -> None:
        def sent(_pfns: PfnArray, message: m.Pages) -> bool:
            self.statistics.push_pages += count_pages(message)
            self.statistics.push_bytes += len(message.pfns) * PAGE_SIZE
            return True

        announce = functools.partial(announce_missing, backlog=self._backlog)
        await push.send_batches(self._backlog.batches(BATCH_PAGES), sent, announce)

    def _open_to_faults(self) -> None:
        if self._faults is not None:
            self._faults.open(self._backlog)

    async def _serve_faults(self, server: FaultServer) -> None:
        try:
            await server.serve()
        except PeerClosedError:
            await trio.sleep(EXPLANATION_S)  # the push lane may say why
            raise

    # ---- the push lane ----
    def _receive_push_lane(self, push: PushLane) -> None:
        """In a thread, until the receiver says that nothing is outstanding."""
        while True:
            message, payload = push.hear_blocking()
            match message:
                case m.Passed():
                    trio.from_thread.run_sync(self._precopy.passed, message.number)
                case m.Ready():
                    self._signals.ready.set()
                case m.Resumed() if self._signals.resumed.is_set():
                    pass
                case m.Resumed():
                    self.statistics.resumed = time.monotonic()
                    if self.statistics.suspended:
                        downtime_ms = self.statistics.downtime_s * 1000
                        log.info(
                            "%s runs at the destination, after %.1f ms of downtime",
                            self.domain_name,
                            downtime_ms,
                        )
                    self._ran = True
                    if not self._toolstack.decides:
                        self._record("handed over")  # for a successor's operator
                    trio.from_thread.run_sync(self._signals.resumed.set)
                case m.Loaded():
                    self._backlog.loaded(message.pfns)
                    self._domain.release(message.pfns)
                    self._count_down()
                case m.Dropped():
                    self._backlog.dropped(message.pfns)
                    self._domain.release(message.pfns)
                    self._count_down()
                case m.Written() | m.Checkpoint():
                    self._take_checkpoint(push, message, payload)
                case m.Unprotected():
                    self._unprotected(message.reason)
                case m.Report():
                    self.progress.faults, self.progress.latency_us = (
                        message.faults,
                        message.latency_us,
                    )
                case m.Complete():
                    trio.from_thread.run_sync(self._completed, message)
                    return
                case m.Ended() | m.Failed():
                    self._raise(message)

    def _take_checkpoint(
        self, push: PushLane, message: m.Written | m.Checkpoint, payload: memoryview
    ) -> None:
        assert self._checkpoints is not None  # so says the session
        problem = ""
        try:
            if not self._checkpoints.add(message, payload):
                return
            self.progress.checkpoints += 1
            self.progress.checkpoint_at = time.monotonic()
        except RemoteProtocolError:
            raise
        except (MigrationError, XenError, OSError) as error:
            problem = m.printable(str(error))
            self._unprotected(problem)
        push.say_blocking(m.Kept(problem))

    def _applying(self) -> None:
        """Note that a resume in the source domain is impossible from now on.  Raises
        :class:`MigrationError`.
        """
        if not self._applied:
            self._applied = True
            try:
                self._record(self._inherited or "handed over", needed=True)
            except MigrationError:
                self._applied = False
                raise

    def _take_up_checkpoint(self, checkpoints: CheckpointStore) -> None:
        """A predecessor's.  Without the checkpoint the guest is not protected; its pages are here
        still.
        """
        if not self._applied and not checkpoints.exists():
            return
        try:
            checkpoints.apply_again()
        except (MigrationError, XenError, OSError) as error:
            self._unprotected(m.printable(str(error)))

    def _unprotected(self, problem: str) -> None:
        """What was kept last stays good."""
        if not self.progress.unprotected:
            log.error("%s is not protected any more: %s", self.domain_name, problem)
            self.progress.unprotected = problem

    def _completed(self, message: m.Complete) -> None:
        self.receiver_statistics = _receiver_statistics(message.statistics)
        self._signals.resumed.set()
        self._signals.complete.set()

    def _raise(self, message: m.Ended | m.Failed) -> NoReturn:
        """There is nothing more to come from the destination."""
        if isinstance(message, m.Failed):
            raise MigrationError(f"the destination cannot go on: {message.reason}")
        if not self.session.handed_over and not message.ran:
            raise StaysHereError(f"the destination has given the guest up: {message.reason}")
        raise GuestEndedError(f"the guest ended at the destination: {message.reason}")

    def _count_down(self) -> None:
        self.progress.outstanding = self._backlog.unacknowledged
        self.progress.pages_done = self.progress.pages_total - self.progress.outstanding

    async def _push_lane_closed(self, push: PushLane) -> None:
        """The receiver closes first, when its ring is given up: nothing of ours is cut off on the way then."""
        with trio.move_on_after(STEP_TIMEOUT_S), contextlib.suppress(PeerClosedError):
            await push.connection.receive()

    # ---- when the lanes are lost ----
    async def _rejoin(self, lost: Exception, then: str) -> None:
        """Until the receiver is there again; ``then`` is the phase that follows."""
        self.progress.phase = "interrupted"
        self._lost_at = time.monotonic()
        while True:
            self._close_lanes()
            log.warning("%s: %s", self.domain_name, lost, exc_info=is_bug(lost))
            self._note(str(lost))
            try:
                self._push = self._push_lane(await self.lanes.again(self._note))
                await self._take_up_again(self._push)
                break
            except Exception as error:
                if is_final(error) or await self._is_lost():
                    raise
                lost = error
        self.statistics.rejoins += 1
        self.progress.phase, self.progress.problem, self._lost_at = then, "", 0.0
        self._count_down()
        log.info(
            "%s: the destination is back, %d pages to go",
            self.domain_name,
            self._backlog.unacknowledged,
        )

    def _note(self, why: str) -> None:
        state = (
            "the guest is at the destination, its missing pages are kept here"
            if self.session.handed_over or self._given_away.is_set()
            else "xl has not said yet at which end the guest runs"
        )
        self.progress.problem = f"{why}; {state}"

    async def _take_up_again(self, push: PushLane) -> None:
        """Find out what the receiver lacks, of pages and of what was said."""
        self.session.rejoin()
        if self._checkpoints is not None:
            await trio.to_thread.run_sync(self._checkpoints.abandon)
        await push.say(m.Rejoin())
        outstanding = np.zeros(self._domain.nr_pfns, dtype=np.bool_)
        with step_timeout("the destination did not say what it lacks"):
            while isinstance(answer := await push.hear(), m.Outstanding):
                outstanding[pfns_of_window(answer.base, answer.bitmap)] = True
        match answer:
            case m.Rejoined() | m.Complete() if self._inherited:
                await trio.to_thread.run_sync(self._inherit, outstanding)
            case m.Rejoined() | m.Complete():
                done = await trio.to_thread.run_sync(self._backlog.rejoin, outstanding)
                await trio.to_thread.run_sync(self._domain.release, done)
            case m.Ended() | m.Failed():
                self._raise(answer)
            case _:
                raise RemoteProtocolError(f"{answer.type} in answer to rejoin")
        if isinstance(answer, m.Complete):
            self._completed(answer)
            return
        self._pull = await self.lanes.pull(answer.token)
        if self.session.phase is Phase.SWITCHOVER:
            await push.say(self._last_of_switchover())
            await self._toolstack.switched_over()

    def _inherit(self, outstanding: PfnMask) -> None:
        """What the predecessor had, the receiver tells."""
        self._backlog = Backlog(outstanding)
        self.statistics.missing_pages = self.progress.pages_total = self._backlog.unacknowledged
        if self._toolstack.decides:
            hold(self._domain, outstanding)
        self._inherited = ""

    # ---- when it goes wrong ----
    async def _failed(self, error: BaseException) -> None:
        progress = self.progress
        given_away = self.session.handed_over and not isinstance(error, StaysHereError)
        if isinstance(error, GuestEndedError):
            await self._guest_ended(error)
            return
        if (
            self._entrusted
            and not given_away
            and not isinstance(error, trio.Cancelled | StaysHereError)
        ):
            progress.phase, progress.problem = (
                "in doubt",
                f"{error}; xl has not said yet at which end the guest runs",
            )
            log.warning("%s: %s", self.domain_name, progress.problem)
            given_away = await self._toolstack.decision(self._domain)
        if given_away and not isinstance(error, trio.Cancelled) and await self._is_lost():
            progress.problem = self._lose(
                f"the domain of {self.domain_name} was destroyed at the source"
            )
            log.error("%s: %s", self.domain_name, progress.problem)
            progress.phase = "failed"
        elif given_away:
            progress.phase = "interrupted"
            decide = f"xen-postcopy decide {self.domain_name}"
            progress.problem = f"{error}; it was handed over, and its missing pages are kept here until you decide ({decide})"
        else:
            progress.problem = str(error)
            with trio.CancelScope(shield=True):
                try:
                    await self._give_up(str(error))
                except GuestEndedError as otherwise:
                    await self._guest_ended(otherwise)
            progress.phase = "failed"

    async def _guest_ended(self, error: GuestEndedError) -> None:
        """Nothing of the guest is needed here any more."""
        await self._let_source_go()
        self.progress.problem = str(error)
        await trio.to_thread.run_sync(self._forget)
        self.progress.phase = "failed"

    def _lose(self, gone: str) -> str:
        """The reason, which the destination is sent as well.  The journal stays until the
        destination has the reason.
        """
        lost = m.Lost(m.printable(f"{gone}: the pages that it lacks at the destination are lost"))
        self._last_word = lost
        return lost.reason

    async def linger(self) -> None:
        """Send the last word to a receiver that was cut off: the guest stays at the source, or its
        missing pages are lost.
        """
        if self._last_word is None:
            return
        lost = isinstance(self._last_word, m.Lost)
        # One that dials us is told as much by our not knowing it any more, but for what is lost.
        with trio.move_on_after(math.inf if self.lanes.dials or lost else LINGER_S):
            while True:
                connection = None
                try:
                    connection = await self.lanes.again(log.debug)
                    if lost and m.LOST not in connection.capabilities:
                        log.warning(
                            "%s: the release at the destination cannot be told: destroy it there",
                            self.domain_name,
                        )
                        break
                    recall = self._recall and m.RECALL in connection.capabilities
                    reason = (
                        f"an operator has decided at the source that {self.domain_name} runs there"
                    )
                    await connection.send(
                        m.Recall(m.printable(reason)) if recall else self._last_word
                    )
                    with step_timeout("the destination does not say that it has let the guest go"):
                        answer, _pages = await connection.receive()
                    if isinstance(answer, m.Failed | m.Ended):
                        break
                except UnknownSessionError:  # it knows
                    if self._recall:
                        warning = "the destination has forgotten the migration: make sure that the guest does not run there"
                        self.progress.problem += f"; {warning}"
                        log.error("%s: %s", self.domain_name, warning)
                    break
                except Exception as error:
                    about = "%s: the destination has not been told yet how it ended: %s"
                    log.info(about, self.domain_name, error, exc_info=is_bug(error))
                finally:
                    if connection is not None:
                        connection.close()
        await trio.to_thread.run_sync(self._journal.erase, self.id)

    async def _give_up(self, reason: str) -> None:
        """The guest goes on here; the receiver is told, if it can be."""
        log.warning("migration of %s given up: %s", self.domain_name, reason)
        abort = m.Abort(m.printable(reason))
        self._recall = self.session.handed_over or self._inherited in ("decided here", "going back")
        if self._may_be_ready:
            self._last_word = abort
        if self._push is not None:
            with trio.move_on_after(2), contextlib.suppress(PeerClosedError):
                # Where this fails it sees the connection end, which says the same to one that is not ready.
                await self._push.connection.send(abort)
        self._close_lanes()
        with self._reported():
            await trio.to_thread.run_sync(self._written.disable)
        with self._reported():
            if self._checkpoints is not None and (
                self._applied or not await trio.to_thread.run_sync(_unreadable, self._checkpoints)
            ):
                await self._go_back(self._checkpoints)
            else:
                await self._toolstack.give_up(self._domain, reason, suspended=self._suspended)
        with self._reported():
            if self._may_be_ready:
                await trio.to_thread.run_sync(self._record, "given up")
            else:
                await trio.to_thread.run_sync(self._journal.erase, self.id)
            if self._checkpoints is not None:
                await trio.to_thread.run_sync(self._checkpoints.close)

    async def _go_back(self, checkpoints: CheckpointStore) -> None:
        """To the guest as it was when the last checkpoint was made, however long it takes.

        Raises :class:`GuestEndedError` if an operator decides otherwise after a failed attempt.
        """
        while True:
            try:
                domain = await trio.to_thread.run_sync(self._reincarnated)
                await trio.to_thread.run_sync(checkpoints.go_back, domain)
                break
            except (MigrationError, XenError, OSError) as error:
                self.progress.problem = (
                    f"cannot go back to the last checkpoint: {error}; trying again; to let the guest go here instead: "
                    f"`xen-postcopy decide {self.domain_name} elsewhere`"
                )
                log.error("%s: %s", self.domain_name, self.progress.problem)
                self._stuck = True
                with trio.move_on_after(GO_BACK_AGAIN_S):
                    await self._otherwise.wait()
                if self._otherwise.is_set():
                    await self._decide_otherwise()
        self._stuck = False
        self._went.set()
        log.warning("%s goes on here, as it was at the last checkpoint", self.domain_name)
        await self._toolstack.finish(self._domain)
        self._domain, self.progress.problem = domain, WENT_BACK

    async def _decide_otherwise(self) -> NoReturn:
        self._decision = "decided elsewhere"
        self._last_word, self._recall = None, False  # the guest may run at the destination
        await trio.to_thread.run_sync(self._record, self._decision)
        verdict = _decision(self._decision)
        assert verdict is not None
        self._went.set()
        raise verdict

    def _reincarnated(self) -> Domain:
        """The domain in which the guest is to go on."""
        config = self._domain.config()
        if self._successor is not None:
            # A guest keeps its UUID, so the domain that takes its place has the same one.
            return self._hypervisor.reopen_incoming(
                self._successor, config, lent=False, handle=self._domain.handle
            )
        for left in self._hypervisor.abandoned(config, instead_of=self._domain):
            left.destroy()  # by a predecessor that died before the journal had the domain's number
        domain = self._hypervisor.create_incoming(config, instead_of=self._domain)
        self._successor, self._applied = domain.domid, True
        self._record("going back")
        return domain

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """The rest is to be done all the same."""
        try:
            yield
        except GuestEndedError:
            raise
        except (MigrationError, XenError) as error:
            self.progress.problem += f"; and then: {error}"
            log.error("%s", error)


def check_free(domain: Domain, options: MigrationOptions) -> None:
    """Raises :class:`MigrationError` for a domain that cannot be migrated as it is.  Raises
    :class:`OccupiedError` if another migration or another program is at work on the domain.
    """
    info = domain.info()
    if info.paged_pages or domain.has_pager():
        raise OccupiedError(
            f"{info.name} has a pager, and {info.paged_pages} of its pages are not here: wait until "
            "the migration that brings them is completed, which `xen-postcopy list` shows"
        )
    if info.state is DomainState.SUSPENDED:
        raise OccupiedError(
            f"{info.name} is suspended: only a running guest can be migrated; who migrates or saves it now, "
            "`xen-postcopy list` may show"
        )
    if info.state is not DomainState.RUNNING:
        raise MigrationError(
            f"{info.name} is {info.state.value}: only a running guest can be migrated"
        )
    if domain.log_dirty_is_on():
        if not options.take_log_dirty:
            raise OccupiedError(
                f"log-dirty is on for {info.name}: somebody migrates, saves or protects it, or died "
                "when doing so; if nobody does any more, `xen-postcopy migrate --take-log-dirty` (or "
                "`XEN_POSTCOPY=off xl migrate`) switches it off first"
            )
        domain.log_dirty_disable()


def _decision(step: str) -> MigrationError | None:
    """What follows from an operator's decision that the journal has under this step."""
    match step:
        case "decided here":
            return StaysHereError(
                "an operator has said that the guest does not run at the destination"
            )
        case "decided elsewhere":
            return GuestEndedError("an operator has said that nothing of the guest is needed here")
    return None


def _unreadable(checkpoints: CheckpointStore) -> str:
    """Why nobody can go back to the last checkpoint; empty if that is possible."""
    try:
        checkpoints.check()
    except MigrationError as error:
        return str(error)
    return ""


def _receiver_statistics(data: bytes) -> dict[str, Any]:
    """The receiver's summary: the peer's word, which decides nothing here."""
    try:
        return from_peer(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"complete: statistics are not JSON: {error}") from error
