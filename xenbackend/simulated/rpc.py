# SPDX-License-Identifier: GPL-2.0-or-later
"""The control protocol of a simulated host: msgpack maps over a Unix socket of whole messages
(SOCK_SEQPACKET).

A request is ``{"op": name, ...}``.  An answer is ``{"ok": result}`` or ``{"error": text, "errno":
n, ...}``, with file descriptors beside it.  Only control requests use the socket: page operations
work on the memory that the descriptors refer to.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import msgpack

from xenbackend.errors import XenError
from xenbackend.unix import STARTING_S, connect_unix

MAX_MESSAGE = 128 * 1024
MAX_FDS = 4
ANSWER_S = 60.0
NOT_SENT = (errno.EMSGSIZE, errno.ENOBUFS)
"""Errors after which the connection is as good as before."""


def pack(message: dict[str, Any]) -> bytes:
    return bytes(msgpack.packb(message))


def unpack(data: bytes) -> dict[str, Any]:
    message = msgpack.unpackb(data, strict_map_key=False)
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


class HostConnection:
    """A blocking client.  Every call is one round trip.  Two threads must not use it at once."""

    def __init__(self, path: str | os.PathLike[str]):
        self._name = f"simulated host at {os.fspath(path)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_S)
        try:
            connect_unix(self._socket, path, STARTING_S)
        except OSError as error:
            self._socket.close()
            raise XenError(
                self._name,
                error.errno or 0,
                why=f"{error.strerror}; is `xen-postcopy simulated-host` running there?",
            ) from error
        self.client_id: int = self.call("hello")["client"]

    def call(self, op: str, **arguments: Any) -> Any:
        result, fds = self.call_fds(op, **arguments)
        for fd in fds:
            os.close(fd)
        return result

    def call_fds(self, op: str, **arguments: Any) -> tuple[Any, list[int]]:
        """Make a request.  Returns the result and the descriptors.  Raises the host's ``XenError``,
        or ``XenError`` with ENOTCONN if the host is gone.
        """
        try:
            self._socket.send(pack({"op": op, **arguments}))
            data, fds, flags, _address = socket.recv_fds(self._socket, MAX_MESSAGE, MAX_FDS)
        except OSError as error:
            if error.errno in NOT_SENT:
                raise XenError(op, error.errno, why="the request is too large") from error
            raise self._gone() from error
        if not data:
            raise self._gone()
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            why = "this process has no descriptor left for what the simulated host sends"
            raise XenError(op, errno.EMFILE, why=why)
        answer = unpack(data)
        if "error" in answer:
            raise XenError(answer["operation"], answer["errno"], why=answer["error"])
        return answer["ok"], fds

    def _gone(self) -> XenError:
        """No further call is made: a late answer would be taken for the answer to that call."""
        self._socket.close()
        why = (
            f"it has ended, or has not answered for {ANSWER_S:g} s: if it has ended, start it "
            "again; then restart the daemons that were attached to it"
        )
        return XenError(self._name, errno.ENOTCONN, why=why)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
