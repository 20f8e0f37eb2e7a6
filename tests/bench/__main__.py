"""``python -m tests.bench``: medians of alternating runs, ratios first.

What is measured against what:

    bulk        1 GiB without zero pages and with an idle guest, all of total_s, against a C program that writes as many bytes
                over loopback in 4 MiB pieces, with the host's congestion control and with ours
    faults      2 vCPUs that touch random pages as fast as they can, against a C program's round trip of 64 bytes
                out and 4 KiB back; "pager" is from the request's arrival to its answer, "vCPU" from the touch to the next
                instruction
    downtime    hybrid, a guest that dirties 1000 pages a second
    memory      anonymous memory of each daemon with a 4 GiB guest (its own pages are shared memory)

Memory that the machine has never handed out, or has given back to its own hypervisor, costs several times as much at its first
touch; each run therefore touches as much memory as it needs beforehand.  No figure is asserted: this prints.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from migrate.loopback import World, loopback_world, verify_migrated, wait_for_steps
from xenbackend.simulated.guest import GuestSpec

GIB = 2**30
HERE = Path(__file__).parent


def warm(size: int) -> None:
    """Have the machine's memory at hand."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


class AnonymousMemory(threading.Thread):
    """The highest RssAnon of each daemon, in bytes, looked at every few milliseconds."""

    def __init__(self, world: World):
        super().__init__(daemon=True)
        self._pids = {name: world.processes[name].popen.pid for name in ("sender", "receiver")}
        self._stopping = threading.Event()
        self.peak = dict.fromkeys(self._pids, 0)

    def run(self) -> None:
        while not self._stopping.wait(0.005):
            for name, pid in self._pids.items():
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon"):
                        self.peak[name] = max(self.peak[name], int(line.split()[1]) * 1024)

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def migrate(spec: GuestSpec, **request: Any) -> dict[str, Any]:
    """One verified migration in a world of its own."""
    with loopback_world(spec.memory_bytes) as world:
        guest = world.source.create_guest(spec.to_bytes())
        wait_for_steps(guest, 5 if spec.workload == "idle" else 500)
        guest.close()
        warm(spec.memory_bytes + GIB // 2)
        memory = AnonymousMemory(world)
        memory.start()
        answer = world.ask(
            "sender", command="migrate", domain=spec.name, destination=f"127.0.0.1:{world.port}", **request
        )
        memory.stop()
        result: dict[str, Any] = answer["result"]
        verification, result["guest"] = verify_migrated(world, spec)
        assert verification.ok, verification.problems
        result["daemon_memory"] = memory.peak
        return result


class Limits:
    """The C program."""

    def __init__(self, directory: str):
        self._program = f"{directory}/limits"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", self._program, str(HERE / "limits.c")], check=True)

    def run(self, *arguments: object) -> list[float]:
        out = subprocess.run([self._program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout
        return [float(word) for word in out.split()]


def median(values: list[float]) -> float:
    return statistics.median(values)


def row(what: str, ratio: float | None, ours: str, limit: str) -> None:
    print(f"{what:34} {f'{ratio:.2f}' if ratio is not None else '':>7}  {ours:44} {limit}", flush=True)


def bulk(limits: Limits, runs: int) -> None:
    spec = GuestSpec("guest", GIB, 1, "idle", zero_permille=0)
    for strategy in ("precopy", "postcopy"):
        ours, theirs, cubic = [], [], []
        for _ in range(runs):
            theirs += limits.run("bulk", GIB)
            cubic += limits.run("bulk", GIB, "cubic")
            ours.append(GIB / migrate(spec, strategy=strategy)["total_s"])
        text = f"{median(ours) / 1e9:.2f} GB/s ({min(ours) / 1e9:.2f} to {max(ours) / 1e9:.2f})"
        row(
            f"bulk, {strategy}",
            median(ours) / median(theirs),
            text,
            f"C over loopback: {median(theirs) / 1e9:.2f} GB/s ({median(cubic) / 1e9:.2f} with our congestion control)",
        )


def faults(limits: Limits, runs: int) -> None:
    for vcpus, bandwidth in ((1, 4 * 2**20), (1, None), (2, None)):
        spec = GuestSpec("guest", GIB // 32 if bandwidth else GIB, vcpus, "random")
        round_trips, pager, pager_p99, guest, guest_p99, longest = [], [], [], [], [], []
        for _ in range(runs):
            round_trips.append(limits.run("roundtrip", 10_000)[0])
            result = migrate(spec, strategy="postcopy", bandwidth=bandwidth)
            pager.append(result["fault_latency_us"]["p50"])
            pager_p99.append(result["fault_latency_us"]["p99"])
            guest.append(result["guest"]["p50_us"])
            guest_p99.append(result["guest"]["p99_us"])
            longest.append(result["guest"]["max_us"])
        where = f"{vcpus} vCPU{'s' * (vcpus > 1)}, link {'idle' if bandwidth else 'busy'}"
        limit = f"C round trip: {median(round_trips):.0f} us"
        text = f"median {median(pager):.0f} us, 99% below {median(pager_p99):.0f} us"
        row(f"fault, pager, {where}", median(pager) / median(round_trips), text, limit)
        text = f"median {median(guest):.0f} us, 99% below {median(guest_p99):.0f} us, longest {median(longest) / 1000:.1f} ms"
        row(f"fault, vCPU, {where}", median(guest) / median(round_trips), text, "")


def downtime(runs: int) -> None:
    spec = GuestSpec("guest", GIB, 2, "random", rate=500)
    results = [migrate(spec, strategy="hybrid") for _ in range(runs)]
    times = [result["downtime_s"] * 1000 for result in results]
    row("downtime, hybrid, 1000 dirty/s", None, f"{median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})", "")
    times = [migrate(GuestSpec("guest", GIB, 2, "random"), strategy="hybrid")["downtime_s"] * 1000 for _ in range(runs)]
    row(
        "downtime, hybrid, as fast as it can",
        None,
        f"{median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})",
        "",
    )


def memory() -> None:
    for strategy in ("precopy", "hybrid", "postcopy"):
        result = migrate(GuestSpec("guest", 4 * GIB, 2, "random", zero_permille=500), strategy=strategy)
        peaks = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in result["daemon_memory"].items())
        row(f"memory, 4 GiB guest, {strategy}", None, peaks, "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("only", nargs="*", choices=["bulk", "faults", "downtime", "memory", []], help="some of them")
    options = parser.parse_args()
    only = options.only or ["bulk", "faults", "downtime", "memory"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        limits = Limits(directory)
        print(f"{'what':34} {'ratio':>7}  {'ours (median)':44} limit")
        if "bulk" in only:
            bulk(limits, options.runs)
        if "faults" in only:
            faults(limits, options.runs)
        if "downtime" in only:
            downtime(options.runs)
        if "memory" in only:
            memory()
    print(f"{options.runs} runs of each in {time.monotonic() - started:.0f} s; every migration verified")


if __name__ == "__main__":
    main()
