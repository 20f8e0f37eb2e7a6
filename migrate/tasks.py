# SPDX-License-Identifier: GPL-2.0-or-later
"""Task groups that raise one error, tasks whose errors end no other task, and the kinds of
errors.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

import trio

from migrate.errors import (
    LocalProtocolError,
    MigrationError,
    PeerClosedError,
    ProtocolError,
    UsedUpError,
)
from migrate.logs import Complaint
from xenbackend.errors import XenError

log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
AGAIN_S = 0.5
"""The pause between two attempts to start a thread."""
KEPT_UP_S = 10.0
"""The pause before work begins anew that a daemon needs for as long as it runs."""
_used_up = Complaint(log.error)


def root_cause(error: BaseException) -> BaseException:
    """Return the most informative error of a group: a lost connection is often the consequence of
    another error.
    """
    while isinstance(error, BaseExceptionGroup):
        inner = [root_cause(e) for e in error.exceptions]
        error = next(
            (e for e in inner if not isinstance(e, PeerClosedError | trio.Cancelled)), inner[0]
        )
    return error


@asynccontextmanager
async def task_group() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises a single exception, not a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if isinstance(group, ExceptionGroup) or group.split(trio.Cancelled)[1] is not None:
            cause = root_cause(group)
            if is_used_up(cause):
                raise UsedUpError from cause
            raise cause from None
        raise


async def as_soon_as_threads_start(work: Callable[[], Awaitable[Result]]) -> Result:
    """Do ``work``, on which a guest depends.  If the host has no thread or memory left, repeat
    ``work`` until the host has.  All of ``work`` must therefore be repeatable.
    """
    while True:
        try:
            return await work()
        except (RuntimeError, MemoryError, UsedUpError) as error:
            if not is_used_up(error):
                raise
            _used_up.log("%s; trying again until it does", UsedUpError())
            await trio.sleep(AGAIN_S)


async def in_thread(call: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """Make a call, on which a guest depends, in a thread, as soon as one can be started."""
    return await as_soon_as_threads_start(
        functools.partial(trio.to_thread.run_sync, call, *arguments)
    )


_ABANDON = (
    "abandon_on_cancel"
    if "abandon_on_cancel" in inspect.signature(trio.to_thread.run_sync).parameters
    else "cancellable"  # before trio 0.23
)


async def in_abandoned_thread(
    call: Callable[[*Arguments], Result],
    *arguments: *Arguments,
    limiter: trio.CapacityLimiter | None = None,
) -> Result:
    """Make a call in a thread.  Cancellation ends the wait, and not the call."""
    run: Callable[..., Awaitable[Result]] = trio.to_thread.run_sync
    return await run(call, *arguments, limiter=limiter, **{_ABANDON: True})


async def in_stoppable_thread(call: Callable[[], Result], stop: Callable[[], object]) -> Result:
    """Make a call in a thread.  ``stop`` makes the call return, and is called when this task is
    cancelled.
    """
    results: list[Result] = []
    ended = trio.Event()
    async with task_group() as tasks:

        async def make() -> None:
            try:
                with trio.CancelScope(shield=True):
                    limiter = trio.CapacityLimiter(1)
                    results.append(await trio.to_thread.run_sync(call, limiter=limiter))
            finally:
                ended.set()

        tasks.start_soon(make)
        try:
            await ended.wait()
        finally:
            if not ended.is_set():
                stop()
    return results[0]


async def poll_in_thread(look: Callable[[], Result | None], pauses_s: Iterable[float]) -> Result:
    """Call ``look`` until it returns something else than ``None``, and return that.  ``pauses_s``:
    the endless pauses between the calls.

    One thread makes all calls, because to change threads would take most of the time of a call.
    """
    stopped = threading.Event()

    def poll() -> Result | None:
        for pause_s in pauses_s:
            if (found := look()) is not None or stopped.wait(pause_s):
                return found
        raise AssertionError("the pauses have an end")

    found = await in_stoppable_thread(poll, stopped.set)
    assert found is not None  # otherwise this task was cancelled
    return found


async def first(*waits: Callable[[], Awaitable[object]]) -> None:
    """Wait until one of ``waits`` returns; the others are cancelled."""

    async def wait_for(one: Callable[[], Awaitable[object]]) -> None:
        await one()
        tasks.cancel_scope.cancel()

    async with task_group() as tasks:
        for one in waits:
            tasks.start_soon(wait_for, one)


async def isolated(
    what: str, work: Callable[[*Arguments], Awaitable[object]], *arguments: *Arguments
) -> None:
    """Do ``work``.  An error that ``work`` raises is logged with its traceback and ends nothing
    else.

    A daemon runs each task for one connection or one migration in this function (invariant 10).
    """
    await _succeeds(work, arguments, functools.partial(_report, what))


async def kept_up(
    what: str, work: Callable[[*Arguments], Awaitable[object]], *arguments: *Arguments
) -> None:
    """Do ``work``, which a daemon needs for as long as the daemon runs.  After an error ``work``
    begins anew, :data:`KEPT_UP_S` later.  An error that occurs again and again is logged seldom.
    """
    failed = Complaint(log.error)

    def report(error: BaseException) -> None:
        cause = root_cause(error)
        is_unexpected = isinstance(cause, Exception) and is_bug(cause)
        reason = UsedUpError() if is_used_up(cause) else cause
        about = "%s fails: %s; trying again every %g s"
        failed.log(about, what, reason, KEPT_UP_S, exc_info=error if is_unexpected else None)

    while not await _succeeds(work, arguments, report):
        await trio.sleep(KEPT_UP_S)


async def _succeeds(
    work: Callable[[*Arguments], Awaitable[object]],
    arguments: tuple[*Arguments],
    report: Callable[[BaseException], None],
) -> bool:
    """Do ``work``, and report its error.  Returns whether there was none."""
    try:
        await work(*arguments)
        return True
    except Exception as error:
        report(error)
    except BaseExceptionGroup as group:
        errors, others = group.split(Exception)
        if errors is not None:
            report(errors)
        if others is not None:
            raise others from None
    return False


def _report(what: str, error: BaseException) -> None:
    if is_used_up(root_cause(error)):
        log.error("%s is given up: %s", what, UsedUpError())
        return
    log.error("internal error in %s, which is given up; all else continues", what, exc_info=error)


def is_used_up(error: BaseException) -> bool:
    """Whether the host had no thread or no memory left for this process."""
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return no_thread or isinstance(error, MemoryError | UsedUpError)


def is_bug(error: Exception) -> bool:
    """True for an error of the program itself: no failure of the hypervisor, of the link, of a
    migration or of this host.
    """
    if is_used_up(error):
        return False
    return isinstance(error, LocalProtocolError) or not isinstance(
        error, MigrationError | XenError | OSError
    )


def is_final(error: Exception) -> bool:
    """Whether trying again after the handover is useless.  All other errors may pass, and so may a
    bug of ours.
    """
    return isinstance(error, MigrationError) and not isinstance(
        error, PeerClosedError | ProtocolError
    )
