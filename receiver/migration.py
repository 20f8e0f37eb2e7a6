# SPDX-License-Identifier: GPL-2.0-or-later
"""One incoming migration, from hello to completed.

Before ``ready`` is said any failure takes everything back: the incoming domain is destroyed and the
sender told why.  Once ``ready`` is said and the lanes are lost without a word, this end cannot know whether the guest was
handed over: it holds still.  After ``handover`` the guest lives here: whatever fails, its
ring stays enabled and its memory stays as it is (invariants 1 and 5).

What it owes it writes into the journal before it says so, for the daemon's successor (:meth:`IncomingMigration.of_predecessor`).

From ``ready`` on a session outlives its lanes: :meth:`_follow_sender` goes over one pair after the other.  What ends with
a pair is in ``_lane_tasks``, what does not in ``_tasks``.

Where a toolstack decides whether the guest runs here, it is served from ``entrust`` on, and what the toolstack does to its domain
tells what was decided: see :meth:`_follow_domain`.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import trio

from migrate import logs
from migrate.control.client import ENDED
from migrate.errors import (
    GuestEndedError,
    MigrationError,
    PagesLostError,
    PeerClosedError,
    ProtocolError,
    RecalledError,
    RemoteProtocolError,
    UnknownSessionError,
)
from migrate.lanes import scheduling
from migrate.lanes.connection import (
    EXPLANATION_S,
    LINGER_S,
    LaneConnection,
    run_in_thread,
    step_timeout,
)
from migrate.lanes.pairs import Lanes
from migrate.logs import Complaint
from migrate.protocol import messages as m
from migrate.protocol.messages import Lane
from migrate.protocol.pfns import pfns_of_window, sparseness, windows
from migrate.protocol.session import Role, Session, new_token
from migrate.service.journal import Journal, check_facts
from migrate.service.lifecycle import ended
from migrate.tasks import as_soon_as_threads_start, first, in_thread, is_bug, is_final, task_group
from migrate.units import pauses
from receiver.checkpoints import NOT_PROTECTED, Checkpoints, mark
from receiver.outstanding import OutstandingPages
from receiver.pager import Pager
from receiver.restore import FrameLimit, MemoryRestorer
from receiver.statistics import PagerStatistics
from receiver.toolstack import OwnToolstack, Toolstack, XlToolstack
from xenbackend.contract import Domain, DomainConfig, DomainState, Hypervisor, ToolstackPorts
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.pages import PfnArray
from xenbackend.ring import PagingRing

log = logging.getLogger(__name__)

MAX_CONTEXT_BYTES = 64 * 1024 * 1024
REPORT_EVERY_S = 0.25
LOOK_EVERY_S = 0.05
"""At a domain that is about to run, ..."""
LOOK_AT_LAST_EVERY_S = 2.0
"""... ever less often if it does not, ..."""
LOOK_AGAIN_EVERY_S = 0.5
"""... and at one that runs."""
ATTACH_TIMEOUT_S = 10.0
CARRY_ON_AGAIN_S = 0.5
"""After an error that is not the link's."""
UNDOING_S = 2.0
"""How long an offer waits for the end of another migration of a guest of the same name, which may be being undone."""
FIRST_START_AGAIN_S = 0.1
LAST_START_AGAIN_S = 5.0
"""Each attempt to start a guest again waits twice as long as the one before it, up to this."""
INHERITED = {
    "making": "precopy", "made": "precopy", "suspended": "in doubt", "ready": "in doubt", "entrusted": "deciding",
    "taken over": "interrupted", "finishing": "completing", "lost": "interrupted", "held": "interrupted",
    "decided elsewhere": "in doubt",
}  # fmt: skip
"""The phase that is shown of a predecessor's migration until it is taken up, by the step in the journal."""
FACTS: dict[str, tuple[type, ...]] = {
    "offer": (dict,),
    "unprotected": (str,),
    "decided": (bool,),
    "raised": (list,),
}
"""What this end notes in the journal besides the facts that both ends note."""
NOT_ALWAYS_NOTED = ("handle", "rejoins", "unprotected", "decided", "raised")
"""An earlier release did not."""
NOT_READY = ("making", "made", "decided elsewhere")
"""Steps in the journal of a guest that does not need this end."""
FINISHED_OR_FINISHING = ("taken over", "finishing")
"""By a journal, the last entries of which may not have been written."""
NOT_HERE = "an operator has said that the guest is not to run here"
NO_MEMORY = "this host has no memory for pages that have arrived, and vCPUs wait for them: make room on this host"


@dataclass
class IncomingProgress:
    """What ``list`` shows."""

    domain: str = ""
    phase: str = "preflight"
    outstanding: int = 0
    waiting: int = 0
    unprotected: str = ""
    """Why there are no further checkpoints, though they were asked for."""
    problem: str = ""


class IncomingMigration:
    def __init__(
        self,
        hypervisor: Hypervisor,
        migration_id: str,
        lanes: Lanes,
        journal: Journal,
        toolstack: Toolstack | None = None,
    ):
        self.id = migration_id
        self._journal = journal
        self._step = ""
        """The last step in the journal."""
        self._noted = ""
        """The last step that a predecessor wrote into the journal."""
        self.others: Callable[[], Iterable[IncomingMigration]] = tuple
        """The daemon's."""
        self._offer: m.Offer
        self.lanes = lanes
        self.progress = IncomingProgress()
        self.session = Session(Role.RECEIVER)
        self.statistics = PagerStatistics()
        self._hypervisor = hypervisor
        self._toolstack = toolstack or OwnToolstack()
        self._push: LaneConnection | None = None
        self._pull: LaneConnection | None = None
        self._domain: Domain | None = None
        self._domid = self._toolstack.lends
        self._handle: bytes | None = None
        """``None`` if there is no domain yet, or if an earlier release wrote the journal, which had
        no handles.
        """
        self._inherited = False
        self._ring: PagingRing | None = None
        self._pages: OutstandingPages
        self._memory: MemoryRestorer
        self._limit: FrameLimit
        self._raised = (0, 0)
        """See :class:`FrameLimit`."""
        self._recording = threading.Lock()
        self._pager: Pager | None = None
        """The guest's, when it may run."""
        self._stand_by: Pager | None = None
        """What will be, with its thread: that takes milliseconds to start, and the guest faults at once."""
        self._checkpoints: Checkpoints | None = None
        self._context = bytearray()
        self._said_ready = False
        self._lacked = 0
        """Pages, when another program than this one suspended the guest."""
        self._released = trio.Event()
        """What was held goes on."""
        self._not_started = ""
        """Why the guest, which is ours, does not run yet."""
        self._runs = trio.Event()
        """The guest, here."""
        self._handed_over = trio.Event()
        self._completed = False
        self._last_word: m.Message | None = None
        self._tasks: trio.Nursery
        self._lane_tasks: trio.Nursery
        self._offline_tasks: trio.Nursery
        self._deciding = trio.Lock()
        """An operator decides; a sender that is back waits for that."""
        self._scope = trio.CancelScope()
        self._cancel_reason = ""
        self._becoming_ready = threading.Lock()
        """It is cancelled, or it becomes ready: never both."""
        self._decided = False
        """An operator told a predecessor that the guest is to run here."""
        self._decided_elsewhere = False
        """An operator, or the source, has decided that the guest is not to run here."""
        self.ended = trio.Event()

    @classmethod
    def of_predecessor(
        cls,
        hypervisor: Hypervisor,
        session_id: str,
        lanes: Lanes,
        journal: Journal,
        facts: dict[str, Any],
    ) -> IncomingMigration:
        """What a daemon has left that died, by its journal; ``lanes`` are for rejoining only.

        Raises ``ValueError`` or :class:`MigrationError` for an entry that this release must not act on.
        """
        check_facts(facts, INHERITED, FACTS, NOT_ALWAYS_NOTED)
        toolstack = XlToolstack(facts["domid"], ToolstackPorts(0, 0)) if facts["xl"] else None
        migration = cls(hypervisor, session_id, lanes, journal, toolstack)
        platform, key = bytes.fromhex(facts["offer"]["platform"]), bytes.fromhex(facts["key"])
        offer = m.parse({**facts["offer"], "type": m.Offer.type, "platform": platform, "key": key})
        assert isinstance(offer, m.Offer)
        migration._offer = offer
        step = facts["step"]
        migration._step, migration._domid = step, facts["domid"]
        migration._handle = bytes.fromhex(handle) if (handle := facts.get("handle")) else None
        migration._inherited, migration._noted = True, step
        migration._decided = facts.get("decided", False)
        migration.progress.phase = INHERITED[step]
        found, raised = facts.get("raised", (0, 0))  # earlier releases did not note it
        migration._raised = (int(found), int(raised))
        migration.progress.domain = offer.name
        migration.progress.unprotected = facts.get("unprotected", "")
        lanes.keep(migration._offer.key)
        return migration

    def _record(self, step: str) -> None:
        """Raises :class:`MigrationError` where the journal cannot be written, and the guest can still stay where it is."""
        with self._recording:
            self._write(step)
            self._step = step

    def _write(self, step: str) -> None:
        offer = self._offer.header()
        del offer["type"], offer["key"]
        offer["platform"] = self._offer.platform.hex()
        self._journal.write(
            self.id,
            {
                "step": step, "domid": self._domid, "handle": self._handle and self._handle.hex(), "offer": offer,
                "key": self._offer.key.hex(), "unprotected": self.progress.unprotected, "decided": self.session.decided,
                "dials": self.lanes.dials, "rejoins": self.lanes.rejoins, "xl": self._toolstack.decides,
                "raised": self._raised,
            },
            needed=not self._said_ready,
        )  # fmt: skip

    def _record_again(self) -> None:
        """Another fact about the step that was recorded last."""
        with self._recording:
            self._write(self._step)

    def _note_raised(self, raised: tuple[int, int]) -> None:
        self._raised = raised
        self._record_again()

    # ---- what others may ask ----
    @property
    def domain_name(self) -> str:
        return self.progress.domain

    def ask_to_cancel(self) -> None:
        """For an operator.  Raises :class:`MigrationError` where it is too late."""
        name, phase = self.progress.domain, self.progress.phase
        if self.has_ended:
            raise MigrationError(self.ending("cancel"))
        self._check_taken_up()
        if self._take_back("cancelled by the operator of the destination"):
            return
        if phase == "in doubt":
            raise MigrationError(
                f"too late to cancel: {name} may have been handed over; `xen-postcopy decide` settles it"
            )
        raise MigrationError(
            f"too late to cancel: {name} is the destination's; to end it, destroy it (xl destroy {name})"
        )

    def _check_taken_up(self) -> None:
        """Raises :class:`MigrationError` while this process is still finding out what its
        predecessor has left.
        """
        if self._inherited and self._domain is None:
            problem = f": {self.progress.problem}" if self.progress.problem else ""
            raise MigrationError(
                f"what a killed receiver has left of {self.progress.domain} is being taken up{problem}; ask again in a moment"
            )

    @property
    def known_of_peer(self) -> str:
        """For whoever decides."""
        if self.progress.phase == "in doubt":
            return "the source may have handed the guest over, or have it running; it has not been in touch since it was cut off"
        return (
            "the source has handed the guest over"
            if self.session.handed_over
            else "the source has not handed the guest over"
        )

    def reconnect(self) -> None:
        """Raises :class:`MigrationError` where there is nobody whom this end would dial."""
        if self.has_ended:
            raise MigrationError(self.ending("reconnect"))
        if self.progress.phase not in ("interrupted", "in doubt"):
            raise MigrationError(
                f"there is nothing to reconnect: {self.progress.domain} is {self.progress.phase}"
            )
        if self.lanes.dials is None:
            raise MigrationError(
                f"the source dials, and tries by itself: ask its sender to reconnect {self.progress.domain}"
            )
        self.lanes.hurry()

    def ending(self, asked: str) -> str:
        """Why there is nothing left to be asked for."""
        return ended(self.progress.domain, self.progress.phase, self.progress.problem, asked)

    @property
    def has_ended(self) -> bool:
        """Nothing more comes of it."""
        return self.progress.phase in ENDED

    @property
    def domid(self) -> int:
        """-1 before there is a domain."""
        return self._domid

    @property
    def missing(self) -> int:
        """Pages of the guest that are still to come."""
        return self._pages.count if self._said_ready else 0

    def count(self) -> None:
        """Bring what ``list`` shows up to date.  While no sender is connected nothing else does."""
        if self._pager is not None and not self.has_ended:
            report, self.progress.waiting = self._pager.report()
            self.progress.outstanding = report.outstanding

    @property
    def needed(self) -> bool:
        """The guest lives by this process: it must not be stopped."""
        inherited = self._inherited and self._step not in NOT_READY
        return (self._said_ready or inherited) and self.progress.phase not in ENDED

    def details(self) -> dict[str, Any]:
        """What has been measured so far; see :meth:`PagerStatistics.summary`."""
        return self.statistics.summary()

    def cancel(self, reason: str) -> None:
        """Has no effect once :attr:`needed`."""
        self._take_back(reason)

    def _take_back(self, reason: str) -> bool:
        """Returns whether the migration is taken back: from then on it does not become ready."""
        with self._becoming_ready:
            # What a predecessor has left ends by itself, or is needed.
            if self.needed or (self._inherited and not self._decided_elsewhere):
                return False
            self._cancel_reason = reason
        self._scope.cancel()
        return True

    async def decide(self, *, here: bool, force: bool = False) -> None:
        """An operator's word, where the sender's does not come.  Raises :class:`MigrationError` where it is not called for."""
        async with self._deciding:
            await self._decide(here=here, force=force)

    async def _decide(self, *, here: bool, force: bool) -> None:
        name, phase = self.progress.domain, self.progress.phase
        if self.has_ended:
            raise MigrationError(self.ending("decide"))
        self._check_taken_up()
        if not self._said_ready:
            raise MigrationError(
                f"there is nothing to decide: the migration of {name} is {phase}, and the guest runs at the source"
            )
        if self._toolstack.decides:
            raise MigrationError(
                f"there is nothing to decide here: xl does, and the daemon follows what xl does to {name}; xl can destroy it"
            )
        if phase == "held" and here and not force:
            raise MigrationError(
                f"{self.progress.problem}: --force, if you are certain that it does not run at its source"
            )
        if phase == "held" and here:
            self._released.set()
            return
        if self._runs.is_set() and phase != "held":
            raise MigrationError(
                f"there is nothing to decide: {name} runs here; to end it, destroy it (xl destroy {name})"
            )
        if here and self._not_started:
            raise MigrationError(
                f"there is nothing to decide: {name} belongs here already, and {self._not_started}"
            )
        if phase not in ("in doubt", "held") and not self._not_started:
            raise MigrationError(
                f"there is nothing to decide here: both ends are in touch, and {name} is {phase}"
            )
        if phase == "in doubt" and self._push is not None:
            raise MigrationError(
                f"the sender of {name} is back and is being asked: see `xen-postcopy list`"
            )
        if not here:
            # Before the operator has the answer: a successor carries it out.
            await trio.to_thread.run_sync(self._record, "decided elsewhere")
            self._said_ready, self._decided_elsewhere = False, True
            self.cancel(NOT_HERE)
            return
        if self._step == "suspended":
            raise MigrationError(
                "it is not known whether all has come that the guest cannot run without"
            )
        if self._stand_by is None:
            raise MigrationError(f"{name} cannot be started yet: {self.progress.problem}")
        log.warning("%s: an operator has said that the guest is to run here", name)
        self.session.handed_over = self.session.decided = True
        try:
            await in_thread(self._start)
            pager = self._started()
        except XenError as error:
            pager = self._start_later(error)
        except GuestEndedError as error:
            self._offline_tasks.start_soon(_end_with, error)
            raise
        self._offline_tasks.start_soon(pager.serve, None)
        await trio.to_thread.run_sync(self._record, "taken over")
        self.progress.phase = "interrupted"
        self._note("started by an operator")

    # ---- the order of things ----
    async def run(self) -> None:
        logs.migration.set(self.id)
        try:
            with self._scope:
                await self._receive_migration()
            if self._scope.cancelled_caught:
                raise MigrationError(self._cancel_reason)
        except Exception as error:
            if is_bug(error):
                log.exception("internal error")
            phase = self.progress.phase
            await as_soon_as_threads_start(functools.partial(self._failed, error))
            logs.abnormal_end(self.progress.domain, phase, self.progress.problem, self.details())
        finally:
            self.ended.set()
            self._close_lanes()
            if self.has_ended:
                self._give_back()

    def _give_back(self) -> None:
        """What is as large as the guest: ``list`` shows this migration for long after its end."""
        self._pager = self._stand_by = self._checkpoints = self._domain = self._ring = None
        self._context.clear()
        for large in ("_pages", "_memory"):
            self.__dict__.pop(large, None)

    def _close_lanes(self) -> None:
        for lane in (self._push, self._pull):
            if lane is not None:
                lane.close()
        self._push = self._pull = None

    async def linger(self) -> None:
        """Tell a sender that was cut off how it has ended, if it comes back."""
        if self._last_word is None:
            return
        with trio.move_on_after(LINGER_S) as limit:
            while True:
                try:
                    self._push = await self.lanes.again(log.debug)
                    self.session.rejoin()
                    message = await self._hear()
                    if reason := self._runs_at_the_source(message):
                        limit.deadline = math.inf
                        cannot = f"{reason}, and {self.progress.domain} cannot be paused here"
                        await self._persist(functools.partial(self._hold_completed, reason), cannot)
                        await self._tell_that_it_was_heard()
                    if isinstance(message, m.Rejoin):
                        await self._say(self._last_word)
                        await self._hear()
                    break
                except UnknownSessionError:  # it knows
                    break
                except Exception as error:
                    log.info(
                        "the sender has not been told yet how it ended: %s",
                        error,
                        exc_info=is_bug(error),
                    )
                finally:
                    self._close_lanes()
        await trio.to_thread.run_sync(self._journal.erase, self.id)

    def _runs_at_the_source(self, message: m.Message) -> str:
        """Why the guest runs at the source though this end has it; empty if the message is not
        about that.
        """
        match message:
            case m.Recall():
                return message.reason
            case m.Abort() if self.session.handed_over and not self._toolstack.decides:
                return f"the source had not handed it over, and has it run: {message.reason}"
        return ""

    def _hold_completed(self, reason: str) -> None:
        """It is all here, and runs at the source as well."""
        with (
            contextlib.suppress(NoSuchDomainError),
            self._hypervisor.open(self._domid, self._handle) as domain,
        ):
            domain.pause()
            name = self.progress.domain
            self.progress.phase = "failed"
            self.progress.problem = f"{reason}; so {name} is paused here: destroy it (xl destroy), or unpause it (xl unpause)"
            log.error("%s: %s", name, self.progress.problem)

    async def _receive_migration(self) -> None:
        if self._inherited:
            await as_soon_as_threads_start(self._keep_inheriting)
        elif not await self._agree():
            return
        said = ""
        while True:
            try:
                async with task_group() as self._tasks:
                    await self._carry_on()
                    self._tasks.cancel_scope.cancel()
                break
            except Exception as error:
                if not self._is_here or isinstance(error, GuestEndedError):
                    raise
                if str(error) != said:
                    said = str(error)
                    log.error(
                        "%s after the handover: %s",
                        self.progress.domain,
                        error,
                        exc_info=is_bug(error),
                    )
            self._close_lanes()
            self.progress.phase = "interrupted"
            self._note(said)
            await trio.sleep(CARRY_ON_AGAIN_S)
        await self._finish()

    @property
    def _is_here(self) -> bool:
        """The guest lives by this pager: nothing but its own end is a reason to stop."""
        ours = self.session.handed_over or self._runs.is_set()
        return self._pager is not None and ours and not self._decided_elsewhere

    async def _carry_on(self) -> None:
        if self._pager is not None:  # something failed since
            self._tasks.start_soon(self._follow_domain)
            if self._not_started:
                self._tasks.start_soon(self._keep_starting, XenError("start", errno.EAGAIN))
        elif self._step in ("entrusted", "taken over", "finishing", "lost", "held"):
            await self._serve_for_predecessor()
        if self._step == "held":
            await self._hold("an operator has decided at the source that it runs there")
        if self._step == "lost":
            await self._go_on_without("the source has nothing of the guest any more")
        await self._follow_sender()

    async def _agree(self) -> bool:
        """hello, preflight and the pull lane; false where it was refused."""
        self._push = await self.lanes.push()
        with step_timeout("the sender offered nothing"):
            offer = await self._hear()
        if isinstance(offer, m.Abort):
            raise MigrationError(f"the sender gave up: {offer.reason}")
        if not isinstance(offer, m.Offer):
            raise RemoteProtocolError(f"{offer.type} instead of an offer")
        coming = [
            other
            for other in self.others()
            if other.domain_name == offer.name and not other.has_ended
        ]
        self.progress.domain = offer.name
        # One that was cancelled a moment ago is still being undone.
        with trio.move_on_after(UNDOING_S):
            for other in coming:
                if not other.needed:
                    await other.ended.wait()
        coming = [other for other in coming if not other.has_ended]
        if coming:
            refusal: str | None = (
                f"a guest named {offer.name!r} is incoming already, as migration {coming[0].id[:8]}, "
                f"which is {coming[0].progress.phase}: wait until that has ended"
            )
            self._offer = offer
        else:
            refusal = await trio.to_thread.run_sync(self._prepare, offer)
        if refusal:
            log.warning("refused %s: %s", offer.name, refusal)
            self.progress.problem = refusal
            await self._discard(refusal)
            self.progress.phase = "refused"
            await self._say(m.Refused(m.printable(refusal), False))
            return False
        token = new_token()
        await self._say(m.Accepted(self.statistics.populate_evicted, token))
        self._pull = await self.lanes.pull(token)
        self.lanes.keep(offer.key)
        self.progress.phase = "precopy"
        return True

    async def _keep_inheriting(self) -> None:
        """A guest waits for us, so that what fails is tried again."""
        while True:
            try:
                await trio.to_thread.run_sync(self._inherit)
                break
            except XenError as error:
                if not self._said_ready:
                    raise
                self.progress.phase = "interrupted" if self.session.handed_over else "in doubt"
                self.progress.problem = (
                    f"what was left here cannot be taken up yet: {error}; trying again"
                )
                log.error("%s: %s", self.progress.domain, self.progress.problem)
                await trio.sleep(LAST_START_AGAIN_S)
        self.progress.problem = ""

    def _inherit(self) -> None:
        """What a predecessor had."""
        config = _config(self._offer)
        if self._step in NOT_READY:
            with contextlib.suppress(NoSuchDomainError):
                if self._step == "making":
                    self._domain = next(iter(self._hypervisor.abandoned(config)), None)
                else:
                    self._domain = self._hypervisor.open(self._domid, self._handle)
            not_arrived = "the receiver was ended before the guest had arrived"
            raise MigrationError(NOT_HERE if self._step == "decided elsewhere" else not_arrived)
        self._said_ready = True  # for all we know
        try:
            domain = self._hypervisor.reopen_incoming(
                self._domid, config, lent=self._toolstack.decides, handle=self._handle
            )
            if (
                not self._toolstack.decides
                and domain.state() is not DomainState.INCOMING
                and self._step != "finishing"
            ):
                self._step = "taken over"
        except NoSuchDomainError:
            raise GuestEndedError("its domain was destroyed") from None
        self._domain = domain
        self._limit = FrameLimit(domain, self._raised, self._note_raised)
        handed_over = self._step in ("taken over", "finishing", "lost", "held")
        self.session = Session.of_predecessor(
            Role.RECEIVER, self._offer.nr_pfns, handed_over=handed_over, protected=self._offer.checkpoint_ms > 0,
            entrusted=self._toolstack.decides,
        )  # fmt: skip
        self.session.decided = self._decided
        if handed_over:
            self._handed_over.set()
        self._pages = OutstandingPages(self._offer.nr_pfns)
        if self._offer.paging:
            self._ring = self._attach(domain)
            self._pages.add(domain.paged_out())
        self.progress.outstanding = self._pages.count
        log.warning(
            "%s: taking up what was left here, %s, %d pages missing",
            config.name,
            self._step,
            self._pages.count,
        )

    def _attach(self, domain: Domain) -> PagingRing | None:
        deadline = time.monotonic() + ATTACH_TIMEOUT_S
        while True:
            try:
                return domain.paging_attach()
            except XenError as error:
                if (
                    error.errno == errno.ENODEV
                    and self._step in FINISHED_OR_FINISHING
                    and not len(domain.paged_out())
                ):
                    return None
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(
                    LOOK_EVERY_S
                )  # the hypervisor has not seen yet that the one before us is dead

    async def _serve_for_predecessor(self) -> None:
        assert self._domain is not None
        state = await trio.to_thread.run_sync(self._state)
        await trio.to_thread.run_sync(self._undo_stop, state)
        if (
            state is DomainState.INCOMING
            and self._step == "taken over"
            and not self._toolstack.decides
        ):
            try:
                await in_thread(self._start)
                self._started()
            except XenError as error:
                self._start_later(error)
        else:
            self._serve()
            await trio.to_thread.run_sync(self._protect, self._domain)
            if self._step != "entrusted":
                self._runs.set()

    def _note_stop(self) -> None:
        with contextlib.suppress(XenError):  # it is too late to leave it
            mark(self._stopped)

    def _undo_stop(self, state: DomainState | None) -> None:
        assert self._domain is not None
        if self._was_stopped_by_us(state):
            with contextlib.suppress(XenError):  # or it was about to stop it
                (self._domain.resume if state is DomainState.SUSPENDED else self._domain.unpause)()
            self._stopped.unlink(missing_ok=True)

    def _was_stopped_by_us(self, state: DomainState | None) -> bool:
        """True if a predecessor stopped the guest: for a checkpoint, to give the ring up, or to
        start the guest.
        """
        if self._handle is None and self._noted == "finishing":
            return True  # it was of a release that noted only this
        just_started = (
            self._noted not in (*FINISHED_OR_FINISHING, "lost", "held") or self._handle is None
        )
        if state is DomainState.PAUSED and just_started and not self._toolstack.decides:
            return True
        return self._stopped.exists()

    @property
    def _stopped(self) -> Path:
        return self._journal.stopped(self.id)

    async def _follow_sender(self) -> None:
        """Until all is done."""
        if self._stand_by is None:
            self._stand_by = self._make_pager()
        while not self._completed:
            try:
                if self._push is None:
                    raise PeerClosedError("the receiver was started anew")
                async with task_group() as self._lane_tasks:
                    for lane in (self._push, self._pull):
                        if lane is not None:
                            self._lane_tasks.start_soon(lane.keep_alive)
                    self._lane_tasks.start_soon(self._serve_faults, self._stand_by)
                    if self._pager is not None:
                        self._finish_over_these_lanes(self._pager)
                    assert self._push is not None
                    await run_in_thread(self._receive_push_lane, self._push.stop_receiving)
                    self._lane_tasks.cancel_scope.cancel()
            except Exception as error:
                if not self._said_ready or is_final(error):
                    raise
                if self._needs_nothing:
                    log.info(
                        "nothing is missing any more, which the sender may not have heard: %s",
                        error,
                    )
                    return
                await self._rejoin(error)

    @property
    def _needs_nothing(self) -> bool:
        """Of the sender."""
        ours = self._runs.is_set() or self._toolstack.decides
        return self.session.handed_over and ours and not self._pages.count and not self._lacked

    async def _finish(self) -> None:
        assert self._domain is not None and self._pager is not None
        await in_thread(self._record, "finishing")
        await in_thread(self._note_stop)
        while True:
            try:
                await self._pager.finish()
                break
            except NoSuchDomainError:  # the guest has ended since
                break
            except XenError as error:
                self.progress.problem = (
                    f"all memory has come, but the ring cannot be given up: {error}; trying again"
                )
                log.error("%s: %s", self.progress.domain, self.progress.problem)
                await trio.sleep(LAST_START_AGAIN_S)
        self.progress.problem = ""
        await in_thread(functools.partial(self._stopped.unlink, missing_ok=True))
        with contextlib.suppress(NoSuchDomainError):
            await in_thread(self._domain.reserve, 0)
            if self._checkpoints is not None:
                await in_thread(self._checkpoints.stop)
            await in_thread(self._limit.give_back)
        if self._completed:
            await in_thread(self._journal.erase, self.id)
        else:
            self._last_word = self._complete_message()
        self.progress.phase, self.progress.outstanding, self.progress.waiting = "completed", 0, 0
        await in_thread(self._domain.close)
        log.info("%s completed", self.progress.domain)

    async def _hear(self) -> m.Message:
        assert self._push is not None
        message, _pages = await self._push.receive()
        self.session.received(message, Lane.PUSH)
        return message

    def _prepare(self, offer: m.Offer) -> str | None:
        """Preflight, the incoming domain and its ring; returns why not."""
        config, self._offer = _config(offer), offer
        try:
            if problem := sparseness(offer.nr_pfns, offer.max_pages):
                return problem
            preflight = self._toolstack.preflight(self._hypervisor, config, paging=offer.paging)
            if preflight.problems:
                return "; ".join(preflight.problems)
            if offer.checkpoint_ms and self._toolstack.decides:
                return "a guest that xl migrates cannot be protected: xl destroys the source"
            self._record("making")
            self._domain = self._toolstack.make(self._hypervisor, config)
            self._domid, self._handle = self._domain.domid, self._domain.handle
            self._record("made")
            if problem := sparseness(offer.nr_pfns, self._domain.config().max_pages):
                return problem  # of a domain that xl has made
            if offer.paging:
                self._ring = self._domain.paging_enable()
                self.statistics.populate_evicted = preflight.populate_evicted
        except (XenError, MigrationError) as error:
            return str(error)
        self._limit = FrameLimit(self._domain, self._raised, self._note_raised)
        self._memory = MemoryRestorer(self._domain, self._limit, offer.max_pages)
        self._pages = OutstandingPages(offer.nr_pfns)
        return None

    # ---- the push lane's thread ----
    def _receive_push_lane(self) -> None:
        """Do what the sender says, in its order, until it agrees that all is done.

        Pages are put in place here; what starts or ends something is the event loop's.
        """
        assert self._push is not None
        while not self._completed:
            message, payload = self._push.receive_blocking()
            self.session.received(message, Lane.PUSH)
            match message:
                case m.Pages() if self._pager is not None:
                    self._pager.pushed(message, payload, self._push.is_over)
                case m.Pages():
                    self._memory.pages(message, payload)
                    for pfns in (message.pfns, message.zeros, message.holes):
                        self._pages.remove(pfns)
                case m.Defer():
                    self._miss(pfns_of_window(message.base, message.bitmap))
                case m.Barrier():
                    self._say_blocking(m.Passed(message.number))
                case m.Suspended():
                    scheduling.be_urgent()  # the guest stands still
                    self._record("suspended")
                    self.progress.phase = "switchover"
                case m.Missing():
                    self._miss(message.pfns)
                case m.Context():
                    self._take_context(message)
                case m.Entrust():
                    trio.from_thread.run(self._entrusted)
                    scheduling.be_bulk()
                case m.Handover():
                    self._handed_to_us()
                    scheduling.be_bulk()
                case m.Abort():
                    raise MigrationError(f"the sender gave up: {message.reason}")
                case m.Kept() if self._checkpoints is not None:
                    self._checkpoints.kept(message.problem)
                case m.Completed():
                    self._completed = True

    def _miss(self, pfns: PfnArray) -> None:
        self._memory.evict(pfns)
        self._pages.add(pfns)

    def _take_context(self, message: m.Context) -> None:
        assert self._domain is not None
        if len(self._context) + len(message.data) > MAX_CONTEXT_BYTES:
            raise RemoteProtocolError(f"context: more than {MAX_CONTEXT_BYTES} bytes")
        self._context += message.data
        if not message.last:
            return
        self._domain.set_context(bytes(self._context))
        self._context.clear()
        self._limit.make_room(self._pages.count)
        with self._becoming_ready:
            if self._cancel_reason:
                raise MigrationError(self._cancel_reason)
            self._said_ready = True
        self._say_blocking(m.Ready())
        # "suspended" in the journal suffices to resume with the sender; "ready" also lets an operator start the guest.
        self._record("ready")

    def _say_blocking(self, message: m.Message, payload: Sequence[memoryview] = ()) -> None:
        assert self._push is not None
        self.session.sent(message, Lane.PUSH)
        self._push.send_blocking(message, payload)

    # ---- from the switchover on ----
    async def _entrusted(self) -> None:
        """xl is about to decide whether the guest runs here."""
        assert self._domain is not None
        if not self._toolstack.decides:
            raise RemoteProtocolError("entrust: there is no toolstack here that would decide")
        if self._pager is None:
            await trio.to_thread.run_sync(self._record, "entrusted")
            self._finish_over_these_lanes(self._serve())
        self.progress.phase = "deciding"
        await self._toolstack.restored(self._domain)

    def _handed_to_us(self) -> None:
        """In this thread until the guest runs: it stands still, and a turn of the event loop takes longer than all this."""
        if self._toolstack.decides:
            trio.from_thread.run_sync(self._taken_over)
        else:
            try:
                self._start()
            except XenError as error:
                start_later = functools.partial(self._start_later, error)
                self._record("taken over")  # a successor is to start it
                trio.from_thread.run_sync(lambda: self._finish_over_these_lanes(start_later()))
                return
            try:
                self._say_blocking(m.Resumed())
            finally:  # it runs
                trio.from_thread.run_sync(lambda: self._finish_over_these_lanes(self._started()))
        self._record("taken over")  # a successor sees it by the domain as well

    def _taken_over(self) -> None:
        """The guest is ours."""
        self._handed_over.set()
        self.progress.phase = "postcopy"

    def _start(self) -> None:
        """Start the guest.  Raises ``XenError`` if a later attempt may succeed, and
        :class:`GuestEndedError` if none can.
        """
        try:
            self._try_to_start()
        except XenError as error:
            state = self._state()
            if state is DomainState.RUNNING:
                return  # the error came after that
            if state in (None, DomainState.CRASHED):
                name = self.progress.domain
                raise GuestEndedError(
                    f"{name} ended when it was to be started here: {error}"
                ) from error
            raise

    def _try_to_start(self) -> None:
        """Raises ``XenError`` for any error.  The guest is ours, so none is a reason to give it up."""
        assert self._domain is not None
        try:
            self._protect(self._domain)
            if self._stand_by is not None:
                self._stand_by.begin()
            self._domain.start()
        except XenError:
            raise
        except Exception as error:
            if is_bug(error):
                log.exception("internal error")
            raise XenError("start", errno.EAGAIN, why=repr(error)) from error

    def _start_later(self, error: XenError) -> Pager:
        """The guest is ours, and its memory comes meanwhile."""
        self._taken_over()
        pager = self._serve()
        self._tasks.start_soon(self._keep_starting, error)
        return pager

    async def _keep_starting(self, error: XenError) -> None:
        """Try to start the guest until an attempt succeeds.  The hypervisor or xenstored may have
        been busy, or memory may have been short.
        """
        for pause_s in pauses(FIRST_START_AGAIN_S, LAST_START_AGAIN_S, growth=2):
            self._not_started = (
                f"the guest cannot be started yet ({error}), which is tried again and again"
            )
            self.progress.problem = self._not_started
            log.warning("%s: %s", self.progress.domain, self._not_started)
            await trio.sleep(pause_s)
            async with self._deciding:
                try:
                    await in_thread(self._start)
                    break
                except XenError as again:
                    error = again
        log.info("%s runs after all", self.progress.domain)
        self._not_started = self.progress.problem = ""
        self._runs.set()

    def _started(self) -> Pager:
        self._taken_over()
        self._runs.set()
        return self._serve()

    def _serve(self) -> Pager:
        """Be the guest's pager."""
        self._pager = self._stand_by = self._stand_by or self._make_pager()
        self._pager.begin()
        self._tasks.start_soon(self._follow_domain)
        return self._pager

    def _make_pager(self) -> Pager:
        assert self._domain is not None
        say, make_room = self._say_blocking, self._limit.make_room
        return Pager(
            self._domain, self._ring, self.session, self._pages, self.statistics, say, make_room
        )

    def _protect(self, domain: Domain) -> None:
        """In a thread."""
        if (
            not self._offer.checkpoint_ms
            or self._checkpoints is not None
            or self.progress.unprotected
        ):
            return
        every_s = self._offer.checkpoint_ms / 1000
        made = Checkpoints(
            domain,
            every_s,
            self._say_blocking,
            self.statistics,
            self._stopped,
            self._protection_is_lost,
        )
        try:
            made.begin(inherit=self._inherited)
            self._checkpoints = made
        except XenError as error:
            self._protection_is_lost(str(error))

    def _protection_is_lost(self, problem: str) -> None:
        log.error("%s: %s: %s", self.progress.domain, NOT_PROTECTED, problem)
        self.progress.unprotected = problem
        self._record_again()

    def _finish_over_these_lanes(self, pager: Pager) -> None:
        for task in (self._complete, self._report):
            self._lane_tasks.start_soon(task, pager)
        if self._offer.checkpoint_ms:
            self._lane_tasks.start_soon(self._send_checkpoints)

    async def _send_checkpoints(self) -> None:
        """Or why there are none."""
        assert self._push is not None
        await self._handed_over.wait()
        if self._checkpoints is not None and not self.progress.unprotected:
            await self._checkpoints.run(self._push.shut)
        if self.progress.unprotected and m.UNPROTECTED in self._push.capabilities:
            await self._say(m.Unprotected(m.printable(self.progress.unprotected)))

    async def _serve_faults(self, pager: Pager) -> None:
        try:
            await pager.serve(self._pull)
        except PeerClosedError:
            await trio.sleep(EXPLANATION_S)  # the push lane may say why
            raise

    async def _follow_domain(self) -> None:
        """Find out that the guest runs here, and that it has ended."""
        began = pauses(LOOK_EVERY_S, LOOK_AT_LAST_EVERY_S)
        complaint = Complaint(log.warning)
        while True:
            try:
                state = await trio.to_thread.run_sync(self._state)
                if self._checkpoints is not None and state is not None:
                    await trio.to_thread.run_sync(self._checkpoints.let_go_on)
            except (XenError, RuntimeError) as error:  # that may pass
                complaint.log(
                    "%s: its state is not known, or it cannot go on: %s",
                    self.progress.domain,
                    error,
                )
                await trio.sleep(LOOK_AGAIN_EVERY_S)
                continue
            if state is None:
                raise GuestEndedError(
                    "its domain was destroyed"
                    if self._runs.is_set()
                    else "xl gave the guest up here"
                )
            if state is not DomainState.INCOMING:
                self._runs.set()
            if not self._offer.checkpoint_ms:  # which suspend it as well
                self._note_whether_it_is_saved(state is DomainState.SUSPENDED)
            await trio.sleep(LOOK_AGAIN_EVERY_S if self._runs.is_set() else next(began))

    def _note_whether_it_is_saved(self, suspended: bool) -> None:
        """Note that another program has suspended the guest.  Such a program may save the guest
        before its missing pages have arrived.
        """
        assert self._pager is not None
        if suspended and not self._lacked and self.missing:
            self._lacked, self._pager.holds_back = self.missing, True
            about = "%s was suspended by another program while %d pages are missing: an image that is made now lacks them"
            log.error(about, self.progress.domain, self._lacked)
        elif not suspended and self._lacked:
            log.warning("%s runs again, and its pages come", self.progress.domain)
            self._lacked, self._pager.holds_back = 0, False

    def _state(self) -> DomainState | None:
        """``None``: the domain is gone."""
        assert self._domain is not None
        try:
            return self._domain.state()
        except NoSuchDomainError:
            return None

    async def _complete(self, pager: Pager) -> None:
        """Send ``resumed`` when the guest runs, unless :meth:`_handed_to_us` has sent it, and
        ``complete`` when all pages have arrived.

        A toolstack may leave the guest paused for any time.  Its memory arrives nevertheless.
        """

        async def all_is_here() -> None:
            await pager.nothing_outstanding.wait()
            await self._handed_over.wait()

        assert self._push is not None
        if self._toolstack.decides and m.PAUSED in self._push.capabilities:
            await first(self._runs.wait, all_is_here)
            if await trio.to_thread.run_sync(self._state) not in (None, DomainState.INCOMING):
                self._runs.set()
        else:
            await self._runs.wait()
        if self._runs.is_set() and not self.session.resumed:
            await self._say(m.Resumed())
        await all_is_here()
        while self._lacked:
            await trio.sleep(LOOK_AGAIN_EVERY_S)
        self.progress.phase = "completing"
        if self._checkpoints is not None:
            await self._checkpoints.end()
        await trio.to_thread.run_sync(pager.acknowledge)
        await self._say(self._complete_message())

    def _complete_message(self) -> m.Message:
        return m.Complete(json.dumps(self.details()).encode())

    async def _report(self, pager: Pager) -> None:
        while True:
            await trio.to_thread.run_sync(pager.acknowledge)
            if pager.nothing_outstanding.is_set():
                return
            report, self.progress.waiting = pager.report()
            self.progress.outstanding = report.outstanding
            if pager.short_of_memory or self.progress.problem == NO_MEMORY:
                self.progress.problem = NO_MEMORY if pager.short_of_memory else ""
            await self._say(report)
            with trio.move_on_after(REPORT_EVERY_S):
                await pager.nothing_outstanding.wait()

    # ---- when the lanes are lost ----
    async def _rejoin(self, lost: Exception) -> None:
        """The guest goes on as far as its pages allow, if it is here."""
        self.progress.phase = (
            "interrupted" if self._runs.is_set() or self.session.handed_over else "in doubt"
        )
        while True:
            self._close_lanes()
            self._note(str(lost))
            log.warning(
                "%s %s: %s", self.progress.domain, self.progress.phase, lost, exc_info=is_bug(lost)
            )
            try:
                async with task_group() as self._offline_tasks:
                    if self._pager is not None:
                        self._offline_tasks.start_soon(self._pager.serve, None)
                    elif self._toolstack.decides:
                        self._offline_tasks.start_soon(self._follow_domain)
                    self._push = await self.lanes.again(self._note)
                    async with self._deciding:
                        self._offline_tasks.cancel_scope.cancel()
                await self._take_up_again()
                break
            except PagesLostError as error:
                await self._go_on_without(str(error))
            except RecalledError as error:
                await self._hold(str(error))
            except UnknownSessionError as error:
                if self._pager is None:
                    raise MigrationError("the sender has given up, and forgotten it") from error
                lost = error
            except Exception as error:
                if is_final(error):
                    raise
                lost = error
                if not isinstance(error, PeerClosedError | ProtocolError):
                    await trio.sleep(CARRY_ON_AGAIN_S)
        if self._pager is not None:
            self.progress.phase = "postcopy" if self.session.handed_over else "deciding"
        self.progress.problem = self._not_started
        log.info(
            "%s: the sender is back, %d pages are missing", self.progress.domain, self._pages.count
        )

    async def _go_on_without(self, reason: str) -> NoReturn:
        """Serve the guest with the pages that are here, until somebody destroys it.  The missing
        pages exist nowhere any more.
        """
        if self._pager is None:
            raise MigrationError(reason)
        await trio.to_thread.run_sync(self._record, "lost")
        self._close_lanes()
        name, count = self.progress.domain, self._pages.count
        self.progress.phase = "lost"
        what_to_do = f"destroy it (xl destroy {name}) and start it anew"
        self.progress.problem = (
            f"{reason}; {name} lacks {count} pages that exist nowhere any more: {what_to_do}"
        )
        log.error("%s: %s", name, self.progress.problem)
        async with task_group() as self._offline_tasks:
            self._offline_tasks.start_soon(self._pager.serve, None)
            await trio.sleep_forever()
        raise AssertionError  # it is cancelled, or _follow_domain ends all

    async def _hold(self, reason: str) -> NoReturn:
        """Keep the guest paused, because it runs at the source as well, until somebody destroys it
        or an operator decides again.
        """
        assert self._domain is not None and self._pager is not None
        domain, name = self._domain, self.progress.domain
        what_to_do = f"`xen-postcopy decide {name} elsewhere` destroys it, `xen-postcopy decide {name} here --force` has it go on"
        await trio.to_thread.run_sync(self._record, "held")  # before the source has the answer
        async with task_group() as self._offline_tasks:
            if self._push is not None:
                self._offline_tasks.start_soon(self._answer_and_leave)
            self._offline_tasks.start_soon(self._pager.serve, None)

            def pause(paused: bool) -> None:
                if (self._state() is DomainState.PAUSED) is not paused:  # as by a predecessor
                    (domain.pause if paused else domain.unpause)()

            self.progress.phase, self.progress.problem = (
                "held",
                f"{reason}; so {name} is being paused here",
            )
            cannot = f"{reason}, and {name} cannot be paused here"
            persist = functools.partial(
                self._persist, functools.partial(pause, True), cannot, what_to_do
            )
            await first(persist, self._released.wait)
            self.progress.problem = f"{reason}; so {name} is paused here: {what_to_do}"
            log.error("%s: %s", name, self.progress.problem)
            await self._released.wait()
            cannot = f"{name} is to go on here, and cannot be unpaused"
            await self._persist(functools.partial(pause, False), cannot)
            self._offline_tasks.cancel_scope.cancel()
        await self._go_on_without(
            "the source has taken the guest back, and an operator has decided that it goes on here"
        )

    async def _persist(self, call: Callable[[], None], what: str, what_to_do: str = "") -> None:
        """Make a call to the hypervisor in a thread until an attempt succeeds."""
        for pause_s in pauses(FIRST_START_AGAIN_S, LAST_START_AGAIN_S, growth=2):
            try:
                await trio.to_thread.run_sync(call)
                return
            except XenError as error:
                self.progress.problem = f"{what} ({error}), which is tried again and again"
                if what_to_do:
                    self.progress.problem += f": {what_to_do}"
                log.error("%s: %s", self.progress.domain, self.progress.problem)
                await trio.sleep(pause_s)

    async def _answer_and_leave(self) -> None:
        await self._tell_that_it_was_heard()
        self._close_lanes()

    def _note(self, why: str) -> None:
        if self.progress.phase == "in doubt":
            state = (
                "the sender may or may not have handed the guest over: it is kept, and does not run"
            )
        else:
            state = self._not_started or "the guest is here and waits for its missing pages"
        self.progress.problem = f"{why}; {state}"

    async def _take_up_again(self) -> None:
        self.session.rejoin()
        with step_timeout("the sender said nothing"):
            message = await self._hear()
        match message:
            case m.Rejoin():
                pass
            case m.Completed() if self._needs_nothing:
                self._completed = True
                return
            case m.Abort() | m.Recall() if reason := self._runs_at_the_source(message):
                if self._runs.is_set():
                    raise RecalledError(reason)
                await self._tell_that_it_was_heard()
                self._said_ready, self._decided_elsewhere = False, True
                raise MigrationError(reason)
            case m.Abort() if not self.session.handed_over:
                raise MigrationError(f"the sender gave up: {message.reason}")
            case m.Lost():
                await self._tell_that_it_was_heard()
                if self._needs_nothing:
                    self._completed = True
                    return
                raise PagesLostError(message.reason)
            case _:
                raise RemoteProtocolError(
                    f"{message.type}, but {self._pages.count} pages are missing"
                )
        pages = self._pages if self._pager is None else self._pager
        for base, bitmap in windows(await trio.to_thread.run_sync(pages.rejoin)):
            await self._say(m.Outstanding(base, bitmap))
        token = new_token()
        reached = (
            "postcopy"
            if self.session.handed_over
            else "switchover"
            if self._pager is None
            else "decision"
        )
        await self._say(m.Rejoined(reached, token))
        self._pull = await self.lanes.pull(token)

    async def _tell_that_it_was_heard(self) -> None:
        assert self._push is not None
        with contextlib.suppress(PeerClosedError):
            await self._push.send(m.Failed("told"))
            await trio.sleep(EXPLANATION_S)

    async def _say(self, message: m.Message) -> None:
        assert self._push is not None
        self.session.sent(message, Lane.PUSH)
        await self._push.send(message)

    # ---- when it goes wrong ----
    async def _failed(self, error: Exception) -> None:
        progress = self.progress
        answer: m.Message = m.Failed(m.printable(str(error)))
        progress.problem = str(error)
        aborted = isinstance(error, MigrationError) and not isinstance(
            error, PeerClosedError | ProtocolError
        )
        gone = self._said_ready and await self._is_gone()
        if gone or isinstance(error, GuestEndedError):
            reason = (
                str(error) if isinstance(error, GuestEndedError) else "its domain was destroyed"
            )
            answer = m.Ended(self._runs.is_set(), m.printable(reason))
            if not gone:  # the guest crashed at its start: the source has all that it was
                reason += f"; its domain is kept here: to end it, destroy it (xl destroy {progress.domain})"
                answer = m.Failed(m.printable(reason))
            lacked = self._lacked or (self.missing if gone and await self._ended_suspended() else 0)
            if self.session.handed_over and lacked:
                reason += (
                    f" after it had been suspended while {lacked} pages were missing: "
                    "an image or a copy that was made of it then lacks them"
                )
                answer = m.Failed(m.printable(reason))  # so that the sender keeps them
            log.warning("%s: %s", progress.domain, reason)
            progress.phase, progress.problem = "failed", reason
            await trio.to_thread.run_sync(self._release)
            self._last_word = answer
        elif (self.session.handed_over or self._runs.is_set()) and not self._decided_elsewhere:
            progress.phase = "interrupted"
            self._note(str(error))
            log.error("%s after the handover: %s", progress.domain, error)
        elif self._said_ready and not aborted:
            progress.phase = "in doubt"
            self._note(str(error))
            log.error("%s before the handover: %s", progress.domain, progress.problem)
            return
        else:
            log.warning("%s given up: %s", progress.domain or "migration", error)
            with trio.CancelScope(shield=True):
                await self._discard(str(error))
            progress.phase = "failed"  # and nothing is left over by now
        with (
            trio.CancelScope(shield=True),
            trio.move_on_after(2),
            contextlib.suppress(MigrationError),
        ):
            if self._push is not None:
                await self._push.send(answer)
                self._last_word = None
                if progress.phase == "failed":
                    await trio.to_thread.run_sync(self._journal.erase, self.id)
                # What the sender says meanwhile is not read any more, and closing a connection then takes back what we said.
                await trio.sleep(EXPLANATION_S)

    async def _is_gone(self) -> bool:
        complaint = Complaint(log.warning)
        while self._domain is not None:
            try:
                return await trio.to_thread.run_sync(self._state) is None
            except XenError as error:  # that may pass
                complaint.log("%s: its state is not known: %s", self.progress.domain, error)
                await trio.sleep(LOOK_AGAIN_EVERY_S)
        return True

    async def _ended_suspended(self) -> bool:
        """As one does that was saved, or migrated to a third host."""
        return self._domain is not None and await trio.to_thread.run_sync(
            self._domain.ended_suspended
        )

    async def _discard(self, reason: str) -> None:
        """Nothing is left over."""
        if self._domain is None:
            await trio.to_thread.run_sync(self._journal.erase, self.id)
            await self._toolstack.failed(reason)
            return
        try:
            await self._toolstack.discard(self._domain, reason)
            await trio.to_thread.run_sync(self._journal.erase, self.id)
        except XenError as error:
            log.error("%s is left over: %s", self.progress.domain, error)
            self.progress.problem += f"; and the incoming domain is left over: {error}"
        await trio.to_thread.run_sync(self._release)

    def _release(self) -> None:
        """What we have of the domain."""
        if self._stand_by is not None:
            self._stand_by.close()
        if self._ring is not None:
            self._ring.close()
        if self._domain is not None:
            self._domain.close()
            self._domain = None


async def _end_with(error: Exception) -> NoReturn:
    """End a task group."""
    raise error


def _config(offer: m.Offer) -> DomainConfig:
    return DomainConfig(offer.name, offer.nr_pfns, offer.max_pages, offer.vcpus, offer.platform)
