# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: what a daemon has promised, so that its successor can keep it when it was killed.

One small file a migration, to which an entry is added before the step that it promises; the last one counts.  It is erased when
nothing is owed any more.  An entry is one write to a file that is open already, since a guest stands still for some of
them, and begins with the newline: what a full disk has cut off of the one before it stays on a line of its own.
Nothing is synced: it is for a process that dies; with the host its domains are gone as well, and entries
of an earlier boot are not taken up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

from migrate.errors import MigrationError

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SUFFIX = ".json"
CHECKPOINT_SUFFIX = ".checkpoint"
STOPPED_SUFFIX = ".stopped"


class Journal:
    """In ``directory``, which is made.  Raises :class:`MigrationError` where that cannot be."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, int] = {}
        self._boot = BOOT_ID.read_text().strip()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(directory, os.W_OK):
                raise PermissionError(0, "it cannot be written")
        except OSError as error:
            raise MigrationError(
                f"state directory {directory}: {error.strerror}: choose another one by --state"
            ) from error

    def own(self) -> None:
        """Keep other daemons from this journal until this process ends.

        Raises :class:`MigrationError` if another daemon owns it: its migrations would look like a dead predecessor's.
        """
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(directory)
            raise MigrationError(
                f"state directory {self._directory}: another daemon uses it: choose another one by --state"
            ) from error

    def write(self, session: str, facts: dict[str, Any], *, needed: bool = True) -> None:
        """Of a migration, instead of what was there; ``facts`` as JSON can have them.

        Raises :class:`MigrationError` where it cannot be written and is ``needed``.
        """
        entry = ("\n" + json.dumps({"boot": self._boot, **facts})).encode()
        path = self._path(session)
        try:
            if session not in self._files:
                # The key of the session is in it.
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._files[session] = os.open(path, flags, 0o600)
            if os.write(self._files[session], entry) < len(entry):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            problem = f"cannot write the journal {path}: {error.strerror}"
            if needed:
                raise MigrationError(problem) from error
            log.error("%s: a successor of this daemon would not know how far it had come", problem)

    def checkpoint(self, session: str) -> Path:
        """Where one of the session's guest belongs."""
        return self._directory / (session + CHECKPOINT_SUFFIX)

    def stopped(self, session: str) -> Path:
        """A file that is there while the daemon has the session's guest stand still for a moment; made before, removed after it.

        So a successor knows whose doing that is, and lets no guest go on that somebody else has stopped.
        """
        return self._directory / (session + STOPPED_SUFFIX)

    def erase(self, session: str) -> None:
        self.stopped(session).unlink(missing_ok=True)
        self._path(session).unlink(missing_ok=True)
        if session in self._files:
            os.close(self._files.pop(session))

    def entries(self) -> dict[str, dict[str, Any]]:
        """By session: what a predecessor has left.  One that cannot be read, or is of an earlier boot, is dropped and said so."""
        found = {}
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            try:
                text = path.read_text()
                if not text:  # it was made, and nothing promised
                    path.unlink()
                    continue
                facts = _last_entry(text)
                if facts["boot"] != self._boot:
                    log.warning("%s: the guest has gone with the host, which was started anew since", path)
                    path.unlink()
                    continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s: not a journal of ours: %r", path, error)
                continue
            found[path.name.removesuffix(SUFFIX)] = facts
        return found

    def _path(self, session: str) -> Path:
        return self._directory / (session + SUFFIX)


def _last_entry(text: str) -> Any:
    """That was written in full.  Raises ``ValueError`` where there is none."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    raise ValueError("no entry in it")
