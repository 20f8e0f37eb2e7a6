# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutual TLS on the lanes.  A peer that is not trusted is refused with a message for each reason,
and the guest stays.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from typing import cast

import pytest
import trio

from migrate.cli.world import World
from migrate.errors import MigrationError, PeerClosedError
from migrate.lanes import accept, records, tls
from migrate.lanes.accept import AwaitedLanes, Reception
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.dial import DialledLanes
from migrate.lanes.tls import STRANGERS, Tls, TlsSocket
from migrate.protocol.messages import Lane
from migrate.protocol.session import hello
from tests.conftest import MIB
from tests.support.certificates import ANOTHER, AUTHORITY, HOST, files
from tests.support.guests import busy
from tests.support.inprocess import Outcome, migrate, verification
from tests.support.links import Link, no_look
from tests.support.waiting import WAIT_S
from tests.support.waiting import until_async as until
from xenbackend.contract import DomainState

__all__ = ["files"]


@pytest.mark.parametrize("native", [True, False], ids=["native records", "Python's records"])
@pytest.mark.parametrize("checksums", [False, True])
async def test_a_guest_is_migrated_and_its_link_is_cut(
    clean_hosts: World,
    name: str,
    files: Callable[..., Tls],
    monkeypatch: pytest.MonkeyPatch,
    checksums: bool,
    native: bool,
) -> None:
    if not native:
        monkeypatch.setattr(records, "lib", None)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.cut()

    outcome = await migrate(
        clean_hosts,
        busy(name),
        terms=Terms(checksums, tls=files()),
        sender_tls=files(),
        meanwhile=meanwhile,
    )
    assert outcome.error is None
    assert outcome.migration.context.statistics.rejoins == 1
    assert (await verification(clean_hosts, busy(name))).problems == []


async def test_a_damaged_record_ends_its_connection_and_no_page_is_damaged(
    clean_hosts: World, name: str, files: Callable[..., Tls]
) -> None:
    def damage(data: bytes) -> bytes:
        return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:] if len(data) > 4096 else data

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.ownership.handed_over)
        link.damage(damage)

    outcome = await migrate(
        clean_hosts, busy(name), terms=Terms(tls=files()), sender_tls=files(), meanwhile=meanwhile
    )
    assert outcome.error is None
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize(
    ("sender", "receiver", "sender_is_told", "receiver_says"),
    [
        (
            {"signed_by": ANOTHER},
            {},
            "the peer does not trust the authority",
            "certificate is not accepted",
        ),
        (
            {},
            {"signed_by": ANOTHER},
            "certificate is not accepted: unable to get local",
            "does not trust the authority",
        ),
        (
            {"names": ("elsewhere",)},
            {},
            "",
            "the peer's certificate is for elsewhere, and [tls] peers are 127.0.0.1",
        ),
        ({}, {"names": ("elsewhere",)}, "certificate is not accepted: IP address mismatch", ""),
        ({"peers": ("host2",)}, {}, "certificate is for 127.0.0.1, and [tls] peers are host2", ""),
        (
            {"expired": True},
            {},
            "the peer finds our certificate expired",
            "certificate has expired",
        ),
        ({}, {"expired": True}, "certificate is not accepted: certificate has expired", ""),
        (
            None,
            {},
            "its configuration may have a [tls] section, and this host's has none",
            "the peer does not speak TLS",
        ),
        ({}, None, "the peer does not speak TLS", "the peer speaks TLS, and this end does not"),
    ],
    ids=[
        "CA",
        "their CA",
        "name",
        "their name",
        "no peer",
        "expired",
        "theirs expired",
        "plain to TLS",
        "TLS to plain",
    ],
)
async def test_who_is_not_to_be_trusted_is_refused(
    clean_hosts: World, name: str, files: Callable[..., Tls], caplog: pytest.LogCaptureFixture,
    sender: dict[str, object] | None, receiver: dict[str, object] | None, sender_is_told: str,
    receiver_says: str,
) -> None:  # fmt: skip
    def made(how: dict[str, object] | None) -> Tls | None:
        if how is None:
            return None
        how = dict(how)
        return files(*how.pop("names", ()), **how)  # type: ignore[misc]

    outcome = await migrate(
        clean_hosts, busy(name), terms=Terms(tls=made(receiver)), sender_tls=made(sender)
    )
    assert outcome.error is not None
    assert sender_is_told in str(outcome.error)
    assert receiver_says in caplog.text
    assert clean_hosts.source.open(name).info().state is DomainState.RUNNING
    assert clean_hosts.destination.domains() == []


async def test_a_client_without_a_certificate_is_refused(
    clean_hosts: World, name: str, files: Callable[..., Tls], caplog: pytest.LogCaptureFixture
) -> None:
    alerts: list[str] = []

    async def meanwhile(_outcome: Outcome, link: Link) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        AUTHORITY.configure_trust(context)

        def call() -> None:
            with (
                socket.create_connection(("127.0.0.1", link.port)) as plain,
                context.wrap_socket(plain, server_hostname=HOST) as sock,
            ):
                try:
                    sock.recv(1)
                except ssl.SSLError as error:
                    alerts.append(str(error.reason))

        await trio.to_thread.run_sync(call)

    outcome = await migrate(
        clean_hosts, busy(name), terms=Terms(tls=files()), sender_tls=files(), meanwhile=meanwhile
    )
    assert outcome.error is None
    assert alerts == ["TLSV13_ALERT_CERTIFICATE_REQUIRED"]
    assert "the peer has no certificate" in caplog.text


async def receive(reception: Reception, nursery: trio.Nursery) -> int:
    """Run a listener before ``reception``.  Returns its port."""
    listeners = await nursery.start(
        functools.partial(trio.serve_tcp, reception.receive, 0, host=HOST)
    )
    return int(listeners[0].socket.getsockname()[1])


@pytest.mark.parametrize(
    "beginning", [b"", b"\x16"], ids=["nothing", "the beginning of a handshake"]
)
async def test_strangers_that_never_shake_hands_take_no_threads(
    files: Callable[..., Tls], beginning: bytes
) -> None:
    """Invariant 7: handshakes use none of the threads that migrations wait for, and no thread
    each.
    """
    strangers = 50
    reception = Reception(lambda _greeting: AwaitedLanes(), no_look, Terms(tls=files()))
    limiter, threads = trio.to_thread.current_default_thread_limiter(), threading.active_count()
    with contextlib.ExitStack() as connections:
        async with trio.open_nursery() as nursery:
            port = await receive(reception, nursery)
            for _ in range(strangers):
                connections.enter_context(socket.create_connection((HOST, port))).send(beginning)
            await until(
                lambda: len(reception._strangers) == strangers and not STRANGERS.borrowed_tokens
            )
            assert limiter.borrowed_tokens == 0
            assert threading.active_count() < threads + strangers
            nursery.cancel_scope.cancel()


async def test_a_stranger_that_is_refused_and_still_sends_is_kept_no_longer(
    files: Callable[..., Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time in which the reason may arrive is limited as a whole, not from one byte to the
    next.
    """
    monkeypatch.setattr(tls, "EXPLANATION_S", 0.2)
    reception = Reception(lambda _greeting: AwaitedLanes(), no_look, Terms(tls=files()))
    async with trio.open_nursery() as nursery:
        stranger = await trio.open_tcp_stream(HOST, await receive(reception, nursery))
        await stranger.send_all(b"GET / HTTP/1.0\r\n\r\n")
        with trio.fail_after(WAIT_S), contextlib.suppress(trio.BrokenResourceError):
            while True:
                await stranger.send_all(b"x")
                await trio.sleep(0.05)
        await stranger.aclose()
        assert reception._strangers == {}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("crowd", ["MAX_STRANGERS", "MAX_STRANGERS_OF_ADDRESS"])
async def test_behind_a_crowd_of_strangers_a_peer_is_received(
    files: Callable[..., Tls],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    crowd: str,
) -> None:
    """The connections that have been silent for longest are closed, from one address or from
    many.
    """
    monkeypatch.setattr(accept, crowd, 5)
    awaited = AwaitedLanes()
    reception = Reception(lambda _greeting: awaited, no_look, Terms(tls=files()))
    async with trio.open_nursery() as nursery:
        port = await receive(reception, nursery)
        strangers = []
        for number in range(12):
            stranger = await trio.open_tcp_stream(
                HOST, port, local_address=f"127.0.0.{number % 2 + 1}"
            )
            strangers.append(stranger)
        lane = await DialledLanes((HOST, port), "s", Terms(tls=files())).push()
        await until(awaited._push.come.is_set)
        with trio.fail_after(WAIT_S), contextlib.suppress(trio.BrokenResourceError):
            assert await strangers[0].receive_some(1) == b""
        assert "have not sent a hello: the oldest are closed" in caplog.text
        lane.close()
        awaited.close()
        for stranger in strangers:
            await stranger.aclose()
        nursery.cancel_scope.cancel()


async def test_a_token_is_good_for_one_connection(
    clean_hosts: World, name: str, files: Callable[..., Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate is that of the pull lane.  A push lane that rejoins is tested with the
    links.
    """
    refused: list[str] = []
    dial = DialledLanes._dial

    async def dial_twice(self: DialledLanes, kind: Lane, token: bytes) -> LaneConnection:
        lane = await dial(self, kind, token)
        if kind is Lane.PULL and not refused:
            try:
                (await dial(self, kind, token)).close()
            except Exception as error:
                refused.append(str(error))
        return lane

    monkeypatch.setattr(DialledLanes, "_dial", dial_twice)
    outcome = await migrate(clean_hosts, busy(name), terms=Terms(tls=files()), sender_tls=files())
    assert outcome.error is None
    assert len(refused) == 1 and "wrong or used token" in refused[0]


async def test_both_directions_at_once(files: Callable[..., Tls]) -> None:
    """The threads of the lanes do the same: 32 MiB in each direction, each page checked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    made = files()
    ends: list[LaneConnection] = []

    async def accept() -> None:
        ends.append(
            LaneConnection(await made.accepted(theirs, 10), Terms(checksums=True, tls=made))
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        ends.append(
            LaneConnection(await made.connected(ours, HOST, 10), Terms(checksums=True, tls=made))
        )
    greeting = hello(Lane.PUSH, "s", requires=("checksums",))
    from migrate.protocol.messages import Pages
    from migrate.protocol.pfns import pfn_array

    pages = memoryview(bytes(range(256)) * 16 * 512)
    failed: list[BaseException] = []

    def send(end: LaneConnection) -> None:
        for _ in range(16):
            end.send_blocking(Pages(pfn_array(range(512))), [pages])

    def take(end: LaneConnection) -> None:
        try:
            for _ in range(16):
                _message, payload = end.receive_blocking()
                assert payload == pages
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(end,)) for end in ends for work in (send, take)]
    for end in ends:
        end.agree([greeting])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failed == []
    assert MIB * 32 < ends[0].bytes_sent < MIB * 33
    for end in ends:
        end.close()


class Peer:
    """The certificate of a peer after the handshake."""

    def __init__(self, *names: object):
        self._names = names

    def getpeercert(self) -> dict[str, object]:
        return {"subjectAltName": self._names} if self._names else {}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ((), "is for nobody"),
        ((("DirName", ((("commonName", "host"),),)),), "is for nobody"),
        (
            (("URI", "spiffe://host"), ("othername", "<unsupported>")),
            "is for <unsupported>, spiffe://host",
        ),
        (
            (("DNS", "h\x1b]0;x\x07\u202est"), ("IP Address", "10.0.0.1")),
            "is for 10.0.0.1, h ]0;x  st,",
        ),
        ((("DNS", "höst"),), "is for höst"),
    ],
)
def test_a_certificate_may_bear_names_of_any_kind(
    files: Callable[..., Tls], names: tuple[object, ...], complaint: str
) -> None:
    tls = files()
    with pytest.raises(PeerClosedError, match=re.escape(complaint)):
        tls._check_names(cast(ssl.SSLSocket, Peer(*names)))
    tls._check_names(cast(ssl.SSLSocket, Peer(*names, ("IP Address", HOST))))


async def test_files_are_renewed_while_connections_come(
    files: Callable[..., Tls], caplog: pytest.LogCaptureFixture
) -> None:
    """While the files do not fit together, or one is missing, the last valid ones are used, and
    this is logged once.
    """
    tls, new = files(), files(signed_by=ANOTHER, trusts=ANOTHER)

    async def connect(trusts: Tls) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        ends: list[TlsSocket] = []

        async def accept() -> None:
            ends.append(await tls.accepted(theirs, WAIT_S))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            ends.append(await trusts.connected(ours, HOST, WAIT_S))
        for end in ends:
            end.close()

    peer = files()
    await connect(peer)
    shutil.copy(new.key, tls.key)
    await connect(peer)
    await connect(peer)
    assert caplog.text.count("the last valid files stay in use") == 1
    tls.authority.unlink()
    await connect(peer)
    shutil.copy(new.authority, tls.authority)
    shutil.copy(new.certificate, tls.certificate)
    await connect(files(signed_by=ANOTHER, trusts=ANOTHER))
    with pytest.raises(MigrationError):
        Tls(tls.certificate, peer.key, tls.authority, ()).check()  # there are no valid files yet
    with pytest.raises(MigrationError, match=r"\[tls\] .*nowhere: No such file"):
        Tls(peer.certificate, peer.key, tls.authority.with_name("nowhere"), ()).check()
