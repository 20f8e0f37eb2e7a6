# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.bench``: medians of alternating runs, ratios first.

What is measured against what:

    bulk        1 GiB without zero pages and with an idle guest, all of total_s, against a C program
                that writes as many bytes over loopback in 4 MiB pieces, with the host's congestion
                control and with ours
    faults      2 vCPUs that touch random pages as fast as they can, against a C program's round
                trip of 64 bytes out and 4 KiB back; "pager" is from the request's arrival to its
                answer, "vCPU" from the touch to the next instruction
    readme      the table of README.md: each strategy over a link of 125 MB/s, 512 MiB, 2 vCPUs that
                write as fast as they can; the freeze is the longest time in which one does not run
    downtime    hybrid, a guest that dirties 1000 pages a second, or all it can; 256 pages in 1 GiB
                and in 16 GiB
    peers       QEMU, an emulated guest of 1 GiB that touches half of it, alternately with ours;
                CRIU, where it runs
    profile     the CPU time, waits and page faults of each thread of both ends, over one migration,
                with the machine's memory used before, and not
    oracle      how long vCPUs wait if the push sends pages in the order in which the guest touches
                them, against today's order (in a model, without processes)
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
import tempfile
import time
from collections.abc import Callable

from tests.bench import estimates, oracle, peers, profile, safety, scale, share, speed
from tests.bench.runs import Limits


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


SECTIONS: dict[str, Callable[[Limits, int], None]] = {
    "bulk": speed.bulk,
    "faults": speed.faults,
    "readme": speed.readme,
    "downtime": speed.downtime,
    "peers": peers.peers,
    "profile": profile.profile,
    "oracle": oracle.oracle,
    "patterns": speed.patterns,
    "sizes": speed.sizes,
    "links": speed.links,
    "safety": safety.safety,
    "share": share.shares,
    "estimates": estimates.estimates,
    "memory": speed.memory,
    "scaling": scale.scaling,
}


if __name__ == "__main__":
    main()
