# SPDX-License-Identifier: GPL-2.0-or-later
"""The C files of the project, and how the checks compile them."""

from __future__ import annotations

import os
import runpy
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/native"
FUZZ = BUILD / "fuzz"
FLAGS: list[str] = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]
INCLUDE = [
    "-Ixenbackend/native",
    "-Imigrate/fastpath/native",
    "-Imigrate/lanes/native",
    f"-I{FUZZ.relative_to(ROOT)}",
]

T = TypeVar("T")
R = TypeVar("R")


def c_files() -> list[Path]:
    """Return all C files, relative to the project's root, except those that cffi generates
    (``_....c``).
    """
    folders = (ROOT / name for name in ("migrate", "xenbackend", "tests"))
    found = (path for folder in folders for path in folder.rglob("*.c"))
    return sorted(path.relative_to(ROOT) for path in found if not path.name.startswith("_"))


def in_parallel(function: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
    """Call the function for as many arguments at once as there are processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(function, arguments)


def run_all(commands: Iterable[Sequence[str]]) -> int:
    """Run the commands in the project's root, and print their output.  Returns how many failed."""

    def run(command: Sequence[str]) -> bool:
        done = subprocess.run(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.stdout or done.returncode:
            print(f"$ {' '.join(command)}\n{done.stdout}", flush=True)
        return done.returncode != 0

    return sum(in_parallel(run, commands))
