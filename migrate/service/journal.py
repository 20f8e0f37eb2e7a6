# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: what a daemon has promised, so that its successor can keep the promise after the
daemon was killed.

Each migration has one small file.  An entry is added before the step that it announces; the last
entry counts.  The file is erased when nothing is left to do for the migration.

An entry is one write to a file that is open already, because a guest is suspended during some of
these writes.  An entry begins with a newline, so that a remainder of the entry before it, cut off
by a full disk, stays on a line of its own.  An entry ends with its checksum and another newline.
An entry without that newline was cut off, wherever that was, and its step was not taken.  An entry
with that newline and with a wrong checksum is damaged, and then no entry of the file counts: by an
earlier entry a sender would resume a guest that it has handed over.

A file that has become large is replaced by one with the new entry only.

Nothing is synced, because the journal is for a process that dies.  When the host dies, its domains
are gone as well; entries of an earlier boot are erased, with a line in the log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
import time
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from migrate.errors import MigrationError, OccupiedError
from migrate.service.files import create_anew

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SUFFIX = ".json"
CHECKPOINT_SUFFIX = ".checkpoint"
NEW_CHECKPOINT_SUFFIX = ".new-checkpoint"
"""A checkpoint that is not complete yet."""
STOPPED_SUFFIX = ".stopped"
REMOVED_SUFFIXES = CHECKPOINT_SUFFIX, NEW_CHECKPOINT_SUFFIX, STOPPED_SUFFIX
"""The files of a session that are removed with its entry."""
KEEPER_SUFFIX = ".keeper"
MEASURED_SUFFIX = ".measured"
MEASURED_S = 900.0
"""For how long a successor takes a note of a measurement for true.  No measurement takes longer.
Another program may use log-dirty later.
"""
HISTORY = "history.jsonl"
NEW_SUFFIX = ".new"
"""A file whose first entry is not written yet: nothing depends on the file."""
NONE = type(None)
FACTS: dict[str, tuple[type, ...]] = {
    "step": (str,), "domid": (int,), "handle": (str, NONE), "key": (str,), "dials": (list, NONE),
    "rejoins": (int,), "proven": (bool,), "xl": (bool,),
}  # fmt: skip
"""The facts that both ends note, with the types of their values."""
MAX_DOMID = 0x7FFF
LARGE_BYTES = 4 * 2**20
"""A larger file is replaced.  A typical migration has a few entries of a kilobyte."""
MAX_BYTES = 64 * 2**20
"""More than the entries of one migration have."""
WITH_SUM = re.compile(r'(.*), "sum": ([0-9]{1,10})\}')
DAMAGED = "its last entry is damaged"
HANDLE_DIGITS = 32


@dataclass(frozen=True)
class Kept:
    """An entry whose migration was not resumed, and which is left to an operator."""

    session: str
    path: Path
    domain: str
    """The domain's name; empty if it is not known."""
    domid: int | None
    """``None`` if it is not known."""
    problem: str
    """Why, and what to do."""


class Journal:
    """The journal in ``directory``, which is made if it does not exist.  Raises
    :class:`MigrationError` if it cannot be made.

    The migrations in a read-only directory can be resumed; a new migration fails at its first
    entry.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, int] = {}
        self.kept: dict[str, Kept] = {}
        """The entries that are kept and not resumed, by session."""
        self._boot = BOOT_ID.read_text().strip()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._read_only = bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
            if not self._read_only and not os.access(directory, os.W_OK):
                raise PermissionError(0, "it cannot be written")
        except OSError as error:
            raise MigrationError(
                f"state directory {directory}: {error.strerror}: choose another one by --state"
            ) from error

    def own(self) -> None:
        """Keep other daemons from this journal until this process ends.

        Raises :class:`MigrationError` if another daemon owns the journal: that daemon's migrations
        would look like those of a dead predecessor.
        """
        if self._read_only:
            log.error(
                "state directory %s is on a read-only file system: new migrations are refused",
                self._directory,
            )
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(directory)
            raise MigrationError(
                f"state directory {self._directory}: another daemon uses it: choose another one by "
                "--state"
            ) from error

    def write(self, session: str, facts: dict[str, Any], *, needed: bool = True) -> None:
        """Write a migration's entry, which replaces the entry before it.  ``facts``: values that
        JSON can have.

        Raises :class:`MigrationError` if the entry cannot be written and is ``needed``.
        """
        entry = _line(json.dumps({"boot": self._boot, **facts}))
        path = self._path(session)
        try:
            if session not in self._files:
                if not path.exists():
                    self._files[session] = _make(path, entry)
                    return
                self._files[session] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            if self._is_replaced(session, entry):
                return
            if os.write(self._files[session], entry) < len(entry):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            problem = f"cannot write the journal {path}: {error.strerror}"
            if needed:
                raise MigrationError(problem) from error
            log.error("%s: a successor of this daemon would begin at an earlier step", problem)

    def _is_replaced(self, session: str, entry: bytes) -> bool:
        """Replace a large file by one with this entry only.  Returns false if the entry is still to
        be added to the file.
        """
        if os.fstat(self._files[session]).st_size <= LARGE_BYTES:
            return False
        try:
            new = _make(self._path(session), entry)
        except OSError:  # for example, there is no room for two files
            return False
        large, self._files[session] = self._files[session], new
        _close(large)
        return True

    def checkpoint(self, session: str) -> Path:
        """Return the path of the checkpoint of the session's guest."""
        return self._directory / (session + CHECKPOINT_SUFFIX)

    def stopped(self, session: str) -> Path:
        """Return the path of a file that exists while the daemon itself has stopped the session's
        guest.  The daemon makes the file before it stops the guest, and removes the file after it
        has resumed the guest.  A sender makes the file when the guest has not suspended in time,
        and may still do so.

        If the file exists, a successor resumes the guest.  A guest that another program has stopped
        stays stopped.
        """
        return self._directory / (session + STOPPED_SUFFIX)

    def keeper(self, session: str) -> Path:
        """Return the path of the socket of a process that keeps the pages of the session's guest
        (:mod:`xenbackend.keeper`).
        """
        return self._directory / (session + KEEPER_SUFFIX)

    @contextlib.contextmanager
    def measuring(self, domid: int, handle: bytes) -> Iterator[None]:
        """Note, for as long as the context lasts, that this daemon has log-dirty of a domain on,
        without a migration.  Raises :class:`MigrationError` if that cannot be noted.
        """
        path = self._directory / f"{domid}{MEASURED_SUFFIX}"
        facts = {"boot": self._boot, "handle": handle.hex(), "at": _seconds_since_boot()}
        try:
            os.close(_make(path, _line(json.dumps(facts))))
        except OSError as error:
            raise MigrationError(
                f"cannot note the measurement in {path}: {error.strerror}"
            ) from error
        try:
            yield
        finally:
            remove(path)

    def take_measured(self) -> dict[int, bytes]:
        """Return the handles of the domains that a predecessor was measuring when it was killed, by
        the domid.  The next call does not find them.
        """
        found = {}
        for path in self._directory.glob(f"*{MEASURED_SUFFIX}"):
            try:
                facts = _last_entry(_text_of(path))
                age_s = _seconds_since_boot() - facts["at"]
                if facts["boot"] == self._boot and age_s <= MEASURED_S:
                    domid = int(path.name.removesuffix(MEASURED_SUFFIX))
                    found[domid] = bytes.fromhex(facts["handle"])
            except Exception as error:
                log.warning("%s is not what a sender notes of a measurement: %s", path, error)
            remove(path)
        return found

    def history(self) -> Path:
        """Return the path of the file with the migrations that have ended
        (:mod:`migrate.service.history`).
        """
        return self._directory / HISTORY

    def keepers(self) -> dict[str, Path]:
        """Return these sockets, by session."""
        found = self._directory.glob(f"*{KEEPER_SUFFIX}")
        return {path.name.removesuffix(KEEPER_SUFFIX): path for path in found}

    def erase(self, session: str) -> None:
        """Remove the session's entry.  If that fails, a successor resumes the migration and finds
        nothing left to do.
        """
        for path in (self.stopped(session), self._path(session)):
            remove(path)
        if session in self._files:
            _close(self._files.pop(session))

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the entries that a predecessor has left, by session.  The newest is first, because
        of two entries for one domain the newer one is valid.  Entries of an earlier boot, and
        entries that cannot be read, are left out.  What belongs to no entry is removed.
        """
        found = {}
        for path in self._directory.glob(f"*{NEW_SUFFIX}"):
            with contextlib.suppress(OSError):  # no entry is in a file of this name
                path.unlink()
        for path in sorted(self._directory.glob(f"*{SUFFIX}"), key=_written, reverse=True):
            session = path.name.removesuffix(SUFFIX)
            try:
                facts = _last_entry(_text_of(path))
                if facts["boot"] != self._boot:
                    log.warning(
                        "%s: the guest has ended with the host, which was restarted since", path
                    )
                    self.erase(session)
                    continue
            except Exception as error:
                self.leave(session, error)
                continue
            found[session] = facts
        self._remove_remnants()
        return found

    def _remove_remnants(self) -> None:
        """Remove the files of sessions that have no entry any more.  A predecessor was killed just
        before it removed them, or the host was restarted.
        """
        for suffix in REMOVED_SUFFIXES:
            for path in self._directory.glob(f"*{suffix}"):
                if not is_there(self._path(path.name.removesuffix(suffix))):
                    remove(path)

    def leave(
        self, session: str, why: Exception, domain: object = "", domid: object = None
    ) -> None:
        """Keep an entry whose migration is not resumed.  ``domain``, ``domid``: the values at the
        places of the domain's name and number.

        An :class:`OccupiedError` states that the domain has a newer entry: when the migration of
        the newer entry has ended, a successor resumes the migration of this entry.  Any other error
        states that this release cannot use the entry, which is kept for a person or for a release
        that can read the entry.
        """
        path = self._path(session)
        if isinstance(why, OccupiedError):
            reason = (
                "kept and not resumed, because a newer journal has a migration of the same "
                "domain: restart this daemon when that migration has ended, or remove the file"
            )
        else:
            cause = why if isinstance(why, ValueError | MigrationError) else repr(why)
            reason = (
                f"not a journal of ours, or of another release: {cause}; if a guest of this host "
                "waits for this migration, start the release that wrote the file, otherwise remove "
                "the file"
            )
        problem = f"{path}: {reason}"
        name = domain if isinstance(domain, str) else ""
        number = domid if type(domid) is int and domid <= MAX_DOMID else None
        self.kept[session] = Kept(session, path, name, number, problem)
        log.error("%s", problem)

    def still_kept(self) -> list[Kept]:
        """Return the kept entries whose files still exist.  Call this in a thread."""
        return [entry for entry in self.kept.values() if os.path.lexists(entry.path)]

    def check_understood(self, session: str) -> None:
        """Raises :class:`MigrationError` for a session whose entry was kept by :meth:`leave`.  Such
        a session may not have ended.
        """
        if session in self.kept:
            raise MigrationError(
                "the journal of that session was not resumed: `xen-postcopy list` at the host of "
                "that journal shows why, and what to do"
            )

    def _path(self, session: str) -> Path:
        return self._directory / (session + SUFFIX)


def _seconds_since_boot() -> float:
    """Return the time of a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _written(path: Path) -> int:
    """Return the time at which the last entry was written, in nanoseconds."""
    try:
        return path.lstat().st_mtime_ns
    except OSError:  # the reader of the file reports what is wrong with it
        return 0


def is_there(path: Path) -> bool:
    """Whether a file of the state directory exists.  A file system that fails has no such file."""
    return os.path.lexists(path)


def remove(path: Path) -> None:
    """Remove a file of the state directory that nothing depends on any more.

    If the removal fails, the log names the file, and the migration ends as if the file had been
    removed.
    """
    try:
        if is_there(path):  # a read-only file system has the same error for a missing file
            path.unlink()
    except OSError as error:
        log.error("cannot erase %s, which is not needed any more: %s", path, error.strerror)


def _close(file: int) -> None:
    """Close a file with entries.  A file system that fails may report an error only now."""
    try:
        os.close(file)
    except OSError as error:
        log.error("cannot close a file of the journal: %s", error.strerror)


def _make(path: Path, entry: bytes) -> int:
    """Make a file with its first entry.  The file gets its name only then, so that a file without
    an entry is a damaged one.

    Returns a descriptor for the entries that follow.  Raises ``OSError``.
    """
    new = path.with_suffix(NEW_SUFFIX)
    file = create_anew(new)  # nobody else may read the key of the session
    try:
        if os.write(file, entry) < len(entry):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        new.rename(path)
    except BaseException:
        os.close(file)
        new.unlink(missing_ok=True)
        raise
    return file


def check_facts(
    facts: dict[str, Any],
    steps: Container[str],
    types: dict[str, tuple[type, ...]],
    optional: Container[str],
) -> None:
    """Check the facts of an entry.  ``types``: the facts that only this end writes.  ``optional``:
    facts that an earlier release did not write.

    Raises ``ValueError`` for an entry that this release must not act on: a step of another release,
    or a value that no release has written.
    """
    for name, allowed in (FACTS | types).items():
        if name not in facts and name in optional:
            continue
        if name not in facts:
            raise ValueError(f"{name} is missing")
        if type(facts[name]) not in allowed:
            raise ValueError(f"{name} cannot be {facts[name]!r}")
    if facts["step"] not in steps:
        raise ValueError(f"this release does not have the step {facts['step']!r}")
    if not -1 <= facts["domid"] <= MAX_DOMID:
        raise ValueError(f"domid cannot be {facts['domid']}")
    if facts["dials"] is not None and not _is_address(facts["dials"]):
        raise ValueError(f"dials cannot be {facts['dials']!r}")
    if not bytes.fromhex(facts["key"]):
        raise ValueError("key is empty")
    handle = facts.get("handle")
    if handle and len(bytes.fromhex(handle)) * 2 != HANDLE_DIGITS:
        raise ValueError(f"handle cannot be {handle!r}")


def _is_address(value: list[Any]) -> bool:
    return [type(part) for part in value] == [str, int] and 0 < value[1] < 2**16


def _text_of(path: Path) -> str:
    """Raises ``ValueError`` if the file is none that a journal has: opening a FIFO waits for a
    writer, and a device has no end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        raise ValueError("this is not a file with entries")
    return path.read_text()


def _line(entry: str) -> bytes:
    """Return the line of an entry, with its checksum and both newlines."""
    return f'\n{entry[:-1]}, "sum": {zlib.crc32(entry.encode())}}}\n'.encode()


def _last_entry(text: str) -> Any:
    """Return the last entry that was written in full.  Raises ``ValueError`` if there is none, or
    if the file is damaged behind that entry.
    """
    lines = text.split("\n")
    for line, after in reversed([*zip_longest(lines, lines[1:])]):
        # The newline that ends an entry is followed by the end, or by the first one of another.
        if line and (facts := _facts_of(line, is_ended=after == "")) is not None:
            return facts
    raise ValueError("no entry in it")


def _facts_of(line: str, *, is_ended: bool) -> Any:
    """Return the facts of an entry; ``None`` if the entry was cut off.  ``is_ended``: whether the
    newline that ends an entry follows.  Raises ``ValueError`` for a damaged entry.
    """
    try:
        facts = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        more_than_an_entry = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if is_ended or more_than_an_entry or not line.isprintable():
            raise ValueError(DAMAGED) from error
        return None
    if (parts := WITH_SUM.fullmatch(line)) is None:
        if is_ended:
            raise ValueError(DAMAGED)
        return facts  # 0.1.0 wrote neither a checksum nor a newline at the end
    if zlib.crc32(f"{parts[1]}}}".encode()) != int(parts[2]):
        raise ValueError(DAMAGED)
    del facts["sum"]
    return facts if is_ended else None
