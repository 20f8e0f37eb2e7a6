# SPDX-License-Identifier: GPL-2.0-or-later
"""Control sockets, the daemon's end.  The client's end, ``client.py``, describes what is
exchanged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from migrate.control.client import MAX_LINE, Json
from migrate.errors import MigrationError, UnknownMigrationError
from migrate.service.encoding import encoded
from migrate.service.lifecycle import inherited_socket, serve_connections
from migrate.tasks import task_group
from xenbackend.errors import XenError
from xenbackend.unix import socket_path

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1000
REQUEST_TIMEOUT_S = 10.0
"""How long a client may take to send its request."""
ANSWER_S = 10.0
"""How long a client may take to receive its last answer."""


class ControlConnection:
    """The daemon's end of one exchange."""

    def __init__(self, stream: trio.SocketStream):
        self._stream = stream
        self._buffer = b""
        self._answering = trio.Lock()

    async def request(self) -> Json | None:
        """Return the next line, or ``None`` if the client has left.  Raises :class:`MigrationError`
        for a malformed line.
        """
        line = await self._line()
        if line is None:
            return None
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise MigrationError("not a JSON object") from None
        if not isinstance(request, dict):
            raise MigrationError("not a JSON object")
        return request

    async def _line(self) -> bytes | None:
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise MigrationError("a line without end")
            try:
                data = await self._stream.receive_some(65536)
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    async def answer(self, event: str, **fields: Any) -> None:
        """Send an answer.  Raises ``trio.BrokenResourceError`` if the client has closed the
        connection.
        """
        await self._send(json.dumps({"event": event, **fields}))

    async def answer_at_length(self, event: str, **fields: Any) -> None:
        """Send an answer that may be large, as :meth:`answer` does."""
        await self._send(await trio.to_thread.run_sync(encoded, {"event": event, **fields}))

    async def _send(self, line: str) -> None:
        async with self._answering:
            await self._stream.send_all(line.encode() + b"\n")


class LastAnswer:
    """The last answer to a client, which is sent once.  Nothing more is received from the client
    after it.
    """

    def __init__(self, connection: ControlConnection | None):
        self._connection = connection
        self.begun = connection is None
        self.given = trio.Event()

    async def give(self, event: str, **fields: Any) -> None:
        """Send the answer, also if the client may have gone.  Every later call does nothing.  A
        client that reads nothing is given up after :data:`ANSWER_S`.
        """
        if self.begun:
            return
        assert self._connection is not None
        self.begun = True
        try:
            with trio.move_on_after(ANSWER_S):
                await self._connection.answer(event, **fields)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("the client has closed the connection before its answer %s", event)
        finally:
            self.given.set()


Handler = Callable[[Json, ControlConnection], Awaitable[None]]


def no_guest() -> bool:
    return False


@asynccontextmanager
async def listening(
    path: Path, *, needed: Callable[[], bool] = no_guest
) -> AsyncIterator[trio.SocketListener]:
    """Listen at the socket that systemd has made, otherwise at one of our own.  Requests wait until
    :func:`serve` answers them.

    ``needed``: whether guests need this daemon.  If it ends nevertheless, its socket stays, as if
    the daemon had been killed: xl's helper then saves no guest that may lack pages.

    Raises :class:`MigrationError` if another process listens there, or if the socket cannot be
    made.
    """
    inherited = inherited_socket()
    async with contextlib.AsyncExitStack() as stack:
        if inherited is not None:
            sock = stack.enter_context(trio.socket.from_stdlib_socket(inherited))
        else:
            sock = await stack.enter_async_context(listen_unix(path, needed=needed))
        yield trio.SocketListener(sock)


async def serve(
    listener: trio.SocketListener,
    handler: Handler,
    *,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the requests at a control socket until cancelled."""
    served = 0

    async def exchange(stream: trio.SocketStream) -> None:
        nonlocal served
        connection = ControlConnection(stream)
        async with stream:
            if not _may_ask(stream):
                return
            if served >= MAX_CONNECTIONS:
                with (
                    trio.move_on_after(REQUEST_TIMEOUT_S),
                    contextlib.suppress(trio.BrokenResourceError),
                ):
                    await connection.answer(
                        "error", message=f"{served} requests are being answered: try again later"
                    )
                return
            served += 1
            try:
                # What the client requested continues when the client has ended.
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await _answer(connection, handler)
            finally:
                served -= 1

    await serve_connections("a request", exchange, [listener], task_status=task_status)


def _may_ask(stream: trio.SocketStream) -> bool:
    """Whether the client may send requests: root, and the user of this daemon.  The mode of the
    socket may have been changed.
    """
    _pid, uid, _gid = struct.unpack(
        "3i", stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    if uid in (0, os.geteuid()):
        return True
    log.warning("a request of user %d refused", uid)
    return False


async def _answer(connection: ControlConnection, handler: Handler) -> None:
    try:
        request = None
        with trio.move_on_after(REQUEST_TIMEOUT_S) as waiting:
            request = await connection.request()
        if waiting.cancelled_caught:
            raise MigrationError(f"no request came within {REQUEST_TIMEOUT_S:g} s")
        if request is not None:
            async with task_group():  # of several errors it raises the most informative one
                await handler(request, connection)
        return
    except UnknownMigrationError as error:
        await connection.answer("error", message=str(error), unknown=True)
        return
    except (MigrationError, XenError) as error:
        text = str(error)
    except KeyError as error:
        text = f"bad request: the key {error} is missing"
    except (TypeError, ValueError, OverflowError) as error:
        text = f"bad request: {error}"
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise
    except Exception as error:
        log.exception("internal error in answering a request")
        text = f"internal error, which the daemon's log has: {error!r}"
    await connection.answer("error", message=text)


@asynccontextmanager
async def listen_unix(
    path: Path,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    *,
    needed: Callable[[], bool] = no_guest,
) -> AsyncIterator[trio.socket.SocketType]:
    """Listen at a socket at ``path``, for this user alone.  If only the last folder of the path is
    missing, the folder is made.  A socket on which no process listens any more is replaced.  The
    socket is removed at the end, unless it is ``needed`` then.

    Raises :class:`MigrationError` if another process listens there, or if the socket cannot be
    made.
    """
    sock = trio.socket.socket(socket.AF_UNIX, kind)
    with sock:
        try:
            name = socket_path(path)
            if not path.parent.parent.is_dir():
                raise MigrationError(f"socket {path}: there is no folder {path.parent.parent}")
            path.parent.mkdir(exist_ok=True, mode=0o755)
            if path.is_socket():
                with socket.socket(socket.AF_UNIX, kind) as probe:
                    try:
                        probe.connect(name)
                        raise MigrationError(f"socket {path}: another process listens there")
                    except ConnectionRefusedError:
                        path.unlink()
            old = os.umask(0o177)
            try:
                await sock.bind(name)
            finally:
                os.umask(old)
        except OSError as error:
            raise MigrationError(f"socket {path}: {error.strerror or error}") from error
        sock.listen(64)
        ours = _identity(path)
        try:
            yield sock
        finally:
            if ours is not None and _identity(path) == ours and not needed():
                path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the identity of the file at ``path``.  If the socket there was removed, another
    process may have made one of its own.
    """
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def decision_of(request: Json) -> dict[str, bool]:
    """Return the decision in a request of ``decide`` or ``check-decision``."""
    return {"here": bool(request["here"]), "force": bool(request.get("force"))}
