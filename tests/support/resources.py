# SPDX-License-Identifier: GPL-2.0-or-later
"""The resources that a process holds: memory, descriptors, threads."""

from __future__ import annotations

import os
from pathlib import Path

from migrate.cli.world import World


def holds(world: World, which: str) -> dict[str, int]:
    process = Path(f"/proc/{world.processes[which].popen.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "MiB": int(status["VmRSS"].split()[0]) // 1024,
        "descriptors": len(os.listdir(process / "fd")),
        "threads": int(status["Threads"]),
    }
