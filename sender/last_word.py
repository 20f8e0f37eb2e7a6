# SPDX-License-Identifier: GPL-2.0-or-later
"""The last word to a destination that was cut off: the guest stays at the source, or its missing
pages are lost.
"""

from __future__ import annotations

import logging

import trio

from migrate.errors import UnknownSessionError
from migrate.lanes.connection import LINGER_S, LaneConnection, step_timeout
from migrate.protocol import messages as m
from migrate.tasks import is_bug
from sender.context import Context
from sender.ownership import State

log = logging.getLogger(__name__)

DIALLING_S = 7 * 24 * 3600.0
"""How long the last word is sent to a destination that does not answer.  The journal keeps its
entry then, and the next sender tries again.
"""


def lose(context: Context, gone: str, shown: str = "") -> str:
    """Pages that the destination lacks are lost, because of what is ``gone``.

    Returns the reason, which the destination is sent.  Here the reason is shown as well, unless
    something else is ``shown``.  Called in a thread.
    """
    reason = m.printable(f"{gone}: the pages that it lacks at the destination are lost")
    context.last_word = m.Lost(reason)
    context.fail(State.PAGES_LOST, shown or reason)
    return reason


async def send_last_word(context: Context) -> None:
    """If one is owed: until the destination has it."""
    if context.last_word is None:
        return
    # A destination that dials, and finds no session here, has the same answer by that, unless
    # pages are lost.
    awaits_us = context.lanes.dials is not None or isinstance(context.last_word, m.Lost)
    pending = "; the destination has not been informed yet"
    if context.lanes.dials is not None:
        pending += f" (`xen-postcopy reconnect {context.name}` dials at once)"
    context.progress.problem += pending
    with trio.move_on_after(DIALLING_S if awaits_us else LINGER_S) as limit:
        while not await _is_sent(context, context.last_word):
            pass
    context.progress.problem = context.progress.problem.replace(pending, "")
    if limit.cancelled_caught and awaits_us:
        log.error(
            "%s: the destination was not reached; it was to be sent: %s",
            context.name,
            context.last_word,
        )
        return
    await trio.to_thread.run_sync(context.ownership.enter, State.FAILED)


async def _is_sent(context: Context, word: m.Message) -> bool:
    """One attempt, which waits for a connection.  True if no further attempt is needed."""
    connection: LaneConnection | None = None
    try:
        connection = await context.lanes.again(log.debug)
        if isinstance(word, m.Lost) and m.LOST not in connection.capabilities:
            about = "%s: the release at the destination cannot be told: destroy it there"
            log.warning(about, context.name)
            return True
        if context.entry.recall and m.RECALL in connection.capabilities:
            reason = f"an operator has decided at the source that {context.name} runs there"
            word = m.Recall(m.printable(reason))
        await connection.send(word)
        with step_timeout("the destination does not say that it has let the guest go"):
            answer, _pages = await connection.receive()
        return isinstance(answer, m.Failed | m.Ended)
    except UnknownSessionError:  # the destination has nothing of the guest any more
        if context.entry.recall:
            warning = (
                "the destination has forgotten the migration: make sure that the guest does not "
                "run there"
            )
            context.progress.problem += f"; {warning}"
            log.error("%s: %s", context.name, warning)
        return True
    except Exception as error:
        about = "%s: the destination has not been told yet how it ended: %s"
        log.info(about, context.name, error, exc_info=is_bug(error))
        return False
    finally:
        if connection is not None:
            connection.close()
