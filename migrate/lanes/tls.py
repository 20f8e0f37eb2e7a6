# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutual TLS on the lanes: certificates of both ends, checked names, TLS 1.3.

Python's ``ssl`` module does the handshake and judges certificates.  What follows the handshake is
in ``migrate/lanes/records.py``.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import select
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from migrate.errors import MigrationError, PeerClosedError
from migrate.fastpath.api import NativeRecords
from migrate.lanes import records
from migrate.lanes.records import Records
from migrate.protocol.messages import printable

log = logging.getLogger(__name__)

EXPLANATION_S = 1.0
"""The longest time for which a refused connection is kept, so that the peer receives the reason."""
STRANGERS = trio.CapacityLimiter(2)
"""Threads for the cryptography of handshakes with strangers.  Waiting for the network takes no
thread.
"""
MEANINGS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate of ours, and has got none",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not trust the authority that has signed our "
    "certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer finds our certificate expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer finds our certificate bad",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no certificate",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS: see whether its configuration has a "
    "[tls] section",
    "UNEXPECTED_EOF_WHILE_READING": "the peer has closed the connection in the TLS handshake: "
    "see the peer's log; a peer without TLS, or without a free descriptor, does so",
}
"""Texts for OpenSSL's reasons."""


class _Kept:
    """The last good contents of the files, and the state of the files that were last tried."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.state: list[object] = []
        self.contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None


def _state(path: Path) -> object:
    """Return an object that differs after each change of the file."""
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Tls:
    """The TLS files of a host: ``certificate`` with its ``key`` for the host itself, and
    ``authority``, which signs the certificates of its ``peers``.
    """

    certificate: Path
    key: Path
    authority: Path
    peers: tuple[str, ...]
    """The certificate of a peer must have one of these names."""
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False, compare=False)

    def check(self) -> None:
        """Raises :class:`MigrationError` if a file cannot be used."""
        self._contexts()

    async def connected(self, sock: socket.socket, host: str, timeout_s: float) -> TlsSocket:
        """Return the socket after the handshake, for the end that has dialled ``host``.  Raises
        :class:`PeerClosedError` if the peer is not trusted.
        """
        return await self._handshake(sock, host, timeout_s)

    async def accepted(self, sock: socket.socket, timeout_s: float) -> TlsSocket:
        """Return the socket after the handshake, for the end that was dialled.  Raises as
        :meth:`connected` does.
        """
        return await self._handshake(sock, None, timeout_s)

    async def _handshake(
        self, sock: socket.socket, host: str | None, timeout_s: float
    ) -> TlsSocket:
        """Do the handshake.  The socket is closed if the handshake fails."""
        sock.setblocking(False)
        limiter = STRANGERS if host is None else trio.CapacityLimiter(1)
        in_thread = functools.partial(trio.to_thread.run_sync, limiter=limiter)
        ends: list[socket.socket] = [sock]

        def wrap() -> Records:
            server, client = self._contexts()
            wrapped, made = records.made_by(
                lambda: (server if host is None else client).wrap_socket(
                    sock,
                    server_side=host is None,
                    server_hostname=host,
                    do_handshake_on_connect=False,
                )
            )
            ends.append(wrapped)
            return made

        try:
            with trio.fail_after(timeout_s):
                made = await in_thread(wrap)
                wrapped = ends[-1]
                assert isinstance(wrapped, ssl.SSLSocket)
                while (wait := await in_thread(_step, wrapped)) is not None:
                    await wait(wrapped)
                self._check_names(wrapped)
                return TlsSocket(wrapped, made)
        except trio.TooSlowError:
            problem = f"the peer did not answer within {timeout_s:g} s: see whether it speaks TLS"
        except OSError as error:
            problem = explain(error)
        except MigrationError as error:
            problem = str(error)
        except ValueError as error:  # a certificate, or a host, whose names are not text
            problem = f"a name cannot be read: {error}"
        except BaseException:
            ends[-1].close()
            raise
        await _refuse(ends[-1])
        raise PeerClosedError(f"TLS: {problem}")

    def _check_names(self, sock: ssl.SSLSocket) -> None:
        names = names_in(sock.getpeercert() or {})
        if not names & set(map(comparable, self.peers)):
            raise PeerClosedError(
                f"the peer's certificate is for {printable(', '.join(sorted(names))) or 'nobody'}, "
                f"and [tls] peers are {', '.join(self.peers)}"
            )

    def _contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """The contexts for the end that is dialled and for the end that dials, made of the present
        files.

        If the files have changed and do not fit together, or cannot be read, the last good contexts
        are returned.  Raises :class:`MigrationError` if there have been none.
        """
        kept = self._kept
        with kept.lock:
            state = [_state(path) for path in (self.certificate, self.key, self.authority)]
            if kept.contexts is None or state != kept.state:
                try:
                    kept.contexts = self.fresh_contexts()
                except MigrationError as error:
                    if kept.contexts is None:
                        raise
                    log.error("%s: the last valid files stay in use", error)
                kept.state = state
            return kept.contexts

    def fresh_contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Return new contexts, for the end that is dialled and for the end that dials.  Raises
        :class:`MigrationError` if a file cannot be used.
        """
        return self._context(server_side=True), self._context(server_side=False)

    def _context(self, *, server_side: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        )
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if server_side:
            context.num_tickets = 0  # no session is resumed
        try:
            # The key must have no passphrase, because a daemon has no terminal to ask at.
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise MigrationError(f"[tls] {self.certificate}, {self.key}: {_why(error)}") from error
        try:
            context.load_verify_locations(self.authority)
        except (OSError, ValueError) as error:
            raise MigrationError(f"[tls] {self.authority}: {_why(error)}") from error
        return context


def names_in(certificate: Mapping[str, Any]) -> set[str]:
    """Return the names in a certificate of ``getpeercert``, as :func:`comparable` makes them."""
    # A directory name is a tuple of tuples.
    alternatives = certificate.get("subjectAltName", ())
    return {comparable(name) for _kind, name in alternatives if isinstance(name, str)}


def comparable(name: str) -> str:
    """Return the form of a name in which equal names are equal texts.  OpenSSL writes an IPv6
    address as ``FD00:0:0:0:0:0:0:1``, and the case of a host's name has no meaning.
    """
    try:
        return str(ipaddress.ip_address(name.strip()))
    except ValueError:
        return name.lower()


def _step(sock: ssl.SSLSocket) -> Callable[[socket.socket], Awaitable[None]] | None:
    """Continue the handshake; returns what to wait for, ``None`` when the handshake is done."""
    try:
        sock.do_handshake()
    except records.WANTED as error:
        return (
            trio.lowlevel.wait_writable
            if records.event(error) == select.POLLOUT
            else trio.lowlevel.wait_readable
        )
    return None


async def _refuse(sock: socket.socket) -> None:
    """Close the connection after the peer has had time to receive the reason.

    If a connection is closed while bytes from the peer are unread, the kernel resets the
    connection.  The peer then loses the reason.
    """
    try:
        limit = trio.CancelScope(deadline=trio.current_time() + EXPLANATION_S, shield=True)
        with contextlib.suppress(OSError), limit:
            socket.socket.shutdown(sock, socket.SHUT_WR)
            while True:
                await trio.lowlevel.wait_readable(sock)
                if not socket.socket.recv(sock, 65536):
                    break
    finally:
        sock.close()


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a certificate and its key: {error.reason}"
    return getattr(error, "strerror", None) or str(error)


def explain(error: OSError) -> str:
    """Return the error in words for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        return MEANINGS.get(reason, reason.lower().replace("_", " "))
    return error.strerror or str(error)


class TlsSocket:
    """The part of the socket interface that a lane uses.  One thread may send while another
    receives.
    """

    def __init__(self, sock: ssl.SSLSocket, made: Records):
        self._socket = sock
        self._records = made
        # Later sessions of the connection may replace the one that OpenSSL would look at.
        self._certificate = sock.getpeercert() or {}
        self.family = sock.family

    def fileno(self) -> int:
        return self._socket.fileno()

    def getpeername(self) -> tuple[str, int]:
        host, port, *_ = self._socket.getpeername()
        return host, port

    def certificate(self) -> dict[str, Any]:
        """Return the peer's certificate, which was accepted."""
        return self._certificate

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._socket.setsockopt(level, option, value)

    def send_timeout(self, seconds: float) -> None:
        self._records.send_timeout(seconds)

    def buffered(self) -> bool:
        """Whether bytes can be received although the descriptor may not be readable."""
        return self._records.buffered()

    def recv_into(self, buffer: memoryview, size: int, flags: int = 0) -> int:
        """Receive as a socket does.  Of ``flags``, only MSG_WAITALL and MSG_DONTWAIT have an
        effect.
        """
        return self._records.receive(buffer[:size], flags)

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Send all of ``buffers``.  Raises ``BlockingIOError`` if the peer takes no bytes."""
        self._records.send(buffers)
        return sum(map(len, buffers))

    def native(self) -> NativeRecords | None:
        """Return what native code needs in this object's stead; ``None`` if only Python can send
        and receive here.
        """
        return self._records.native()

    def error(self, number: int) -> OSError:
        """Return the error that native code has met in this object's stead."""
        return self._records.error(number)

    def shutdown(self, how: int) -> None:
        """Shut down the TCP connection, so that the other threads return from their calls."""
        if how == socket.SHUT_RD:
            self._records.stop_receiving()
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """Close the connection, on which no other thread may be in a call."""
        self._records.close()
        self._socket.close()
