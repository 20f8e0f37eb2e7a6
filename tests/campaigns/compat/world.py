# SPDX-License-Identifier: GPL-2.0-or-later
"""Two simulated hosts with a daemon each, in which each end is of its own release."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme

from migrate.cli.world import Process, World, start_receiver, start_sender
from tests.campaigns.chaos.world import COMPLAINTS, LostError
from tests.campaigns.compat.release import Release

ADDRESS = "127.0.0.1"
HOST_MEMORY = "256M"
CONFIG = "[network]\nchecksums = true\n"
HOSTS = {"sender": "source", "receiver": "destination"}
"""The host of each daemon."""


@dataclass
class CompatWorld(World):
    releases: dict[str, Release] = field(default_factory=dict)
    """The release of each host."""

    def start(self, name: str, *arguments: str) -> Process:
        CompatWorld.spawn = self.releases[HOSTS.get(name, name)].popen
        return super().start(name, *arguments)

    def kill(self, which: str) -> None:
        self.stop(which, signal.SIGKILL)

    def line(self, which: str) -> dict[str, Any]:
        """Return the line of the newest migration in the output of a daemon's ``list``."""
        found = self.ask(which, command="list")["migrations"]
        return found[-1] if found else {"phase": "", "problem": ""}

    def guest(self, host: str, command: str, name: str, *options: str) -> str:
        """Run ``simulated-guest COMMAND NAME`` of the host's own release."""
        socket = str(self.directory / f"{host}.sock")
        return self.releases[host].run("simulated-guest", command, name, "--host", socket, *options)

    def states(self, name: str) -> dict[str, str]:
        """Return the state of the guest at each host that has the guest."""
        found = {}
        for host, release in self.releases.items():
            socket = str(self.directory / f"{host}.sock")
            for line in release.run("simulated-guest", "list", "--host", socket).splitlines():
                words = line.split()
                if words[1:2] == [name]:
                    found[host] = next(
                        word for word in words[2:] if word.isalpha() and word.islower()
                    )
        return found

    def check_logs(self) -> None:
        """Raises :class:`LostError` if a daemon has logged a fault of its own."""
        for which in HOSTS:
            log = (self.directory / f"{which}.log").read_text(errors="replace")
            if found := COMPLAINTS.search(log):
                raise LostError(f"{which}: {log[max(0, found.start() - 500) :][:4000]}")


def tls_config(directory: Path) -> str:
    """Make the certificate of both ends, and return the configuration that uses it."""
    authority = trustme.CA()
    issued = authority.issue_cert(ADDRESS)
    files = {
        "certificate": b"".join(pem.bytes() for pem in issued.cert_chain_pems),
        "key": issued.private_key_pem.bytes(),
        "authority": authority.cert_pem.bytes(),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    paths = "".join(f'{name} = "{directory / name}"\n' for name in files)
    return f'[tls]\n{paths}peers = ["{ADDRESS}"]\n'


@contextlib.contextmanager
def compat_world(source: Release, destination: Release, *, tls: bool) -> Iterator[CompatWorld]:
    with tempfile.TemporaryDirectory(prefix="xen-postcopy-compat-") as directory:
        owner, alive = os.pipe()
        releases = {"source": source, "destination": destination}
        world = CompatWorld(Path(directory), owner, releases=releases)
        try:
            world.config_file.write_text(CONFIG + (tls_config(world.directory) if tls else ""))
            for host in releases:
                socket = str(world.directory / f"{host}.sock")
                world.start(host, "simulated-host", "--socket", socket, "--memory", HOST_MEMORY)
            start_receiver(world)
            start_sender(world)
            yield world
        finally:
            for name in reversed(list(world.processes)):
                world.kill(name)
            for fd in (owner, alive):
                os.close(fd)
