# SPDX-License-Identifier: GPL-2.0-or-later
"""How files are opened that somebody else may have put there: a FIFO or a device in the place of a
file must not stop a daemon.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def open_without_waiting(path: Path) -> BinaryIO:
    """Open a file to be read.  A FIFO is not waited for.  Raises ``OSError``, also for a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
