# SPDX-License-Identifier: GPL-2.0-or-later
"""The history: the migrations of one daemon that have ended, for people and for reports.

When a migration has ended, its last answer to ``show`` is added.  If more becomes known of the end
later, an entry with the same ``id`` replaces the former one.  The newest :data:`MOST_ENTRIES` are
in memory, and a file in the state directory has them for the successors of this daemon.  No
decision about a guest depends on either of them.

The file has a JSON object on each line, the oldest first: the keys of ``show``, with ``ended_at``,
``format`` (:data:`FORMAT`) and the ``release`` that wrote the line.  A later release may add keys;
it changes ``format`` if the meaning of a key changes.  An entry begins with a newline, as in the
journal: what a killed daemon or a full disk has left of an entry stays on a line of its own.  When
the file is full, a file with the newest entries takes its place.

What was recorded of a migration over time is in a file of its own (``migrate/service/records.py``).
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from migrate import __version__
from migrate.errors import MigrationError
from migrate.logs import Complaint
from migrate.outcomes import outcome
from migrate.service.files import create_anew, open_regular
from migrate.service.journal import Journal, Kept
from migrate.service.lifecycle import Named, ended, find_migration
from migrate.service.records import Records
from migrate.tasks import in_abandoned_thread

log = logging.getLogger(__name__)

FORMAT = 1
MOST_ENTRIES = 500
"""The most migrations in memory.  One answer of a control socket has them all."""
MOST_BYTES = 4 * 2**20
"""The most bytes of the file."""
MOST_LINES = 2 * MOST_ENTRIES
"""The most lines of the file."""
MOST_OF_AN_ENTRY = 64 * 1024
"""The most bytes of an entry.  What was measured is left out of a larger entry."""
RECENT = 100
"""The number of ended migrations that ``list`` shows without ``--all``."""
PATIENCE_S = 5.0
"""How long the end of a migration waits for the disk."""
TYPES: dict[str, type] = {
    "id": str, "direction": str, "domain": str, "peer": str, "phase": str, "problem": str,
    "outstanding": int, "unknown": list, "details": dict,
}  # fmt: skip
"""The keys without which an entry is not shown, with the types of their values."""
PERHAPS: dict[str, Any] = {
    "domid": int | None, "strategy": str | None, "started_at": int | float | None,
    "ended_at": int | float | None,
}  # fmt: skip
"""Keys that an entry may lack, or have without a value."""
RECORDS = "records"
"""The folder of the records, beside the file."""
NOT_IN_A_LIST = ("options", "details", "known")
ASKED = {"postcopy-now": "switch over", "check-decision": "decide", "set": "change"}
"""The verb for a request in an answer, if the verb is not the command."""
Json = dict[str, Any]
Amend = Callable[[], Awaitable[None]]
"""A function that adds to the history what has become known of an end (:meth:`History.follow`)."""
M = TypeVar("M", bound=Named)
R = TypeVar("R", bound="Recording")


@dataclass(frozen=True)
class Ended:
    """A migration that has ended.  ``shown``: what ``show`` answers.  ``here``: the migration has
    ended in this process.
    """

    shown: Json
    here: bool

    has_ended = True

    @property
    def id(self) -> str:
        return str(self.shown["id"])

    @property
    def domain_name(self) -> str:
        return str(self.shown["domain"])

    @property
    def line(self) -> Json:
        """Return what ``list`` shows of the migration."""
        return {key: value for key, value in self.shown.items() if key not in NOT_IN_A_LIST}

    def refusal(self, command: str) -> MigrationError:
        """Return the answer to a request that came after the end."""
        asked = ASKED.get(command, command)
        shown = self.shown
        return MigrationError(ended(self.domain_name, shown["phase"], shown["problem"], asked))


class Recording(Named, Protocol):
    def recorded(self) -> Json:
        """Return what was recorded so far.  Called in a thread."""


class Ending(Named, Protocol):
    @property
    def phase(self) -> str: ...

    @property
    def progress(self) -> Any:
        """What ``problem`` is an attribute of."""


async def still_kept(journal: Journal) -> list[Kept]:
    """Return the entries of the journal that were not resumed and whose files still exist."""
    return await trio.to_thread.run_sync(journal.still_kept) if journal.kept else []


class History:
    """The history in the file at ``path``.  Nothing raises an error: a history that cannot be read
    or written is logged, and its daemon works without.
    """

    def __init__(self, path: Path):
        self._path = path
        self.records = Records(path.with_name(RECORDS))
        self._ended: dict[str, Ended] = {}
        """The migrations that have ended, by identifier, the oldest first."""
        self._lines = 0
        self._writing = threading.Lock()
        self._unwritten = Complaint(log.warning)
        self.added: Callable[[Json], object] = lambda _shown: None
        """Called with each entry that is added, before :meth:`add` waits for anything."""

    def __contains__(self, migration_id: str) -> bool:
        return migration_id in self._ended

    def load(self) -> None:
        """Read the entries that predecessors have left."""
        try:
            lines = _read(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot read the history %s: %s", self._path, error.strerror)
            return
        self._lines = len(lines)
        read = [shown for line in lines if (shown := _parsed(line)) is not None]
        for shown in read:
            self._keep(Ended(shown, here=False))
        if len(read) < len(lines):
            log.warning(
                "%s: %d of %d lines were cut off, or another release wrote them: they are left out",
                self._path,
                len(lines) - len(read),
                len(lines),
            )

    def lines(self, *, of_predecessors: bool, but: Iterable[str]) -> list[Json]:
        """Return what ``list`` shows of the newest migrations, the oldest first: of the
        :data:`RECENT` that have ended in this process, or of all.  Those with the ids ``but`` are
        left out.
        """
        left_out = {*but}
        found = [one for one in self._ended.values() if one.id not in left_out]
        if not of_predecessors:
            found = [one for one in found if one.here][-RECENT:]
        return [one.line for one in found]

    def ended_at(self, migration_id: str) -> float | None:
        """Return when a migration has ended, in seconds since 1970; ``None`` if it has not."""
        one = self._ended.get(migration_id)
        return one.shown.get("ended_at") if one is not None else None

    def find(self, others: dict[str, M], name: str, kept: Iterable[Kept]) -> M | Ended:
        """Return the migration of ``others``, or the one that has ended, with this name or id.
        Raises as :func:`find_migration`.
        """
        past = [one for one in self._ended.values() if one.id not in others]
        known: list[M | Ended] = [*past, *others.values()]
        return find_migration(known, name, kept)

    def find_under_way(self, others: dict[str, M], request: Json, kept: Iterable[Kept]) -> M:
        """Return the migration of ``others`` that a request is for.  Raises as :meth:`find`, and
        :meth:`Ended.refusal`.
        """
        found = self.find(others, request["migration"], kept)
        if isinstance(found, Ended):
            raise found.refusal(request["command"])
        return found

    def listed(
        self,
        others: dict[str, M],
        line: Callable[[M, float | None], Json],
        *,
        of_predecessors: bool,
    ) -> list[Json]:
        """Return what ``list`` shows, in the order of the starts: what :meth:`lines` returns, and
        ``others``.  ``line`` is called with one of these and the time of its end.
        """
        found = self.lines(of_predecessors=of_predecessors, but=others)
        found += [line(one, self.ended_at(one.id)) for one in others.values()]
        # A cancelled migration may end after the one that was begun next.
        return sorted(found, key=lambda shown: shown.get("started_at") or 0.0)

    def shown(self, found: R | Ended, show: Callable[[R, float | None], Json]) -> Json:
        """Return what the request ``show`` answers of a migration that :meth:`find` has returned.
        The argument ``show`` is called with a migration of this process, and the time of its end.
        """
        return found.shown if isinstance(found, Ended) else show(found, self.ended_at(found.id))

    async def recorded(self, found: R | Ended, show: Callable[[R, float | None], Json]) -> Json:
        """Return what ``record`` answers: what :meth:`shown` returns, and under ``record`` what was
        recorded over time; ``None`` if that is not kept any more.
        """
        get = (
            functools.partial(self.records.read, found.id)
            if isinstance(found, Ended)
            else found.recorded
        )
        return {**self.shown(found, show), "record": await trio.to_thread.run_sync(get)}

    async def add(self, shown: Json, record: Callable[[], Json] | None = None) -> None:
        """Add what ``show`` answers of a migration that has just ended.  Does nothing if the
        history has the migration: a successor ends what its predecessor had given up.

        ``record`` returns what was recorded of the migration; it is called in a thread.
        """
        if shown["id"] in self._ended:
            return
        entry = {**shown, "ended_at": round(time.time(), 3)}
        self.added(entry)
        await self._note(entry, record)

    def follow(self, migration: Ending) -> Amend:
        """Return a function that amends the migration's entry, if it has become known since the
        last call, or since this one, that the migration has ended otherwise.
        """
        before = _end(migration)

        async def amend() -> None:
            nonlocal before
            known, before = before, _end(migration)
            noted = self._ended.get(migration.id)
            if noted is not None and known != before and not before.items() <= noted.shown.items():
                await self._note({**noted.shown, **before})

        return amend

    async def _note(self, entry: Json, record: Callable[[], Json] | None = None) -> None:
        self._keep(Ended(entry, here=True))
        # A daemon that is being stopped does not end before the entry is written.
        limit = trio.CancelScope(deadline=trio.current_time() + PATIENCE_S, shield=True)
        try:
            with limit:
                write = functools.partial(self._write, _line(entry), str(entry["id"]), record)
                await in_abandoned_thread(write)
        except Exception as error:
            self._complain(error)
        if limit.cancelled_caught:
            self._complain(f"the disk has not answered for {PATIENCE_S:g} s")

    def _keep(self, one: Ended) -> None:
        self._ended[one.id] = one
        if len(self._ended) > MOST_ENTRIES:
            del self._ended[next(iter(self._ended))]

    def _complain(self, why: object) -> None:
        reason = why.strerror if isinstance(why, OSError) and why.strerror else why
        self._unwritten.log("cannot write the history %s: %s", self._path, reason)

    # ---- the file ----
    def _write(self, line: bytes, migration_id: str, record: Callable[[], Json] | None) -> None:
        """Write an entry and a record.  Raises ``OSError``."""
        if not self._writing.acquire(timeout=PATIENCE_S):
            raise TimeoutError(errno.ETIMEDOUT, "the entry before it is still being written")
        try:
            self._write_entry(line)
            if record is not None:
                self.records.write(migration_id, record(), list(self._ended))
        finally:
            self._writing.release()

    def _write_entry(self, line: bytes) -> None:
        """Append an entry, or make the file anew if it is full.  Raises ``OSError``."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(self._path, flags, 0o600)
        try:
            is_full = os.fstat(file).st_size + len(line) > MOST_BYTES
            if not is_full and self._lines < MOST_LINES:
                _write_all(file, line)
                self._lines += 1
                return
        finally:
            os.close(file)
        self._replace()

    def _replace(self) -> None:
        """Make the file anew, with the newest entries.  Raises ``OSError``, and leaves the file
        then as it was.
        """
        newest, room = list[bytes](), MOST_BYTES // 2
        for one in reversed(list(self._ended.values())):
            newest.append(_line(one.shown))
            room -= len(newest[-1])
            if room < 0:
                newest.pop()
                break
        new = self._path.with_suffix(".new")
        file = create_anew(new)
        try:
            try:
                _write_all(file, b"".join(reversed(newest)))
                os.fsync(file)  # otherwise the file may be empty after a crash of the host
            finally:
                os.close(file)
            new.rename(self._path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        self._lines = len(newest)


def _end(migration: Ending) -> Json:
    """Return what ``list`` shows of how a migration has ended."""
    phase, problem = migration.phase, migration.progress.problem
    return {"phase": phase, "outcome": outcome(phase, problem), "problem": problem}


def _line(shown: Json) -> bytes:
    entry = {"format": FORMAT, "release": __version__, **shown}
    line = b"\n" + json.dumps(entry).encode()
    if len(line) <= MOST_OF_AN_ENTRY:
        return line
    return b"\n" + json.dumps({**entry, "details": {}}).encode()


def _write_all(file: int, data: bytes) -> None:
    if os.write(file, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(path: Path) -> list[bytes]:
    """Return the lines of the file; if it is larger than a history can be, those of its end.
    Raises ``OSError``.
    """
    with open_regular(path) as file:
        before = max(os.fstat(file.fileno()).st_size - MOST_BYTES, 0)
        file.seek(before)
        lines = file.read(MOST_BYTES).split(b"\n")
    return [line for line in lines[1 if before else 0 :] if line]


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _parsed(line: bytes) -> Json | None:
    """Return what an entry shows; ``None`` if it was cut off, or if it has another format."""
    try:
        entry = json.loads(line, parse_constant=_refuse)  # NaN and Infinity are no JSON
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        return None
    if not all(isinstance(entry.get(key), of_type) for key, of_type in TYPES.items()):
        return None
    if not all(isinstance(entry.get(key), of_type) for key, of_type in PERHAPS.items()):
        return None
    del entry["format"]
    entry.pop("release", None)
    return entry
