# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration leaves of the CPUs of dom0 to other programs of nice 0.

Two programs run beside the daemons, on the same CPUs: one computes, and one sleeps 10 ms at a time.
What the first gets, of the CPU time that the daemons and the program use, stands for hotplug
scripts and QEMU, and the lateness of the second for TCP and back ends.  The simulated hosts, and so
the guest, have the other CPU if the daemons have one.

The processes are one session, because the kernel shares the CPUs out among sessions before it looks
at priorities (``CONFIG_SCHED_AUTOGROUP``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.cli.world import World
from tests.bench.runs import GIB, Limits, median, migrate, row
from xenbackend.simulated.guest import GuestSpec

COMPUTES = """
import json, sys, threading, time
done = []
threading.Thread(target=lambda: (sys.stdin.read(), done.append(1)), daemon=True).start()
while not done:
    for _ in range(10_000):
        pass
print(json.dumps({"used_s": time.process_time()}))
"""
SERVES = """
import hashlib, sys, threading, time
from migrate.lanes import scheduling
def serve():
    scheduling.be_prompt()
    while True:
        hashlib.sha256(some)
some = bytes(1 << 20)
for _ in range(int(sys.argv[1])):
    threading.Thread(target=serve, daemon=True).start()
sys.stdin.read()
print('{"used_s": %f}' % time.process_time())
"""
SLEEPS = """
import json, select, sys, time
late, wait = [], select.poll()
wait.register(sys.stdin, select.POLLIN | select.POLLHUP)
while True:
    began = time.monotonic()
    if wait.poll(10):
        break
    late.append((time.monotonic() - began) * 1000 - 10)
late.sort()
print(json.dumps({"late_p50_ms": late[len(late) // 2], "late_p99_ms": late[-len(late) // 100 - 1]}))
"""


def _place(pid: int, cpus: set[int]) -> None:
    for path in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(path.name), cpus)
        os.setpriority(os.PRIO_PROCESS, int(path.name), 0)


def _used_s(world: World) -> float:
    """Return the CPU time that the daemons have used."""
    ticks = 0
    for name in ("sender", "receiver"):
        stat = Path(f"/proc/{world.processes[name].popen.pid}/stat").read_text()
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def place(world: World, cpus: set[int], others: set[int]) -> None:
    """Have the daemons run on ``cpus``, and the hosts on ``others``, all with nice 0."""
    for name, process in world.processes.items():
        _place(process.popen.pid, others if name in ("source", "destination") else cpus)


def _start(program: str, cpus: set[int], *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    _place(process.pid, cpus)
    return process


def _results(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """End one of the programs, and return what it has measured."""
    out, _ = process.communicate(timeout=60)
    results: dict[str, float] = json.loads(out)
    return results


def at_worst(threads: int, seconds: float = 3) -> float:
    """Return the share that the program which computes gets of one CPU, beside threads that have
    the priority of those that serve faults and never wait.
    """
    serves, computes = _start(SERVES, {0}, str(threads)), _start(COMPUTES, {0})
    time.sleep(seconds)
    serving, used = _results(serves)["used_s"], _results(computes)["used_s"]
    return used / (used + serving)


@contextlib.contextmanager
def beside(world: World, cpus: set[int], found: dict[str, Any]) -> Iterator[None]:
    """Run the two programs on ``cpus``, and add to ``found`` what they have measured."""
    programs = [_start(program, cpus) for program in (COMPUTES, SLEEPS)]
    try:
        before = _used_s(world)
        yield
        daemons_s = _used_s(world) - before
        for program in programs:
            found.update(_results(program))
        found["share"] = found["used_s"] / (found["used_s"] + daemons_s)
    finally:
        for program in programs:
            program.kill()
            program.wait()


def shares(_limits: Limits, runs: int) -> None:
    """Measure on one CPU and on two what is left to others, and what the faults cost."""
    for threads in (1, 2, 4):
        left = median([at_worst(threads) for _ in range(runs)])
        what = f"share, 1 CPU, {threads} thread{'s' * (threads > 1)} that compute"
        row(what, left, "of what both use, to a program that computes", "")
    spec = GuestSpec("guest", GIB // 2, 2, "random")
    for cpus, others in (({0}, {1}), ({0, 1}, {0, 1})):
        results = []
        for _ in range(runs):
            found: dict[str, Any] = {}
            result = migrate(
                spec,
                place=functools.partial(place, cpus=cpus, others=others),
                beside=functools.partial(beside, cpus=cpus, found=found),
                strategy="postcopy",
            )
            faults = {key: result["fault_latency_us"][key] for key in ("p50", "p99")}
            results.append({**faults, "total_s": result["total_s"], **found})
        of = {key: median([r[key] for r in results]) for key in results[0]}
        text = (
            f"late {of['late_p50_ms']:.1f} ms, 99% below {of['late_p99_ms']:.1f} ms; fault "
            f"{of['p50'] / 1000:.2f} ms, 99% below {of['p99'] / 1000:.1f} ms; "
            f"{of['total_s']:.2f} s in all"
        )
        row(f"share, {len(cpus)} CPU{'s' * (len(cpus) > 1)}", of["share"], text, "")
