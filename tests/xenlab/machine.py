# SPDX-License-Identifier: GPL-2.0-or-later
"""One emulated machine: boots Xen and dom0, runs one command there, brings back what came of it, and is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.xenlab import parts
from tests.xenlab.cache import LabError, directory, say

TREE = Path(__file__).parents[2]

# Each flag that is masked stands for something that QEMU 7.2 or Xen under it gets wrong: docs/xenlab.md has the list.
CPU = "EPYC,+svm,+npt,-monitor,-smap,-smep,-rdseed,-nrip-save,-avx,-avx2,-f16c,-fma,-xsave,-xsaveopt,-xsavec,-xgetbv1"
XEN_OPTIONS = (
    "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all spec-ctrl=no xpti=no mwait-idle=0 cpuidle=0 iommu=no "
    "watchdog=0 noreboot dom0_mem=1024M,max:1024M dom0_max_vcpus=1 dom0_vcpus_pin"
)
DOM0_OPTIONS = "console=hvc0 mitigations=off nokaslr quiet panic=1 net.ifnames=0"
MEMORY_MIB = 3072
MILESTONES = (
    ("Xen version", "Xen boots"),
    ("Dom0 has maximum", "dom0 boots"),
    ("xenlab: toolstack is up", "the toolstack is up"),
)
SIGNS_OF_DEATH = ("Hardware Dom0 crashed", "Panic on CPU")


@dataclass(frozen=True)
class Result:
    status: int
    """Of the command; 124 when its time was up."""
    output: str
    out: Path
    """What the command left in ``$LAB_OUT``; the consoles of guests."""
    console: Path
    """Of Xen and dom0."""
    seconds: float


def boot(
    kind: str,
    command: str,
    *,
    timeout_s: float,
    keep: Path | None = None,
    live: bool = True,
    memory_mib: int = MEMORY_MIB,
) -> Result:
    """Run a shell command in dom0, in the working tree (which is read-only there).

    ``kind``: one of ``parts.MACHINES``.  ``keep``: where results go (default: a new folder under the cache's ``runs``).  Its
    output is shown as it comes when ``live``.  Raises :class:`LabError` when the machine does not come to the command.
    """
    parts.check_tools()
    parts.backend()
    where = keep or Path(tempfile.mkdtemp(prefix="run-", dir=_runs()))
    with contextlib.ExitStack() as stack:
        if kind != parts.HOSTS:
            machine = stack.enter_context(_started(kind, where, command, _qemu(kind, memory_mib)))
        else:
            parts.package()
            cable = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            machine, _other = (
                stack.enter_context(
                    _started(kind, to, _joining(number) + what, _qemu(kind, memory_mib) + _network_card(cable, number))
                )
                for number, (to, what) in enumerate(((where, command), (where / "host2", "sleep infinity")))
            )
        return machine.result(timeout_s, live)


@contextlib.contextmanager
def _started(kind: str, where: Path, command: str, qemu: list[str]) -> Iterator[_Machine]:
    """It is gone with the context."""
    (where / "out").mkdir(parents=True, exist_ok=True)
    for old in ("status", "output", "hypervisor.log"):
        (where / old).unlink(missing_ok=True)
    (where / "command").write_text(f"export LAB_HYPERVISOR={kind}\n{command}\n")
    console = where / "console.log"
    say(f"booting ({kind}); console in {console}")
    process = subprocess.Popen(
        [*qemu, "-serial", f"file:{console}", *_share("io", where, readonly=False)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield _Machine(kind, where, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Machine:
    def __init__(self, kind: str, where: Path, qemu: subprocess.Popen[bytes]):
        self._kind, self._where, self._qemu = kind, where, qemu
        self._console = where / "console.log"
        self._started = time.monotonic()

    def result(self, timeout_s: float, live: bool) -> Result:
        """Wait for its command."""
        where, qemu = self._where, self._qemu
        watch = _Watch(self._kind, self._console, where / "output", self._started, live)
        died, timed_out = "", False
        while not died and not timed_out and qemu.poll() is None:
            time.sleep(0.2)
            died = watch.look()
            timed_out = time.monotonic() - self._started > timeout_s
        if qemu.poll() is None:
            os.killpg(qemu.pid, signal.SIGKILL)
        qemu.wait()
        watch.look()
        seconds = time.monotonic() - self._started
        output = (where / "output").read_text(errors="replace") if (where / "output").exists() else ""
        if (where / "status").exists():
            status = int((where / "status").read_text())
        elif (where / "output").exists() and timed_out:
            status = 124
        else:
            why = died or (f"was given up after {timeout_s:g} s" if timed_out else "ended")
            raise LabError(f"the machine {why} before the command was done; its last words:\n{self._last_words()}")
        say(f"{self._kind}: exit status {status} after {seconds:.0f} s; results in {where}")
        return Result(status, output, where / "out", self._console, seconds)

    def _last_words(self) -> str:
        assert self._qemu.stderr is not None
        complaints = self._qemu.stderr.read().decode(errors="replace").splitlines()
        lines = self._console.read_text(errors="replace").splitlines() if self._console.exists() else []
        return "\n".join(
            [
                *[line for line in complaints if "warning: TCG" not in line][-10:],
                *[line for line in lines if line.strip()][-30:],
            ]
        )


def _runs() -> Path:
    runs = directory() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(runs.iterdir(), key=lambda path: path.stat().st_mtime)[:-10]:
        shutil.rmtree(old, ignore_errors=True)
    return runs


def _qemu(kind: str, memory_mib: int) -> list[str]:
    options = f"{DOM0_OPTIONS} xenlab=systemd" if kind == parts.HOSTS else DOM0_OPTIONS
    modules = f"{parts.kernel() / 'vmlinuz'} {options},{parts.initramfs()}"
    return [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", "2", "-m", str(memory_mib), "-cpu", CPU,
        "-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none",
        "-kernel", str(parts.hypervisor(kind)), "-append", XEN_OPTIONS, "-initrd", modules,
        "-drive", f"file={parts.dom0() / 'disk'},if=virtio,format=raw,snapshot=on",
        *_share("tree", TREE, readonly=True), *_share("parts", parts.guest(), readonly=True),
    ]  # fmt: skip


def _network_card(cable: Path, number: int) -> list[str]:
    """Of the first or the second of two hosts."""
    here, there = (f"{end}.type=unix,{end}.path={cable}/{n}" for end, n in (("local", number), ("remote", 1 - number)))
    card = f"virtio-net-pci,netdev=cable,mac=52:54:00:00:00:0{number + 1}"
    return ["-netdev", f"dgram,id=cable,{here},{there}", "-device", card]


def _joining(number: int) -> str:
    """What it does before its command."""
    name, address = parts.HOST_NAMES[number], parts.address(number)
    return f"hostname {name}; ip address add {address}/24 dev eth0; ip link set eth0 up\n"


def _share(tag: str, where: Path, *, readonly: bool) -> list[str]:
    option = f"local,path={where},mount_tag={tag},security_model=none,multidevs=remap" + ",readonly=on" * readonly
    return ["-virtfs", option]


class _Watch:
    """Says how far it is, and shows the command's output as it comes."""

    def __init__(self, name: str, console: Path, output: Path, started: float, live: bool):
        self._name, self._console, self._output, self._started, self._live = name, console, output, started, live
        self._waiting = list(MILESTONES)
        self._shown = 0

    def look(self) -> str:
        """Why the machine need not be waited for any longer, or nothing."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        while self._waiting and self._waiting[0][0] in text:
            say(f"{self._name}: {self._waiting.pop(0)[1]} ({time.monotonic() - self._started:.1f} s)")
        if self._live and self._output.exists():
            data = self._output.read_bytes()
            sys.stdout.write(data[self._shown :].decode(errors="replace"))
            sys.stdout.flush()
            self._shown = len(data)
        return next((f"died ({sign})" for sign in SIGNS_OF_DEATH if sign in text), "")
