# SPDX-License-Identifier: GPL-2.0-or-later
"""``preflight --peer``: what can be wrong between two hosts has a line each, with its remedy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
import trio

from migrate.cli import peer
from migrate.cli.peer import NOTE, OK, PROBLEM, Check, Report, Wanted, judged, try_all
from migrate.errors import MigrationError, ProtocolError
from migrate.lanes import accept
from migrate.lanes.accept import AwaitedLanes, Reception
from migrate.lanes.connection import Terms
from migrate.lanes.ends import RECEIVER, SENDER
from migrate.lanes.probe import free_bytes_of
from migrate.lanes.tls import Tls
from migrate.protocol import messages as m
from migrate.protocol.messages import Hello
from migrate.service.config import Config, NetworkConfig, TlsConfig
from migrate.xl import VARIABLE
from sender.guests import room_at
from tests.support.certificates import ANOTHER, HOST, files

__all__ = ["files"]
GIB = 2**30
Found = dict[str, tuple[str, str]]


@pytest.fixture(autouse=True)
def _own_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEN_POSTCOPY_SOCKETS", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def nobody(_greeting: Hello) -> AwaitedLanes:
    raise MigrationError("no migration was asked for")


@contextlib.asynccontextmanager
async def listening(
    tls: Tls | None, answer: m.Message | MigrationError | None = None
) -> AsyncIterator[int]:
    """A peer's receiver.  By default there is a sender beside it."""

    async def look(end: str) -> m.Host:
        if isinstance(answer, MigrationError):
            raise answer
        at = f"{HOST}:{ports[SENDER]}"
        return cast(m.Host, answer or m.Host("", "native", GIB, at, end))

    ports = dict[str, int]()
    async with trio.open_nursery() as nursery:
        for end in (SENDER, RECEIVER):
            reception = Reception(nobody, functools.partial(look, end), Terms(tls=tls))
            serve = functools.partial(trio.serve_tcp, reception.receive, 0, host=HOST)
            ports[end] = int((await nursery.start(serve))[0].socket.getsockname()[1])
        yield ports[RECEIVER]
        nursery.cancel_scope.cancel()


async def look(
    port: int, tls: Tls | None = None, *, host: str = HOST, by_ssh: bool = False,
    guest_bytes: int | None = None,
) -> Found:  # fmt: skip
    section = TlsConfig()
    if tls is not None:
        section = TlsConfig(str(tls.certificate), str(tls.key), str(tls.authority), tls.peers)
    config = Config(NetworkConfig(unencrypted=True), section)
    shown: list[Check] = []
    report = Report(shown.append)
    wanted = Wanted((host, port), config, by_ssh, guest_bytes)
    await trio.to_thread.run_sync(try_all, wanted, report)
    assert shown == report.checks
    return {check.what: (check.result, check.text) for check in report.checks}


async def test_all_is_well(files: Callable[..., Tls]) -> None:
    async with listening(files()) as port:
        found = await look(port, files(), guest_bytes=GIB)
    assert found[f"{HOST}, name"] == (OK, f"it has the address {HOST}")
    assert found[f"{HOST}, receiver"] == (OK, f"port {port} accepts connections")
    result, text = found[f"{HOST}, receiver, its certificate"]
    assert result == OK and text.startswith(f"accepted here: for {HOST}, until 3000")
    assert found[f"{HOST}, receiver, our certificate"] == (OK, "accepted there")
    assert found[f"{HOST}, release"][0] == OK
    assert "protocol 1" in found[f"{HOST}, release"][1]
    assert found[f"{HOST}, paging"][1].startswith("guests can be paged; pages are evicted in")
    assert found[f"{HOST}, memory"] == (
        OK,
        "the guest needs 1.0 GiB, and 1.0 GiB are free",
    )
    assert found[f"{HOST}, sender at {HOST}, our certificate"] == (OK, "accepted there")
    assert not [text for result, text in found.values() if result == PROBLEM]


@pytest.mark.parametrize(
    ("here", "there", "what", "text"),
    [
        ({"signed_by": ANOTHER}, {}, "our", "certificates of one authority"),
        ({}, {"signed_by": ANOTHER}, "its", "give both hosts certificates of one authority"),
        ({"expired": True}, {}, "our", "renew the certificate here"),
        ({}, {"expired": True}, "its", "certificate has expired: renew the certificate there"),
        ({}, {"names": ("elsewhere",)}, "its", "dial the host by a name of its certificate"),
        ({"peers": ("host2",)}, {}, "its", "peers are host2: name the peer in peers of [tls] here"),
        ({"names": ("elsewhere",)}, {}, "our", "see whether peers in [tls] there has a name"),
        ({}, None, "its", "see whether its configuration has a [tls] section"),
    ],
    ids=[
        "another authority here", "another authority there", "expired here", "expired there",
        "another name there", "no peer there", "no peer here", "no TLS there",
    ],
)  # fmt: skip
async def test_what_is_wrong_with_tls_has_its_remedy(
    files: Callable[..., Tls], here: dict[str, object], there: dict[str, object] | None,
    what: str, text: str,
) -> None:  # fmt: skip
    def made(how: dict[str, object]) -> Tls:
        how = dict(how)
        return files(*how.pop("names", ()), **how)  # type: ignore[misc]

    async with listening(None if there is None else made(there)) as port:
        found = await look(port, made(here))
    result, said = found[f"{HOST}, receiver, {what} certificate"]
    assert result == PROBLEM and text in said
    assert f"{HOST}, paging" not in found


async def test_no_tls_here_and_tls_there(files: Callable[..., Tls]) -> None:
    async with listening(files()) as port:
        found = await look(port)
    result, text = found[f"{HOST}, receiver"]
    assert result == PROBLEM and "a [tls] section, and this host's has none" in text
    assert "connections are not encrypted" in found["this host, TLS"][1]


async def test_a_port_at_which_nobody_listens() -> None:
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    result, text = (await look(port))[f"{HOST}, receiver"]
    assert result == PROBLEM
    assert f"cannot reach {HOST}:{port}: Connection refused; see whether xen-postcopy runs" in text


async def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nowhere(*_arguments: object, **_options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", nowhere)
    found = await look(8013, host="nowhere")
    result, text = found["nowhere, name"]
    assert result == PROBLEM
    assert text == (
        "there is no address of nowhere: Name or service not known; see /etc/hosts, or the name "
        "server"
    )


@pytest.mark.parametrize("with_tls", [False, True])
async def test_an_older_peer_could_not_be_asked(
    files: Callable[..., Tls], monkeypatch: pytest.MonkeyPatch, with_tls: bool
) -> None:
    """Release 0.1.0 refuses a capability that it does not have in these words."""

    def negotiate(greeting: Hello) -> None:
        (unknown,) = set(greeting.requires)
        raise ProtocolError(
            f"the peer requires capabilities that this end does not have: {unknown}"
        )

    monkeypatch.setattr(accept, "negotiate", negotiate)
    async with listening(files() if with_tls else None) as port:
        found = await look(port, files() if with_tls else None)
    result, text = found[f"{HOST}, receiver"]
    assert result == PROBLEM and text.startswith("older release, could not be asked")
    assert (f"{HOST}, receiver, our certificate" in found) is with_tls


async def test_another_protocol_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def negotiate(_greeting: Hello) -> None:
        raise ProtocolError("install the same release of xen-postcopy at both ends")

    monkeypatch.setattr(accept, "negotiate", negotiate)
    async with listening(None) as port:
        result, text = (await look(port))[f"{HOST}, receiver"]
    assert result == PROBLEM
    assert text == (
        "the peer refuses this connection: install the same release of xen-postcopy at both ends"
    )


async def test_what_the_host_there_lacks() -> None:
    answer = m.Host("this hypervisor is built without memory paging: x", "none", GIB, "", RECEIVER)
    async with listening(None, answer) as port:
        found = await look(port, guest_bytes=2 * GIB)
    assert found[f"{HOST}, paging"] == (PROBLEM, answer.problem)
    assert found[f"{HOST}, memory"] == (
        PROBLEM,
        "the guest needs 2.0 GiB, and 1.0 GiB are free: make room there",
    )
    result, text = found[f"{HOST}, sender"]
    assert result == NOTE and "set listen in [sender] there" in text


async def test_free_memory_that_the_host_there_has_not_found_out_is_not_0() -> None:
    answer = m.Host("xen: Permission denied", "none", 0, "", RECEIVER)
    async with listening(None, answer) as port:
        found = await look(port, guest_bytes=2 * GIB)
        with pytest.raises(MigrationError, match=r"^127.0.0.1:\d+: xen: Permission denied$"):
            await room_at((HOST, port), Terms())
    assert found[f"{HOST}, paging"] == (PROBLEM, answer.problem)
    assert f"{HOST}, memory" not in found
    assert free_bytes_of(answer) is None


async def test_a_host_without_paging_has_room_for_precopy() -> None:
    answer = m.Host("this hypervisor is built without memory paging: x", "none", GIB, "", RECEIVER)
    async with listening(None, answer) as port:
        assert (await room_at((HOST, port), Terms()))["free_bytes"] == GIB
    assert free_bytes_of(m.Host("", "native", 0, "", RECEIVER)) == 0


async def test_a_sender_that_cannot_be_reached() -> None:
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    async with listening(None, m.Host("", "native", GIB, f"{HOST}:{port}", RECEIVER)) as receiver:
        found = await look(receiver)
    result, text = found[f"{HOST}, sender at {HOST}"]
    assert result == PROBLEM and "Connection refused" in text


async def test_a_sender_in_the_place_of_a_receiver() -> None:
    async with listening(None, m.Host("", "native", GIB, "", SENDER)) as port:
        found = await look(port, guest_bytes=GIB)
        text = f"{HOST}:{port}: this is a sender, and no receiver; receivers listen on port 8013"
        with pytest.raises(MigrationError, match=re.escape(text)):
            await room_at((HOST, port), Terms())
    assert found[f"{HOST}, receiver"] == (PROBLEM, f"{text} by default")
    assert f"{HOST}, memory" not in found


async def test_a_receiver_in_the_place_of_a_sender() -> None:
    """For example, [sender] address there has the port of the receiver."""
    other = m.Host("", "native", GIB, "", RECEIVER)
    async with listening(None, other) as port:
        answer = m.Host("", "native", GIB, f"{HOST}:{port}", RECEIVER)
        async with listening(None, answer) as port:
            result, text = (await look(port))[f"{HOST}, sender at {HOST}"]
    assert result == PROBLEM
    assert "this is a receiver, and no sender; senders listen on port 8014 by default" in text


async def test_a_host_that_is_of_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "CAPABILITIES", m.CAPABILITIES | {"teleportation"})
    async with listening(None) as port:
        result, text = (await look(port))[f"{HOST}, release"]
    assert result == NOTE and text.endswith("it lacks, and so is not used: teleportation")
    monkeypatch.setattr(peer, "CAPABILITIES", m.CAPABILITIES - {m.PROOF})
    async with listening(None) as port:
        result, text = (await look(port))[f"{HOST}, release"]
    assert result == NOTE and text.endswith("this release lacks, and so is not used: proof")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (m.Barrier(1), "the peer answered with barrier instead of host"),
        (MigrationError("xenstored hangs"), "the peer cannot look at its host: xenstored hangs"),
    ],
    ids=["another message", "an error"],
)
async def test_a_peer_that_answers_something_else(
    answer: m.Message | MigrationError, text: str
) -> None:
    async with listening(None, answer) as port:
        found = await look(port)
    assert found[f"{HOST}, host"] == (PROBLEM, text)


def ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin/ssh"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


HELPER = f"/usr/bin/{peer.HELPER}"


@pytest.mark.parametrize(
    ("script", "result", "text"),
    [
        (f"echo {HELPER}; echo executable", OK, f"LIBXL_SAVE_HELPER={HELPER}, also over ssh"),
        (f"echo {HELPER}; exit 1", PROBLEM, "cannot be executed: put LIBXL_SAVE_HELPER="),
        ("exit 1", PROBLEM, "LIBXL_SAVE_HELPER is not set, so `xl migrate` uses Xen's own"),
        ("echo /bin/other; echo executable", PROBLEM, "is another helper: put LIBXL_SAVE_HELPER="),
        (
            "echo 'Warning: x' >&2; echo 'Permission denied (publickey).' >&2; exit 255",
            PROBLEM,
            "ssh, by which `xl migrate` reaches the host: Permission denied (publickey).",
        ),
        ("exit 255", PROBLEM, "no reason was given"),
    ],
)
async def test_the_helper_s_variable_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, result: str, text: str
) -> None:
    """A non-interactive ssh reads neither a profile nor a login shell's files, as for xl."""
    ssh(tmp_path, script, monkeypatch)
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    found = await look(port, by_ssh=True)
    assert found[f"{HOST}, xl"][0] == result and text in found[f"{HOST}, xl"][1]
    assert found["this host, xl"][0] == PROBLEM


async def test_the_arguments_of_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose name looks like an option is none."""
    ssh(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/arguments', monkeypatch)
    report = Report(lambda _check: None)
    peer._helper(Wanted(("-oProxyCommand=x", 1), Config(), True, None), report)
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "-o", "BatchMode=yes", "--", "-oProxyCommand=x", peer.ASK_BY_SSH,
    ]  # fmt: skip


def test_the_helper_s_variable_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def here() -> tuple[str, str]:
        report = Report(lambda _check: None)
        peer._helper(Wanted((HOST, 1), Config(), False, None), report)
        return report.checks[0].result, report.checks[0].text

    assert here()[0] == NOTE and "is not set" in here()[1]
    helper = tmp_path / peer.HELPER
    helper.touch(0o755)
    monkeypatch.setenv(VARIABLE, str(helper))
    assert here() == (OK, f"{VARIABLE}={helper}")
    assert judged(str(helper), executable=True) == ""


def test_a_report_is_json_as_it_is(files: Callable[..., Tls]) -> None:
    report = Report(lambda _check: None)
    report.add("host2, name", PROBLEM, "no\x1b[31m address")
    assert report.problems == ["host2, name: no\ufffd[31m address"]
    assert json.dumps(report.problems)
