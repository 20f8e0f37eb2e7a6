# SPDX-License-Identifier: GPL-2.0-or-later
"""Paths of Unix sockets, and connections to a socket whose owner is just starting."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

MAX_PATH_BYTES = 107
"""The longest path in sockaddr_un(7), without the null byte at its end."""
STARTING_S = 10.0
"""How long to wait for a process that was started beside this one and does not listen yet."""
AGAIN_S = 0.05


def socket_path(path: str | os.PathLike[str]) -> str:
    """Return ``path``, if a socket can have it.  Raises ``OSError``, whose ``strerror`` has the
    reason.
    """
    text = os.fspath(path)
    size = len(os.fsencode(text))
    if size > MAX_PATH_BYTES:
        why = f"the path has {size} bytes, and a socket's has at most {MAX_PATH_BYTES}"
        raise OSError(errno.ENAMETOOLONG, f"{why}: choose a shorter one")
    if not text or "\0" in text:
        raise OSError(errno.EINVAL, "this is no path of a socket")
    return text


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """Yield an address for a socket at a path of any length, while the folder is open.  Raises
    ``OSError``.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect_unix(sock: socket.socket, path: str | os.PathLike[str], wait_s: float) -> None:
    """Connect.  If no process listens, try again for at most ``wait_s`` seconds.  Raises
    ``OSError``.
    """
    deadline = time.monotonic() + wait_s
    name = socket_path(path)
    while True:
        try:
            sock.connect(name)
            return
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(AGAIN_S)
