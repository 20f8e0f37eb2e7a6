# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that are part of the project."""

from __future__ import annotations

import contextlib
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

TREE = Path(__file__).parents[2]
SOURCES = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".sh",
    ".pml",
    ".toml",
    ".yaml",
    ".yml",
    ".service",
    ".socket",
    ".target",
    ".tmpfiles",
}
"""How the names of source files end."""
FOLDERS = ("migrate", "sender", "receiver", "xenbackend")
"""The folders of the product."""


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


def ours() -> list[tuple[str, Path]]:
    """Return the Python files of the product, each with its folder."""
    return [
        (path.parts[0], path)
        for path in files()
        if path.suffix == ".py" and path.parts[0] in FOLDERS
    ]
