# SPDX-License-Identifier: GPL-2.0-or-later
"""A link that can be cut, or damaged in other ways: a relay between the two daemons, controlled by
a test.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

import pytest
import trio

from migrate.protocol import messages as m
from tests.support.event_loop import in_event_loop

PIECE = 65536
Damage = Callable[[bytes], bytes]
NO_LINGER = struct.pack("ii", 1, 0)


class Link:
    """A link.  ``budgets``: how many bytes each connection carries, in both directions together,
    before the link is cut.

    The first connection is the push lane, the second the pull lane; then those of the next pair
    follow.  A connection without a budget, or after the end of the list, carries everything.
    """

    def __init__(self, to: tuple[str, int], budgets: list[int | None] | None = None):
        self.to = to
        """The address to which the next connection leads."""
        self._budgets = list(budgets or [])
        self._streams: set[trio.SocketStream] = set()
        self._lefts: set[trio.SocketStream] = set()
        self.port = 0
        self.connections = 0
        self.is_up = True
        self.was_cut = trio.Event()
        self.delay_s = 0.0
        """The delay of each piece of data."""
        self.piece = PIECE
        self._flowing = trio.Event()
        self._flowing.set()
        self._damage: Damage | None = None

    async def carry(self, left: trio.SocketStream) -> None:
        """Relay one connection."""
        self.connections += 1
        budget = self._budgets.pop(0) if self._budgets else None
        if not self.is_up:
            _reset(left)
            return
        try:
            right = await trio.open_tcp_stream(*self.to)
        except OSError:  # no process listens at the moment
            _reset(left)
            return
        self._streams |= {left, right}
        self._lefts.add(left)
        left_over = [budget]

        async def pass_on(source: trio.SocketStream, to: trio.SocketStream) -> None:
            try:
                with contextlib.suppress(trio.ClosedResourceError):
                    await copy(source, to)
                with contextlib.suppress(trio.ClosedResourceError):
                    while await source.receive_some(PIECE):
                        pass  # the other end was cut, and this end has not noticed it
            except trio.BrokenResourceError:
                for stream in (source, to):
                    _reset(stream)

        async def copy(source: trio.SocketStream, to: trio.SocketStream) -> None:
            while data := await source.receive_some(self.piece):
                await self._flowing.wait()
                if self.delay_s:
                    await trio.sleep(self.delay_s)
                if self._damage is not None:
                    damage, self._damage = self._damage, None
                    data = damage(data)
                if left_over[0] is not None:
                    data = data[: left_over[0]]
                    left_over[0] -= len(data)
                await to.send_all(data)
                if left_over[0] == 0:
                    self.cut()
            await to.send_eof()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, left, right)
                nursery.start_soon(pass_on, right, left)
        finally:
            self._streams -= {left, right}
            self._lefts.discard(left)
            for stream in (left, right):
                stream.socket.close()

    def stop(self) -> None:
        """Stop carrying data, without a notice to either end, until :meth:`go`."""
        self._flowing = trio.Event()

    def go(self) -> None:
        self._flowing.set()

    def restore(self) -> None:
        """Carry everything again, and at once."""
        self.is_up, self.delay_s, self.piece = True, 0.0, PIECE
        self.go()

    def damage(self, how: Damage | None) -> None:
        """Damage the next piece of data on any connection.  ``None``: damage nothing."""
        self._damage = how

    def cut(self) -> None:
        """Reset every connection."""
        for stream in self._streams:
            _reset(stream)
        self._streams.clear()
        self.was_cut.set()

    def cut_left(self) -> None:
        """Reset every connection at the end that opened it.  The other end gets no notice and no
        more data.
        """
        for stream in self._lefts:
            _reset(stream)
        self._lefts.clear()

    def down(self) -> None:
        """Cut every connection, and refuse new ones until :attr:`is_up` is set again."""
        self.is_up = False
        self.cut()


def _reset(stream: trio.SocketStream) -> None:
    with contextlib.suppress(OSError):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    stream.socket.close()


async def link(
    nursery: trio.Nursery, to: tuple[str, int], budgets: list[int | None] | None = None
) -> Link:
    """Start a link that carries until the nursery ends."""
    made = Link(to, budgets)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    made.port = listener.socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, made.carry, [listener])
    return made


class LinkInThread:
    """A link for a test without an event loop; a context manager."""

    def __init__(self, to: tuple[str, int]):
        self._to = to
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))
        self._token: trio.lowlevel.TrioToken
        self._scope: trio.CancelScope
        self.link: Link

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self.link = await link(nursery, self._to)
            self._scope = nursery.cancel_scope
            self._ready.set()

    def __enter__(self) -> LinkInThread:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_error: object) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join()

    def do(self, what: Callable[[Link], None]) -> None:
        trio.from_thread.run_sync(what, self.link, trio_token=self._token)


Patch = pytest.MonkeyPatch


async def until_cut(links: list[Link], link: Link) -> None:
    """Have the message of :func:`cut_when` cut the link, and wait until the link is cut."""
    links.append(link)
    await link.was_cut.wait()


def cut_when(
    monkeypatch: Patch, cls: type, sent: type[m.Message], *, before: bool, down: bool = False
) -> list[Link]:
    """Cut the link when an end sends this message for the first time, before or after it is sent.
    The caller puts the link into the list.
    """
    links: list[Link] = []
    send, send_blocking = vars(cls)["send"], vars(cls)["send_blocking"]

    def cut() -> None:
        link = links.pop()
        (link.down if down else link.cut)()

    def cut_from_wherever() -> None:
        cut() if in_event_loop() else trio.from_thread.run_sync(cut)

    async def send_and_cut(self: object, message: m.Message) -> None:
        due = isinstance(message, sent) and bool(links)
        if due and before:
            cut()
        await send(self, message)
        if due and not before:
            cut()

    monkeypatch.setattr(cls, "send", send_and_cut)

    def send_blocking_and_cut(self: object, message: m.Message) -> None:
        due = isinstance(message, sent) and bool(links)
        if due and before:
            cut_from_wherever()
        send_blocking(self, message)
        if due and not before:
            cut_from_wherever()

    monkeypatch.setattr(cls, "send_blocking", send_blocking_and_cut)
    return links


async def no_look() -> m.Host:
    """Answer as a host of which a listener is tested, and nothing else."""
    return m.Host("this is no host", "none", 0, "", "receiver")
