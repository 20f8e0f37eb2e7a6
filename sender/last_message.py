# SPDX-License-Identifier: GPL-2.0-or-later
"""The last message to a destination that was cut off: the guest stays at the source (``abort``),
its missing pages are lost (``lost``), an operator has decided that the guest continues here
although it was handed over (``recall``), or nothing is missing any more (``completed``).
"""

from __future__ import annotations

import logging

import trio

from migrate.errors import UnknownSessionError
from migrate.lanes.connection import LINGER_S, LaneConnection, step_timeout
from migrate.protocol import messages as m
from migrate.tasks import is_bug
from migrate.units import command
from sender.context import Context
from sender.ownership import State

log = logging.getLogger(__name__)

DIALLING_S = 7 * 24 * 3600.0
"""How long the last message is sent to a destination that does not answer.  The journal keeps its
entry then, and the next sender tries again.
"""


NOT_NEEDED = "an operator has decided at the source that nothing of the guest is needed there"


def lose(context: Context, gone: str, shown: str = "") -> str:
    """End the migration because pages that the destination lacks are lost.  ``gone``: the cause.

    Returns the reason, which is sent to the destination, unless the destination has reported its
    own end.  The reason is shown here as well, unless there is another text, ``shown``.  Called in
    a thread.
    """
    reason = m.printable(f"{gone}: the pages that it lacks at the destination are lost")
    if context.entry.ended_there:
        context.fail(State.FAILED, shown or reason)
    else:
        context.last_message = m.Lost(reason)
        context.fail(State.PAGES_LOST, shown or reason)
    return reason


async def send_last_message(context: Context) -> None:
    """Send the last message until the destination has it, if there is one."""
    if context.last_message is None:
        return
    if isinstance(context.last_message, m.Completed):
        await _send_completed(context, context.last_message)
        return
    # If the destination dials and is refused, because its session is unknown here, the refusal has
    # the meaning of ``abort``, but not of ``lost``.
    awaits_us = context.lanes.dials is not None or isinstance(context.last_message, m.Lost)
    pending = "; the destination has not been informed yet"
    if context.lanes.dials is not None:
        pending += f" ({command('reconnect', context.name)} dials at once)"
    context.progress.problem += pending
    with trio.move_on_after(DIALLING_S if awaits_us else LINGER_S) as limit:
        while not await _is_sent(context, context.last_message):
            pass
    context.progress.problem = context.progress.problem.replace(pending, "")
    if limit.cancelled_caught and awaits_us:
        log.error(
            "%s: the destination was not reached; it was to be sent: %s",
            context.name,
            context.last_message,
        )
        return
    stays = context.ownership.state is State.GIVEN_UP
    end = State.STAYED if stays else State.FAILED
    await trio.to_thread.run_sync(context.ownership.enter, end)


async def _send_completed(context: Context, word: m.Completed) -> None:
    """Send ``completed``, on which nothing depends: the destination waits for the message with an
    entry in its journal, for a limited time.
    """
    with trio.move_on_after(LINGER_S):
        while not await _is_sent(context, word):
            pass


async def _is_sent(context: Context, word: m.Message) -> bool:
    """Wait for a connection and send the message once.  Returns whether no further attempt is
    needed.
    """
    connection: LaneConnection | None = None
    try:
        connection = await context.lanes.again(log.debug)
        if isinstance(word, m.Lost) and m.LOST not in connection.capabilities:
            about = "%s: the release at the destination does not have `lost`: destroy it there"
            log.warning(about, context.name)
            return True
        if context.entry.recall and m.RECALL in connection.capabilities:
            reason = f"an operator has decided at the source that {context.name} runs there"
            word = m.Recall(m.printable(reason))
        await connection.send(word)
        with step_timeout("the destination did not confirm the end of the migration"):
            answer, _pages = await connection.receive()
        if isinstance(answer, m.Failed) and answer.reason == m.ALL_ARRIVED:
            about = f"the domain of {context.name} is gone at the source, and {m.ALL_ARRIVED}"
            context.progress.problem = about
        return isinstance(answer, m.Failed | m.Ended)
    except UnknownSessionError:  # nothing of the guest is left at the destination
        if context.entry.recall:
            warning = (
                "the destination has forgotten the migration: make sure that the guest does not "
                "run there"
            )
            context.progress.problem += f"; {warning}"
            log.error("%s: %s", context.name, warning)
        return True
    except Exception as error:
        about = "%s: the destination has not been informed of the end yet: %s"
        log.info(about, context.name, error, exc_info=is_bug(error))
        return False
    finally:
        if connection is not None:
            connection.close()
