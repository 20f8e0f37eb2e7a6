# SPDX-License-Identifier: GPL-2.0-or-later
"""One emulated machine: Xen and a dom0, which runs one command and then ends.

A machine boots once.  Its state is saved when dom0 waits for the command, and every later run
begins with that state (:func:`_saved`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.xenlab import parts, qemu
from tests.xenlab.cache import LabError, directory, fingerprint, part, say
from xenbackend.hypervisor.debian import run

TREE = Path(__file__).parents[2]
NOT_IN_DOM0 = ("build", "docs", "tests/campaigns/fuzz/corpus")
"""The folders of the working tree that no command there needs; hidden folders are left out as
well.
"""
PYTHON_FOLDERS = ("migrate", "receiver", "sender", "tests", "xenbackend")

XEN_OPTIONS = (
    "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all spec-ctrl=no xpti=no mwait-idle=0 "
    "cpuidle=0 iommu=no watchdog watchdog_timeout=3600 noreboot bootscrub=0 "
    "dom0_mem=1024M,max:1024M dom0_max_vcpus=1 dom0_vcpus_pin"
)
"""Xen's watchdog has a timer that interrupts each processor once a second.  QEMU 7.2 sometimes
loses the wake-up of a halted processor, and the next interrupt wakes it.  No NMI arrives in an
emulated machine, so the watchdog itself does nothing.
"""
DOM0_OPTIONS = "console=hvc0 mitigations=off nokaslr quiet panic=1 net.ifnames=0"
# A getty would read the line that is for the runner.
SYSTEMD_OPTIONS = (
    "xenlab=systemd systemd.mask=serial-getty@hvc0.service systemd.mask=getty@tty1.service"
)
MEMORY_MIB = 3072
AT_ONCE = 2
"""The number of machines that run at once; each uses one processor and its memory.  Beside other
work a machine gets so little of a processor that migrations and forks in it pass their limits.
"""
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""QEMU's own memory is in large pages as well, as far as the host has them."""
SAVED = "memory and devices in one stream"
"""The form of a saved state."""
READY, RUNS = "xenlab: the machine is ready", "xenlab: the command runs"
"""The lines that ``dom0/runner.py`` prints."""
BOOT_S, RESTORE_S = 600.0, 180.0
"""The time limits."""
LOOK_EVERY_S = 30.0
"""The pause between two looks whether QEMU has lost an interrupt; after two in a row it has."""
SIGNS_OF_DEATH = ("Hardware Dom0 crashed", "Panic on CPU")
Command = str | Sequence[str]
"""A shell command, or the arguments of pytest, which needs no start of its own."""


class StuckError(LabError):
    """The emulated machine has stopped by a fault of QEMU, and not by one of what it runs."""


@dataclass(frozen=True)
class Result:
    status: int
    """The exit status of the command; 124 if its time was up."""
    output: str
    out: Path
    """The folder with what the command left in ``$LAB_OUT``, and with the consoles of guests."""
    console: Path
    """The console of Xen and dom0."""
    ready_s: float
    """The seconds until the command ran."""
    seconds: float
    """The seconds of the whole run."""


def boot(
    kind: str,
    command: Command,
    *,
    timeout_s: float,
    keep: Path | None = None,
    live: bool = True,
    memory_mib: int = MEMORY_MIB,
) -> Result:
    """Run a command in dom0, in a copy of the working tree, which is read-only there.

    ``kind``: one of ``parts.KINDS``.  ``keep``: the folder for results (default: a new folder
    under the cache's ``runs``).  With ``live`` the command's output is shown as it arrives.  Raises
    :class:`LabError` if the machine does not start the command.
    """
    parts.check_tools()
    where = keep or Path(tempfile.mkdtemp(prefix="run-", dir=_runs()))
    commands = [(where, command, "")]
    if len(parts.KINDS[kind]) > 1:
        other: Command = "sleep infinity"
        commands = [(where, command, _joining(0)), (where / "host2", other, _joining(1))]
    if kind == parts.HOSTS:
        parts.package()
    began = time.monotonic()
    save = memory_mib == MEMORY_MIB
    states = [_saved(name) if save else None for name in parts.KINDS[kind]]
    with contextlib.ExitStack() as stack:
        try:
            machine = _start(stack, kind, commands, states, memory_mib)
        except LabError as error:
            if not any(states):
                raise
            say(f"{kind}: a saved state is of no use, booting instead: {error}")
            states = [None for _ in states]
            machine = _start(stack, kind, commands, states, memory_mib)
        ready_s = time.monotonic() - began
        say(f"{kind}: the command runs after {ready_s:.1f} s; console in {machine.console}")
        try:
            status = machine.wait(timeout_s, live)
        except StuckError as error:
            say(f"{kind}: {error}: the command is run again, in a new machine")
            again = _start(stack, kind, commands, states, memory_mib)
            status = again.wait(timeout_s, live)
    seconds = time.monotonic() - began
    say(f"{kind}: exit status {status} after {seconds:.0f} s; results in {where}")
    output = (where / "output").read_text(errors="replace") if (where / "output").exists() else ""
    return Result(status, output, where / "out", machine.console, ready_s, seconds)


def _start(
    stack: contextlib.ExitStack,
    kind: str,
    commands: Sequence[tuple[Path, Command, str]],
    states: Sequence[Path | None],
    memory_mib: int,
) -> _Machine:
    """End what the stack has, and start the machines of a kind, which end with the stack.

    ``commands``: the folder for results, the command and what comes before it, of each machine.
    Returns the first machine.
    """
    stack.close()
    cable = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenlab-")))
    machines = [
        stack.enter_context(_Machine(name, commands[number][0], state, memory_mib, cable, number))
        for number, (name, state) in enumerate(zip(parts.KINDS[kind], states, strict=True))
    ]
    for machine, (_, what, first) in zip(machines, commands, strict=True):
        machine.begin(what, first, kind)
    return machines[0]


def save_all(kinds: Iterable[str]) -> None:
    """Save the states of the machines of these kinds, so that their runs need not do it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(_saved, parts.machines(kinds)))


def _saved(name: str) -> Path | None:
    """Return the folder of a machine that has booted and waits for its command: ``state``, which
    has its memory and its devices, and ``disk``.

    Returns ``None``, and prints a line with the reason, if the state cannot be saved.
    """
    command = _command(name, MEMORY_MIB)
    ingredients = " ".join(command).replace(str(directory()), "")
    dom0 = parts.MACHINES[name].dom0
    disks = parts.disk(dom0).name, parts.packages(dom0).name
    key = fingerprint(ingredients, *disks, qemu.version(), qemu.processor(), SAVED)

    def save(where: Path) -> None:
        base = os.path.relpath(parts.disk(dom0) / "disk", where)
        run(
            [
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                base,
                "-F",
                "raw",
                str(where / "disk"),
            ]
        )
        with (
            tempfile.TemporaryDirectory(prefix="xenlab-") as sockets,
            _Machine(name, where, where, MEMORY_MIB, Path(sockets), 0, saving=True) as machine,
        ):
            machine.boot()
            machine.save()

    try:
        return part(f"machine-{name}", key, save)
    except LabError as error:
        say(f"{name}: no state of it can be saved: {error}")
        return None


def _command(name: str, memory_mib: int) -> list[str]:
    """Return QEMU's command line, as far as it is the same for each run of the machine."""
    what = parts.MACHINES[name]
    options = f"{DOM0_OPTIONS} {SYSTEMD_OPTIONS}" if what.is_host else DOM0_OPTIONS
    modules = f"{parts.kernel(what.dom0) / 'vmlinuz'} {options},{parts.initramfs(what.dom0)}"
    return [
        qemu.PROGRAM, *qemu.acceleration(), "-smp", "2", "-m", str(memory_mib),
        "-display", "none", "-nodefaults", "-no-reboot",
        "-kernel", str(parts.hypervisor(what)), "-append", XEN_OPTIONS, "-initrd", modules,
    ]  # fmt: skip


class _Machine(contextlib.AbstractContextManager["_Machine"]):
    """A QEMU, which ends when the context ends."""

    def __init__(
        self,
        name: str,
        where: Path,
        state: Path | None,
        memory_mib: int,
        sockets: Path,
        number: int,
        *,
        saving: bool = False,
    ):
        """``state``: the state to begin with or, if ``saving``, where to save it.  ``number``: the
        first or the second of two hosts.
        """
        self._what = parts.MACHINES[name]
        self._where, self._state, self._saving = where, state, saving
        self.console = where / "console.log"
        self._monitor_at = sockets / f"monitor{number}"
        self._console_at = sockets / f"console{number}"
        (where / "out").mkdir(parents=True, exist_ok=True)
        for old in ("status", "output", "hypervisor.log", "console.log"):
            (where / old).unlink(missing_ok=True)
        dom0 = self._what.dom0
        disk, form = (state / "disk", "qcow2") if state else (parts.disk(dom0) / "disk", "raw")
        snapshot = "off" if saving else "on"
        command = [
            *_command(name, memory_mib), "-drive",
            f"file={disk},if=virtio,format={form},snapshot={snapshot}", "-drive",
            f"file={parts.packages(dom0) / 'disk'},if=virtio,format=raw,readonly=on",
            *_share("io", where, readonly=False),
            *_share("parts", parts.guest(dom0), readonly=True),
            "-qmp", f"unix:{self._monitor_at},server=on,wait=off", "-chardev",
            f"socket,id=com1,path={self._console_at},server=on,wait=off,logfile={self.console}",
            "-serial", "chardev:com1",
        ]  # fmt: skip
        if self._what.is_host:
            command += _network_card(sockets, number)
        if state and not saving:
            command += ["-incoming", "defer"]
        # QEMU ends with the thread that started it, and so with this process.
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            env=os.environ | LARGE_PAGES,
        )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def boot(self) -> None:
        """Boot, and wait until dom0 waits for a command.  Otherwise raises :class:`LabError` with
        the last lines of the console.
        """
        self._wait_for(READY, BOOT_S)

    def save(self) -> None:
        """Stop, and save the state of everything but the disk, which is a file already."""
        assert self._state
        with contextlib.closing(qemu.Monitor(self._monitor_at)) as monitor:
            monitor("stop")
            monitor.save_as_fast_as_possible()
            monitor("migrate", uri=f"exec:cat > '{self._state / 'state'}'")
            monitor.wait_for_migration()
            monitor("quit")
        self._process.wait()

    def begin(self, command: Command, first: str, kind: str) -> None:
        """Boot or continue, and start the command of a run after ``first``, a shell command."""
        what = {"shell": command} if isinstance(command, str) else {"pytest": list(command)}
        dom0 = self._what.dom0
        environment = {"LAB_HYPERVISOR": kind if self._what.is_host else self._what.hypervisor}
        order = {"environment": environment, "first": first, **what}
        (self._where / "command").write_text(json.dumps(order))
        _pack_tree(self._where / "tree.tar", parts.backend(dom0))
        if self._state:
            with contextlib.closing(qemu.Monitor(self._monitor_at)) as monitor:
                monitor("migrate-incoming", uri=f"exec:cat '{self._state / 'state'}'")
                monitor.wait_for_migration()
                monitor("cont")
        else:
            self.boot()
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(str(self._console_at))
            console.sendall(f"run {time.time():.3f} {secrets.token_hex(16)}\n".encode())
            self._wait_for(RUNS, RESTORE_S)

    def _wait_for(self, words: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in (text := self._console_text()):
            died = self._died(text) or (
                time.monotonic() > deadline and f"took over {timeout_s:g} s"
            )
            if died:
                raise LabError(
                    f"the machine {died} before the command ran; its last words:\n"
                    f"{self._last_words()}"
                )
            time.sleep(0.05)

    def wait(self, timeout_s: float, live: bool) -> int:
        """Wait for the command's end.  Returns its exit status; 124 if its time was up."""
        status, output = self._where / "status", self._where / "output"
        deadline, shown, died = time.monotonic() + timeout_s, 0, ""
        look_at, was_stuck = time.monotonic() + LOOK_EVERY_S, False
        while not died and not status.exists():
            now = time.monotonic()
            if now > deadline:
                return 124
            if now > look_at:
                look_at, before = now + LOOK_EVERY_S, was_stuck
                was_stuck = self._is_stuck()
                if before and was_stuck:
                    raise StuckError("QEMU has lost an interrupt of the machine")
            died = self._died(self._console_text())
            time.sleep(0.1)
            if live and output.exists():
                data = output.read_bytes()
                sys.stdout.write(data[shown:].decode(errors="replace"))
                sys.stdout.flush()
                shown = len(data)
        if not status.exists():
            raise LabError(
                f"the machine {died} before the command was done; its last words:\n"
                f"{self._last_words()}"
            )
        return int(status.read_text())

    def _is_stuck(self) -> bool:
        try:
            with contextlib.closing(qemu.Monitor(self._monitor_at)) as monitor:
                return monitor.has_lost_an_interrupt()
        except LabError:  # the machine has ended
            return False

    def _console_text(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def _died(self, console: str) -> str:
        """Return why waiting for the machine is useless, or nothing."""
        if self._process.poll() is not None:
            return "ended"
        return next((f"died ({sign})" for sign in SIGNS_OF_DEATH if sign in console), "")

    def _last_words(self) -> str:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stderr is not None
        complaints = self._process.stderr.read().decode(errors="replace").splitlines()
        lines = self._console_text().splitlines()
        return "\n".join(
            [
                *[line for line in complaints if "warning: TCG" not in line][-10:],
                *[line for line in lines if line.strip()][-30:],
            ]
        )


def _pack_tree(to: Path, native_half: Path) -> None:
    """Pack the working tree as dom0 needs it, with byte code and with the native half of the
    backend for its Xen.  It is one file, because each file costs time over a shared folder.
    """
    run([sys.executable, "-m", "compileall", "-q", *PYTHON_FOLDERS], cwd=TREE)

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        hidden = any(name.startswith(".") for name in Path(member.name).parts)
        other = fnmatch(member.name, f"{parts.NATIVE_HALF.parent}/_xen.*.so")
        return None if hidden or other or member.name in NOT_IN_DOM0 else member

    with tarfile.open(to, "w") as archive:
        for path in sorted(TREE.iterdir()):
            archive.add(path, path.name, filter=wanted)
        archive.add(native_half, str(parts.NATIVE_HALF))
        for path in (TREE / "build").glob(parts.PACKAGE):
            archive.add(path, str(path.relative_to(TREE)))


def _runs() -> Path:
    runs = directory() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(runs.iterdir(), key=lambda path: path.stat().st_mtime)[:-30]:
        shutil.rmtree(old, ignore_errors=True)
    return runs


def _network_card(sockets: Path, number: int) -> list[str]:
    """Return the network card of the first or the second of two hosts."""
    here, there = (
        f"{end}.type=unix,{end}.path={sockets}/cable{n}"
        for end, n in (("local", number), ("remote", 1 - number))
    )
    return ["-netdev", f"dgram,id=cable,{here},{there}", "-device", "virtio-net-pci,netdev=cable"]


def _joining(number: int) -> str:
    """Return what a host does before its command.  Both hosts may begin with one state, and so with
    one hardware address.
    """
    name, address = parts.HOST_NAMES[number], parts.address(number)
    return (
        f"hostname {name}; ip link set eth0 address 52:54:00:00:01:0{number + 1}; "
        f"ip address add {address}/24 dev eth0; ip link set eth0 up"
    )


def _share(tag: str, where: Path, *, readonly: bool) -> list[str]:
    option = (
        f"local,path={where},mount_tag={tag},security_model=none,multidevs=remap"
        + ",readonly=on" * readonly
    )
    return ["-virtfs", option]
