# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast pages move, how long a fault and the downtime take, and what crosses the link."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.cli.world import World
from migrate.units import human_us
from tests.bench.runs import CAP, GIB, Limits, looking, median, migrate, row, warm
from xenbackend.simulated.guest import GuestSpec

LAN_MS = 0.05
"""The time that a piece of data takes through a local network, in one direction."""


def bulk(limits: Limits, runs: int) -> None:
    spec = GuestSpec("guest", GIB, 1, "idle", zero_permille=0)
    for strategy in ("precopy", "postcopy"):
        ours, theirs, cubic, into = [], [], [], []
        for _ in range(runs):
            theirs += limits.run("bulk", GIB)
            cubic += limits.run("bulk", GIB, "cubic")
            warm(2 * GIB)
            into += limits.run("into", GIB, "cubic")
            ours.append(GIB / migrate(spec, strategy=strategy)["total_s"])
        ours_median = median(ours)
        text = f"{ours_median / 1e9:.2f} GB/s ({min(ours) / 1e9:.2f} to {max(ours) / 1e9:.2f})"
        limit = (
            f"C over loopback: {median(theirs) / 1e9:.2f} GB/s "
            f"({median(cubic) / 1e9:.2f} with our congestion control)"
        )
        row(f"bulk, {strategy}", ours_median / median(theirs), text, limit)
        limit = f"C from memory into fresh memory: {median(into) / 1e9:.2f} GB/s"
        row(f"bulk, {strategy}", ours_median / median(into), "", limit)


def faults(limits: Limits, runs: int) -> None:
    for vcpus, bandwidth in ((1, 4 * 2**20), (1, None), (2, None)):
        spec = GuestSpec("guest", GIB // 32 if bandwidth else GIB, vcpus, "random")
        round_trips, chains, pager, pager_p99, guest, guest_p99, longest = (
            [],
            [],
            [],
            [],
            [],
            [],
            [],
        )
        for _ in range(runs):
            round_trips.append(limits.run("roundtrip", 10_000)[0])
            chains.append(limits.run("chain", 10_000)[0])
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
        text = (
            f"median {median(guest):.0f} us, 99% below {median(guest_p99):.0f} us, "
            f"longest {median(longest) / 1000:.1f} ms"
        )
        limit = f"the same wake-ups in C: {median(chains):.0f} us"
        row(f"fault, vCPU, {where}", median(guest) / median(round_trips), text, limit)


def downtime(_limits: Limits, runs: int) -> None:
    def measure(what: str, spec: GuestSpec) -> float:
        times = [migrate(spec, strategy="hybrid")["downtime_s"] * 1000 for _ in range(runs)]
        row(
            f"downtime, hybrid, {what}",
            None,
            f"{median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})",
            "",
        )
        return median(times)

    measure("1000 dirty/s", GuestSpec("guest", GIB, 2, "random", rate=500))
    measure("as fast as it can", GuestSpec("guest", GIB, 2, "random"))
    # The dirty set does not depend on the length of a round.  Most of 16 GiB is zero, because the
    # machine has no more memory.
    dirty: dict[str, Any] = {"rate": 500, "working_set_bytes": 256 * 4096}
    small = measure("256 dirty", GuestSpec("guest", GIB, 2, "random", **dirty))
    large = measure(
        "256 dirty, 16 GiB", GuestSpec("guest", 16 * GIB, 2, "random", zero_permille=970, **dirty)
    )
    row("downtime, 16 GiB to 1 GiB", large / small, "", "")


def readme(limits: Limits, runs: int) -> None:
    """Measure over a link of 1 Gbit/s, which a cap of the bandwidth would not be: no cap applies
    while the guest is suspended.  xl has no downtime target, so precopy has none either: xl stops
    after its last round.
    """
    spec = GuestSpec("guest", GIB // 2, 2, "random")
    stock = None
    for what, strategy in (
        ("precopy, as by xl", "precopy"),
        ("hybrid", "hybrid"),
        ("postcopy", "postcopy"),
    ):
        results = [
            migrate(
                spec,
                through=lambda port: limits.link(port, LAN_MS, CAP),
                strategy=strategy,
                policy={"downtime_target_ms": 0.001},
            )
            for _ in range(runs)
        ]
        frozen, done = (
            median(values)
            for values in (
                [max(r["downtime_s"], r["guest"]["max_us"] / 1e6) for r in results],
                [r["total_s"] for r in results],
            )
        )
        stock = stock or frozen
        text = f"frozen for {human_us(frozen * 1e6)}, done after {done:.1f} s"
        row(f"readme, {what}", frozen / stock, text, "")


def patterns(_limits: Limits, runs: int) -> None:
    """Show what crosses the link, by what the guest does."""
    for workload in ("random", "sequential", "hotset", "stride"):
        for vcpus in (1, 2, 8):
            spec = GuestSpec("guest", GIB, vcpus, workload)
            results = [migrate(spec, strategy="postcopy") for _ in range(runs)]
            requests = median([r["pull"]["requests"] for r in results])
            text = (
                f"{requests:.0f} requests, {requests / spec.working_pages:.2%} of the working set; "
                f"blocked {median([sum(r['vcpu_block_s'].values()) for r in results]) / vcpus:.2f} "
                f"s a vCPU, longest {median([r['guest']['max_us'] for r in results]) / 1000:.1f} ms"
            )
            row(f"{workload}, {vcpus} vCPU{'s' * (vcpus > 1)}", None, text, "")


def sizes(_limits: Limits, runs: int) -> None:
    for memory_bytes, zero in ((64 * 2**20, 250), (GIB, 250), (16 * GIB, 970)):
        touched = min(memory_bytes, GIB) // 2
        spec = GuestSpec(
            "guest", memory_bytes, 2, "random", zero_permille=zero, working_set_bytes=touched
        )
        for strategy in ("hybrid", "postcopy"):
            results = [migrate(spec, strategy=strategy) for _ in range(runs)]
            total, down = (median([r[key] for r in results]) for key in ("total_s", "downtime_s"))
            text = f"{total:.2f} s, downtime {down * 1000:.1f} ms"
            row(f"{memory_bytes / GIB:g} GiB, {strategy}", None, text, f"{zero / 10:g}% of it zero")


def links(limits: Limits, runs: int) -> None:
    """Measure a link with latency: the cost of a fault compared with the round trip."""
    for delay_ms in (0.2, 1.0, 10.0):
        for workload in ("random", "sequential", "stride"):
            spec = GuestSpec("guest", GIB // 4, 2, workload)
            results = []
            for _ in range(runs):
                results.append(
                    migrate(
                        spec, through=lambda port: limits.link(port, delay_ms), strategy="postcopy"
                    )
                )
            p50 = median([r["fault_latency_us"]["p50"] for r in results])
            text = (
                f"median {p50 / 1000:.2f} ms, "
                f"{median([r['pull']['requests'] for r in results]):.0f} requests, "
                f"{median([r['total_s'] for r in results]):.2f} s in all"
            )
            row(
                f"{workload}, {delay_ms:g} ms each way",
                p50 / (2000 * delay_ms),
                text,
                "the round trip alone",
            )


@contextlib.contextmanager
def anonymous_memory(world: World, peaks: dict[str, int]) -> Iterator[None]:
    """Keep the highest RssAnon of each daemon, in bytes.  Reading it every few milliseconds takes a
    twentieth of a CPU.
    """
    pids = {name: world.processes[name].popen.pid for name in ("sender", "receiver")}

    def look() -> None:
        for name, pid in pids.items():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peaks[name] = max(peaks.get(name, 0), int(line.split()[1]) * 1024)

    with looking(look, 0.005):
        yield


def memory(_limits: Limits, _runs: int) -> None:
    for strategy in ("precopy", "hybrid", "postcopy"):
        peaks: dict[str, int] = {}
        migrate(
            GuestSpec("guest", 4 * GIB, 2, "random", zero_permille=500),
            beside=functools.partial(anonymous_memory, peaks=peaks),
            strategy=strategy,
        )
        text = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items())
        row(f"memory, 4 GiB guest, {strategy}", None, text, "")
