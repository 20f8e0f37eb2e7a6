# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.bench``: medians of alternating runs, ratios first.

What is measured against what:

    bulk        1 GiB without zero pages and with an idle guest, all of total_s, against a C program
                that writes as many bytes over loopback in 4 MiB pieces, with the host's congestion
                control and with ours
    faults      2 vCPUs that touch random pages as fast as they can, against a C program's round
                trip of 64 bytes out and 4 KiB back; "pager" is from the request's arrival to its
                answer, "vCPU" from the touch to the next instruction
    readme      the table of README.md: each strategy with a cap of 125 MB/s, 512 MiB, 2 vCPUs that
                write as fast as they can; the freeze is the longest time in which one does not run
    downtime    hybrid, a guest that dirties 1000 pages a second, or all it can; 256 pages in 1 GiB
                and in 16 GiB
    peers       QEMU, an emulated guest of 1 GiB that touches half of it, alternately with ours;
                CRIU, where it runs
    patterns    what crosses the link, by what the guest does and its vCPUs
    sizes       64 MiB to 16 GiB
    scaling     structures and passes at 2^28 pfns, against 2^18
    links       with latency added: a fault against the round trip alone
    safety      what checksums, TLS and --protect cost, against a plain migration of the same guest
    share       what other programs get of one CPU, and of two, that run both daemons
    estimates   what `estimate` expects, against what the migration then takes, of four guests, as
                fast as the link allows and with a cap of 125 MB/s; the ratio is of the total times
    memory      anonymous memory of each daemon with a 4 GiB guest (its own pages are shared memory)

Memory that the machine has never handed out, or has given back to its own hypervisor, costs several
times as much at its first touch.  Each run therefore touches as much memory as it needs beforehand.
The program prints figures and asserts none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import mmap
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trustme

from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from migrate.units import human_us
from tests.bench import qemu, scale, share
from tests.bench.estimates import CAP, GUESTS, STRATEGIES, Compared, Estimating, compared
from xenbackend.simulated.guest import GuestSpec

GIB = 2**30
HERE = Path(__file__).parent


def warm(size: int) -> None:
    """Touch memory, so that the machine has it available."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


@contextlib.contextmanager
def anonymous_memory(world: World, peaks: dict[str, int]) -> Iterator[None]:
    """Keep the highest RssAnon of each daemon, in bytes.  Reading it every few milliseconds takes a
    twentieth of a CPU.
    """
    pids = {name: world.processes[name].popen.pid for name in ("sender", "receiver")}
    stopping = threading.Event()

    def look() -> None:
        while not stopping.wait(0.005):
            for name, pid in pids.items():
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon"):
                        peaks[name] = max(peaks.get(name, 0), int(line.split()[1]) * 1024)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        stopping.set()
        looking.join()


Link = Callable[[int], contextlib.AbstractContextManager[int]]
Beside = Callable[[World], contextlib.AbstractContextManager[object]]


def migrate(
    spec: GuestSpec, *, steps: int = 500, through: Link = contextlib.nullcontext,
    beside: Beside = contextlib.nullcontext, config: str = "",
    place: Callable[[World], None] = lambda _world: None, **request: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run one verified migration in a world of its own.

    ``steps``: the steps that each vCPU does before the migration.  ``through``: a relay between the
    sender and the receiver's port.  ``beside``: what runs during the migration.  ``config``: the
    configuration of both daemons.  ``place``: called before there is a guest.
    """
    with loopback_world(spec.memory_bytes, config=config) as world, through(world.port) as port:
        place(world)
        guest = world.source.create_guest(spec.to_bytes())
        wait_for_steps(guest, 5 if spec.workload == "idle" else steps)
        guest.close()
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
    def link(self, port: int, delay_ms: float) -> Iterator[int]:
        """Yield another port, from which all data is passed to this one, with a delay."""
        process = subprocess.Popen(
            [self._program, "delay", str(port), str(delay_ms)], stdout=subprocess.PIPE, text=True
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


def readme(_limits: Limits, runs: int) -> None:
    """Take the downtime target from precopy, because xl has none: xl stops after its last round."""
    spec = GuestSpec("guest", GIB // 2, 2, "random")
    policy = {"downtime_target_ms": 0.001}
    stock = None
    for what, strategy in (
        ("precopy, as by xl", "precopy"),
        ("hybrid", "hybrid"),
        ("postcopy", "postcopy"),
    ):
        results = [
            migrate(spec, strategy=strategy, bandwidth=CAP, policy=policy) for _ in range(runs)
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


def peers(_limits: Limits, runs: int) -> None:
    """QEMU's guest and ours: 1 GiB, of which one half is written at random as fast as possible, and
    the other half is zero.
    """
    criu()
    why = qemu.unavailable()
    if why:
        row("QEMU", None, "", f"does not run here: {why}")
        return
    spec = GuestSpec("guest", GIB, 1, "random", write_permille=750, zero_permille=1000)
    written = 2 * spec.working_pages  # the visits after which each page has been written
    for strategy in ("postcopy", "hybrid"):
        theirs, ours = [], []
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as directory:
                theirs.append(qemu.migrate(Path(directory), 1024, 512, rounds=strategy == "hybrid"))
            ours.append(migrate(spec, steps=written, strategy=strategy))

        def compare(what: str, our: list[float], their: list[float], unit: str) -> None:
            a, b = median(our), median(their)
            row(
                f"{strategy}, {what}",
                a / b if b else None,
                f"{a:.4g} {unit}",
                f"QEMU: {b:.4g} {unit}",
            )

        compare("total time", [r["total_s"] for r in ours], [r.total_s for r in theirs], "s")
        compare(
            "downtime",
            [r["downtime_s"] * 1000 for r in ours],
            [r.standstill_ms for r in theirs],
            "ms",
        )
        compare("requests", [r["pull"]["requests"] for r in ours], [r.requests for r in theirs], "")
        compare(
            "blocked, a request",
            [r["fault_latency_us"]["mean"] / 1000 for r in ours],
            [r.block_ms / max(r.requests, 1) for r in theirs],
            "ms",
        )
        compare(
            "blocked in all",
            [sum(r["vcpu_block_s"].values()) * 1000 for r in ours],
            [r.block_ms for r in theirs],
            "ms",
        )
        compare(
            "longest stall",
            [r["guest"]["max_us"] / 1000 for r in ours],
            [r.longest_ms for r in theirs],
            "ms",
        )
        own = median([r.downtime_ms for r in theirs])
        print(
            f"{'':43} QEMU's is from its event STOP to its event RESUME; by its own account, "
            f"{own:.0f} ms"
        )
        idle = median([r.idle_longest_ms for r in theirs])
        print(
            f"{'':43} QEMU's guest, emulated, does not run for {idle:.0f} ms at times when nobody "
            "migrates it"
        )


def criu() -> None:
    """Compare with CRIU's lazy-pages, if they run on this kernel."""
    try:
        check = subprocess.run(["criu", "check"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        row("CRIU lazy-pages", None, "", "not installed")
        return
    errors = [
        line for line in check.stderr.splitlines() if "Error" in line and "exited" not in line
    ]
    row(
        "CRIU lazy-pages",
        None,
        "",
        " ".join(errors[:1]) if check.returncode else "runs here, not measured",
    )


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
def tls_config() -> Iterator[str]:
    """Yield a configuration with an authority and a certificate of its own."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    with tempfile.TemporaryDirectory() as directory:
        files = {name: f"{directory}/{name}" for name in ("certificate", "key", "authority")}
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(files["certificate"], append=True)
        certificate.private_key_pem.write_to_path(files["key"])
        authority.cert_pem.write_to_path(files["authority"])
        lines = [f'{name} = "{path}"' for name, path in files.items()]
        yield "\n".join(["[tls]", *lines, 'peers = ["127.0.0.1"]\n'])


def safety(_limits: Limits, runs: int) -> None:
    spec = GuestSpec("guest", GIB, 2, "random")
    with tls_config() as tls:
        ways: dict[str, dict[str, Any]] = {
            "plain": {}, "checksums": {"config": "[network]\nchecksums = true\n"},
            "TLS": {"config": tls}, "--protect, every 0.25 s": {"checkpoint_every_s": 0.25},
        }  # fmt: skip
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, request in ways.items():
                results[way].append(migrate(spec, strategy="hybrid", **request))
    plain = median([r["total_s"] for r in results["plain"]])
    for way, those in results.items():
        total, down = (median([r[key] for r in those]) for key in ("total_s", "downtime_s"))
        fault, longest = (median([r["guest"][key] for r in those]) for key in ("p50_us", "max_us"))
        text = (
            f"{total:.2f} s, downtime {down * 1000:.1f} ms, fault {fault:.0f} us, "
            f"longest {longest / 1000:.1f} ms"
        )
        made = [r["checkpoints"] for r in those]
        kept, pages, pause = (
            median([c[key] for c in made]) for key in ("kept", "pages", "longest_pause_s")
        )
        protected = (
            f"{kept:.0f} checkpoints, {pages:.0f} pages, longest pause {pause * 1000:.0f} ms"
            if kept
            else ""
        )
        row(f"hybrid, {way}", total / plain, text, protected)


def shares(_limits: Limits, runs: int) -> None:
    """Measure on one CPU and on two what is left to others, and what the faults cost."""
    for threads in (1, 2, 4):
        left = median([share.at_worst(threads) for _ in range(runs)])
        what = f"share, 1 CPU, {threads} thread{'s' * (threads > 1)} that compute"
        row(what, left, "of what both use, to a program that computes", "")
    spec = GuestSpec("guest", GIB // 2, 2, "random")
    for cpus, others in (({0}, {1}), ({0, 1}, {0, 1})):
        results = []
        for _ in range(runs):
            found: dict[str, Any] = {}
            result = migrate(
                spec,
                place=functools.partial(share.place, cpus=cpus, others=others),
                beside=functools.partial(share.beside, cpus=cpus, found=found),
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


def estimates(_limits: Limits, runs: int) -> None:
    """Measure the error of estimates.  A ratio above 1: more was expected than was taken.

    There are 24 cases, and the error is taken over all of them: a fifth of the runs is enough.
    """
    all_found: list[Compared] = []
    for what, spec in GUESTS.items():
        for strategy in STRATEGIES:
            for bandwidth in (None, CAP):
                found = []
                for _ in range(max(1, runs // 5)):
                    before = Estimating(bandwidth)
                    result = migrate(
                        spec, beside=before.beside, strategy=strategy, bandwidth=bandwidth
                    )
                    found.append(compared(before.found["strategies"][strategy], result))
                all_found += found

                def of(key: str, found: list[Compared] = found) -> str:
                    expected, taken = (
                        median([getattr(one, side)[key] for one in found])
                        for side in ("expected", "taken")
                    )
                    return f"{expected:.3g} of {taken:.3g} {key.rpartition('_')[2]}"

                row(
                    f"{strategy}, {what}{', capped' if bandwidth else ''}",
                    median([one.ratio("total_s") for one in found]),
                    f"{of('total_s')}, downtime {of('downtime_ms')}",
                    f"freeze {of('freeze_ms')}",
                )
    for key in ("total_s", "downtime_ms"):
        errors = sorted(abs(one.ratio(key) - 1) for one in all_found)
        row(
            f"error of the estimate, {key}",
            None,
            f"median {median(errors):.0%}, 90% below {errors[len(errors) * 9 // 10]:.0%}",
            "",
        )


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("only", nargs="*", choices=[*SECTIONS, []], help="some of them")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        limits = Limits(directory)
        print(f"{'what':34} {'ratio':>7}  {'ours (median)':44} against")
        for name in options.only or SECTIONS:
            SECTIONS[name](limits, options.runs)
    print(
        f"{options.runs} runs of each in {time.monotonic() - started:.0f} s; every migration "
        "verified"
    )


def scaling(_limits: Limits, _runs: int) -> None:
    """Measure each value once, because 2^28 pfns are 2 GiB of arrays."""
    small, large = (scale.measure(1 << bits) for bits in (18, 28))
    for what, ms in large.items():
        row(
            what,
            ms / small[what],
            f"{scale.describe(1 << 28)}: {ms:.2f} ms",
            f"{scale.describe(1 << 18)}: {small[what]:.2f} ms",
        )


SECTIONS: dict[str, Callable[[Limits, int], None]] = {
    "bulk": bulk,
    "faults": faults,
    "readme": readme,
    "downtime": downtime,
    "peers": peers,
    "patterns": patterns,
    "sizes": sizes,
    "links": links,
    "safety": safety,
    "share": shares,
    "estimates": estimates,
    "memory": memory,
    "scaling": scaling,
}


if __name__ == "__main__":
    main()
