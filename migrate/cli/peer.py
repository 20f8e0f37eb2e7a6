# SPDX-License-Identifier: GPL-2.0-or-later
"""``preflight --peer``: everything between this host and another one, tried line by line."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from migrate.cli.options import receiver_socket, sender_socket
from migrate.control.client import ANSWER_S, ControlClient
from migrate.errors import MigrationError, PeerClosedError
from migrate.lanes.certificate import describe
from migrate.lanes.connection import LaneConnection, Terms, is_loopback, open_stream
from migrate.lanes.dial import HINT
from migrate.lanes.ends import RECEIVER, SENDER, SENDER_PORT
from migrate.lanes.probe import OlderPeerError, WrongEndError, free_bytes_of, greet, host_of
from migrate.protocol.messages import CAPABILITIES, PROTOCOL_VERSION, Hello, Host
from migrate.service.config import Config
from migrate.service.host import credentials
from migrate.service.values import Address
from migrate.units import human_bytes, parse_address, printable
from migrate.xl import INSTALLED, VARIABLE, WITH_HELPER

WAYS = {
    "native": "in batches (the hypervisor has populate_evicted)",
    "fallback": "one by one (the hypervisor has no populate_evicted; xenbackend/hypervisor/ has "
    "it as a patch)",
    "none": "not at all",
}
OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
HELPER = Path(INSTALLED).name
ASK_BY_SSH = f'printenv {VARIABLE}; test -x "${VARIABLE}" && echo executable'
SSH_S = 30.0
REMEDIES = {
    "does not trust the authority": "give both hosts certificates of one authority",
    "certificate expired": "renew the certificate here (xen-postcopy init --renew)",
    "has expired": "renew the certificate there (xen-postcopy init --renew)",
    "not yet valid": "set the clocks of both hosts",
    "mismatch": "dial the host by a name of its certificate, or make one with this name",
    "local issuer": "give both hosts certificates of one authority",
    "self-signed": "give both hosts certificates of one authority",
    "[tls] peers are": "name the peer in peers of [tls] here",
}
"""What to do about an error, by a part of its text.  Other errors contain their remedies."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried.  ``text``: what was found, and for a problem what to do."""

    what: str
    result: str
    text: str


@dataclass
class Report:
    """The checks so far.  ``show`` is called with each at once, because the next may take long."""

    show: Callable[[Check], None]
    checks: list[Check] = field(default_factory=list)

    def add(self, what: str, result: str, text: str) -> None:
        check = Check(what, result, printable(text))
        self.checks.append(check)
        self.show(check)

    @property
    def problems(self) -> list[str]:
        return [f"{c.what}: {c.text}" for c in self.checks if c.result == PROBLEM]


@dataclass(frozen=True)
class Wanted:
    """What is asked: the ``address`` of the peer's receiver, by the ``config`` of this host."""

    address: Address
    config: Config
    by_ssh: bool
    guest_bytes: int | None
    """The memory of the guest that is to move there, if one was named."""


def try_all(wanted: Wanted, report: Report) -> None:
    """Try everything between this host and the peer."""
    _this_host(wanted.config, report)
    trio.run(_the_peer, wanted, report)
    _helper(wanted, report)


def _this_host(config: Config, report: Report) -> None:
    found = credentials(config)
    for finding in found:
        report.add("this host, TLS", PROBLEM if finding.is_fatal else NOTE, finding.text)
    if config.tls.files is None:
        how = "[network] unencrypted = true" if config.network.unencrypted else "loopback only"
        report.add("this host, TLS", NOTE, f"connections are not encrypted ({how})")
    elif not found:
        report.add("this host, TLS", OK, f"{config.tls.certificate} can be used")
    for name, path in (("sender", sender_socket()), ("receiver", receiver_socket())):
        try:
            with ControlClient(path, answer_s=ANSWER_S) as client:
                port = client.call(command="status")["port"]
            report.add(f"this host, {name}", OK, f"it runs, and listens at port {port}")
        except MigrationError as error:
            report.add(f"this host, {name}", NOTE, str(error))


async def _the_peer(wanted: Wanted, report: Report) -> None:
    name, port = wanted.address
    try:
        found = await trio.socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = f"there is no address of {name}: {getattr(error, 'strerror', None) or error}"
        report.add(f"{name}, name", PROBLEM, f"{why}; see /etc/hosts, or the name server")
        return
    addresses = ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))
    report.add(f"{name}, name", OK, f"it has the address {addresses}")
    terms = wanted.config.terms
    lane = await _connected(f"{name}, receiver", wanted.address, terms, report)
    if lane is None:
        return
    try:
        theirs = await _greeted(f"{name}, receiver", lane, terms, report)
        if theirs is None:
            return
        _release(f"{name}, release", theirs, report)
        host = await host_of(lane, RECEIVER)
    except WrongEndError as error:
        report.add(f"{name}, receiver", PROBLEM, str(error))
        return
    except MigrationError as error:
        report.add(f"{name}, host", PROBLEM, str(error))
        return
    finally:
        lane.close()
    _host(name, host, wanted.guest_bytes, report)
    await _sender(name, host, terms, report)


async def _connected(
    what: str, address: Address, terms: Terms, report: Report
) -> LaneConnection | None:
    """Connect with a daemon, and check its certificate."""
    try:
        stream = await open_stream(*address, terms)
    except MigrationError as error:
        report.add(what, PROBLEM, str(error))
        return None
    report.add(what, OK, f"port {address[1]} accepts connections")
    try:
        lane = await LaneConnection.from_stream(stream, terms, address[0])
    except MigrationError as error:
        report.add(f"{what}, its certificate", PROBLEM, remedied(str(error)))
        return None
    certificate = lane.certificate()
    if certificate is not None:
        report.add(f"{what}, its certificate", OK, f"accepted here: {describe(certificate)}")
    return lane


async def _greeted(what: str, lane: LaneConnection, terms: Terms, report: Report) -> Hello | None:
    """Exchange hellos, which shows whether the peer accepts our certificate."""
    accepted = f"{what}, our certificate"
    try:
        theirs = await greet(lane, terms)
    except OlderPeerError:
        if terms.tls is not None:
            report.add(accepted, OK, "accepted there")
        report.add(
            what,
            PROBLEM,
            "older release, could not be asked: its memory and its hypervisor are not known here; "
            "install the same release there, or run `xen-postcopy preflight` there",
        )
        return None
    except PeerClosedError as error:
        what = accepted if terms.tls is not None else what
        report.add(what, PROBLEM, _why_closed(error, terms))
        return None
    except MigrationError as error:
        report.add(what, PROBLEM, str(error))
        return None
    if terms.tls is not None:
        report.add(accepted, OK, "accepted there")
    return theirs


def _why_closed(error: PeerClosedError, terms: Terms) -> str:
    """Return why a peer has ended the connection instead of sending its hello.  A peer that does
    not accept the names of a certificate gives no reason.
    """
    text = remedied(str(error))
    if text != str(error) or "refuses this connection" in text:
        return text
    if terms.tls is None:
        return f"{text}; {HINT}"
    return (
        f"{text}; see whether peers in [tls] there has a name of our certificate, and the log of "
        "the daemon there"
    )


def _release(what: str, theirs: Hello, report: Report) -> None:
    text = f"{theirs.software}, protocol {PROTOCOL_VERSION}"
    lacks = ", ".join(sorted(CAPABILITIES - set(theirs.offers)))
    surplus = ", ".join(sorted(set(theirs.offers) - CAPABILITIES))
    if lacks:
        report.add(what, NOTE, f"{text}; it lacks, and so is not used: {lacks}")
    elif surplus:
        report.add(what, NOTE, f"{text}; this release lacks, and so is not used: {surplus}")
    else:
        report.add(what, OK, text)


def _host(name: str, host: Host, guest_bytes: int | None, report: Report) -> None:
    if host.problem:
        report.add(f"{name}, paging", PROBLEM, host.problem)
    else:
        way = WAYS.get(host.populate_evicted, host.populate_evicted)
        report.add(f"{name}, paging", OK, f"guests can be paged; pages are evicted {way}")
    free_bytes = free_bytes_of(host)
    if free_bytes is None:
        return
    text = f"{human_bytes(free_bytes)} are free"
    if guest_bytes is not None:
        text = f"the guest needs {human_bytes(guest_bytes)}, and {text}"
    if guest_bytes is not None and guest_bytes > free_bytes:
        report.add(f"{name}, memory", PROBLEM, f"{text}: make room there")
    else:
        report.add(f"{name}, memory", OK, text)


async def _sender(name: str, host: Host, terms: Terms, report: Report) -> None:
    """Try the way of this host's receiver to the peer's sender, for guests that xl moves here."""
    what = f"{name}, sender"
    try:
        address = parse_address(host.sender, SENDER_PORT) if host.sender else None
    except MigrationError as error:
        report.add(what, PROBLEM, str(error))
        return
    if address is None or (is_loopback(address[0]) and not is_loopback(name)):
        report.add(
            what,
            NOTE,
            "it listens for its own host only, so `xl migrate` from there uses Xen's own live "
            "migration: set listen in [sender] there",
        )
        return
    what = f"{what} at {address[0]}"
    lane = await _connected(what, address, terms, report)
    if lane is None:
        return
    try:
        if await _greeted(what, lane, terms, report) is not None:
            await host_of(lane, SENDER)
    except MigrationError as error:
        report.add(what, PROBLEM, str(error))
    finally:
        lane.close()


def remedied(text: str) -> str:
    """Return the text of an error of TLS, with what to do about it."""
    for part, remedy in REMEDIES.items():
        if part in text:
            return f"{text}: {remedy}"
    return text


# ---- what xl needs ----
def _helper(wanted: Wanted, report: Report) -> None:
    """Check the variable by which xl finds its helper, here and, by ssh, at the peer.  Without ssh
    a missing variable is no problem: `xen-postcopy migrate` does not need it.
    """
    value = os.environ.get(VARIABLE, "")
    here = judged(value, executable=os.access(value, os.X_OK))
    if here and not wanted.by_ssh:
        report.add("this host, xl", NOTE, here)
    else:
        report.add("this host, xl", PROBLEM if here else OK, here or f"{VARIABLE}={value}")
    if not wanted.by_ssh:
        return
    what = f"{wanted.address[0]}, xl"
    command = ["ssh", "-o", "BatchMode=yes", "--", wanted.address[0], ASK_BY_SSH]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, timeout=SSH_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        report.add(what, PROBLEM, f"ssh: {error}")
        return
    if done.returncode == 255:
        why = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        report.add(what, PROBLEM, f"ssh, by which `xl migrate` reaches the host: {why}")
        return
    lines = done.stdout.splitlines()
    value = lines[0] if lines and lines[0] != "executable" else ""
    there = judged(value, executable="executable" in lines[1:])
    report.add(what, PROBLEM if there else OK, there or f"{VARIABLE}={value}, also over ssh")


def judged(value: str, *, executable: bool) -> str:
    """Return what is wrong with the value of the variable; empty if nothing is."""
    remedy = f"put {WITH_HELPER} into /etc/environment, and log in anew"
    if not value:
        return f"{VARIABLE} is not set, so `xl migrate` uses Xen's own live migration: {remedy}"
    if Path(value).name != HELPER:
        return f"{VARIABLE}={value} is another helper: {remedy}"
    if not executable:
        return f"{VARIABLE}={value} cannot be executed: {remedy}"
    return ""
