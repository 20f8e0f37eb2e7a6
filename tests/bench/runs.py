# SPDX-License-Identifier: GPL-2.0-or-later
"""What every section uses: a verified migration in a world of its own, the C program with the
limits, and a line of the table.
"""

from __future__ import annotations

import contextlib
import mmap
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from xenbackend.simulated.guest import GuestSpec

GIB = 2**30
CAP = 125e6
"""The bandwidth of a link of 1 Gbit/s, in bytes a second."""
HERE = Path(__file__).parent


def warm(size: int) -> None:
    """Touch memory, so that the machine has it available."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


@contextlib.contextmanager
def looking(look: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call ``look`` again and again in a thread, and one more time at the end."""
    stopping = threading.Event()

    def again() -> None:
        while not stopping.wait(every_s):
            look()

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        look()


Link = Callable[[int], contextlib.AbstractContextManager[int]]
Beside = Callable[[World], contextlib.AbstractContextManager[object]]


def migrate(
    spec: GuestSpec, *, steps: int = 500, through: Link = contextlib.nullcontext,
    beside: Beside = contextlib.nullcontext, config: str = "",
    place: Callable[[World], None] = lambda _world: None, warmed: bool = True, **request: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run one verified migration in a world of its own.

    ``steps``: the steps that each vCPU does before the migration.  ``through``: a relay between the
    sender and the receiver's port.  ``beside``: what runs during the migration.  ``config``: the
    configuration of both daemons.  ``place``: called before there is a guest.  ``warmed``: the
    machine's memory is touched beforehand.
    """
    with loopback_world(spec.memory_bytes, config=config) as world, through(world.port) as port:
        place(world)
        guest = world.source.create_guest(spec.to_bytes())
        wait_for_steps(guest, 5 if spec.workload == "idle" else steps)
        guest.close()
        if warmed:
            warm(min(spec.memory_bytes, 2 * GIB) + GIB // 2)
        with beside(world):
            answer = world.ask(
                "sender",
                command="migrate",
                domain=spec.name,
                destination=f"127.0.0.1:{port}",
                **request,
            )
        result: dict[str, Any] = answer["result"]
        verification, result["guest"] = verify_migrated(world, spec)
        assert verification.ok, verification.problems
        return result


class Limits:
    """The C program with the limits."""

    def __init__(self, directory: str):
        self._program = f"{directory}/limits"
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-pthread", "-o", self._program, str(HERE / "limits.c")],
            check=True,
        )

    def run(self, *arguments: object) -> list[float]:
        out = subprocess.run(
            [self._program, *map(str, arguments)], check=True, capture_output=True, text=True
        ).stdout
        return [float(word) for word in out.split()]

    @contextlib.contextmanager
    def link(self, port: int, delay_ms: float, bytes_per_s: float = 0) -> Iterator[int]:
        """Yield another port, from which all data is passed to this one, with a delay and at a
        rate (0: as fast as possible).
        """
        process = subprocess.Popen(
            [self._program, "link", *map(str, (port, delay_ms, bytes_per_s))],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def median(values: list[float]) -> float:
    return statistics.median(values)


def row(what: str, ratio: float | None, ours: str, limit: str) -> None:
    print(
        f"{what:34} {f'{ratio:.2f}' if ratio is not None else '':>7}  {ours:44} {limit}", flush=True
    )
