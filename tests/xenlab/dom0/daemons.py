"""Sender and receiver in dom0, as processes, and the helper for libxl."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from migrate.client import ControlClient
from migrate.errors import MigrationError
from tests.labs import until

TREE = Path(__file__).parents[3]


@contextlib.contextmanager
def daemons(directory: Path) -> Iterator[tuple[Path, int]]:
    """The sender's control socket, the receiver's port."""
    with contextlib.ExitStack() as stack:
        for role in ("receiver", "sender"):
            log = stack.enter_context((directory / f"{role}.log").open("w+"))
            process = subprocess.Popen(
                [sys.executable, "-m", "migrate.cli", role, "--socket", str(directory / role), "--listen", "127.0.0.1:0"],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(_show, log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        ports: list[int] = []

        def started() -> bool:
            with contextlib.suppress(MigrationError):
                ControlClient(directory / "sender").close()
                with ControlClient(directory / "receiver") as client:
                    ports.append(client.call(command="status")["port"])
            return bool(ports)

        until(started, "the daemons do not start", 100)
        yield directory / "sender", ports[0]


def write_helper(directory: Path) -> Path:
    """The helper of this tree, as a program that libxl can start."""
    program = directory / "xen-postcopy-xl-helper"
    program.write_text(f'#!/bin/sh\ncd {TREE} && exec {sys.executable} -m migrate.xl.helper "$@"\n')
    program.chmod(0o755)
    return program


def _show(log: TextIO) -> None:
    log.seek(0)
    print(log.read())
