"""Lanes over sockets: the thin trio around the codec."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence

import trio

from migrate import frames
from migrate.errors import MigrationError, PeerClosedError
from migrate.frames import FrameDecoder
from migrate.messages import Hello, Message, parse
from migrate.messages import Lane as LaneName
from xenbackend.contract import Buffer

CONNECT_TIMEOUT_S = 10.0
STEP_TIMEOUT_S = 60.0
"""How long a peer may take for a step before the handover (a hello, a preflight, an eviction)."""
SEND_CHUNK = 256 * 1024
"""One send copies this much at most: meanwhile no fault is served."""
RECEIVE_CHUNK = 256 * 1024
URGENT_NICE = -10
"""Of the threads that serve faults."""


class LaneConnection:
    """Sends and receives messages on one socket.  Several tasks may send; one may receive."""

    def __init__(self, sock: trio.socket.SocketType):
        self._socket = sock
        self._decoder = FrameDecoder()
        self._sending = trio.Lock()
        self._mid_frame = False
        self.bytes_sent = 0
        self.bytes_received = 0
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send(self, message: Message, payload: Buffer = frames.EMPTY) -> int:
        """Returns the bytes that it took.  Raises :class:`PeerClosedError` when the connection is gone.

        A send that was cancelled midway leaves the lane unusable, and later ones say so.
        """
        head = frames.encode(message.header(), payload)
        async with self._sending:
            if self._mid_frame:
                raise PeerClosedError("an earlier message was cut off")
            self._mid_frame = True
            try:
                if len(payload) <= 4096:
                    await self._send_all(head + payload if payload else head)
                else:
                    await self._send_all(head)
                    await self._send_all(payload)
            except OSError as error:
                raise PeerClosedError(f"the connection was lost while sending: {error.strerror or error}") from error
            except trio.ClosedResourceError as error:
                raise PeerClosedError("the connection was closed at this end") from error
            self._mid_frame = False
        size = len(head) + len(payload)
        self.bytes_sent += size
        return size

    async def _send_all(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._socket.send(view[:SEND_CHUNK]) :]

    async def receive(self) -> tuple[Message, memoryview]:
        """A message and its pages, which stay valid until the next call.

        Raises :class:`ProtocolError` for garbage, :class:`PeerClosedError` when the connection has ended.
        """
        while (frame := self._decoder.next_frame()) is None:
            try:
                count = await self._socket.recv_into(self._decoder.wanted()[:RECEIVE_CHUNK])
            except OSError as error:
                raise PeerClosedError(f"the connection was lost: {error.strerror or error}") from error
            except trio.ClosedResourceError as error:
                raise PeerClosedError("the connection was closed at this end") from error
            if count == 0:
                where = "" if self._decoder.at_boundary() else " in the middle of a frame"
                raise PeerClosedError(f"the peer closed the connection{where}")
            self.bytes_received += count
            self._decoder.filled(count)
        return parse(frame.header, len(frame.payload)), frame.payload

    async def receive_hello(self, timeout_s: float = CONNECT_TIMEOUT_S) -> Hello:
        with trio.move_on_after(timeout_s):
            message, _pages = await self.receive()
            if not isinstance(message, Hello):
                raise MigrationError(f"the peer began with {message.type} instead of hello")
            if message.lane not in [name.value for name in LaneName]:
                raise MigrationError(f"the peer asked for a lane {message.lane!r}")
            return message
        raise MigrationError(f"the peer said nothing for {timeout_s:g} s: is a xen-postcopy receiver listening there?")

    def close(self) -> None:
        self._socket.close()

    def into_thread(self) -> ThreadLane:
        """Give the connection up to a thread of its own; this object is not to be used any more."""
        lane = ThreadLane(socket.socket(fileno=os.dup(self._socket.fileno())), self._decoder)
        self._socket.close()
        return lane


class ThreadLane:
    """A lane for one thread that blocks on it, where waiting for the event loop's turn would take too long.

    Another thread may call :meth:`shut`, and then close it when the first is done.
    """

    def __init__(self, sock: socket.socket, decoder: FrameDecoder):
        self._socket = sock
        self._socket.setblocking(True)
        self._decoder = decoder
        self.bytes_sent = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, payload: Buffer = frames.EMPTY) -> None:
        """Raises :class:`PeerClosedError`."""
        head = frames.encode(message.header(), payload)
        data = head + payload if len(payload) <= 16384 else head
        try:
            self._socket.sendall(data)
            if data is head and payload:
                self._socket.sendall(payload)
        except OSError as error:
            raise PeerClosedError(f"the pull lane was lost while sending: {error.strerror or error}") from error
        self.bytes_sent += len(head) + len(payload)

    def pending(self) -> tuple[Message, memoryview] | None:
        """A message that is complete already."""
        frame = self._decoder.next_frame()
        return None if frame is None else (parse(frame.header, len(frame.payload)), frame.payload)

    def fill(self) -> None:
        """Wait for bytes.  Raises :class:`PeerClosedError` at the end."""
        try:
            count = self._socket.recv_into(self._decoder.wanted())
        except OSError as error:
            raise PeerClosedError(f"the pull lane was lost: {error.strerror or error}") from error
        if not count:
            raise PeerClosedError("the peer closed the pull lane")
        self._decoder.filled(count)

    def shut(self) -> None:
        """Wake the thread: it sees the end of the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


async def run_in_thread(main: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run ``main`` in a thread of its own; ``stop`` makes it return, and is called when this task is cancelled.

    The thread gets a higher priority where the process may have it: it serves vCPUs that stand still.
    """

    def prioritised() -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), URGENT_NICE)
        main()

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(prioritised, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        try:
            await trio.sleep_forever()
        finally:
            stop()


async def connect(host: str, port: int) -> LaneConnection:
    """Raises :class:`MigrationError` where nobody answers."""
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise MigrationError(f"no answer from {host}:{port} within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        causes: Sequence[BaseException] = getattr(error.__cause__, "exceptions", ()) or (error.__cause__ or error,)
        why = getattr(causes[0], "strerror", None) or str(causes[0])
        raise MigrationError(f"cannot reach a receiver at {host}:{port}: {why}; is `xen-postcopy receiver` running there?") from error
    return LaneConnection(stream.socket)


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """``host``, ``host:port``, ``[v6]:port``.  Raises :class:`MigrationError`."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, str(default_port)
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise MigrationError(f"address {text!r}: HOST, HOST:PORT or [IPV6]:PORT")
    return host, int(port)
