# SPDX-License-Identifier: GPL-2.0-or-later
"""Control sockets: the connection from the command line, or from xl's helper, to a daemon on the
same host.

A control socket is a Unix socket with mode 0600.  Each connection carries one request and its
answers, each as one JSON object on one line.  An answer has ``event``: ``result`` or ``error`` ends
the exchange; others may precede it.  During a long request the client may send further lines
(``{"command": "cancel"}``).

This module is the client's end.  It imports little, because xl's helper has to start fast.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from migrate.errors import DaemonGoneError, MigrationError, SilentDaemonError, UnknownMigrationError
from xenbackend.unix import connect_unix

MAX_LINE = 1024 * 1024
RUN_DIRECTORY = "/run/xen-postcopy"
SOCKETS = "XEN_POSTCOPY_SOCKETS"
"""The environment variable that names another folder of sockets than :data:`RUN_DIRECTORY`."""
RUNNING = "is the daemon running?"
ANSWER_S = 5.0
"""How long a daemon may take for an answer for which it waits for nothing else."""
LOOK_MS = 200
"""The longest wait of one call of the kernel."""
Json = dict[str, Any]


def sender_socket() -> str:
    """Return the path of the local sender's control socket."""
    return f"{os.environ.get(SOCKETS) or RUN_DIRECTORY}/sender.sock"


def receiver_socket() -> str:
    """Return the path of the local receiver's control socket."""
    return f"{os.environ.get(SOCKETS) or RUN_DIRECTORY}/receiver.sock"


class ControlClient:
    """A connection to a daemon; blocking, and a context manager.  Raises :class:`MigrationError` if
    no daemon listens.

    ``wait_s``: how long to wait for a daemon that has just been started.  ``announce``: what is
    called with the path if that wait takes long.  ``answer_s``: how long each answer may take, 0
    for no limit; :class:`SilentDaemonError` is raised after that time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        wait_s: float = 0,
        answer_s: float = 0,
        announce: Callable[[str | os.PathLike[str]], None] = lambda _path: None,
    ):
        self.path = path
        self._answer_s = answer_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        limit = struct.pack("ll", int(answer_s), int(answer_s % 1 * 1e6))
        for option in (
            socket.SO_RCVTIMEO,
            socket.SO_SNDTIMEO,
        ):  # connect() waits in a full queue, too
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        try:
            connect_unix(self._socket, path, wait_s, lambda: announce(path))
        except BlockingIOError:
            self._socket.close()
            raise self._silent() from None
        except OSError as error:
            self._socket.close()
            hints = {
                errno.ENOENT: RUNNING,
                errno.ECONNREFUSED: RUNNING,
                errno.EACCES: "are you root?",
            }
            hint = hints.get(error.errno or 0, "is this the path of its control socket?")
            raise MigrationError(f"no daemon at {path}: {error.strerror}; {hint}") from error
        self._buffer = b""

    def send(self, **request: Any) -> None:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except BlockingIOError:
            raise self._silent() from None
        except OSError as error:
            self.answer()  # raises the reason, if the daemon has refused this before it was sent
            raise DaemonGoneError(f"the daemon has ended: {error.strerror}") from error

    def answer(self, watched_fd: int | None = None) -> Json | None:
        """Return the next answer; ``None`` at the end.

        Raises :class:`MigrationError` for an ``error``, and :class:`EOFError` if ``watched_fd``
        becomes readable first.
        """
        while b"\n" not in self._buffer:
            self._wait(watched_fd)
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: Json = json.loads(line)
        if answer["event"] == "error":
            raise (UnknownMigrationError if answer.get("unknown") else MigrationError)(
                answer["message"]
            )
        return answer

    def _wait(self, watched_fd: int | None) -> None:
        """Wait until something can be received.

        A signal just before a call of the kernel does not interrupt the call, and Python runs the
        signal's handler only afterwards.  No call therefore waits for longer than :data:`LOOK_MS`.
        """
        give_up_at = time.monotonic() + (self._answer_s or math.inf)
        readable = select.poll()
        for fd in (self._socket.fileno(), watched_fd):
            if fd is not None:
                readable.register(fd, select.POLLIN)
        while not (ready := dict(readable.poll(LOOK_MS))):
            if time.monotonic() >= give_up_at:
                raise self._silent()
        if watched_fd in ready:
            raise EOFError

    def answers(self) -> Iterator[Json]:
        """Yield the answers up to the ``result``.  Raises :class:`MigrationError` for an ``error``,
        and if the connection ends before the ``result``.
        """
        while (answer := self.answer()) is not None:
            yield answer
            if answer["event"] == "result":
                return
        raise DaemonGoneError("the daemon has ended in the middle of the request")

    def _silent(self) -> SilentDaemonError:
        return SilentDaemonError(
            f"the daemon at {self.path} has not answered for {self._answer_s:g} s: see whether it "
            "is stopped or hangs (systemctl status), and start it again if it hangs; it then "
            "resumes its migrations"
        )

    def call(self, **request: Any) -> Json:
        """Send one request, and return its result."""
        self.send(**request)
        *_progress, result = self.answers()
        return result

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
