# SPDX-License-Identifier: GPL-2.0-or-later
"""The checkpoints that the destination sends back (``--protect``), and the return of the guest to
the last one.

The suspended source domain has the guest's memory as it was at the switchover.  A checkpoint is
what the guest has written since the checkpoint before it, and its context, all of one instant.  Its
frames are written to a file as they arrive.  The checkpoint counts when it is complete: the file
then gets its name, and its pages are written into the source domain.  If the sender is killed
during these writes, its successor repeats them.

From the first of these pages on, the memory of the source domain is a mixture of two instants.  A
resume of the domain would combine the registers of one instant with the memory of another.  The
journal notes this before the first page is written.  If the file is damaged or gone afterwards, the
guest cannot continue at the source.

A page of a checkpoint is never a page that the destination still lacks, because the guest has
written the page there.

To go back, a new domain is made in place of the source's, as a receiver would make it.  The pages
are moved over in batches, so that this takes no additional memory.  A resume of the suspended
domain is possible only for the instant of its suspension.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from migrate.errors import MigrationError, RemoteProtocolError
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.frames import FrameDecoder
from migrate.protocol.pfns import batches_of
from migrate.service.files import create_anew
from migrate.service.journal import NEW_CHECKPOINT_SUFFIX, is_there, remove
from migrate.units import human_bytes
from sender.source_pages import announce, present
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import XenError

log = logging.getLogger(__name__)

MAX_CONTEXT_BYTES = 64 * 1024 * 1024
MAX_COPIES = 4
"""The most copies of one page in one checkpoint: one for each attempt to suspend the running guest,
and one afterwards.
"""
MOVED_PAGES = 1024
"""The number of pages that are moved in one step."""


MARGIN_BYTES = 64 * 1024 * 1024
"""The room that checkpoints leave free in their file system, because the journals of all migrations
are written there.
"""
MARGIN_SHARE = 8
"""In a small file system, checkpoints leave one eighth of it free instead."""


def _room(path: Path) -> tuple[int, int]:
    """Return the number of free bytes in a file system, and of all of its bytes."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


class CheckpointStore:
    """The checkpoint of one guest, in the file ``path``.  Calls block: run them in a thread.

    ``applying`` is called before a checkpoint is written into the domain, and notes this for a
    successor.  If ``applying`` raises :class:`MigrationError`, nothing is written.
    """

    def __init__(self, path: Path, domain: Domain, applying: Callable[[], None]):
        self._path, self._new_path = path, path.with_suffix(NEW_CHECKPOINT_SUFFIX)
        self._domain, self._applying = domain, applying
        self._new: BinaryIO | None = None
        self._context_bytes = self._pages = 0
        self._problem = ""
        """Why the checkpoint that is being received cannot be kept."""
        self._incomplete = ""
        """Why the domain may lack pages of the last checkpoint.  No later checkpoint has these
        pages.
        """

    def exists(self) -> bool:
        """Whether a checkpoint file exists; it may be damaged."""
        return is_there(self._path)

    def check(self) -> None:
        """Read the whole of the last checkpoint.  Raises :class:`MigrationError` if the guest
        cannot return to it.
        """
        for _piece in _read(self._path):
            pass

    # ---- the checkpoint that is being received ----
    def add(self, message: m.Written | m.Checkpoint, payload: memoryview) -> bool:
        """Add a piece; return whether it was the last one, and the checkpoint is kept.

        Raises :class:`MigrationError` at the last piece if the checkpoint cannot be kept; the
        checkpoint before it is kept then.
        """
        last = isinstance(message, m.Checkpoint) and message.last
        if isinstance(message, m.Written):
            self._pages += len(message.pfns) + len(message.zeros) + len(message.holes)
        else:
            self._context_bytes += len(message.data)
        if (
            self._pages > MAX_COPIES * self._domain.nr_pfns
            or self._context_bytes > MAX_CONTEXT_BYTES
        ):
            raise RemoteProtocolError("a checkpoint that is larger than the guest")
        try:
            if not self._problem and not self._incomplete:
                self._write(message, payload)
                if last and self._new is not None:
                    self._new.close()
                    self._make_room()
                    self._new_path.replace(self._path)
        except OSError as error:
            self._problem = f"cannot keep a checkpoint in {self._new_path}: {error.strerror}"
            self._remove()  # others need the room
        except (MigrationError, XenError):
            self.abandon()
            raise
        if not last:
            return False
        problem = self._problem or self._incomplete
        self.abandon()
        if problem:
            raise MigrationError(problem)
        self.apply()
        return True

    def _write(self, message: m.Written | m.Checkpoint, payload: memoryview) -> None:
        """Write a piece.  Raises ``OSError``, also if the journals would have too little room
        afterwards.
        """
        if self._new is None:  # guest memory, which no other user may read
            self._new = os.fdopen(create_anew(self._new_path), "wb")
        left, size = _room(self._new_path)
        if left - len(payload) < (margin := min(MARGIN_BYTES, size // MARGIN_SHARE)):
            raise OSError(
                errno.ENOSPC,
                f"the last {human_bytes(margin)} of its file system are kept free for the journal",
            )
        # With a checksum, because a disk sometimes returns other bytes than were written.
        self._new.write(frames.encode(message.header(), [payload] if payload else (), checked=True))
        self._new.write(payload)

    def abandon(self) -> None:
        """Drop a checkpoint that was received in part, because its rest will not arrive."""
        self._remove()
        self._pages = self._context_bytes = 0
        self._problem = ""

    def _remove(self) -> None:
        if self._new is not None:
            with contextlib.suppress(OSError):  # buffered bytes may not fit into the file system
                self._new.close()
            self._new = None
        remove(self._new_path)

    def _make_room(self) -> None:
        """Allocate frames for pfns that had no memory at the switchover, before anything is
        changed, because the host may have no memory.
        """
        for message, _payload in _read(self._new_path):
            if isinstance(message, m.Written):
                _populate(self._domain, message)

    def apply(self) -> None:
        """Bring the source's memory to the last whole checkpoint.

        Raises ``XenError`` or :class:`MigrationError`; no further checkpoint is kept then.
        """
        try:
            self._applying()
            self._write_to(self._domain)
        except (MigrationError, XenError, OSError) as error:
            self._cannot_apply(error)
            raise

    def apply_again(self) -> None:
        """Repeat :meth:`apply` for a predecessor, which may have done a part of it.  If the file is
        damaged, nothing is changed.
        """
        try:
            self.check()
        except MigrationError as error:
            self._cannot_apply(error)
            raise
        self.apply()

    def _cannot_apply(self, error: Exception) -> None:
        self._incomplete = f"the last checkpoint is not in the memory of the source: {error}"

    def _write_to(self, domain: Domain) -> None:
        for message, payload in _read(self._path):
            if isinstance(message, m.Written):
                _populate(domain, message)
                domain.write_pages(message.pfns, payload)
                domain.write_pages(message.zeros, None)
                domain.depopulate(message.holes[domain.present(message.holes)])

    # ---- the end ----
    def close(self) -> None:
        """Remove the checkpoint, which is not needed any more."""
        self.abandon()
        remove(self._path)

    def go_back(self, to: Domain) -> None:
        """Give ``to`` the guest's state of the last checkpoint, and let the guest run.  ``to``: an
        empty domain, or one with which an earlier attempt began.

        Raises ``XenError`` or :class:`MigrationError`; the call can be repeated then.
        """
        if to.state() is DomainState.INCOMING:
            self.check()  # before a page is moved
            for pfns in batches_of(present(self._domain), MOVED_PAGES):
                with self._domain.map_pages(pfns) as mapped:
                    message, data = announce(pfns, mapped), b"".join(mapped.data)
                to.populate(pfns[~to.present(pfns)])
                to.write_pages(message.pfns, data)
                to.write_pages(message.zeros, None)
                self._domain.depopulate(pfns)
            self._write_to(to)  # the source domain may have only a part of the checkpoint
            pieces = [
                message.data
                for message, _payload in _read(self._path)
                if isinstance(message, m.Checkpoint)
            ]
            to.set_context(b"".join(pieces))
            to.start()


def _populate(domain: Domain, message: m.Written) -> None:
    for pfns in (message.pfns, message.zeros):
        domain.populate(pfns[~domain.present(pfns)])


def _read(path: Path) -> Iterator[tuple[m.Message, memoryview]]:
    """Yield the pieces that :meth:`CheckpointStore.add` has written.  Raises
    :class:`MigrationError` at the first damaged piece.
    """
    decoder = FrameDecoder()
    decoder.checked = True
    whole = False
    try:
        with path.open("rb") as file:
            while count := file.readinto(decoder.wanted()):
                decoder.filled(count)
                while (frame := decoder.next_frame()) is not None:
                    message = m.parse(frame.header, len(frame.payload))
                    whole = isinstance(message, m.Checkpoint) and message.last
                    yield message, frame.payload
    except OSError as error:
        raise MigrationError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    except RemoteProtocolError as error:
        raise MigrationError(f"the checkpoint {path} is damaged: {error}") from error
    if not whole or not decoder.at_boundary():
        raise MigrationError(f"the checkpoint {path} is damaged: it ends in the middle")
