# SPDX-License-Identifier: GPL-2.0-or-later
"""Other programs that move memory, alternately with ours."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import qemu
from tests.bench.runs import GIB, Limits, median, migrate, row
from xenbackend.simulated.guest import GuestSpec


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

        _compare(strategy, ours, theirs)


def _compare(strategy: str, ours: list[dict[str, Any]], theirs: list[qemu.QemuResult]) -> None:
    for what, our, their, unit in (
        ("total time", [r["total_s"] for r in ours], [r.total_s for r in theirs], "s"),
        (
            "downtime",
            [r["downtime_s"] * 1000 for r in ours],
            [r.standstill_ms for r in theirs],
            "ms",
        ),
        (
            "requests",
            [float(r["pull"]["requests"]) for r in ours],
            [float(r.requests) for r in theirs],
            "",
        ),
        (
            "blocked, a request",
            [r["fault_latency_us"]["mean"] / 1000 for r in ours],
            [r.block_ms / max(r.requests, 1) for r in theirs],
            "ms",
        ),
        (
            "blocked in all",
            [sum(r["vcpu_block_s"].values()) * 1000 for r in ours],
            [r.block_ms for r in theirs],
            "ms",
        ),
        (
            "longest stall",
            [r["guest"]["max_us"] / 1000 for r in ours],
            [r.longest_ms for r in theirs],
            "ms",
        ),
    ):
        a, b = median(our), median(their)
        row(
            f"{strategy}, {what}",
            a / b if b else None,
            f"{a:.4g} {unit}",
            f"QEMU: {b:.4g} {unit}",
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
