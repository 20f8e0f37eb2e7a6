# SPDX-License-Identifier: GPL-2.0-or-later
"""The resources that a process holds: memory, descriptors, threads."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
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


def descriptors(world: World, which: str) -> str:
    """Return what the open descriptors of a daemon are, and how many of each."""
    folder = Path(f"/proc/{world.processes[which].popen.pid}/fd")
    found: Counter[str] = Counter()
    for one in folder.iterdir():
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            found[re.sub(r"\d+|[0-9a-f]{32}", "N", os.readlink(one))] += 1
    return ", ".join(f"{count} {what}" for what, count in found.most_common())
