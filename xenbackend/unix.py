# SPDX-License-Identifier: GPL-2.0-or-later
"""Paths of Unix sockets, and connections to a socket whose owner is just starting."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

MAX_PATH_BYTES = 107
"""The longest path in sockaddr_un(7), without the null byte at its end."""
STARTING_S = 10.0
"""How long to wait for a process that was started beside this one and does not listen yet."""
AGAIN_S = 0.05
ANNOUNCED_S = 1.0
"""After this time of a wait the person who waits is informed."""
Problem = TypeVar("Problem")


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


def connect_unix(
    sock: socket.socket,
    path: str | os.PathLike[str],
    wait_s: float,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Connect.  If no process listens, try again for at most ``wait_s`` seconds.  ``announce`` is
    called once, if the wait takes long.  Raises ``OSError``.
    """
    name = socket_path(path)

    def connect() -> OSError | None:
        try:
            sock.connect(name)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            return error
        return None

    if error := again_until(connect, wait_s, announce):
        raise error


def again_until(
    attempt: Callable[[], Problem | None], wait_s: float, announce: Callable[[], None]
) -> Problem | None:
    """Call ``attempt`` until it returns no problem, for at most ``wait_s`` seconds.  ``announce``
    is called once, after :data:`ANNOUNCED_S`.  Returns the last problem.
    """
    began = time.monotonic()
    is_announced = False
    while (problem := attempt()) is not None and (waited_s := time.monotonic() - began) < wait_s:
        if waited_s >= ANNOUNCED_S and not is_announced:
            is_announced = True
            announce()
        time.sleep(AGAIN_S)
    return problem
