"""Control sockets: how the command line talks to a daemon on the same host.

A Unix socket, mode 0600; each connection carries one request and its answers, a JSON object a line.  An answer has
``event``: ``result`` or ``error`` end the exchange, ``progress`` may come before.  During a long request the client may
send further lines (``{"command": "cancel"}``).
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from migrate.errors import MigrationError

MAX_LINE = 1024 * 1024
RUN_DIRECTORY = Path("/run/xen-postcopy")
Json = dict[str, Any]


class ControlConnection:
    """The daemon's end of one exchange."""

    def __init__(self, stream: trio.SocketStream):
        self._stream = stream
        self._lines = _lines(stream)
        self._answering = trio.Lock()

    async def request(self) -> Json | None:
        """The next line, or ``None`` when the client has gone.  Raises :class:`MigrationError` for garbage."""
        async for line in self._lines:
            try:
                request = json.loads(line)
            except ValueError:
                raise MigrationError("not a JSON object") from None
            if not isinstance(request, dict):
                raise MigrationError("not a JSON object")
            return request
        return None

    async def answer(self, event: str, **fields: Any) -> None:
        """Raises ``trio.BrokenResourceError`` when the client has gone."""
        async with self._answering:
            await self._stream.send_all(json.dumps({"event": event, **fields}).encode() + b"\n")


async def _lines(stream: trio.SocketStream) -> AsyncIterator[bytes]:
    buffer = b""
    while True:
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            yield line
        if len(buffer) > MAX_LINE:
            raise MigrationError("a line without end")
        try:
            data = await stream.receive_some(65536)
        except trio.BrokenResourceError:
            return
        if not data:
            return
        buffer += data


Handler = Callable[[Json, ControlConnection], Awaitable[None]]


async def serve(
    path: Path, handler: Handler, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled.  Raises :class:`MigrationError` when the socket cannot be had."""

    async def exchange(stream: trio.SocketStream) -> None:
        connection = ControlConnection(stream)
        try:
            async with stream:
                try:
                    request = await connection.request()
                    if request is not None:
                        await handler(request, connection)
                except (MigrationError, KeyError, TypeError, ValueError) as error:
                    text = str(error) if isinstance(error, MigrationError) else f"bad request: {error!r}"
                    await connection.answer("error", message=text)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has gone; what it asked for goes on

    async with listen_unix(path) as sock:
        await trio.serve_listeners(exchange, [trio.SocketListener(sock)], task_status=task_status)


@asynccontextmanager
async def listen_unix(
    path: Path, kind: socket.SocketKind = socket.SOCK_STREAM
) -> AsyncIterator[trio.socket.SocketType]:
    """A listening socket at ``path`` for this user alone; one that nobody listens at any more is replaced.

    Raises :class:`MigrationError` where somebody does, or where it cannot be made.
    """
    sock = trio.socket.socket(socket.AF_UNIX, kind)
    with sock:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            if path.is_socket():
                with socket.socket(socket.AF_UNIX, kind) as probe:
                    try:
                        probe.connect(os.fspath(path))
                        raise MigrationError(f"socket {path}: somebody is listening there already")
                    except ConnectionRefusedError:
                        path.unlink()
            old = os.umask(0o177)
            try:
                await sock.bind(os.fspath(path))
            finally:
                os.umask(old)
        except OSError as error:
            raise MigrationError(f"socket {path}: {error.strerror or error}") from error
        sock.listen(64)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


class ControlClient:
    """The command line's end, blocking; a context manager.  Raises :class:`MigrationError` when there is no daemon."""

    def __init__(self, path: Path):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            hint = "is the daemon running?" if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else "are you root?"
            raise MigrationError(f"no daemon at {path}: {error.strerror}; {hint}") from error
        self._file = self._socket.makefile("rb")

    def say(self, **request: Any) -> None:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise MigrationError(f"the daemon has gone: {error.strerror}") from error

    def answers(self) -> Iterator[Json]:
        """Until a ``result``, which is the last.  Raises :class:`MigrationError` for an ``error``, and when it ends early."""
        for line in self._file:
            answer: Json = json.loads(line)
            if answer["event"] == "error":
                raise MigrationError(answer["message"])
            yield answer
            if answer["event"] == "result":
                return
        raise MigrationError("the daemon has gone in the middle of the request")

    def call(self, **request: Any) -> Json:
        """One request, its result."""
        self.say(**request)
        *_progress, result = self.answers()
        return result

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
