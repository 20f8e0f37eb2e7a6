# SPDX-License-Identifier: GPL-2.0-or-later
"""Lanes over sockets: the thin layer of I/O around the codec.

A lane blocks.  The loops that move pages (the push and the pull of either end) run in threads of
their own, which the event loop starts and stops (:func:`migrate.lanes.scheduling.run_in_thread`).
The few control messages of the event loop go through :meth:`LaneConnection.send` and
:meth:`LaneConnection.receive`, which do the same in worker threads.

There are two reasons, both measured.  A page of memory costs a microsecond, and a turn of the event
loop costs some tens of them.  A blocking call sleeps until all of its data is queued, and a
non-blocking call returns each time that some buffer space opens up.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import trio

from migrate.errors import (
    CleanEndError,
    MigrationError,
    PeerClosedError,
    RefusedError,
    UnknownSessionError,
)
from migrate.fastpath.api import NativeLane
from migrate.fastpath.lock import NativeLock
from migrate.lanes import bulk
from migrate.lanes.latency import silence_s
from migrate.lanes.tls import Tls, TlsSocket, explain
from migrate.protocol import frames
from migrate.protocol.frames import FrameDecoder
from migrate.protocol.messages import (
    ALIVE_EACH_SECOND,
    CHECKSUMS,
    Alive,
    Hello,
    Lane,
    Message,
    Refused,
    parse,
)
from migrate.tasks import in_abandoned_thread, task_group

CONNECT_TIMEOUT_S = 10.0
STEP_TIMEOUT_S = 60.0
"""The longest time for one step of the peer (a preflight, an eviction, a report of missing pages),
and for the peer to receive bytes that we send.
"""
EXPLANATION_S = 1.0
"""How long to wait, when the pull lane has ended, for the push lane to show the reason."""
LINGER_S = 600.0
"""The longest time for which a peer that dials may be away and still receives the outcome of a
migration when it dials again.
"""
CONGESTION_CONTROL = b"cubic"
"""Linux's own default.  If the host's default is BBR, it paces a sender that alternates between
reading pages and sending them, and keeps little in flight if the round trip is short: 1.6 GB/s over
loopback, against 2.1 GB/s with cubic.
"""
MANY_BYTES = 64 * 1024
"""Payloads of at least this size are sent in one call without the interpreter lock.  For a single
page, preparing this call would be most of the work.
"""
RECEIVE_BYTES = 512 * 1024
"""The most bytes that one call receives.  Over a slow link a call may last for longer than a peer
may be silent.  Only the kernel then has the time at which the last bytes arrived.
"""
SILENCE_S = 30.0
"""A peer that sends nothing for this time is treated as dead."""
POSTCOPY_SILENCE_S = 5.0
"""The same, while a guest waits for pages of this peer.  Linux gives up a grant of a missing page
after 32 s, and then the guest gets an I/O error.  A lost link must be replaced before that.
"""
ALIVE_EVERY_S = 1.0
"""The longest pause between two messages on a lane.  The pause does not follow from ``silence_s``
alone, because the peer may have a shorter one.
"""
LEAST_SILENCE_S = 3 * ALIVE_EVERY_S
"""The least ``silence_s`` that a host can have: one late message must not count as silence."""


@dataclass(frozen=True)
class Terms:
    """The conditions on which a host connects with other hosts."""

    checksums: bool = False
    """Pages are checked from end to end."""
    silence_s: float = SILENCE_S
    postcopy_silence_s: float = POSTCOPY_SILENCE_S
    """Has no effect if ``silence_s`` is shorter."""
    tls: Tls | None = None
    unencrypted: bool = False
    """Connections without TLS are allowed even if others may read them."""

    @property
    def requires(self) -> tuple[str, ...]:
        return (CHECKSUMS,) if self.checksums else ()


class LaneConnection:
    """Messages on one connected socket.  Several tasks or threads may send, one may receive."""

    def __init__(self, sock: socket.socket | TlsSocket, terms: Terms):
        self._terms = terms
        self.received_at = time.monotonic()
        """When a call last received bytes of the peer."""
        self._silent_s = 0.0
        """How long the peer was silent when it was treated as dead."""
        self._socket = sock
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._decoder = FrameDecoder()
        self._sending = NativeLock()
        self._receiving = threading.Lock()
        self._send_limiter = trio.CapacityLimiter(1)
        self._receive_limiter = trio.CapacityLimiter(1)
        self._cut_off = self._closed = False
        self.capabilities: frozenset[str] = frozenset()
        self.bytes_sent = 0
        self.bytes_received = 0
        self._tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        if self._tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # If this kernel does not have or allow it, the host's own default remains.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)
        if isinstance(sock, TlsSocket):
            sock.send_timeout(STEP_TIMEOUT_S)
        else:
            sock.setblocking(True)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(STEP_TIMEOUT_S), 0)
            )

    @classmethod
    async def from_stream(
        cls, stream: trio.SocketStream, terms: Terms, dialled: str | None = None
    ) -> LaneConnection:
        """Take the connection over from ``stream``, which is closed.  ``dialled``: the host that we
        dialled; ``None`` if the peer dialled us.

        Raises :class:`PeerClosedError` if the TLS handshake fails.
        """
        # The descriptor is detached and not copied, because there may be none left for a copy.
        sock = socket.socket(fileno=stream.socket.detach())
        if terms.tls is None:
            return cls(sock, terms)
        if dialled is None:
            return cls(await terms.tls.accepted(sock, CONNECT_TIMEOUT_S), terms)
        return cls(await terms.tls.connected(sock, dialled, CONNECT_TIMEOUT_S), terms)

    def agree(self, greetings: Iterable[Hello]) -> None:
        """Use from here on what the hello of either end requires, and allow what both offer."""
        both = list(greetings)
        self._decoder.checked = any(CHECKSUMS in greeting.requires for greeting in both)
        self.capabilities = frozenset.intersection(
            *(frozenset(greeting.offers) for greeting in both)
        )

    def fileno(self) -> int:
        return self._socket.fileno()

    def peer(self) -> str:
        """Return the address and the port of the other end, for people."""
        try:
            host, port, *_ = self._socket.getpeername()
        except (OSError, ValueError):
            return ""
        return f"{host}:{port}"

    def certificate(self) -> dict[str, Any] | None:
        """Return the peer's certificate as ``getpeercert`` does; ``None`` without TLS."""
        return None if self._tls is None else self._tls.certificate()

    # ---- blocking ----
    def send_blocking(self, message: Message, payload: Sequence[memoryview] = ()) -> int:
        """Send a message and return the number of bytes sent.  ``payload``: the pieces of memory
        that hold the message's pages; they are sent without a copy.

        Raises :class:`PeerClosedError` if the connection has ended.
        """
        if self._decoder.checked and payload:
            # Copy the pages, because a running guest may write them between checksum and sending.
            payload = [memoryview(b"".join(payload))]
        head = frames.encode(message.header(), payload, checked=self._decoder.checked)
        size = len(head) + sum(map(len, payload))
        with self._sending:
            if self._cut_off:
                raise PeerClosedError("the connection was lost while sending")
            try:
                self._send([memoryview(head), *payload], size)
            except OSError as error:
                self._not_sent(error)
            self.bytes_sent += size
        return size

    def _send(self, pieces: list[memoryview], size: int) -> None:
        if self._tls is not None:
            self._tls.sendmsg(pieces)
        elif size < MANY_BYTES:
            assert isinstance(self._socket, socket.socket)
            sent = self._socket.sendmsg(pieces)
            if sent < size:
                self._socket.sendall(b"".join(pieces)[sent:])
        elif error := bulk.send(self._socket.fileno(), pieces):
            raise OSError(error, os.strerror(error))

    def receive_blocking(self) -> tuple[Message, memoryview]:
        """Receive a message as :meth:`receive` does, and block meanwhile."""
        with self._receiving:
            if self._closed:
                raise PeerClosedError("the connection was closed at this end")
            while (received := self.pending()) is None:
                if not self._decoder.in_payload() and not self.buffered():
                    # Waiting in recv() would wake this thread each time that buffer space opens up
                    # for another thread's send.
                    self._readable.poll()
                self.fill()
            return received

    def pending(self) -> tuple[Message, memoryview] | None:
        """Return a message that has been received completely, or ``None``."""
        while (frame := self._decoder.next_frame()) is not None:
            message = parse(frame.header, len(frame.payload))
            if not isinstance(message, Alive):
                return message, frame.payload
        return None

    def readable(self) -> bool:
        """Whether :meth:`fill` would return without waiting."""
        return self.buffered() or bool(self._readable.poll(0))

    def buffered(self) -> bool:
        """Whether TLS holds received bytes.  The descriptor may then not be readable."""
        return self._tls is not None and self._tls.buffered()

    def fill(self) -> None:
        """Wait for bytes; inside a payload, for the rest of the payload.  Raises
        :class:`PeerClosedError` at the end of the connection.
        """
        wanted = self._decoder.wanted()[:RECEIVE_BYTES]
        try:
            self._received(self._receive(wanted))
        except OSError as error:
            raise PeerClosedError(f"the connection was lost: {explain(error)}") from error

    def _received(self, count: int) -> None:
        self.received_at = time.monotonic()
        self.bytes_received += count
        if self._silent_s:
            raise PeerClosedError(f"the peer has sent nothing for {self._silent_s:g} s")
        if not count:
            if self._decoder.at_boundary():
                raise CleanEndError("the peer closed the connection")
            raise PeerClosedError("the peer closed the connection in the middle of a frame")
        self._decoder.filled(count)

    def _receive(self, wanted: memoryview) -> int:
        if not self._decoder.in_payload():
            return self._socket.recv_into(wanted, len(wanted))
        if self._tls is not None:
            return self._tls.recv_into(wanted, len(wanted), socket.MSG_WAITALL)
        count = bulk.receive(self._socket.fileno(), wanted, is_tcp=self._tcp)
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return count

    # ---- native code in this object's stead (migrate/fastpath/api.py) ----
    def native(self) -> NativeLane | None:
        """Return the lane for native code, or ``None`` for a TLS connection that only Python can
        use.
        """
        records = None if self._tls is None else self._tls.native()
        if self._tls is not None and records is None:
            return None
        return NativeLane(self._socket.fileno(), self._sending, self._decoder.checked, records)

    def vacant(self) -> memoryview | None:
        """Return the buffer into which native code may receive, and which it reports by
        :meth:`native_received`.  ``None`` in the middle of a frame.
        """
        return self._decoder.wanted() if self._decoder.at_boundary() else None

    def native_received(self, count: int) -> None:
        """Take over ``count`` bytes that native code has received and not handled, or a negative
        errno.  Raises as :meth:`fill` does.
        """
        if count < 0:
            raise PeerClosedError(f"the connection was lost: {explain(self._error(-count))}")
        self._received(count)

    def native_sent(self, count: int, error: int) -> None:
        """Count what native code has sent.  ``error``: the errno that it met, or 0.  Raises as
        :meth:`send_blocking` does.
        """
        with self._sending:
            self.bytes_sent += count
        if error:
            self._not_sent(self._error(error))

    def _error(self, number: int) -> OSError:
        if self._tls is not None:
            return self._tls.error(number)
        return OSError(number, os.strerror(number))

    def _not_sent(self, error: OSError) -> NoReturn:
        self._cut_off = True
        if isinstance(error, BlockingIOError):
            raise PeerClosedError(f"the peer has taken nothing for {STEP_TIMEOUT_S:g} s") from error
        raise PeerClosedError(f"the connection was lost while sending: {explain(error)}") from error

    # ---- for the event loop ----
    async def send(self, message: Message) -> None:
        """Send a message as :meth:`send_blocking` does, in the order of the calls.

        Cancellation stops the wait, not the sending: a frame is always sent completely.
        """
        async with self._send_limiter:
            await in_abandoned_thread(self.send_blocking, message, limiter=trio.CapacityLimiter(1))

    async def receive(self) -> tuple[Message, memoryview]:
        """Return a message and its pages, which stay valid during the next call and not longer.

        Raises :class:`ProtocolError` for malformed bytes, and :class:`PeerClosedError` if the
        connection has ended.
        """
        return await in_abandoned_thread(self.receive_blocking, limiter=self._receive_limiter)

    async def keep_alive(self, guest_waits: Callable[[], bool] = lambda: False) -> None:
        """Send ``alive`` from time to time, and end the connection if the peer sends nothing.  Runs
        until cancelled.  ``guest_waits``: whether a guest may wait for pages that cross this lane.

        The probes of TCP do not suffice: a kernel answers them although its daemon hangs, and so
        does a box in between.
        """
        async with task_group() as tasks:
            tasks.start_soon(self._send_alive)
            self._silent_s = await self._silence(guest_waits)
            self.shut()
            tasks.cancel_scope.cancel()

    async def _send_alive(self) -> None:
        while True:
            await trio.sleep(self._alive_every_s)
            if not self._sending.locked():
                with contextlib.suppress(PeerClosedError):  # the thread that receives notices
                    await self.send(Alive())

    async def _silence(self, guest_waits: Callable[[], bool]) -> float:
        """Wait until the peer is silent.  Returns the limit that has passed.  ``alive`` is not sent
        here, because it may wait for room in the buffers.
        """
        unread = select.poll()  # an own object, because only one thread may wait in one
        unread.register(self._socket, select.POLLIN)
        while True:
            await trio.sleep(self._alive_every_s)
            limit_s = self._terms.silence_s
            if ALIVE_EACH_SECOND in self.capabilities and guest_waits():
                limit_s = min(limit_s, self._terms.postcopy_silence_s)
            is_silent = time.monotonic() - self.received_at > limit_s and not unread.poll(0)
            if is_silent and silence_s(self._socket.fileno()) > limit_s:
                return limit_s

    @property
    def _alive_every_s(self) -> float:
        return min(self._terms.silence_s / 4, ALIVE_EVERY_S)

    async def receive_hello(self) -> Hello:
        with trio.move_on_after(CONNECT_TIMEOUT_S):
            message = await self._first_message()
            if isinstance(message, Refused):
                why = UnknownSessionError if message.unknown else RefusedError
                raise why(f"the peer refuses this connection: {message.reason}")
            if not isinstance(message, Hello):
                raise MigrationError(f"the peer began with {message.type} instead of hello")
            if message.lane not in [lane.value for lane in Lane]:
                raise MigrationError(f"the peer asked for a lane {message.lane!r}")
            return message
        raise PeerClosedError(
            f"the peer sent nothing for {CONNECT_TIMEOUT_S:g} s: see whether xen-postcopy listens "
            "there"
        )

    async def _first_message(self) -> Message:
        """Receive the first message without a thread, because many peers may connect and never send
        one.
        """
        while (received := self.pending()) is None:
            if self._decoder.in_payload():
                raise MigrationError("the peer began with pages instead of hello")
            await trio.lowlevel.checkpoint()
            wanted = self._decoder.wanted()
            try:
                count = self._socket.recv_into(wanted, len(wanted), socket.MSG_DONTWAIT)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket.fileno())
            except OSError as error:
                raise PeerClosedError(f"the connection was lost: {explain(error)}") from error
            else:
                self._received(count)
        return received[0]

    # ---- the end ----
    def is_over(self, wait_s: float = 0) -> bool:
        """True if the connection has ended at either end, or ends within ``wait_s``.  Bytes from
        the peer may still be unread.

        Nobody may close this end meanwhile.
        """
        ended = select.poll()
        ended.register(self._socket, select.POLLRDHUP)
        return bool(ended.poll(wait_s * 1000))

    def stop_receiving(self) -> None:
        """End the connection for the thread that receives here.  Sending stays possible."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def shut(self) -> None:
        """End the connection, so that every thread that waits on it returns, at both ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection.  A thread that a cancelled task has left behind may begin its call
        after that, when the descriptor's number belongs to somebody else.
        """
        self.shut()
        with self._sending, self._receiving:  # no thread is inside a call any more
            self._cut_off = self._closed = True
            self._socket.close()


@contextlib.contextmanager
def step_timeout(complaint: str) -> Iterator[None]:
    """Limit one step of the peer to ``STEP_TIMEOUT_S``.  Raises :class:`PeerClosedError` if the
    step takes longer.
    """
    with trio.move_on_after(STEP_TIMEOUT_S) as scope:
        yield
    if scope.cancelled_caught:
        raise PeerClosedError(f"{complaint} within {STEP_TIMEOUT_S:g} s")


async def connect(host: str, port: int, terms: Terms) -> LaneConnection:
    """Dial a host.  Raises :class:`PeerClosedError` if nobody answers or the peer is not trusted,
    and :class:`MigrationError` if the connection is not allowed.
    """
    return await LaneConnection.from_stream(await open_stream(host, port, terms), terms, host)


async def open_stream(host: str, port: int, terms: Terms) -> trio.SocketStream:
    """Dial a host, without the TLS handshake.  Raises as :func:`connect` does."""
    if terms.tls is None and not terms.unencrypted and not is_loopback(host):
        raise MigrationError(
            f"{host} is another host, and connections are not encrypted: make a [tls] section in "
            "the configuration, or allow it by unencrypted = true in [network]"
        )
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            return await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise PeerClosedError(
            f"no answer from {host}:{port} within {CONNECT_TIMEOUT_S:g} s"
        ) from None
    except OSError as error:
        causes: Sequence[BaseException] = getattr(error.__cause__, "exceptions", ()) or (
            error.__cause__ or error,
        )
        number = getattr(causes[0], "errno", None)
        why = os.strerror(number) if number is not None and number > 0 else str(causes[0])
        raise PeerClosedError(
            f"cannot reach {host}:{port}: {why}; see whether xen-postcopy runs there and listens "
            "on that address"
        ) from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
