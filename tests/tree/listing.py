# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that are part of the project."""

from __future__ import annotations

import contextlib
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

TREE = Path(__file__).parents[2]


@cache
def files() -> list[Path]:
    """Return the files that are part of the project, relative to it."""
    with contextlib.suppress(FileNotFoundError):
        command = [
            "git",
            "-C",
            str(TREE),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        listed = subprocess.run(command, capture_output=True, check=False)
        if listed.returncode == 0:
            found = [Path(name) for name in listed.stdout.decode().split("\0") if name]
            return [path for path in found if (TREE / path).is_file()]
    # This tree was unpacked from an archive.
    ignored = [
        ".git",
        *(line.strip("/") for line in (TREE / ".gitignore").read_text().splitlines()),
    ]
    found = [path.relative_to(TREE) for path in TREE.rglob("*") if path.is_file()]
    return [
        path
        for path in found
        if not any(fnmatch(part, name) for part in path.parts for name in ignored)
    ]
