# SPDX-License-Identifier: GPL-2.0-or-later
"""Task groups that raise one error, tasks whose errors end nothing else, and the kinds of errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVarTuple

import trio

from migrate.errors import LocalProtocolError, MigrationError, PeerClosedError, ProtocolError
from xenbackend.errors import XenError

log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")


def root_cause(error: BaseException) -> BaseException:
    """Of several errors in a group, the one that says most: a lost connection is often another's consequence."""
    while isinstance(error, BaseExceptionGroup):
        inner = [root_cause(e) for e in error.exceptions]
        error = next((e for e in inner if not isinstance(e, PeerClosedError | trio.Cancelled)), inner[0])
    return error


@asynccontextmanager
async def task_group() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises a single exception, not a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if isinstance(group, ExceptionGroup) or group.split(trio.Cancelled)[1] is not None:
            raise root_cause(group) from None
        raise


async def first(*waits: Callable[[], Awaitable[object]]) -> None:
    """Wait until one of them is over; the others are cancelled."""

    async def wait_for(one: Callable[[], Awaitable[object]]) -> None:
        await one()
        tasks.cancel_scope.cancel()

    async with task_group() as tasks:
        for one in waits:
            tasks.start_soon(wait_for, one)


async def isolated(what: str, work: Callable[[*Arguments], Awaitable[object]], *arguments: *Arguments) -> None:
    """Do ``work``.  An error that ``work`` raises is logged with its traceback and ends nothing
    else.

    A daemon runs each task for one connection or one migration in this function.
    """
    try:
        await work(*arguments)
    except Exception as error:
        _report(what, error)
    except BaseExceptionGroup as group:
        errors, others = group.split(Exception)
        if errors is not None:
            _report(what, errors)
        if others is not None:
            raise others from None


def _report(what: str, error: BaseException) -> None:
    log.error("internal error in %s, which is given up; all else goes on", what, exc_info=error)


def is_bug(error: Exception) -> bool:
    """True for an error of the program itself: no failure of the hypervisor, of the link or of a migration."""
    return isinstance(error, LocalProtocolError) or not isinstance(error, MigrationError | XenError | OSError)


def is_final(error: Exception) -> bool:
    """After the handover: nothing comes of trying again.  Anything else may pass, and so may what is a bug here."""
    return isinstance(error, MigrationError) and not isinstance(error, PeerClosedError | ProtocolError)
