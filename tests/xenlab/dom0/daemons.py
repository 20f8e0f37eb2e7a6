# SPDX-License-Identifier: GPL-2.0-or-later
"""Sender and receiver in dom0, as processes, and the helper for libxl."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from tests.support import zygote
from tests.support.keepers import keepers
from tests.xenlab.dom0.waiting import WAIT_S, until

TREE = Path(__file__).parents[3]


class Daemons:
    """The daemons, with their control sockets, logs and journals in ``directory``."""

    def __init__(self, directory: Path, config: str = ""):
        self.directory = directory
        self._config = directory / "config.toml"
        self._config.write_text(config)
        self.ports = {"sender": 0, "receiver": 0}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def port(self) -> int:
        """The port of the receiver."""
        return self.ports["receiver"]

    def start(self, role: str) -> None:
        """Start a daemon, at the port of the one before it."""
        socket, state = self.directory / role, self.directory / "state"
        with (self.directory / f"{role}.log").open("a") as log:
            self._processes[role] = zygote.Popen[bytes](
                [
                    sys.executable,
                    "-m",
                    "migrate.cli",
                    role,
                    "--socket",
                    str(socket),
                    "--state",
                    str(state),
                    "--listen",
                    f"127.0.0.1:{self.ports[role]}",
                    "--config",
                    str(self._config),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.ports[role] = 0

        def started() -> bool:
            with contextlib.suppress(MigrationError):
                self.ports[role] = self.ask(role, command="status")["port"]
            return bool(self.ports[role])

        until(started, f"the {role} does not start")

    def send_signal(self, role: str, number: int) -> None:
        self._processes[role].send_signal(number)

    def wait(self, role: str) -> int:
        """Wait for the end of a daemon, and return its exit status."""
        return self._processes.pop(role).wait(WAIT_S)

    def kill(self, role: str) -> None:
        process = self._processes.pop(role)
        process.kill()
        process.wait()

    def ask(self, role: str, **request: Any) -> dict[str, Any]:
        with ControlClient(self.directory / role) as client:
            return client.call(**request)

    def line(self, role: str) -> dict[str, Any]:
        """Return the line of the last migration; empty if there was none."""
        lines: list[dict[str, Any]] = self.ask(role, command="list")["migrations"]
        return lines[-1] if lines else {}

    def phase(self, role: str) -> str:
        return str(self.line(role).get("phase", ""))

    def close(self) -> None:
        for role in list(self._processes):
            self.kill(role)
            print((self.directory / f"{role}.log").read_text())
        for keeper in keepers():  # of migrations that a test has left
            os.kill(keeper, signal.SIGKILL)


@contextlib.contextmanager
def daemons(directory: Path, config: str = "") -> Iterator[Daemons]:
    """Run both daemons.  ``config``: the contents of their configuration file."""
    with contextlib.closing(Daemons(directory, config)) as made:
        for role in ("receiver", "sender"):
            made.start(role)
        yield made


def write_helper(directory: Path) -> Path:
    """Write the helper of this tree as a program that libxl can start."""
    program = directory / "xen-postcopy-xl-helper"
    program.write_text(f'#!/bin/sh\ncd {TREE} && exec {sys.executable} -m migrate.xl.helper "$@"\n')
    program.chmod(0o755)
    return program
