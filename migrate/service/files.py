# SPDX-License-Identifier: GPL-2.0-or-later
"""How files are opened and made where somebody else may have put something: a FIFO or a device in
the place of a file must not stop a daemon, and a link must not lead it to another file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class IrregularFileError(OSError):
    """A FIFO or a device is in the place of a file."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to be read.  Raises ``OSError``; :class:`IrregularFileError` for a FIFO
    or a device, which is not waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # open() names a folder
            raise IrregularFileError(errno.EINVAL, "this is not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def create_anew(path: Path) -> int:
    """Make a file that only its owner may read, and return a descriptor to write it.  What is in
    its place is removed, and never opened.  The writes append.  Raises ``OSError``.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC
    return os.open(path, flags, 0o600)
