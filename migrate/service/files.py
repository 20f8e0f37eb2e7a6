# SPDX-License-Identifier: GPL-2.0-or-later
"""How files are opened that somebody else may have put there: a FIFO or a device in the place of a
file must not stop a daemon.
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
