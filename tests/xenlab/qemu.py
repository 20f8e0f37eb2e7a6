# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU for the lab: the emulation or acceleration of the machine, and the monitor of a running
one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

from tests.xenlab.cache import LabError
from xenbackend.hypervisor.debian import run

PROGRAM = "qemu-system-x86_64"
# Each flag that is masked stands for something that does not work in QEMU 7.2, or in Xen under it;
# docs/xenlab.md has the list.
EMULATED_CPU = (
    "EPYC,+svm,+npt,-monitor,-smap,-smep,-rdseed,-nrip-save,-avx,-avx2,-f16c,-fma,-xsave,"
    "-xsaveopt,-xsavec,-xgetbv1"
)
INTERRUPT_FLAG = 1 << 9
"""Of the register RFLAGS."""
KVM = Path("/dev/kvm")
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
CPUID_ENTRIES = 256
CPUID_VMX, CPUID_SVM = (0x00000001, 1 << 5), (0x80000001, 1 << 2)
"""A leaf, and the bit of its ECX."""


@functools.cache
def version() -> str:
    return run([PROGRAM, "--version"]).splitlines()[0]


@functools.cache
def acceleration() -> tuple[str, ...]:
    """Return options: KVM if the host lets its guests have guests of their own, otherwise
    emulation.
    """
    if kvm_nests(KVM):
        return ("-accel", "kvm", "-cpu", "host")
    return ("-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU)


def kvm_nests(device: Path) -> bool:
    """Whether KVM offers SVM or VMX to a guest.  False if there is no KVM that we may use."""
    asked = bytearray(8 + CPUID_ENTRIES * 40)
    struct.pack_into("II", asked, 0, CPUID_ENTRIES, 0)
    try:
        with device.open("rb+", buffering=0) as kvm:
            fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, asked)
    except OSError:
        return False
    return nests(bytes(asked))


def nests(cpuid: bytes) -> bool:
    """Whether a ``struct kvm_cpuid2`` has SVM or VMX."""
    (count,) = struct.unpack_from("I", cpuid)
    entries = (struct.unpack_from("7I", cpuid, 8 + 40 * n) for n in range(count))
    return any(
        leaf == wanted and ecx & bit
        for leaf, _, _, _, _, ecx, _ in entries
        for wanted, bit in (CPUID_VMX, CPUID_SVM)
    )


@functools.cache
def processor() -> str:
    """The host's processor by its name and the rate of its time-stamp counter.

    The emulated counter runs at the host's rate, which Xen measures when it boots.
    """
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.*)$", text, re.M)
    rate = re.search(r"^bogomips\s*: ([\d.]+)$", text, re.M)
    return f"{name and name[1]} {rate and round(float(rate[1]), -1)}"


def is_stuck(registers: str, lapic: str) -> bool:
    """Whether a processor is halted although it accepts interrupts and one is pending: QEMU 7.2 has
    lost the wake-up.  ``registers``, ``lapic``: the answers of ``info registers`` and of ``info
    lapic``.
    """
    flags = re.search(r"RFL=([0-9a-f]+)", registers)
    accepts = flags is not None and bool(int(flags[1], 16) & INTERRUPT_FLAG)
    pending = re.search(r"^IRR\s+\d", lapic, re.M)
    return "HLT=1" in registers and accepts and pending is not None


class Monitor:
    """A connection to QEMU's monitor, by its machine protocol (QMP)."""

    def __init__(self, path: Path, timeout_s: float = 60.0):
        """Connect.  Raises :class:`LabError` if QEMU does not listen there."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LabError(f"QEMU's monitor does not answer: {error}") from error
                time.sleep(0.02)
        self._lines = self._socket.makefile("r")
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command, and return QEMU's answer.  Raises :class:`LabError` with its error."""
        request = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            for line in self._lines:
                answer = json.loads(line)
                if "error" in answer:
                    raise LabError(f"QEMU: {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
        except OSError as error:
            raise LabError(f"QEMU: {command}: {error}") from error
        raise LabError(f"QEMU ended at {command}")

    def text(self, command: str, cpu: int) -> str:
        """Return the answer of the monitor for people, about one processor."""
        asked = {"command-line": command, "cpu-index": cpu}
        return str(self("human-monitor-command", **asked))

    def has_lost_an_interrupt(self) -> bool:
        """Whether :func:`is_stuck` is true of a processor."""
        cpus = [one["cpu-index"] for one in self("query-cpus-fast")]
        return any(
            is_stuck(self.text("info registers", cpu), self.text("info lapic", cpu)) for cpu in cpus
        )

    def save_as_fast_as_possible(self) -> None:
        """Lift the limit on the rate at which a state is saved."""
        self("migrate-set-parameters", **{"max-bandwidth": 1 << 40})

    def wait_for_migration(self, timeout_s: float = 120.0) -> None:
        """Wait until the state is saved, or loaded."""
        deadline = time.monotonic() + timeout_s
        while (answer := self("query-migrate")).get("status") != "completed":
            if answer.get("status") == "failed" or time.monotonic() > deadline:
                raise LabError(f"the machine's state is not transferred: {answer}")
            time.sleep(0.02)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._lines.close()
            self._socket.close()
