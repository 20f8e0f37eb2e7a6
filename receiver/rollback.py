# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration that does not complete: what is undone, and what is sent to the sender."""

from __future__ import annotations

import contextlib
import functools
import logging

import trio

from migrate.errors import GuestEndedError, MigrationError, UnknownSessionError
from migrate.lanes.connection import EXPLANATION_S, LINGER_S, step_timeout
from migrate.logs import Complaint
from migrate.protocol import messages as m
from migrate.service.history import Amend
from migrate.tasks import in_thread, is_bug
from migrate.units import xl_command
from receiver.context import Context, retries
from receiver.guest import state_of
from receiver.ownership import TABLE, State
from receiver.switchover import LOOK_AGAIN_EVERY_S, Switchover
from xenbackend.contract import DomainState, End
from xenbackend.errors import NoSuchDomainError, XenError

log = logging.getLogger(__name__)

LAST_MESSAGE_S = 2.0
"""How long sending the last message may take, if there are lanes."""
RECALLED_LINGER_DAYS = 7
"""How long a sender whose guest also runs may be away and still be answered that the guest is
paused here.
"""
RECALLED_LINGER_S = RECALLED_LINGER_DAYS * 24 * 3600


async def failed(
    context: Context, error: Exception, switchover: Switchover | None
) -> m.Message | None:
    """Undo the migration, or end it if the guest has ended here.  The call can be repeated.

    The error was raised before this call, and an operator may have decided since: the state
    decides, and no operator decides meanwhile.  Returns the message for the sender.
    """
    ownership = context.ownership
    context.progress.problem = str(error)
    gone = ownership.needed and await _is_gone(context, error)
    async with context.deciding:
        if ownership.needed and (gone or isinstance(error, GuestEndedError)):
            return await _guest_ended(context, error, switchover, gone=gone)
        if ownership.has_ended:
            return None
        assert not ownership.ours, f"{context.name} is here, and is not given up for: {error}"
        log.warning("the migration of %s is undone: %s", context.name or "a guest", error)
        answer = m.Failed(m.printable(str(error)))
        with trio.CancelScope(shield=True):
            if ownership.needed:  # a successor destroys what is left over, and keeps nothing
                await in_thread(ownership.enter, State.DECIDED_ELSEWHERE)
        await discard(context, str(error), answer)
        ownership.enter(State.GIVEN_UP)
        return answer


async def _guest_ended(
    context: Context, error: Exception, switchover: Switchover | None, *, gone: bool
) -> m.Message:
    """End the migration of a guest that has ended here.  Returns the message for the sender."""
    end, has_run = await _end(context)
    ran = switchover is not None and (has_run or switchover.runs.is_set())
    reason = str(error) if isinstance(error, GuestEndedError) else end.value
    answer: m.Message = m.Ended(ran, m.printable(reason))
    if not gone:  # the guest crashed at its start, and the source still has its state
        reason += (
            "; its domain is kept at the destination, where "
            f"{xl_command('destroy', context.name)} removes it"
        )
        answer = m.Failed(m.printable(reason))
    elif switchover is None and context.is_in(State.SERVING):
        # xl may have let the guest run before this daemon was started.
        reason += ", and it is not known whether the guest ran at the destination"
        answer = m.Failed(m.printable(reason))
    lacked = 0
    if switchover is not None:
        lacked = switchover.lacked
        if not lacked and gone and end is End.SUSPENDED:
            lacked = switchover.guest.pages.count
    if context.ownership.handed_over and lacked:
        reason += (
            f", and {lacked} pages were missing when it was suspended: "
            "an image or a copy that was made of it then lacks them"
        )
        answer = m.Failed(m.printable(reason))  # so that the sender keeps the missing pages
    log.warning("%s: %s", context.name, reason)
    context.progress.problem = reason
    await trio.to_thread.run_sync(context.holdings.release)
    context.ownership.enter(State.ENDED)
    return answer


async def send_outcome(context: Context, answer: m.Message | None) -> m.Message | None:
    """Send the last message if there is a lane.  Returns the message if the sender may have to
    receive it again: the link can lose the message, and without it the sender keeps the guest's
    pages.
    """
    if answer is None:
        return None
    with (
        trio.CancelScope(shield=True),
        trio.move_on_after(LAST_MESSAGE_S),
        contextlib.suppress(MigrationError),
    ):
        if context.peer.connections:
            await context.peer.push.send(answer)
            # What the sender sends now is not read any more.  If the connection were closed with
            # unread bytes, the kernel would reset it and the message could be lost.
            await trio.sleep(EXPLANATION_S)
    return answer if context.is_in(State.ENDED) else None


async def _is_gone(context: Context, reason: Exception) -> bool:
    complaint = Complaint(log.warning)
    while (domain := context.holdings.domain) is not None:
        try:
            return await trio.to_thread.run_sync(state_of, domain) is None
        except XenError as error:  # the error may pass
            complaint.log("%s: its state is not known: %s", context.name, error)
            await trio.sleep(LOOK_AGAIN_EVERY_S)
    return isinstance(reason, GuestEndedError)  # a predecessor's domain did not exist any more


async def _end(context: Context) -> tuple[End, bool]:
    """Return how the guest ended, and whether its domain shows that the guest has run here."""
    domain = context.holdings.domain
    if domain is None:
        return End.DESTROYED, False
    return await trio.to_thread.run_sync(lambda: (domain.end(), domain.has_run()))


async def discard(context: Context, reason: str, answer: m.Message) -> None:
    """Destroy the domain, if there is one, and erase the journal's entry.

    The attempt is repeated until it succeeds.  The sender does not wait for that: after the first
    error the sender is sent ``answer``.  If this process ends meanwhile, its successor destroys the
    domain, by the entry in the journal.
    """
    domain, problem = context.holdings.domain, context.progress.problem
    attempts = retries()
    with trio.CancelScope(shield=True) as shield:
        if domain is None:
            await trio.to_thread.run_sync(context.entry.erase)
            await context.toolstack.failed(reason)
            return
        while True:
            try:
                with contextlib.suppress(NoSuchDomainError):
                    await context.toolstack.discard(domain, reason)
                break
            except XenError as error:
                context.progress.problem = (
                    f"{problem}; and the incoming domain cannot be destroyed yet: {error}; trying "
                    "again"
                )
                log.error("%s: %s", context.name, context.progress.problem)
                await send_outcome(context, answer)
                context.disconnect()
            shield.shield = False
            await trio.sleep(next(attempts))
            shield.shield = True
        await trio.to_thread.run_sync(context.entry.erase)
        await trio.to_thread.run_sync(context.holdings.release)
    context.progress.problem = problem


# ---- after the end ----
async def linger(context: Context, last_message: m.Message, amend: Amend) -> None:
    """Send the last message to a sender that was cut off, if the sender comes back.  ``amend`` is
    called before a sender is answered that runs the guest as well.
    """
    name, peer = context.name, context.peer
    with trio.move_on_after(LINGER_S) as limit:
        if context.entry.recalled and context.is_in(State.COMPLETED):  # by a predecessor
            limit.deadline = trio.current_time() + RECALLED_LINGER_S
            _stopped(context)
        while True:
            try:
                await peer.reconnect(log.debug)
                peer.session.rejoin()
                with step_timeout("the sender sent nothing"):
                    message = await peer.receive()
                if reason := recall_reason(context, message):
                    limit.deadline = trio.current_time() + RECALLED_LINGER_S
                    if not context.is_in(State.STOPPED):  # an operator may have unpaused the guest
                        cannot = f"{reason}, and {name} cannot be paused here"
                        await context.persist(functools.partial(_stop, context, reason), cannot)
                    await amend()
                    await peer.acknowledge()
                    if context.is_in(State.STOPPED):  # the answer may be lost
                        continue
                if isinstance(message, m.Rejoin):
                    await peer.send(last_message)
                    with step_timeout("the sender did not confirm the end of the migration"):
                        await peer.receive()
                elif isinstance(message, m.Lost) and isinstance(last_message, m.Complete):
                    await peer.acknowledge(m.ALL_ARRIVED)
                elif isinstance(message, m.Lost):
                    await peer.acknowledge()
                break
            except UnknownSessionError as error:
                log.info("%s: the sender does not have this migration any more: %s", name, error)
                break
            except Exception as error:
                log.info(
                    "the sender has not been informed of the end yet: %s",
                    error,
                    exc_info=is_bug(error),
                )
            finally:
                peer.close()
    if limit.cancelled_caught:
        log.info("%s: the sender did not come back, and may not have the outcome", name)
    await trio.to_thread.run_sync(context.entry.erase)


def recall_reason(context: Context, message: m.Message) -> str:
    """Return why the guest runs at the source although it was handed over; empty if the message
    does not state that.
    """
    match message:
        case m.Recall():
            return message.reason
        case m.Abort() if context.peer.session.handed_over and context.toolstack.abort_recalls:
            return f"the source had not handed it over, and runs it: {message.reason}"
    return ""


def _stop(context: Context, reason: str) -> None:
    """Pause a guest whose memory is all here, because it runs at the source as well.

    Raises ``XenError``.
    """
    entry = context.entry
    with (
        contextlib.suppress(NoSuchDomainError),
        context.hypervisor.open(entry.domid, entry.handle) as domain,
    ):
        if domain.state() is not DomainState.PAUSED:  # a predecessor may have paused it
            domain.pause()
        entry.recalled = reason
        if context.is_in(State.COMPLETED):
            entry.write(TABLE[State.FINISHING].step, needed=False)  # for a successor
        _stopped(context)


def _stopped(context: Context) -> None:
    """State that the guest was paused here, because it runs at the source as well."""
    name = context.name
    context.progress.problem = (
        f"{context.entry.recalled}; so {name} is paused here: destroy it "
        f"({xl_command('destroy', name)}), or unpause it ({xl_command('unpause', name)}); a source "
        f"that is cut off can ask for the outcome for {RECALLED_LINGER_DAYS} days"
    )
    if context.is_in(State.COMPLETED):
        context.ownership.enter(State.STOPPED)
    log.error("%s: %s", name, context.progress.problem)
