# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator changes while a migration runs: options, and whether memory is copied.

Each change acts at once, or raises a :class:`MigrationError` with the reason.  The caps and the
pause are noted in the journal; the other options end with precopy.  If the journal cannot be
written, a change is undone, but not the end of a pause.

One change follows the other: to undo a change would otherwise undo what another client has changed
since, and would end a pause that has ended already.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from migrate.errors import MigrationError
from migrate.options import CHANGEABLE, Until, changed, flag, shown
from migrate.service.lifecycle import ended
from migrate.tasks import in_thread
from migrate.units import command
from sender.context import Context
from sender.ownership import DECIDED, State


async def change(context: Context, values: dict[str, Any]) -> None:
    """Change options.  ``values``: by the names of the fields in ``migrate/options.py``.

    Raises as :func:`migrate.options.changed`, and :class:`MigrationError` for an option that has no
    effect any more.
    """
    async with context.adjusting:
        await _change(context, values)


async def _change(context: Context, values: dict[str, Any]) -> None:
    before = context.options
    _check_under_way(context, "change")
    is_over = precopy_is_over(context)
    late = [flag(name) for name in values if CHANGEABLE.get(name) is Until.SWITCHOVER]
    if is_over and late:
        raise MigrationError(
            f"too late for {', '.join(late)}: {context.name} is past its precopy: its phase is "
            f"{context.ownership.phase}"
        )
    after = changed(before, values)
    if is_over:
        is_own = after.postcopy_bandwidth_bytes_per_s is not None
        if set(values) == {"bandwidth_bytes_per_s"} and is_own:
            raise MigrationError(
                f"too late for --bandwidth: {context.name} is past its precopy, and "
                "--postcopy-bandwidth is its cap now"
            )
    context.use(after)
    await _note(context, lambda: context.use(before))


async def pause(context: Context) -> None:
    """Pause copying."""
    async with context.adjusting:
        await _pause(context)


async def _pause(context: Context) -> None:
    _check_under_way(context, "pause")
    name = context.name
    if context.pause.is_on:
        raise MigrationError(
            f"the copying of {name} is paused already: {command('resume', name)} ends that"
        )
    state = context.ownership.state
    if state is State.ALL_SENT:
        raise MigrationError(f"there is nothing to pause: all pages of {name} have been sent")
    if precopy_is_over(context) and state is not State.HANDED_OVER:
        raise MigrationError(
            f"{name} cannot be paused in its switchover: it is {context.ownership.phase}; try "
            "again in postcopy"
        )
    context.pause.begin(time.monotonic())
    context.cap.wake()
    await _note(context, lambda: context.pause.end(time.monotonic()))


async def resume(context: Context) -> None:
    """End a pause."""
    async with context.adjusting:
        _check_under_way(context, "resume")
        if not context.pause.is_on:
            raise MigrationError(f"the copying of {context.name} is not paused")
        context.pause.end(time.monotonic())
        await in_thread(context.ownership.note)


def precopy_is_over(context: Context) -> bool:
    ownership = context.ownership
    return context.rounds_are_over or ownership.is_suspended or ownership.has_ended


def options_shown(context: Context) -> dict[str, Any]:
    """Return the options that can still be changed, as JSON has them."""
    return shown(context.options, precopy=not precopy_is_over(context))


def _check_under_way(context: Context, asked: str) -> None:
    ownership = context.ownership
    if ownership.has_ended:
        raise MigrationError(ended(context.name, ownership.phase, context.progress.problem, asked))
    if ownership.state in (State.COMPLETING, *DECIDED):
        raise MigrationError(
            f"there is nothing to {asked}: no more memory of {context.name} is sent"
        )


async def _note(context: Context, undo: Callable[[], None]) -> None:
    """Write the change into the journal.  If that fails, undo the change and raise the error."""
    try:
        await in_thread(functools.partial(context.ownership.note, needed=True))
    except MigrationError:
        undo()
        raise
