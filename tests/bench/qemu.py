# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's postcopy, for comparison: a guest under software emulation, moved over loopback from one
process to another.

The guest runs the lab's program (``tests/xenlab/guest/init.c``), which touches random pages as fast
as it can, reads the clock at each step, and prints the longest step.  QEMU counts the requests, and
for how long the vCPU was blocked.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.labs import until
from tests.xenlab import parts
from tests.xenlab.cache import LabError
from tests.xenlab.debian import DEBIAN_12
from tests.xenlab.dom0.guests import Heartbeat, heartbeats_in

BEAT_MS = 100
CAPABILITIES = ("postcopy-ram", "postcopy-preempt", "postcopy-blocktime")
UNLIMITED = 1 << 40


@dataclass(frozen=True)
class QemuResult:
    total_s: float
    downtime_ms: float
    """By QEMU's own account, in whole ms: until the source has written the last of the state."""
    standstill_ms: float
    """By QEMU's events: from the stop at the source until the start at the destination."""
    requests: int
    block_ms: float
    """The time for which its one vCPU was blocked, in all."""
    longest_ms: float
    """The longest time between two steps, measured by the guest, from the start of the migration
    on.
    """
    idle_longest_ms: float
    """The longest time between two steps without a migration."""


class Qemu:
    """One process.  ``incoming``: it waits for a migration."""

    def __init__(
        self, directory: Path, name: str, memory_mib: int, options: str, *, incoming: bool
    ):
        self._console = directory / f"{name}.console"
        path = directory / f"{name}.qmp"
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-smp", "1", "-m", str(memory_mib),
            "-nodefaults", "-display", "none", "-kernel", str(parts.kernel(DEBIAN_12) / "vmlinuz"),
            "-initrd", str(parts.guest(DEBIAN_12) / "initramfs"), "-append",
            f"console=ttyS0 quiet mitigations=off {options}", "-serial", f"file:{self._console}",
            "-qmp", f"unix:{path},server=on,wait=off",
            *(("-incoming", "defer") if incoming else ()),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._qmp = socket.socket(socket.AF_UNIX)

        def reached() -> bool:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self._qmp.connect(str(path))
                return True
            return False

        until(reached, "QEMU does not start", 300)
        self._events: dict[str, float] = {}
        self._lines = self._qmp.makefile("r")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(f"QEMU: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            if "event" in answer:
                at = answer["timestamp"]
                self._events[answer["event"]] = at["seconds"] * 1000 + at["microseconds"] / 1000

    def at(self, event: str) -> float:
        """Return when the event happened last, in ms of the host's clock."""
        self.migration()  # events that have happened arrive before the answer to this
        return self._events[event]

    def migration(self) -> dict[str, Any]:
        found: dict[str, Any] = self("query-migrate")
        return found

    def heartbeats(self) -> list[Heartbeat]:
        return heartbeats_in(
            self._console.read_text(errors="replace") if self._console.exists() else ""
        )

    def close(self) -> None:
        self._qmp.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def pair(directory: Path, memory_mib: int, options: str) -> Iterator[tuple[Qemu, Qemu]]:
    with contextlib.ExitStack() as stack:
        source = Qemu(directory, "source", memory_mib, options, incoming=False)
        stack.callback(source.close)
        destination = Qemu(directory, "destination", memory_mib, options, incoming=True)
        stack.callback(destination.close)
        for end in (source, destination):
            end(
                "migrate-set-capabilities",
                capabilities=[{"capability": c, "state": True} for c in CAPABILITIES],
            )
            end("migrate-set-parameters", **{"max-bandwidth": UNLIMITED})
        yield source, destination


def migrate(directory: Path, memory_mib: int, touched_mib: int, *, rounds: bool) -> QemuResult:
    """Migrate the guest.  ``rounds``: postcopy begins after the first round of precopy; otherwise
    at once.
    """
    options = f"pages={touched_mib * 256} words=8 clock=1 beat={BEAT_MS}"
    with pair(directory, memory_mib, options) as (source, destination):
        until(lambda: len(source.heartbeats()) >= 20, "the guest has no heartbeat", 120)
        idle = max(beat.longest_ms for beat in source.heartbeats()[-10:])
        before = len(source.heartbeats())
        destination("migrate-incoming", uri="tcp:127.0.0.1:0")
        address = destination.migration()["socket-address"][0]
        source("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
        if rounds:
            wait_for(source, lambda info: info.get("ram", {}).get("dirty-sync-count", 0) >= 2)
        wait_for(source, lambda info: info["status"] == "active")
        source("migrate-start-postcopy")
        wait_for(source, lambda info: info["status"] == "completed")
        wait_for(destination, lambda info: info["status"] == "completed")
        sent, taken = source.migration(), destination.migration()
        until(lambda: len(destination.heartbeats()) >= 10, "the guest has no heartbeat", 300)
        after = destination.heartbeats()
        assert all(beat.errors == 0 for beat in after)
        longest = max(beat.longest_ms for beat in source.heartbeats()[before:] + after)
        return QemuResult(
            sent["total-time"] / 1000, sent["downtime"],
            destination.at("RESUME") - source.at("STOP"), sent["ram"]["postcopy-requests"],
            sum(taken["postcopy-vcpu-blocktime"]), longest, idle,
        )  # fmt: skip


def wait_for(end: Qemu, reached: Callable[[dict[str, Any]], bool]) -> None:
    def there() -> bool:
        info = end.migration()
        if info.get("status") in ("failed", "cancelled"):
            raise RuntimeError(f"QEMU does not migrate: {info}")
        return reached(info)

    until(there, "QEMU does not migrate", 120)


def unavailable() -> str:
    """Return why QEMU cannot be run here, or nothing."""
    try:
        parts.check_tools()
        parts.guest(DEBIAN_12)
    except LabError as error:
        return str(error)
    return ""
