# SPDX-License-Identifier: GPL-2.0-or-later
"""The hosts and daemons of a campaign.  Some have certificates; a fault may start further daemons;
the logs of the daemons are read.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trustme

from migrate.cli.world import World, loopback_world, start_receiver, start_sender
from migrate.errors import DaemonGoneError, MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.tls import Tls
from migrate.service.journal import REMOVED_SUFFIXES
from xenbackend.contract import DomainState

HOST = "127.0.0.1"
CONFIG = """\
[network]
checksums = true
silence_s = {silence_s:g}
postcopy_silence_s = {silence_s:g}
[sender]
address = "127.0.0.1:{lanes}"
[migration]
bandwidth = "16M"
"""
COMPLAINTS = re.compile(r"internal error|Traceback \(most recent call last\)")
"""Text in a daemon's log that shows a fault of the daemon itself."""
BESIDES = {"second": "destination", "onward": "destination", "homeward": "source"}
"""Further daemons, and their hosts."""
HUNG_UP_S = 10.0
"""How long a daemon may take to end after SIGHUP, if it is not needed."""
REMNANT_S = 3.0
"""How long a daemon may take to remove the files of a migration with its journal."""
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAPABILITY_VERSION = 24, 1, 0x20080522


class LostError(Exception):
    """A trial has not ended as it must."""


@dataclass
class ChaosWorld(World):
    authority: trustme.CA | None = None
    """The authority of the daemons' certificates, if they have any."""
    ports: dict[str, int] = field(default_factory=dict)
    """The ports of the further daemons."""
    hung_up: set[str] = field(default_factory=set)
    """The daemons that were sent SIGHUP, and end when no guest needs them."""
    _reviving: threading.Lock = field(default_factory=threading.Lock)
    _read: dict[str, int] = field(default_factory=dict)
    """How much of each log has been read."""

    @property
    def tls(self) -> bool:
        return self.authority is not None

    @property
    def daemons(self) -> list[str]:
        return [name for name in self.processes if name not in ("source", "destination")]

    def state(self, which: str) -> Path:
        """Return the path of a daemon's journal."""
        match which:
            case "sender":
                return self.directory / "source.sock.state/sender"
            case "receiver":
                return self.directory / "destination.sock.state/receiver"
        return self.directory / f"{which}.state" / ("sender" if which == "onward" else "receiver")

    # ---- daemons ----
    def kill(self, which: str) -> None:
        """Kill a daemon.  Raises :class:`LostError` if it has ended before."""
        self._revive(which)
        self.check_alive_of(which)
        self.hung_up.discard(which)
        self.stop(which, signal.SIGKILL)

    def hang_up(self, which: str) -> None:
        self._revive(which)
        self.hung_up.add(which)
        self.processes[which].popen.send_signal(signal.SIGHUP)

    def ask(self, which: str, **request: Any) -> dict[str, Any]:
        try:
            return super().ask(which, **request)
        except MigrationError as error:
            no_daemon = isinstance(error, DaemonGoneError) or "no daemon" in str(error)
            if not (no_daemon and self._revive(which, HUNG_UP_S)):
                raise
        return super().ask(which, **request)

    def end_hang_ups(self) -> None:
        """Note that no guest needs these daemons any more."""
        for which in list(self.hung_up):
            if not self._revive(which, HUNG_UP_S):
                raise LostError(f"{which} was sent SIGHUP, is not needed and does not end")

    @contextlib.asynccontextmanager
    async def without_starts(self) -> AsyncIterator[None]:
        """Have no daemon that has ended after SIGHUP started again within the block."""
        await trio.to_thread.run_sync(self._reviving.acquire)
        try:
            yield
        finally:
            self._reviving.release()

    def _revive(self, which: str, within_s: float = 0.0) -> bool:
        """Start a daemon again that has ended after SIGHUP.  Returns whether the daemon was sent
        SIGHUP and has ended.  Raises :class:`LostError` if a guest needed it.
        """
        with self._reviving:
            if which not in self.hung_up:
                return False
            process = self.processes[which]
            try:
                if status := process.popen.wait(within_s):
                    raise LostError(
                        f"{which} ended after SIGHUP with status {status}:\n{process.tail()}"
                    )
            except subprocess.TimeoutExpired:
                return False
            self._check_needed(which)
            self.hung_up.discard(which)
            self.start_anew(which)
            return True

    def _check_needed(self, which: str) -> None:
        host = self.source if which == "sender" else self.destination
        for info in host.domains():
            suspended = info.state is DomainState.SUSPENDED
            if suspended if which == "sender" else info.paged_pages:
                raise LostError(
                    f"{which} ended after SIGHUP, and left {info.name} {info.state.value}, "
                    f"{info.paged_pages} of its pages paged out"
                )

    def start_anew(self, which: str) -> None:
        match which:
            case "sender":
                start_sender(self)
            case "receiver":
                start_receiver(self, self.port)
            case _:
                self.start_beside(which)

    def start_beside(self, which: str) -> None:
        """Start one of :data:`BESIDES`, unless it runs."""
        if which in self.processes:
            return
        self.start(
            which, self.state(which).name, "--listen", f"{HOST}:{self.ports.get(which, 0)}",
            "--socket", str(self.directory / f"{which}.sock"), "--config", str(self.config_file),
            "--state", str(self.state(which).parent), "--simulated",
            str(self.directory / f"{BESIDES[which]}.sock"),
        )  # fmt: skip
        self.ports[which] = self.ask(which, command="status")["port"]

    def check_alive_of(self, which: str) -> None:
        process = self.processes[which]
        if process.popen.poll() is not None:
            raise LostError(
                f"{which} ended by itself, with status {process.popen.returncode}:\n"
                f"{process.tail()}"
            )

    def check_remnants(self) -> None:
        """Raises :class:`LostError` if a file is left that belongs to no journal.  A daemon that
        was killed, or could not write, has a successor that removes the file.
        """
        for which in self.daemons:
            if self._remnants(which):
                self.kill(which)
                self.start_anew(which)
                if found := self._remnants(which):
                    raise LostError(f"{which} has left {', '.join(map(str, found))}")

    def _remnants(self, which: str) -> list[Path]:
        deadline = time.monotonic() + REMNANT_S
        while True:
            files = [path for end in REMOVED_SUFFIXES for path in self.state(which).glob(f"*{end}")]
            found = [path for path in files if not path.with_suffix(".json").exists()]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    def check(self) -> None:
        """Raises :class:`LostError` if a process has ended, or a daemon has logged a fault of its
        own.
        """
        for which in self.processes:
            if which not in self.hung_up:
                self.check_alive_of(which)
        for which in self.daemons:
            log = self.processes[which].log.read_text(errors="replace")
            new, self._read[which] = log[self._read.get(which, 0) :], len(log)
            if found := COMPLAINTS.search(new):
                raise LostError(
                    f"{which} logged a fault of its own:\n"
                    f"{new[max(0, found.start() - 500) :][:4000]}"
                )

    # ---- certificates ----
    @property
    def terms(self) -> Terms:
        """Return the terms of a peer, with a certificate if the daemons require one."""
        if not self.tls:
            return Terms()
        certificate, key, authority = (
            self.directory / name for name in ("certificate", "key", "authority")
        )
        return Terms(tls=Tls(certificate, key, authority, (HOST,)))

    def renewed(self) -> dict[Path, bytes]:
        """Return a new certificate and its key, by their paths."""
        assert self.authority is not None
        issued = self.authority.issue_cert(HOST)
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return {
            self.directory / "certificate": chain,
            self.directory / "key": issued.private_key_pem.bytes(),
        }


@contextlib.contextmanager
def chaos_world(
    memory_bytes: int, *, tls: bool, silence_s: float, lanes: int
) -> Iterator[ChaosWorld]:
    """``lanes``: the port of the link from the receiver to the sender, for migrations under xl."""
    with loopback_world(memory_bytes, daemons=False) as hosts:
        world = ChaosWorld(hosts.directory, hosts.owner, hosts.processes)
        world.source, world.destination = hosts.source, hosts.destination
        config = CONFIG.format(silence_s=silence_s, lanes=lanes)
        if tls:
            world.authority = trustme.CA()
            world.authority.cert_pem.write_to_path(world.directory / "authority")
            for path, text in world.renewed().items():
                path.write_bytes(text)
            files = "".join(
                f'{part} = "{world.directory / part}"\n'
                for part in ("certificate", "key", "authority")
            )
            config += f'[tls]\n{files}peers = ["{HOST}"]\n'
        world.config_file.write_text(config)
        start_receiver(world)
        start_sender(world)
        yield world


def respect_modes() -> None:
    """Have this process, and the processes that it starts, respect the modes of files even as root.
    A directory without write permission is then read-only for daemons.
    """
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable capabilities, 32 in each word.
    data = (ctypes.c_uint32 * 6)()
    libc.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)
    if libc.capget(header, data) == 0:
        for word in range(3):
            data[word] &= ~(1 << CAP_DAC_OVERRIDE)
        libc.capset(header, data)
