# SPDX-License-Identifier: GPL-2.0-or-later
"""Two simulated hosts and two daemons on one machine, each a process of its own.

The ``loopback`` command, the tests and the benchmarks use them.  Each process reports by
sd_notify(3) that it is ready, as under systemd.  The processes end when the context ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.service.lifecycle import OWNED
from xenbackend.contract import DomainState
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import Verification, verify
from xenbackend.unix import socket_path

PROGRAM = (sys.executable, "-m", "migrate.cli")
DIRECTORY_PREFIX = "xen-postcopy-"
LOCKED = "locked"
"""The name of an empty file in a directory that its process has locked."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 0.5
"""How long a daemon may take to end.  Its migrations are not waited for, because their guests end
with the hosts.
"""


@dataclass
class Process:
    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


@dataclass
class World:
    """The running processes; ``source`` and ``destination`` are attached to the two hosts."""

    spawn: ClassVar[Callable[..., subprocess.Popen[bytes]]] = subprocess.Popen
    """The function that starts the processes."""
    directory: Path
    owner: int
    """The reading end of a pipe whose writing end only this process has.  The processes that it
    starts end when this process ends.
    """
    processes: dict[str, Process] = field(default_factory=dict)
    program: Sequence[str] = PROGRAM
    """The command that starts ``xen-postcopy``."""
    source: SimulatedHypervisor = field(init=False)
    destination: SimulatedHypervisor = field(init=False)
    port: int = 0

    @property
    def sender_socket(self) -> Path:
        return self.directory / "sender.sock"

    @property
    def receiver_socket(self) -> Path:
        return self.directory / "receiver.sock"

    @property
    def config_file(self) -> Path:
        return self.directory / "config.toml"

    def control(self, which: str = "sender") -> ControlClient:
        return ControlClient(self.directory / f"{which}.sock")

    def ask(self, which: str, **request: Any) -> dict[str, Any]:
        """Send one request to a daemon, and return its result."""
        with self.control(which) as client:
            return client.call(**request)

    def start(self, name: str, *arguments: str) -> Process:
        """Start ``xen-postcopy ARGUMENTS`` and wait until the process is ready.  Raises
        :class:`MigrationError`.
        """
        log = self.directory / f"{name}.log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, log.open("ab") as output:
            notify_path = self.directory / f"{name}.notify"
            notify_path.unlink(missing_ok=True)  # a process before it may have left one
            ready.bind(str(notify_path))
            popen = self.spawn(
                [*self.program, *arguments],
                stdin=self.owner,
                stdout=output,
                stderr=output,
                env={**os.environ, "NOTIFY_SOCKET": str(notify_path), OWNED: "1"},
                # Ctrl-C is for this process, which ends the others in order.  They have no session
                # of their own: the kernel would share the CPUs out among sessions first
                # (CONFIG_SCHED_AUTOGROUP), and an urgent thread of one process would wait for the
                # other processes.
                process_group=0,
            )
            process = self.processes[name] = Process(name, popen, log)
            ready.settimeout(0.2)
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in ready.recv(4096):
                        return process
                if popen.poll() is not None or time.monotonic() > deadline:
                    raise MigrationError(f"{name} did not start:\n{process.tail()}")

    def check_alive(self) -> None:
        """Raises :class:`MigrationError` if a process has ended."""
        for process in self.processes.values():
            if process.popen.poll() is not None:
                raise MigrationError(
                    f"{process.name} ended with status {process.popen.returncode}:\n"
                    f"{process.tail()}"
                )

    def stop(self, name: str, sig: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        process.popen.send_signal(sig)
        try:
            process.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()


def _lock(directory: Path) -> int:
    """Lock a directory until the descriptor is closed, or until this process ends.  Raises
    ``OSError``.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove_left_over() -> None:
    """Remove the directories of processes that were killed: the lock that each held is free."""
    for marker in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*/{LOCKED}"):
        with contextlib.suppress(OSError):
            if marker.parent.stat().st_uid == os.geteuid():
                fd = _lock(marker.parent)
                shutil.rmtree(marker.parent, ignore_errors=True)
                os.close(fd)


@contextlib.contextmanager
def loopback_world(
    memory_bytes: int,
    *,
    host_options: tuple[str, ...] = (),
    source_options: tuple[str, ...] = (),
    daemons: bool = True,
    config: str = "",
    program: Sequence[str] = PROGRAM,
) -> Iterator[World]:
    """Start two hosts with equal memory, a sender at the source and a receiver at the destination,
    both with the same configuration.  ``program``: the command that starts ``xen-postcopy``.
    """
    _remove_left_over()
    directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
    locked = _lock(directory)
    (directory / LOCKED).touch()
    owner, alive = os.pipe()
    world = World(directory, owner, program=program)
    try:
        for name in ("source.sock", "destination.notify"):
            try:
                socket_path(directory / name)
            except OSError as error:
                raise MigrationError(f"{directory}: {error.strerror} (see TMPDIR)") from error
        for name in ("source", "destination"):
            path = directory / f"{name}.sock"
            extra = host_options if name == "destination" else source_options
            world.start(
                name, "simulated-host", "--socket", str(path), "--memory", str(memory_bytes), *extra
            )
            setattr(world, name, SimulatedHypervisor(path))
        if daemons:
            world.config_file.write_text(config)
            start_receiver(world)
            start_sender(world)
        yield world
    except MigrationError as error:
        for name in ("sender", "receiver"):
            if name in world.processes:
                error.add_note(f"--- {name} ---\n{world.processes[name].tail()}")
        raise
    finally:
        for name in ("source", "destination"):
            with contextlib.suppress(AttributeError):
                getattr(world, name).close()
        for name in reversed(list(world.processes)):
            popen = world.processes[name].popen
            popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(DRAIN_TIMEOUT_S)
            world.stop(name)  # the second signal ends a daemon that waits for its migrations
        for fd in (owner, alive):
            os.close(fd)
        shutil.rmtree(directory, ignore_errors=True)
        os.close(locked)


def start_sender(world: World, port: int = 0) -> None:
    world.start(
        "sender", "sender", "--listen", f"127.0.0.1:{port}", "--socket", str(world.sender_socket),
        "--config", str(world.config_file), "--simulated", str(world.directory / "source.sock"),
    )  # fmt: skip


def start_receiver(world: World, port: int = 0) -> None:
    world.start(
        "receiver", "receiver", "--listen", f"127.0.0.1:{port}", "--socket",
        str(world.receiver_socket), "--config", str(world.config_file), "--simulated",
        str(world.directory / "destination.sock"),
    )  # fmt: skip
    world.port = world.ask("receiver", command="status")["port"]


def wait_for_steps(domain: SimulatedDomain, steps: int, timeout_s: float = 60.0) -> None:
    """Wait until each vCPU has done ``steps`` further steps.  A receiver pauses its guest for a
    moment when it gives up the ring.  Raises :class:`MigrationError` if the guest has ended, or
    does not do the steps in time.
    """
    start = [vcpu["count"] for vcpu in domain.report()["vcpu"]]
    deadline = time.monotonic() + timeout_s
    while True:
        report = domain.report()
        if all(
            vcpu["count"] >= before + steps
            for vcpu, before in zip(report["vcpu"], start, strict=True)
        ):
            return
        if report["state"] not in (DomainState.RUNNING.value, DomainState.PAUSED.value):
            raise MigrationError(f"the guest is {report['state']}: {report['reason']}")
        if time.monotonic() > deadline:
            raise MigrationError(f"the guest did not do {steps} steps within {timeout_s:g} s")
        time.sleep(0.01)


def verify_migrated(world: World, spec: GuestSpec) -> tuple[Verification, dict[str, Any]]:
    """Stop the guest at the destination and verify its memory.  Returns the result, and what the
    guest itself has measured.
    """
    domain = world.destination.open(spec.name)
    wait_for_steps(domain, 5 if spec.workload == "idle" else min(100, spec.rate or 100))
    domain.suspend()
    gone = [report for report in world.source.history() if report["name"] == spec.name]
    result = verify(
        domain,
        spec,
        source_positions=[vcpu["count"] for vcpu in gone[-1]["vcpu"]] if gone else None,
    )
    if not gone:
        result.problems.append("the source domain was not released")
    if any(info.name == spec.name for info in world.source.domains()):
        result.problems.append("the domain is still at the source")
    report = domain.report()
    domain.close()
    return result, guest_view(report)


def guest_view(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the vCPUs measured of their own faults, from the access to the next
    instruction.
    """
    stalls: dict[int, int] = {}
    for vcpu in report["vcpu"]:
        for bucket, count in vcpu["stalls"].items():
            stalls[bucket] = stalls.get(bucket, 0) + count
    total = sum(stalls.values())

    def quantile(q: float) -> float:
        rank = q * total
        for bucket in sorted(stalls):
            rank -= stalls[bucket]
            if rank <= 0:
                return _bucket_us(bucket)
        return 0.0

    return {
        "faults": sum(vcpu["faults"] for vcpu in report["vcpu"]),
        "p50_us": quantile(0.5),
        "p99_us": quantile(0.99),
        "max_us": max(vcpu["max_block_ns"] for vcpu in report["vcpu"]) / 1000,
        "mean_us": round(sum(vcpu["block_ns"] for vcpu in report["vcpu"]) / 1000 / total, 1)
        if total
        else 0.0,
        "block_s": [vcpu["block_ns"] / 1e9 for vcpu in report["vcpu"]],
        "steps": [vcpu["count"] for vcpu in report["vcpu"]],
        "histogram_us": [[*_limits_us(bucket), stalls[bucket]] for bucket in sorted(stalls)],
    }


def _limits_us(bucket: int) -> tuple[float, float]:
    """Return the limits of one of ``note_stall``'s buckets, in microseconds.  There are 8 buckets
    for each power of two, and one for each microsecond below 8.
    """
    if bucket < 8:
        return float(bucket), bucket + 1.0
    log, sub = bucket // 8 + 2, bucket % 8
    return (8 + sub) * 2.0 ** (log - 3), (9 + sub) * 2.0 ** (log - 3)


def _bucket_us(bucket: int) -> float:
    """Return the middle of a bucket; below 8 microseconds, its lower limit."""
    low, high = _limits_us(bucket)
    return low if bucket < 8 else (low + high) / 2
