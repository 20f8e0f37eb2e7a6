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

from tests.xenlab.dom0.waiting import WAIT_S

T = TypeVar("T")

PARTS, NEAR = Path("/mnt/parts"), Path("/tmp/parts")
CONSOLES = Path("/var/log/xen")
PANIC = "Kernel panic"
STEPS_PER_S = 1000
"""Less than the guest could do, because the emulated processor is shared with dom0."""
# Without tsc_mode the guest executes an RDTSCP that the emulated Xen cannot emulate.  ``cpus``
# prevents a triple fault, which a move between the emulated processors causes; so several vCPUs
# share one.
CONFIG = """\
type = "{type}"
name = "{name}"
memory = {memory_mib}
vcpus = {vcpus}
cpus = "1"
tsc_mode = "native"
on_reboot = "destroy"
on_crash = "preserve"
"""


@dataclass(frozen=True)
class Kind:
    """What a guest boots, and its memory: enough to run, and little to copy."""

    kernel: str
    """Empty: the firmware boots from the first disk."""
    memory_mib: int
    initramfs: str = ""
    options: str = ""
    type: str = "pvh"

    def boots(self, options: str) -> str:
        """Return the lines of the configuration with what the guest boots.  ``options``: those of
        its program; a kernel that the firmware boots has its own.
        """
        if not self.kernel:
            return 'boot = "c"\nhdtype = "ahci"\n'
        lines = f'kernel = "{near(self.kernel)}"\ncmdline = "{self.options + options}"\n'
        return lines + (f'ramdisk = "{near(self.initramfs)}"\n' if self.initramfs else "")


LINUX_OPTIONS = "console=hvc0 mitigations=off nokaslr quiet panic=1 "
LINUX = Kind("vmlinux", 112, "initramfs", LINUX_OPTIONS)
"""Debian's kernel with one program (``guest/init.c``)."""
HVM = Kind("vmlinuz", 160, "initramfs-hvm", LINUX_OPTIONS, type="hvm")
"""The same with a device model, which starts the kernel."""
FROM_DISK = Kind("", 160, type="hvm")
"""The same, started by the firmware from ``boot.disk``."""
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


CD = re.compile(r"cd reads (\d+) errors (\d+) mismatches (\d+)")


@dataclass(frozen=True)
class CdUse:
    """Since the guest's start."""

    reads: int
    errors: int
    mismatches: int


CPU = re.compile(r"cpu (\d+) steps (\d+) errors (\d+)")


@dataclass(frozen=True)
class CpuUse:
    """Since the guest's start."""

    number: int
    steps: int
    errors: int


CLOCK = re.compile(r"clock reads (\d+) backwards (\d+) woken (\d+) (\d+) (\d+) early (\d+)")


@dataclass(frozen=True)
class ClockUse:
    """Since the guest's start."""

    reads: int
    backwards: int
    """How often a CPU has read an earlier time than another CPU, or itself, before."""
    woken: tuple[int, ...]
    """How often each sleeper has woken."""
    early: int


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

    def cpu_use(self, after: int = 0) -> dict[int, CpuUse]:
        """Return the last line of each CPU behind a place of the console, by the CPU's number."""
        uses = (CpuUse(*map(int, found)) for found in CPU.findall(self.console()[after:]))
        return {use.number: use for use in uses}

    def clock_use(self, after: int = 0) -> list[ClockUse]:
        uses = (list(map(int, found)) for found in CLOCK.findall(self.console()[after:]))
        return [ClockUse(use[0], use[1], tuple(use[2:-1]), use[-1]) for use in uses]

    def wait_for_cpus(self, count: int) -> list[CpuUse]:
        """Wait until each of so many CPUs has worked from now on.  Returns the last line of each.
        Raises as :meth:`wait_for_heartbeats`.
        """
        here = len(self.console())
        first: dict[int, CpuUse] = {}

        def look() -> list[CpuUse] | None:
            uses = self.cpu_use(here)
            for number, use in uses.items():
                first.setdefault(number, use)
            worked = [use for number, use in uses.items() if use.steps > first[number].steps]
            return worked if len(worked) >= count else None

        return self._wait(look, f"does not work on {count} CPUs")

    def wait_for_sleepers(self) -> ClockUse:
        """Wait until each sleeper has woken, slept and woken again from now on.  Returns the last
        line.  Raises as :meth:`wait_for_heartbeats`.
        """
        here = len(self.console())

        def look() -> ClockUse | None:
            uses = self.clock_use(here)
            if not uses:
                return None
            first, last = uses[0].woken, uses[-1].woken
            woken = all(now >= before + 2 for now, before in zip(last, first, strict=True))
            return uses[-1] if woken else None

        return self._wait(look, "has a sleeper that does not wake")

    def wait_for_network(self) -> NetUse:
        """Wait until the guest answers.  Returns the last line.  Raises as
        :meth:`wait_for_heartbeats`.
        """
        return self._wait(self.net_use, "does not use its network")[-1]

    def wait_for_requests(self, count: int) -> DiskUse:
        """Wait for so many more requests to the disk.  Returns the last line.  Raises as
        :meth:`wait_for_heartbeats`.
        """
        return self._wait_for_more(
            self.disk_use, lambda use: use.requests, count, "does not use its disk"
        )

    def cd_use(self) -> list[CdUse]:
        return [CdUse(*map(int, found)) for found in CD.findall(self.console())]

    def wait_for_cd(self, count: int) -> CdUse:
        """Wait for so many more reads of the CD.  Returns the last line.  Raises as
        :meth:`wait_for_heartbeats`.
        """
        return self._wait_for_more(self.cd_use, lambda use: use.reads, count, "does not use its CD")

    def _wait_for_more(
        self, uses: Callable[[], list[T]], done: Callable[[T], int], count: int, lack: str
    ) -> T:
        """Wait until ``done`` of the last use has grown by so much.  Returns the last use."""
        first = done(self._wait(uses, lack)[-1])

        def look() -> T | None:
            last = uses()[-1]
            return last if done(last) >= first + count else None

        return self._wait(look, lack)

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
    copy = NEAR / name
    NEAR.mkdir(exist_ok=True)
    if not copy.exists():
        shutil.copy(PARTS / name, copy)
    return copy


def create(
    name: str,
    kind: Kind = LINUX,
    *,
    memory_mib: int | None = None,
    vcpus: int = 1,
    extra: str = "",
    paused: bool = False,
    options: str = f"rate={STEPS_PER_S}",
) -> Guest:
    """Make a guest.  ``extra``: lines of its configuration.  ``options``: the options of its
    program.
    """
    memory_mib = memory_mib or kind.memory_mib
    config = write_config(name, kind, memory_mib, vcpus, kind.boots(options) + extra)
    xl("create", *(["-p"] if paused else []), str(config))
    return Guest(name, int(xl("domid", name)))


def write_config(name: str, kind: Kind, memory_mib: int, vcpus: int, further: str) -> Path:
    """Write xl's configuration of a guest, and return the file.  ``further``: more lines, which
    have what the guest boots.
    """
    config = Path(f"/tmp/{name}.cfg")
    own = CONFIG.format(type=kind.type, name=name, memory_mib=memory_mib, vcpus=vcpus)
    config.write_text(own + further)
    return config


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
