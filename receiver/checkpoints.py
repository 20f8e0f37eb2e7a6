# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints: the guest's new state, which is sent back to the source until all of the guest's
memory has arrived (``--protect``).

A checkpoint is what the guest has written since the checkpoint before it, and its context.  If many
pages were written, they are sent while the guest runs, and pages written meanwhile follow.  Then
the guest is suspended for as long as the copy of the rest takes.  The copy is sent while the guest
runs again.  So a slow link delays the guest only if the rest is more than ``MAX_COPIED_PAGES``.  A
page that was read from the dirty log counts as unconfirmed until the source reports that the
checkpoint is kept, also if the lanes are lost.

Output and disk writes of the guest are not delayed until a checkpoint covers them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import trio

from migrate.lanes.scheduling import run_in_thread
from migrate.protocol import messages as m
from migrate.protocol.pfns import PfnMask, batches_of, mask_from_bitmap
from migrate.service.journal import is_there, remove
from receiver.statistics import PagerStatistics
from xenbackend.contract import SUSPENDS_LATE_S, Domain, DomainState
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE, PageStatus

log = logging.getLogger(__name__)

BATCH_PAGES = 1024
KINDS = (PageStatus.DATA, PageStatus.ZERO, PageStatus.HOLE)
LIVE_PAGES = 4096
"""To copy more pages than this takes longer than to suspend the guest.  They are therefore sent
first, while the guest runs.
"""
SPARE_PAGES = 1024
MAX_COPIED_PAGES = 32768
"""The most pages that a checkpoint copies.  Over a slow link the guest may write all its memory
between two checkpoints.
"""
NOT_PROTECTED = "the guest is not protected any more"
ATTEMPTS = 3
MAX_SUSPENDED_SHARE = 0.1
"""The largest share of the time for which checkpoints suspend the guest.  If they take longer,
there are fewer of them.
"""


class LogDirtyLostError(Exception):
    """Another program has switched log-dirty off, so what was read from it is not valid."""


class Checkpoints:
    """The checkpoints of a domain that runs here.  ``send`` sends on the push lane, and blocks."""

    def __init__(
        self, domain: Domain, every_s: float, send: Callable[[m.Message, list[memoryview]], None],
        statistics: PagerStatistics, stopped: Path, lost: Callable[[str], None],
    ):  # fmt: skip
        """``stopped``: see :meth:`Journal.stopped`.  ``lost`` is called in a thread, with the
        reason, when no further checkpoints can be made.
        """
        self._domain = domain
        self._stopped = stopped
        self._is_stopped = False
        """The guest was asked to suspend, and has not been resumed since.  The file is only for a
        successor, because a file system that has become read-only keeps the file.
        """
        self._lost = lost
        self.log_dirty_is_ours = False
        self._every_s = every_s
        self._send = send
        self._statistics = statistics
        self._unconfirmed: PfnMask = np.zeros(domain.nr_pfns, dtype=np.bool_)
        self._memory_pages = 0
        """The number of the guest's pages at the last reading, here or at the source."""
        self._making = trio.Lock()
        self._kept = trio.Event()
        self._made = self._ended = self._inherited = False
        self._problem = ""
        """Why the source could not keep the last checkpoint."""
        self._suspending = threading.Lock()
        """The thread that holds this lock may suspend or resume the guest."""
        self._suspends_until = 0.0
        """Until this time a guest that did not suspend in time may still do so."""

    def begin(self, *, inherit: bool = False) -> None:
        """Begin to record what the guest writes, before the guest runs.  Raises ``XenError`` if
        log-dirty cannot be enabled.

        ``inherit``: log-dirty may be on.  If it is, a predecessor enabled it.  What the predecessor
        had read from it is not known, so every present page is sent again.
        """
        self._inherited = inherit
        self._is_stopped = inherit and is_there(self._stopped)
        if self._is_stopped:  # the predecessor may just have asked for it
            self._suspends_until = time.monotonic() + SUSPENDS_LATE_S
        if inherit and self._domain.log_dirty_is_on():
            self._domain.log_dirty_disable()
        self._domain.log_dirty_enable()
        self.log_dirty_is_ours = True
        try:
            self._memory_pages = self._count_memory()
            if inherit:
                self._mark_all_unconfirmed()
        except XenError:
            self.stop()
            raise

    def stop(self) -> None:
        """Switch log-dirty off, if this object has switched it on."""
        if self.log_dirty_is_ours:
            self.log_dirty_is_ours = False
            self._domain.log_dirty_disable()

    async def run(self, stop: Callable[[], None]) -> None:
        """Make one checkpoint after another until cancelled; ``stop`` interrupts a sending thread.

        A guest that cannot be suspended continues without checkpoints.  A guest that lacks much of
        its memory may only need more time.
        """
        pause_s = 0.0 if self._inherited else self._every_s
        failures = 0
        while True:
            await trio.sleep(pause_s)
            async with self._making:
                if self._ended:
                    return
                self._kept = trio.Event()
                began = self._statistics.checkpoint_pause_s
                try:
                    await run_in_thread(self._make, stop)
                except LogDirtyLostError as error:
                    await self._end(str(error))
                    return
                except XenError as error:
                    failures += 1
                    if failures == ATTEMPTS:
                        await self._end(str(error))
                        return
                    log.warning("no checkpoint could be made, trying again: %s", error)
                    continue
                failures = 0
                if self._made:
                    await self._kept.wait()
                if self._problem:
                    await self._end(self._problem)
                    return
            suspended_s = self._statistics.checkpoint_pause_s - began
            pause_s = max(self._every_s, suspended_s / MAX_SUSPENDED_SHARE)

    def kept(self, problem: str) -> None:
        """Note that the source has kept the last checkpoint, or has refused the checkpoint for this
        ``problem``.  Called in a thread.
        """
        self._problem = problem
        if not problem:
            self._unconfirmed[:] = False
            self._statistics.checkpoints += 1
        trio.from_thread.run_sync(self._kept.set)

    async def _end(self, problem: str) -> None:
        self._ended = True
        await trio.to_thread.run_sync(self._lost, problem)

    async def end(self) -> None:
        """Make no further checkpoints, and wait for the end of the present one."""
        self._ended = True
        async with self._making:
            pass

    # ---- in a thread ----
    def _make(self) -> None:
        self._made = False
        self.resume_if_suspended()
        if self._domain.state() is not DomainState.RUNNING:
            return
        self._look()
        rest = self._unconfirmed.copy()
        if np.count_nonzero(rest) > LIVE_PAGES:
            for message, pieces in self._written(rest):
                self._send(message, pieces)
            rest[:] = False
        expected = rest | mask_from_bitmap(
            self._domain.log_dirty(clean=False), self._domain.nr_pfns
        )
        room = Room(int(np.count_nonzero(expected)))
        copies = []
        with self._suspended():
            rest |= self._look()
            context = self._domain.context()
            for message, pieces in self._written(rest):
                copied = room.take(pieces)
                if copied is None:
                    # The guest is suspended for longer, so that dom0 does not run out of memory.
                    self._send(message, pieces)
                else:
                    copies.append((message, copied))
        for message, copied in copies:
            self._send(message, copied)
        for at in range(0, len(context), m.MAX_CONTEXT_CHUNK):
            chunk = context[at : at + m.MAX_CONTEXT_CHUNK]
            self._send(m.Checkpoint(chunk, at + len(chunk) == len(context)), [])
        self._made = True

    def _look(self) -> PfnMask:
        # The memory is counted three times, because a load of a page does not change both counts of
        # the domain at the same instant.
        counts = [self._count_memory() for _ in range(3)]
        written = mask_from_bitmap(self._domain.log_dirty(clean=True), self._domain.nr_pfns)
        if not self._domain.log_dirty_is_on():
            self.log_dirty_is_ours = False
            raise LogDirtyLostError(
                "another program has switched its log-dirty off, so that the pages that the guest "
                "has written since are unknown"
            )
        self._unconfirmed |= written
        if self._memory_pages not in counts:
            # The balloon has moved, which log-dirty does not record.
            self._memory_pages = counts[-1]
            self._mark_all_unconfirmed()
            return self._unconfirmed.copy()
        return written

    def _count_memory(self) -> int:
        frames = self._domain.reservation()
        return frames.tot_pages + frames.paged_pages

    def _mark_all_unconfirmed(self) -> None:
        """Have the next checkpoint contain every page that is here, and every hole."""
        self._unconfirmed[:] = True
        self._unconfirmed[self._domain.paged_out()] = False

    @contextlib.contextmanager
    def _suspended(self) -> Iterator[None]:
        with self._suspending:
            began = time.monotonic()
            self._suspend()
            try:
                yield
            finally:
                try:
                    self._resume()
                except XenError as error:  # the copies are valid nevertheless
                    log.error("%s; trying again until it does", error)
                self._statistics.count_suspension(time.monotonic() - began)

    def _suspend(self) -> None:
        """Suspend the guest for a moment.  Raises ``XenError``; EINVAL means that the guest did not
        run, so another program has stopped it.
        """
        mark(self._stopped)
        self._is_stopped = True
        try:
            self._domain.suspend()
        except XenError as error:
            if error.errno == errno.EINVAL:
                self._forget_stop()
            elif error.errno == errno.ETIMEDOUT:
                self._suspends_until = time.monotonic() + SUSPENDS_LATE_S
            raise

    def _resume(self) -> None:
        self._domain.resume()
        self._suspends_until = 0.0
        self._forget_stop()

    def _forget_stop(self) -> None:
        self._is_stopped = False
        remove(self._stopped)

    @property
    def may_suspend_late(self) -> bool:
        """Whether the guest may still suspend for a checkpoint that has failed."""
        return time.monotonic() <= self._suspends_until

    def resume_if_suspended(self) -> None:
        """Resume a guest that is still suspended for a past checkpoint, because it could not be
        resumed then or because it suspended late.  To be called from time to time, with and without
        lanes.  Raises ``XenError`` if a later call may succeed.
        """
        if not self._suspending.acquire(blocking=False):
            return  # a checkpoint is being made
        try:
            if not self._is_stopped:
                return
            if self._domain.state() is DomainState.SUSPENDED:
                self._resume()
            elif not self.may_suspend_late:
                # The guest will not suspend for us any more.  If another program suspends it, it
                # must not be resumed here.
                self._forget_stop()
        finally:
            self._suspending.release()

    def _written(self, pages: PfnMask) -> Iterator[tuple[m.Written, list[memoryview]]]:
        """Yield the messages about a set of pages, each with its pieces of memory.  The pieces stay
        mapped until the next message is requested.
        """
        for pfns in batches_of(pages, BATCH_PAGES):
            with self._domain.map_pages(pfns) as mapped:
                data, zeros, holes = (pfns[mapped.status == kind] for kind in KINDS)
                if len(data) + len(zeros) + len(holes):
                    self._statistics.checkpoint_pages += len(pfns)
                    yield m.Written(data, zeros, holes), mapped.data


def mark(stopped: Path) -> None:
    """Note that the guest is about to be stopped, so that a successor can resume it.  Raises
    ``XenError`` if that cannot be noted; the guest must not be stopped then.
    """
    try:
        stopped.touch(0o600)
    except OSError as error:
        raise XenError(
            "suspend",
            error.errno or errno.EIO,
            why=f"cannot note it in {stopped}: {error.strerror}",
        ) from error


class Room:
    """Memory for copies of about ``pages`` pages.  The first access to new memory costs most of the
    time, and is made before the guest is suspended.
    """

    def __init__(self, pages: int):
        self._free = np.full(
            min(pages + pages // 4 + SPARE_PAGES, MAX_COPIED_PAGES) * PAGE_SIZE, 1, dtype=np.uint8
        )

    def take(self, pieces: list[memoryview]) -> list[memoryview] | None:
        """Return a copy of pieces of memory, or ``None`` if there is no room for it."""
        size = sum(map(len, pieces))
        if not size:
            return []
        if size > len(self._free):
            return None
        copy, self._free = self._free[:size], self._free[size:]
        at = 0
        for piece in pieces:
            copy[at : at + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            at += len(piece)
        return [copy.data]
