# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutual TLS on the lanes: what is not to be trusted is refused, each with its own message, and the guest stays."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import trio
import trustme

from migrate.errors import PeerClosedError
from migrate.lanes import AwaitedLanes, DialledLanes, Reception
from migrate.loopback import World
from migrate.messages import Lane
from migrate.session import hello
from migrate.tls import Tls, TlsSocket
from migrate.transport import LaneConnection, Terms
from tests.conftest import MIB
from tests.inprocess import Outcome, migrate, verification
from tests.links import Link
from tests.test_invariants import busy
from tests.test_link_loss import until
from xenbackend.contract import DomainState

AUTHORITY, ANOTHER = trustme.CA(), trustme.CA()
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
HOST = "127.0.0.1"


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Tls]:
    made = 0

    def make(
        *names: str, signed_by: trustme.CA = AUTHORITY, trusts: trustme.CA = AUTHORITY, expired: bool = False,
        peers: tuple[str, ...] = (HOST,),
    ) -> Tls:  # fmt: skip
        nonlocal made
        made += 1
        folder = tmp_path / str(made)
        folder.mkdir()
        names = names or (HOST,)
        certificate = (
            signed_by.issue_cert(*names, not_before=LONG_AGO, not_after=LONG_AGO + datetime.timedelta(days=1))
            if expired
            else signed_by.issue_cert(*names)
        )
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(folder / "certificate", append=True)
        certificate.private_key_pem.write_to_path(folder / "key")
        trusts.cert_pem.write_to_path(folder / "authority")
        return Tls(folder / "certificate", folder / "key", folder / "authority", peers)

    return make


@pytest.mark.parametrize("checksums", [False, True])
async def test_a_guest_is_migrated_and_its_link_is_cut(
    clean_hosts: World, name: str, files: Callable[..., Tls], checksums: bool
) -> None:
    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until(lambda: outcome.migration.session.handed_over)
        link.cut()

    outcome = await migrate(
        clean_hosts, busy(name), terms=Terms(checksums, tls=files()), sender_tls=files(), meanwhile=meanwhile
    )
    assert outcome.error is None
    assert outcome.migration.statistics.rejoins == 1
    assert (await verification(clean_hosts, busy(name))).problems == []


@pytest.mark.parametrize(
    ("sender", "receiver", "sender_is_told", "receiver_says"),
    [
        ({"signed_by": ANOTHER}, {}, "the peer does not trust the authority", "certificate is not accepted"),
        ({}, {"signed_by": ANOTHER}, "certificate is not accepted: unable to get local", "does not trust the authority"),
        ({"names": ("elsewhere",)}, {}, "", "the peer's certificate is for elsewhere, and [tls] peers are 127.0.0.1"),
        ({}, {"names": ("elsewhere",)}, "certificate is not accepted: IP address mismatch", ""),
        ({"peers": ("host2",)}, {}, "certificate is for 127.0.0.1, and [tls] peers are host2", ""),
        ({"expired": True}, {}, "the peer finds our certificate expired", "certificate has expired"),
        ({}, {"expired": True}, "certificate is not accepted: certificate has expired", ""),
        (None, {}, "has it a [tls] section in its configuration, and this host none?", "the peer does not speak TLS"),
        ({}, None, "the peer does not speak TLS", "the peer speaks TLS, and this end does not"),
    ],
    ids=["CA", "their CA", "name", "their name", "no peer", "expired", "theirs expired", "plain to TLS", "TLS to plain"],
)  # fmt: skip
async def test_who_is_not_to_be_trusted_is_refused(
    clean_hosts: World, name: str, files: Callable[..., Tls], caplog: pytest.LogCaptureFixture,
    sender: dict[str, object] | None, receiver: dict[str, object] | None, sender_is_told: str, receiver_says: str,
) -> None:  # fmt: skip
    def made(how: dict[str, object] | None) -> Tls | None:
        if how is None:
            return None
        how = dict(how)
        return files(*how.pop("names", ()), **how)  # type: ignore[misc]

    outcome = await migrate(clean_hosts, busy(name), terms=Terms(tls=made(receiver)), sender_tls=made(sender))
    assert outcome.error is not None
    assert sender_is_told in str(outcome.error)
    assert receiver_says in caplog.text
    assert clean_hosts.source.open(name).info().state is DomainState.RUNNING
    assert clean_hosts.destination.domains() == []


async def test_a_client_without_a_certificate_is_refused(
    clean_hosts: World, name: str, files: Callable[..., Tls], caplog: pytest.LogCaptureFixture
) -> None:
    import ssl

    said: list[str] = []

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
                    said.append(str(error.reason))

        await trio.to_thread.run_sync(call)

    outcome = await migrate(clean_hosts, busy(name), terms=Terms(tls=files()), sender_tls=files(), meanwhile=meanwhile)
    assert outcome.error is None
    assert said == ["TLSV13_ALERT_CERTIFICATE_REQUIRED"]
    assert "the peer has no certificate" in caplog.text


class NeverShaken(Tls):
    """The peer connects and sends nothing."""

    begun: ClassVar[list[socket.socket]] = []
    over: ClassVar[threading.Event] = threading.Event()

    def accepted(self, sock: socket.socket, timeout_s: float) -> TlsSocket:
        self.begun.append(sock)
        self.over.wait(timeout_s)
        sock.close()
        raise PeerClosedError("TLS: the peer did not answer")


async def test_strangers_that_never_shake_hands_take_no_thread_from_migrations() -> None:
    """Invariant 7.  Migrations wait for threads of trio's default limiter, which has 40."""
    terms = Terms(tls=NeverShaken(Path(), Path(), Path(), ()))
    reception = Reception(lambda _greeting: AwaitedLanes(), terms)
    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    port = listener.socket.getsockname()[1]
    limiter = trio.to_thread.current_default_thread_limiter()
    strangers = int(limiter.total_tokens) + 10
    with contextlib.ExitStack() as connections:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, reception.receive, [listener])
            for _ in range(strangers):
                connections.enter_context(socket.create_connection((HOST, port)))
            try:
                await until(lambda: len(NeverShaken.begun) == strangers)
                assert limiter.borrowed_tokens == 0
            finally:
                NeverShaken.over.set()
                nursery.cancel_scope.cancel()


async def test_a_token_is_good_for_one_connection(
    clean_hosts: World, name: str, files: Callable[..., Tls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the pull lane; the one of a push lane that rejoins is tested with the links."""
    refused: list[str] = []
    dial = DialledLanes._dial
    tls = files()

    async def dial_twice(self: DialledLanes, kind: Lane, token: bytes) -> LaneConnection:
        lane = await dial(self, kind, token)
        if kind is Lane.PULL and not refused:
            try:
                (await dial(self, kind, token)).close()
            except Exception as error:
                refused.append(str(error))
        return lane

    monkeypatch.setattr(DialledLanes, "_dial", dial_twice)
    outcome = await migrate(clean_hosts, busy(name), terms=Terms(tls=tls), sender_tls=files())
    assert outcome.error is None
    assert len(refused) == 1 and "wrong or used token" in refused[0]


def test_both_directions_at_once(files: Callable[..., Tls]) -> None:
    """As the lanes' threads do: 32 MiB each way, each page checked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    tls = files()
    ends: list[LaneConnection] = []

    def accept() -> None:
        ends.append(LaneConnection(tls.accepted(theirs, 10), Terms(checksums=True, tls=tls)))

    accepting = threading.Thread(target=accept)
    accepting.start()
    ends.append(LaneConnection(tls.connected(ours, HOST, 10), Terms(checksums=True, tls=tls)))
    accepting.join()
    greeting = hello(Lane.PUSH, "s", requires=("checksums",))
    from migrate.messages import Pages
    from migrate.pfns import pfn_array

    pages = memoryview(bytes(range(256)) * 16 * 512)
    failed: list[BaseException] = []

    def send(end: LaneConnection) -> None:
        for _ in range(16):
            end.send_blocking(Pages(pfn_array(range(512))), [pages])

    def receive(end: LaneConnection) -> None:
        try:
            for _ in range(16):
                _message, payload = end.receive_blocking()
                assert payload == pages
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(end,)) for end in ends for work in (send, receive)]
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
