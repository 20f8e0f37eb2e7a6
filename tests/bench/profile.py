# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the time of one migration goes: the CPU time, the waits and the page faults of each thread.

The kernel counts these for each thread (``/proc/PID/task/TID``).  A worker thread of trio has the
name of the function that it runs, so what a thread has used since the last look is added to the
name that it has now.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from migrate.cli.world import World
from tests.bench.runs import GIB, Limits, looking, median, migrate, row
from xenbackend.simulated.guest import GuestSpec

LOOK_EVERY_S = 0.05
SHOWN_S = 0.005
"""A thread that uses less CPU time is not shown."""
GUESTS = {
    "precopy, idle": (GuestSpec("guest", GIB, 2, "idle", zero_permille=0), "precopy"),
    "hybrid, random": (GuestSpec("guest", GIB, 2, "random"), "hybrid"),
    "postcopy, random": (GuestSpec("guest", GIB, 2, "random"), "postcopy"),
}


def _counted(task: Path) -> Counter[str]:
    """Return what a thread has used since its start."""
    stat = (task / "stat").read_text().rpartition(")")[2].split()
    cpu_ns, ready_ns, _turns = map(int, (task / "schedstat").read_text().split())
    status = dict(
        line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line
    )
    return Counter(
        cpu_ns=cpu_ns,
        ready_ns=ready_ns,
        user=int(stat[11]),
        system=int(stat[12]),
        faults=int(stat[7]) + int(stat[9]),
        wakeups=int(status["voluntary_ctxt_switches"]),
    )


@dataclass
class Profile:
    """What each thread of a world has used, by its process and name."""

    used: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @contextlib.contextmanager
    def beside(self, world: World) -> Iterator[None]:
        before: dict[Path, Counter[str]] = {}
        self._look(world, before)
        self.used.clear()
        with looking(functools.partial(self._look, world, before), LOOK_EVERY_S):
            yield

    def _look(self, world: World, before: dict[Path, Counter[str]]) -> None:
        for process, running in world.processes.items():
            for task in Path(f"/proc/{running.popen.pid}/task").iterdir():
                with contextlib.suppress(OSError):  # a thread that has ended
                    now = _counted(task)
                    name = (task / "comm").read_text().strip()
                    self.used[process, name] += now - before.get(task, Counter())
                    before[task] = now


def profile(_limits: Limits, runs: int) -> None:
    """Show the threads of three kinds of migrations.  The ratio is that of CPU time to total time.

    Memory that the machine has never used, or has given back, costs more at its first touch: so
    each kind is run with the memory touched beforehand, and without.
    """
    for what, (spec, strategy) in GUESTS.items():
        for memory, warmed in (("used memory", True), ("as it is", False)):
            profiles, totals = [], []
            for _ in range(runs):
                profiles.append(Profile())
                result = migrate(spec, beside=profiles[-1].beside, warmed=warmed, strategy=strategy)
                totals.append(result["total_s"])
            total_s = median(totals)
            row(f"{what}, {memory}", None, f"{total_s:.2f} s in all", "")
            names = {name for one in profiles for name in one.used}
            used = {
                name: {
                    key: median([float(one.used[name][key]) for one in profiles])
                    for key in ("cpu_ns", "ready_ns", "user", "system", "faults", "wakeups")
                }
                for name in names
            }
            for name in sorted(names, key=lambda name: (name[0], -used[name]["cpu_ns"])):
                _show(name, used[name], total_s)


def _show(name: tuple[str, str], used: dict[str, float], total_s: float) -> None:
    cpu_s = used["cpu_ns"] / 1e9
    if cpu_s < SHOWN_S:
        return
    kernel = used["system"] / max(used["user"] + used["system"], 1)
    row(
        f"  {name[0]}: {name[1]}",
        cpu_s / total_s,
        f"{cpu_s:.3f} s of CPU, {kernel:.0%} in the kernel",
        f"ready without a CPU {used['ready_ns'] / 1e9:.3f} s, "
        f"{used['wakeups']:.0f} waits, {used['faults']:.0f} page faults",
    )
