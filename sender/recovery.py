# SPDX-License-Identifier: GPL-2.0-or-later
"""The recovery of a session whose lanes were lost after the handover or, under xl, after
``entrust``; or whose sender was restarted then.

The session is resumed over a new pair of lanes.  The destination reports what it lacks, and each of
those pages is sent again.  A message that may not have arrived is sent again as well.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import trio

from migrate.errors import MigrationError, PeerClosedError, RemoteProtocolError
from migrate.lanes.connection import step_timeout
from migrate.protocol import messages as m
from migrate.protocol.pfns import PfnMask, pfns_of_window
from migrate.protocol.session import Phase, Role, Session
from migrate.tasks import in_thread, is_bug, is_final
from sender.backlog import Backlog
from sender.checkpoints import CheckpointStore
from sender.context import Context, Source
from sender.inbox import completed, raise_end, unprotected
from sender.ownership import Link, State
from sender.push import PushLane
from sender.switchover import last_of_switchover
from xenbackend.contract import Domain
from xenbackend.errors import NoSuchDomainError, XenError

log = logging.getLogger(__name__)


class Recovery:
    def __init__(self, context: Context, source: Source):
        self._context = context
        self._source = source

    async def resume_predecessor(self) -> PushLane:
        """Rejoin the session of a sender that was killed."""
        context, source = self._context, self._source
        context.session = Session.of_predecessor(
            Role.SENDER,
            source.domain.nr_pfns,
            handed_over=context.ownership.handed_over,
            protected=source.checkpoints is not None,
            entrusted=context.entry.xl,
        )
        if source.checkpoints is not None:
            await trio.to_thread.run_sync(self.apply_checkpoint_again, source.checkpoints)
        return await self.rejoin(PeerClosedError("the sender was restarted"))

    async def rejoin(self, lost: Exception) -> PushLane:
        """Try to rejoin until the destination is there again.  Returns the new push lane.

        Raises an error after which no further attempt can succeed.
        """
        context = self._context
        context.lost_at = time.monotonic()
        while True:
            log.warning("%s: %s", context.name, lost, exc_info=is_bug(lost))
            self._note(str(lost))
            context.close_lanes()
            try:
                connection = await context.lanes.again(self._note)
                push = context.take_push_lane(connection, self._source.domain)
                await self._resume_session(push)
                break
            except Exception as error:
                if is_final(error) or await self.pages_are_lost():
                    raise
                lost = error
        context.statistics.rejoins += 1
        if context.ownership.state is State.ALL_SENT:
            await in_thread(context.ownership.enter, State.HANDED_OVER)
        context.ownership.link = Link.UP
        context.progress.problem, context.lost_at = "", 0.0
        context.count_down()
        missing = context.backlog.unacknowledged
        log.info("%s: the destination is back, %d pages to go", context.name, missing)
        return push

    async def pages_are_lost(self) -> bool:
        """Whether pages that the destination may lack were destroyed with the source domain."""
        context, domain = self._context, self._source.domain
        # If a successor has no keeper, it holds the pages when it has taken the backlog.
        held = context.toolstack.destroys_source and (
            domain.has_keeper or not context.ownership.inherited
        )
        if held and not await in_thread(domain.holds_are_lost):
            return False
        if not context.ownership.inherited and not context.backlog.unacknowledged:
            return False
        return await in_thread(is_gone, domain, context.name)

    def _note(self, why: str) -> None:
        state = (
            "the guest is at the destination, its missing pages are kept here"
            if self._context.ownership.handed_over
            else "xl has not decided yet at which end the guest runs"
        )
        self._context.progress.problem = f"{why}; {state}"

    async def _resume_session(self, push: PushLane) -> None:
        """Ask the destination which pages and messages it lacks, and send the messages."""
        context, checkpoints = self._context, self._source.checkpoints
        context.session.rejoin()
        if checkpoints is not None:
            await trio.to_thread.run_sync(checkpoints.abandon)
        await push.send(m.Rejoin())
        outstanding = np.zeros(self._source.domain.nr_pfns, dtype=np.bool_)
        with step_timeout("the destination did not report what it lacks"):
            while isinstance(answer := await push.receive(), m.Outstanding):
                outstanding[pfns_of_window(answer.base, answer.bitmap)] = True
        match answer:
            case m.Rejoined() | m.Complete():
                await trio.to_thread.run_sync(self._take_backlog, outstanding)
            case m.Ended() | m.Failed():
                raise_end(context, answer)
            case _:
                raise RemoteProtocolError(f"{answer.type} in answer to rejoin")
        if isinstance(answer, m.Complete):
            completed(context, answer)
            return
        context.pull = await context.lanes.pull(answer.token)
        if context.session.phase is Phase.SWITCHOVER:
            await push.send(last_of_switchover(context))
            await context.toolstack.switched_over()

    def _take_backlog(self, outstanding: PfnMask) -> None:
        """Set the backlog to what the destination lacks.  The journal has no backlog of a
        predecessor.
        """
        context, domain = self._context, self._source.domain
        if not context.ownership.inherited:
            domain.release(context.backlog.rejoin(outstanding))
            return
        context.backlog = Backlog(outstanding)
        missing = context.backlog.unacknowledged
        context.statistics.missing_pages = missing
        context.progress.pages_total = max(context.entry.missing, missing)
        if missing:  # otherwise the domain may be gone
            context.toolstack.hold(domain, outstanding)
        context.ownership.inherited = False

    def apply_checkpoint_again(self, checkpoints: CheckpointStore) -> None:
        """Apply a predecessor's checkpoint again.  If that fails, the guest is not protected any
        more, but its pages are still here.
        """
        if not self._context.entry.applied and not checkpoints.exists():
            return
        try:
            checkpoints.apply_again()
        except (MigrationError, XenError, OSError) as error:
            unprotected(self._context, m.printable(str(error)))


def is_gone(domain: Domain, name: str) -> bool:
    """Whether the domain does not exist any more.  Called in a thread."""
    try:
        domain.state()
    except NoSuchDomainError:
        return True
    except XenError as error:
        log.warning("%s: the state of its domain is not known: %s", name, error)
    return False
