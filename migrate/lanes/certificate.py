# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer would find wrong with this host's own certificate.

The host shakes hands with itself, in memory, with the files of its configuration: so OpenSSL judges
the certificate here as it does at a peer that trusts the same authority.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.errors import MigrationError
from migrate.lanes.tls import Tls, comparable, names_in

SOON_S = 30 * 86400
"""A certificate that ends within this time is named: it can be renewed without a restart."""
NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME."""
OUT_OF_TIME = (9, 10)
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""
RENEW = "renew it (xen-postcopy init --renew, or the way in which it was made)"


@dataclass(frozen=True)
class Finding:
    """What is wrong, in one sentence with the remedy."""

    text: str
    is_fatal: bool
    """No peer accepts a connection."""


def findings(tls: Tls, dialled: str | None = None) -> list[Finding]:
    """Return what is wrong with a host's certificate and key.  ``dialled``: the name by which other
    hosts dial this one, if that is known.  Raises :class:`MigrationError` if the files cannot be
    used at all.
    """
    return [*_of_certificate(tls, dialled), *_of_key(tls.key)]


def describe(certificate: Mapping[str, Any]) -> str:
    """Return the names of a certificate of ``getpeercert`` and the end of its time, as text."""
    names = ", ".join(sorted(names_in(certificate))) or "nobody"
    return f"for {names}, until {_day(ssl.cert_time_to_seconds(certificate['notAfter']))}"


def _of_certificate(tls: Tls, dialled: str | None) -> Iterator[Finding]:
    where, now = f"[tls] certificate {tls.certificate}", time.time()
    try:
        certificate = _own(tls, in_time=True)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code not in OUT_OF_TIME:
            yield Finding(
                f"{where}: peers with this authority do not accept it: {error.verify_message}; "
                f"see whether {tls.authority} has signed it, for servers and clients",
                True,
            )
            return
        yield from _out_of_time(tls, where, now)
        return
    if not any(kind in ("DNS", "IP Address") for kind, _ in certificate.get("subjectAltName", ())):
        yield Finding(
            f"{where}: it has no name that a peer can check: make one with this host's names and "
            "addresses as subjectAltName",
            True,
        )
    elif dialled is not None and comparable(dialled) not in names_in(certificate):
        yield Finding(
            f"{where}: it is {describe(certificate)}, and receivers of xl's migrations dial "
            f"{dialled}: make one with that name, or set address in [sender]",
            False,
        )
    ends = ssl.cert_time_to_seconds(certificate["notAfter"])
    if ends - now < SOON_S:
        yield Finding(f"{where}: it expires on {_day(ends)}: {RENEW}", False)


def _out_of_time(tls: Tls, where: str, now: float) -> Iterator[Finding]:
    certificate = _own(tls, in_time=False)
    begins, ends = (ssl.cert_time_to_seconds(certificate[key]) for key in ("notBefore", "notAfter"))
    if ends <= now:
        yield Finding(f"{where}: it has expired on {_day(ends)}: {RENEW}", True)
    elif begins > now:
        yield Finding(
            f"{where}: it is valid from {_day(begins)} on, and this host's clock has {_day(now)}: "
            "set the clock, or wait",
            True,
        )
    else:
        yield Finding(
            f"[tls] authority {tls.authority}: it has expired or is not valid yet: all hosts need "
            "certificates of another authority",
            True,
        )


def _of_key(path: Path) -> Iterator[Finding]:
    try:
        status = path.stat()
    except OSError as error:
        raise MigrationError(f"[tls] {path}: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    # A group may read a key of root's, as it may that of other daemons.
    if mode & (0o027 if status.st_uid == 0 else 0o077):
        yield Finding(
            f"[tls] key {path}: others than its owner can use it (mode {mode:04o}): chmod 600 "
            f"{path}, and make a new key if somebody may have read it",
            False,
        )
    if status.st_uid not in (0, os.geteuid()):
        yield Finding(f"[tls] key {path}: it belongs to user {status.st_uid}: chown root", False)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _own(tls: Tls, *, in_time: bool) -> dict[str, Any]:
    """Shake hands with ourselves, and return our certificate as a peer has it.  ``in_time``: judge
    the times of the certificates as well.  Raises ``ssl.SSLCertVerificationError``.
    """
    contexts = tls.fresh_contexts()
    for context in contexts:
        context.check_hostname = False
        if not in_time:
            context.verify_flags |= NO_CHECK_TIME
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = contexts[0].wrap_bio(to_server, to_client, server_side=True)
    client = contexts[1].wrap_bio(to_client, to_server, server_side=False)
    waiting = [client, server]
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    return client.getpeercert() or {}
