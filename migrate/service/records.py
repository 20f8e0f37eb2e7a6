# SPDX-License-Identifier: GPL-2.0-or-later
"""The records of migrations that have ended, as files beside the history.

Each record is one compressed file, whose name is the migration's identifier.  Only the records of
the newest :data:`MOST_RECORDS` migrations of the history are kept.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from migrate.protocol.session import is_session_id
from migrate.service.encoding import encoded, is_nested
from migrate.service.files import create_anew, open_regular
from migrate.service.record import FORMAT

log = logging.getLogger(__name__)

MOST_RECORDS = 100
MOST_BYTES = 512 * 1024
"""The most bytes of a file."""
MOST_OF_TEXT = 8 * 1024 * 1024
"""The most bytes of its text."""
MOST_LEVELS = 8
"""The most levels of dictionaries and lists in it."""
GZIP = 31
"""The format, as ``zlib`` has it."""
SUFFIX = ".json.gz"
NEW_SUFFIX = ".new"
Json = dict[str, Any]


class Records:
    """The records in ``folder``, which is made when the first one is written."""

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, migration_id: str, record: Json, known: Sequence[str]) -> None:
        """Write a record, and remove those of migrations that are not among the last
        :data:`MOST_RECORDS` of ``known``.  Raises ``OSError``, and leaves no part of the file then.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        kept = {f"{one}{SUFFIX}" for one in known[-MOST_RECORDS:]}
        for path in self._folder.iterdir():
            if path.name.endswith((SUFFIX, NEW_SUFFIX)) and path.name not in kept:
                with contextlib.suppress(OSError):  # a folder, for example, is not ours
                    path.unlink()
        data = gzip.compress(encoded(record).encode(), compresslevel=6, mtime=0)
        if len(data) > MOST_BYTES:
            log.warning("the record of %s is left out: %d bytes", migration_id, len(data))
            return
        path = self._path(migration_id)
        new = path.with_suffix(NEW_SUFFIX)
        descriptor = create_anew(new)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            new.rename(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def read(self, migration_id: str) -> Json | None:
        """Return a record; ``None`` if there is none, or none that this release can read."""
        if not is_session_id(migration_id):
            return None
        path = self._path(migration_id)
        try:
            record = json.loads(_contents(path))
            if is_nested(record, MOST_LEVELS):
                raise ValueError(f"it has more than {MOST_LEVELS} levels")
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
            log.warning("cannot read the record %s: %s", path, error)
            return None
        is_ours = isinstance(record, dict) and record.get("format") == FORMAT
        return record if is_ours else None

    def _path(self, migration_id: str) -> Path:
        return self._folder / f"{migration_id}{SUFFIX}"


def _contents(path: Path) -> bytes:
    """Return what a compressed file has.  Raises ``OSError``, ``EOFError`` or ``zlib.error``."""
    with open_regular(path) as file:
        decompressor = zlib.decompressobj(GZIP)
        text = decompressor.decompress(file.read(MOST_BYTES), MOST_OF_TEXT)
    if not decompressor.eof:
        raise EOFError(f"it is cut off, or more than {MOST_OF_TEXT} bytes")
    return text
