# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests for tests inside the lab.  They are made with xl, and destroyed when the context ends."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PARTS = Path("/mnt/parts")
CONSOLES = Path("/var/log/xen")
PANIC = "Kernel panic"
WAIT_S = 300.0
"""How long a guest is waited for, in an emulated machine that may have a share of a processor."""
STEPS_PER_S = 3000
"""Less than the guest could do, because the emulated processor is shared with dom0."""
# Without tsc_mode the guest executes an RDTSCP that the emulated Xen cannot emulate.  ``cpus``
# prevents a triple fault, which a move between the emulated processors causes.
CONFIG = """\
type = "pvh"
name = "{name}"
kernel = "{kernel}"
cmdline = "{options}"
memory = {memory_mib}
vcpus = 1
cpus = "1"
tsc_mode = "native"
on_reboot = "destroy"
on_crash = "preserve"
"""


@dataclass(frozen=True)
class Kind:
    """What a guest boots, and its memory: enough to run, and little to copy."""

    kernel: str
    memory_mib: int
    initramfs: str = ""
    options: str = ""


LINUX = Kind("vmlinux", 112, "initramfs", "console=hvc0 mitigations=off nokaslr quiet panic=1 ")
"""Debian's kernel with one program (``guest/init.c``)."""
STUB = Kind("stub", 4)
"""No operating system (``guest/stub.c``)."""
HEARTBEAT = re.compile(r"heartbeat (\d+) steps (\d+) errors (\d+) longest (\d+) ms")

AREAS = re.compile(r"areas (\d+) vcpu_info (-?\d+) runstate (-?\d+) time (-?\d+)")

DISK = re.compile(r"disk requests (\d+) errors (\d+) mismatches (\d+) longest (\d+) ms")


@dataclass(frozen=True)
class DiskUse:
    """Since the guest's start, but ``longest_ms``: since the last line."""

    requests: int
    errors: int
    mismatches: int
    longest_ms: int


NET = re.compile(r"net messages (\d+) mismatches (\d+) connections (\d+)")


@dataclass(frozen=True)
class NetUse:
    """Since the guest's start."""

    messages: int
    mismatches: int
    connections: int


@dataclass(frozen=True)
class Heartbeat:
    number: int
    steps: int
    errors: int
    longest_ms: int


def heartbeats_in(console: str) -> list[Heartbeat]:
    return [Heartbeat(*map(int, found)) for found in HEARTBEAT.findall(console)]


@dataclass(frozen=True)
class Guest:
    name: str
    domid: int

    def console(self) -> str:
        log = CONSOLES / f"guest-{self.name}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def heartbeats(self) -> list[Heartbeat]:
        return heartbeats_in(self.console())

    def areas(self) -> tuple[int, list[int]]:
        """Return the first pfn of the stub's areas, and the results of registering each."""
        pfn, *results = map(int, AREAS.findall(self.console())[-1])
        return pfn, results

    def disk_use(self) -> list[DiskUse]:
        return [DiskUse(*map(int, found)) for found in DISK.findall(self.console())]

    def net_use(self) -> list[NetUse]:
        return [NetUse(*map(int, found)) for found in NET.findall(self.console())]

    def wait_for_network(self) -> NetUse:
        """Wait until the guest answers.  Returns the last line.  Raises as
        :meth:`wait_for_heartbeats`.
        """
        return self._wait(self.net_use, "does not use its network")[-1]

    def wait_for_requests(self, count: int) -> DiskUse:
        """Wait for so many more requests to the disk.  Returns the last line.  Raises as
        :meth:`wait_for_heartbeats`.
        """
        first = self._wait(self.disk_use, "does not use its disk")[-1].requests

        def look() -> DiskUse | None:
            last = self.disk_use()[-1]
            return last if last.requests >= first + count else None

        return self._wait(look, "does not use its disk")

    def wait_for_heartbeats(self, count: int, timeout_s: float = WAIT_S) -> list[Heartbeat]:
        """Wait for so many more heartbeats.  Raises ``TimeoutError`` with the end of the
        console.
        """
        wanted = len(self.heartbeats()) + count

        def look() -> list[Heartbeat] | None:
            beats = self.heartbeats()
            return beats if len(beats) >= wanted else None

        return self._wait(look, "has no heartbeat", timeout_s)

    def _wait(self, look: Callable[[], T | None], lack: str, timeout_s: float = WAIT_S) -> T:
        """Wait until ``look`` returns something that is not empty, and return it."""
        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            if time.monotonic() > deadline or PANIC in self.console():
                raise TimeoutError(
                    f"{self.name} {lack}; the end of its console:\n{self.console()[-2000:]}"
                )
            time.sleep(0.1)
        return found


def run(*command: str) -> str:
    """Return what a command prints.  Raises ``RuntimeError`` with its output if the command
    fails.
    """
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}")
    return done.stdout


def xl(*arguments: str) -> str:
    return run("xl", *arguments)


@functools.cache
def near(name: str) -> Path:
    """Return a copy of one of the parts in dom0's memory, because the shared folder is slow."""
    copy = Path("/tmp/parts") / name
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(PARTS / name, copy)
    return copy


def create(
    name: str,
    kind: Kind = LINUX,
    *,
    memory_mib: int | None = None,
    extra: str = "",
    paused: bool = False,
    options: str = f"rate={STEPS_PER_S}",
) -> Guest:
    """Make a guest.  ``extra``: lines of its configuration.  ``options``: the options of its
    program.
    """
    config = Path(f"/tmp/{name}.cfg")
    if kind.initramfs:
        extra += f'ramdisk = "{near(kind.initramfs)}"\n'
    config.write_text(
        CONFIG.format(
            name=name,
            kernel=near(kind.kernel),
            memory_mib=memory_mib or kind.memory_mib,
            options=kind.options + options,
        )
        + extra
    )
    xl("create", *(["-p"] if paused else []), str(config))
    return Guest(name, int(xl("domid", name)))


def destroy(name: str) -> None:
    with contextlib.suppress(RuntimeError):
        xl("destroy", name)


@contextlib.contextmanager
def guest(name: str, **how: Any) -> Iterator[Guest]:
    """Yield a guest of :func:`create`, and destroy it."""
    try:
        yield create(name, **how)
    finally:
        destroy(name)
