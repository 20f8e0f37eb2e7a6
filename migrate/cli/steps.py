# SPDX-License-Identifier: GPL-2.0-or-later
"""The folder that ``init`` fills, and the commands that bring its files to the hosts."""

from __future__ import annotations

import datetime
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from migrate.service.config import CONFIG_FILE
from migrate.service.template import written
from migrate.xl import VARIABLE, WITH_HELPER

if TYPE_CHECKING:
    from migrate.cli.authority import Issued

CERTIFICATE, KEY, AUTHORITY = "host.pem", "host.key", "authority.pem"
"""The files of a host, beside its configuration."""
CONFIGURATION = CONFIG_FILE.name


@dataclass(frozen=True)
class Place:
    """The folder that the command works in."""

    directory: Path

    @property
    def authority(self) -> Path:
        return self.directory / "authority"

    def host(self, name: str) -> Path:
        return self.directory / "hosts" / name

    def known(self) -> list[str]:
        """Return the hosts that have a certificate here."""
        return sorted(path.parent.name for path in self.directory.glob(f"hosts/*/{CERTIFICATE}"))


def after_making(
    place: Place,
    until: datetime.datetime,
    hosts: Sequence[tuple[str, ...]],
    issued: Mapping[str, Issued],
    older: Sequence[str],
) -> Iterator[str]:
    """Yield what was made and what to do next, line by line.  ``until``: the end of the authority.
    ``older``: the hosts that the folder had before.
    """
    new = list(issued)
    yield f"{place.authority}: the authority, until {until:%Y-%m-%d}."
    yield "  Keep this folder safe, and on none of the hosts: with authority.key anybody can make"
    yield "  certificates that the hosts accept.  Further hosts and renewals need it."
    for names in hosts:
        end = issued[names[0]].until
        yield f"{place.host(names[0])}: certificate for {', '.join(names)}, until {end:%Y-%m-%d}."
    yield ""
    yield f"1. Copy each host's files into {CONFIG_FILE.parent}.  They belong to root, and"
    yield f"   {KEY} has mode 0600:"
    yield ""
    for name in new:
        yield f"    {copy(name, f'{shlex.quote(str(place.host(name)))}/*')}"
    yield ""
    if older:
        yield "   On the hosts that were there before, name the new peers in [tls] of"
        yield f"   {CONFIG_FILE}:"
        yield ""
        for name in older:
            peers = tuple(peer for peer in [*older, *new] if peer != name)
            yield f"    {name}: peers = {written(peers)}"
        yield ""
    yield "2. Restart the daemons, which read the configuration when they start:"
    yield ""
    for name in [*new, *older]:
        yield f"    {on(name, 'xen-postcopy restart-idle')}"
    yield ""
    yield "3. Try everything between the hosts, in both directions:"
    yield ""
    for name in new:
        for peer in [*new, *older]:
            if peer != name:
                yield f"    {on(name, f'xen-postcopy preflight --peer {peer}')}"
                if peer in older:
                    yield f"    {on(peer, f'xen-postcopy preflight --peer {name}')}"
    yield ""
    source, destination = [*older, *new][0], new[-1]
    yield "4. Migrate a guest, without a toolstack or under xl:"
    yield ""
    yield f"    {on(source, f'xen-postcopy migrate GUEST {destination}')}"
    yield f"    {on(source, f'{WITH_HELPER} xl migrate GUEST {destination}')}"
    yield ""
    yield f"   xl needs {VARIABLE} on both hosts (man xen-postcopy-xl-helper), and"
    yield "   a destination needs a hypervisor with memory paging (xen-postcopy preflight)."


def after_renewing(place: Place, issued: Mapping[str, Issued]) -> Iterator[str]:
    """Yield what was made and what to do next, line by line."""
    for name, made in issued.items():
        yield f"{place.host(name)}: a new key and certificate, until {made.until:%Y-%m-%d}."
    yield ""
    yield "Copy them to the hosts.  The daemons use them from the next connection on, without a"
    yield "restart:"
    yield ""
    for name in issued:
        files = [shlex.quote(str(place.host(name) / file)) for file in (CERTIFICATE, KEY)]
        yield f"    {copy(name, ' '.join(files))}"


def copy(name: str, files: str) -> str:
    """Return the command that brings files to a host.  ``files``: as a shell reads them."""
    target = f"{CONFIG_FILE.parent}/"
    if is_here(name):
        return f"cp --preserve=mode {files} {target}"
    address = f"[{name}]" if ":" in name else name
    return f"scp -p {files} {shlex.quote(f'root@{address}:{target}')}"


def on(name: str, command: str) -> str:
    """Return the command that runs ``command`` on a host."""
    return command if is_here(name) else f"ssh root@{name} {command}"


def is_here(name: str) -> bool:
    """Whether this is the host of that name."""
    return name in (socket.gethostname(), socket.gethostname().partition(".")[0])
