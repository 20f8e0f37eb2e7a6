# SPDX-License-Identifier: GPL-2.0-or-later
"""``init``: an authority, and for each host a certificate and a configuration.

The files are made in a folder here, and the command prints how they reach the hosts:

    authority/    the authority's certificate and key, which no host needs
    hosts/HOST/   what belongs into /etc/xen-postcopy of HOST
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.options import OptionType, WholeNumber
from migrate.cli.steps import (
    AUTHORITY,
    CERTIFICATE,
    CONFIGURATION,
    KEY,
    Place,
    after_making,
    after_renewing,
)
from migrate.cli.text import echo, json_option
from migrate.errors import MigrationError
from migrate.lanes.ends import RECEIVER_PORT, SENDER_PORT
from migrate.service.template import INSTALLED, configuration
from migrate.units import shortened

if TYPE_CHECKING:
    from migrate.cli.authority import Authority, Issued

DAYS = 730
MAX_DAYS = 36500
LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
MAX_NAME = 253
BROADCAST = ipaddress.IPv4Address(0xFFFFFFFF)


def checked_name(text: str) -> str:
    """Return a name of a host, or an address, as a certificate has it.  Raises ``ValueError``."""
    name = text.strip().lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        labels = name.split(".")
        if len(name) > MAX_NAME or labels[-1].isdigit() or not all(map(LABEL.fullmatch, labels)):
            raise ValueError(
                f"{shortened(text)!r} is no name of a host and no address: letters, digits, hyphens"
                " and dots, or an IPv4 or IPv6 address"
            ) from None
        return name
    if address.is_unspecified or address.is_multicast or address == BROADCAST:
        raise ValueError(f"{shortened(text)!r} is the address of no single host")
    if getattr(address, "scope_id", None):
        raise ValueError(f"{shortened(text)!r}: the zone of an address means something here only")
    return str(address)


class Names(OptionType):
    """``HOST`` or ``HOST,NAME,...``: all names and addresses of one host."""

    name = "host"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(map(checked_name, str(value).split(","))))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


@click.command("init")
@click.argument("hosts", nargs=-1, type=Names(), metavar="HOST[,NAME...]...")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default="xen-postcopy-init",
    show_default=True,
    help="The folder for the files.",
)
@click.option(
    "--days",
    type=WholeNumber(1, MAX_DAYS),
    default=DAYS,
    show_default=True,
    help="How long the certificates of hosts are valid; never longer than the authority, which is "
    "made for ten years.",
)
@click.option(
    "--renew",
    is_flag=True,
    help="Make new keys and certificates for hosts that the folder has (all, or those named), and "
    "leave their configurations as they are.",
)
@click.option("--force", is_flag=True, help="Replace the files of hosts that the folder has.")
@json_option
def init_command(
    hosts: tuple[tuple[str, ...], ...],
    directory: Path,
    days: int,
    renew: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make what two hosts need to migrate guests to each other.

    HOST is the name or the address by which the others dial a host.  More names and addresses of
    the same host follow behind commas: host1,10.0.0.1 host2,10.0.0.2.

    Makes an authority, and for each host a certificate and a configuration, in a folder here, and
    prints which commands bring the files to the hosts.  A further host, later: the same command
    with its name alone.  Files that exist are not replaced without --force.
    """
    _check_different(hosts)
    if renew and force:
        raise click.UsageError(
            "--renew and --force: one of them; --renew leaves the configurations as they are, and "
            "--force replaces all files"
        )
    try:
        from migrate.cli.authority import Authority
    except ImportError as error:
        raise MigrationError(
            f"this command needs Python's cryptography ({error}): apt install python3-cryptography,"
            " or pip install 'xen-postcopy[init]'"
        ) from error
    place = Place(directory)
    now = datetime.datetime.now(datetime.UTC)
    with _locked(directory):
        loaded = _loaded(Authority, place, now)
        if renew:
            issued, lines = _renew(place, hosts, days, now, loaded)
        else:
            issued, lines = _make(place, hosts, days, now, loaded, force=force)
    if as_json:
        echo(json.dumps(_facts(place, issued), indent=2))
        return
    for line in lines:
        echo(line)


def _facts(place: Place, issued: dict[str, Issued]) -> dict[str, Any]:
    """Return what was made, as JSON."""
    from migrate.cli.authority import names_of

    return {
        "authority": str(place.authority),
        "hosts": [
            {
                "host": name,
                "names": names_of(made.certificate),
                "directory": str(place.host(name)),
                "until": made.until.isoformat(),
            }
            for name, made in issued.items()
        ],
    }


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other commands out of the folder: two of them would make two authorities.  A folder that
    is made here is removed again if it stays empty.
    """
    made = not directory.exists()
    _folder(directory)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _check_different(hosts: Sequence[tuple[str, ...]]) -> None:
    names = [name for host in hosts for name in host]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"{name} is named twice: each host has names of its own")


def _loaded(kind: type[Authority], place: Place, now: datetime.datetime) -> Authority | None:
    """Return the authority of the folder, or ``None`` if there is none yet.  Raises
    :class:`MigrationError` if it cannot sign any more.
    """
    certificate, key = place.authority / AUTHORITY, place.authority / "authority.key"
    # The certificate is written after the key.  Without both it and hosts, nothing was signed yet.
    if not certificate.exists() and not place.known():
        return None
    try:
        authority = kind.load(_read(certificate), _read(key))
    except MigrationError as error:
        raise MigrationError(f"the authority of {place.directory}: {error}") from None
    if authority.until <= now:
        raise MigrationError(
            f"the authority of {place.directory} has expired on {authority.until:%Y-%m-%d}: make "
            "the files of all hosts anew in another folder (--directory)"
        )
    return authority


def _make(
    place: Place, hosts: Sequence[tuple[str, ...]], days: int, now: datetime.datetime,
    loaded: Authority | None, *, force: bool,
) -> tuple[dict[str, Issued], Iterator[str]]:  # fmt: skip
    """Make the files of hosts.  Returns their certificates, and what to do next, line by line."""
    from migrate.cli.authority import Authority

    new = [host[0] for host in hosts]
    older = [name for name in place.known() if name not in new]
    if not new or len(new) + len(older) < 2:
        raise click.UsageError("two hosts migrate guests to each other: name both")
    for name in new:
        if not force and name in place.known():  # its certificate was written last
            raise MigrationError(
                f"{place.host(name)} is there already: --renew makes a new certificate, and --force"
                " replaces all files of the host"
            )
    authority = loaded or Authority.make(now)
    issued = {host[0]: authority.issue(host, days, now) for host in hosts}
    if loaded is None:
        _folder(place.authority)
        _write(place.authority / "authority.key", authority.key(), 0o600)
        _write(place.authority / AUTHORITY, authority.certificate(), 0o644)
    for name, certificate in issued.items():
        peers = [peer for peer in [*older, *new] if peer != name]
        _folder(place.host(name))
        _write(place.host(name) / CONFIGURATION, _configuration(name, peers).encode(), 0o644)
        _write(place.host(name) / AUTHORITY, authority.certificate(), 0o644)
        _write_certificate(place.host(name), certificate)
    return issued, after_making(place, authority.until, hosts, issued, older)


def _renew(
    place: Place, hosts: Sequence[tuple[str, ...]], days: int, now: datetime.datetime,
    authority: Authority | None,
) -> tuple[dict[str, Issued], Iterator[str]]:  # fmt: skip
    """Make new certificates of hosts.  Returns the same."""
    from migrate.cli.authority import names_of

    known = place.known()
    if authority is None or not known:
        raise MigrationError(f"{place.directory} has no hosts: make them without --renew first")
    for host in hosts:
        if host[0] not in known:
            raise MigrationError(
                f"{place.directory} has no host {host[0]}; it has {', '.join(known)}"
            )
    issued = {}
    for host in hosts or [(name,) for name in known]:
        file = place.host(host[0]) / CERTIFICATE
        names = host if len(host) > 1 else names_of(_read(file))
        issued[host[0]] = authority.issue(names, days, now)
    for name, certificate in issued.items():
        _write_certificate(place.host(name), certificate)
    return issued, after_renewing(place, issued)


def _configuration(name: str, peers: list[str]) -> str:
    """Return the configuration of a host.  Its paths count from the folder that it is in."""
    try:
        listen = str(ipaddress.ip_address(name))
    except ValueError:
        listen = "0.0.0.0"
    heading = f"The configuration of {name}, made by `xen-postcopy init`.  " + INSTALLED[1]
    given: dict[str, dict[str, Any]] = {
        "tls": {
            "certificate": CERTIFICATE,
            "key": KEY,
            "authority": AUTHORITY,
            "peers": tuple(peers),
        },
        "sender": {"listen": (listen, SENDER_PORT), "address": name},
        "receiver": {"listen": (listen, RECEIVER_PORT)},
    }
    return configuration((heading,), given)


def _write_certificate(folder: Path, issued: Issued) -> None:
    _write(folder / KEY, issued.key, 0o600)
    _write(folder / CERTIFICATE, issued.certificate, 0o644)


# ---- files ----
def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from error


def _folder(path: Path) -> None:
    """Make a folder that only its owner may enter, if there is none."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file as a whole: after an error the former file, or none, is there."""
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), mode)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from error
