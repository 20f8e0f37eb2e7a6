# SPDX-License-Identifier: GPL-2.0-or-later
"""``make coverage-c``: the lines of the native modules that their tests reach, by gcov.

A copy of the tree is compiled with counters, so that the modules of the tree itself are not
changed.  A process that is killed loses its counts, and the tests of real Xen's module run
elsewhere.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).parents[2]
COPY = TREE / "build/coverage/c"
OBJECTS = "objects"
FOLDERS = ("migrate", "sender", "receiver", "xenbackend", "tests")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = (
    "unit/test_ring.py",
    "unit/test_bulk.py",
    "unit/test_records.py",
    "unit/test_fault_path.py",
    "component/test_loading.py",
    "component/test_simulated_host.py",
    "conformance/test_conformance.py",
    "system/test_migration.py",
)
ELSEWHERE = "xenbackend/libxenctrl"


def build() -> None:
    """Compile the copy.  The counters are atomic, because threads share them."""
    shutil.rmtree(COPY, ignore_errors=True)
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(TREE / folder, COPY / folder, ignore=ignored)
    for name in FILES:
        shutil.copy(TREE / name, COPY)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", OBJECTS]
    flags = {"CFLAGS": "--coverage -fprofile-update=atomic", "LDFLAGS": "--coverage"}
    subprocess.run(command, cwd=COPY, env={**os.environ, **flags}, check=True)


def test() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in TESTS]
    subprocess.run(command, cwd=COPY, env={**os.environ, "PYTHONPATH": str(COPY)}, check=True)


def lines_of(source: Path) -> dict[int, int]:
    """Return how often each line of a file was run."""
    folder = COPY / OBJECTS / source.parent
    command = ["gcov", "--json-format", "--stdout", "-o", str(folder), str(source)]
    done = subprocess.run(command, cwd=COPY, capture_output=True, check=True)
    data = gzip.decompress(done.stdout) if done.stdout[:2] == b"\x1f\x8b" else done.stdout
    counts: dict[int, int] = {}
    for document in data.splitlines():
        for file in json.loads(document)["files"]:
            if file["file"] == str(source):
                for line in file["lines"]:
                    number = line["line_number"]
                    counts[number] = counts.get(number, 0) + line["count"]
    return counts


def main() -> None:
    build()
    test()
    print(f"\n{'Name':40} {'Lines':>5} {'Miss':>5} {'Cover':>6}   Missing")
    for path in sorted(COPY.glob("**/native/*.c")):
        source = path.relative_to(COPY)
        if (
            source.parts[0] == "tests"
            or source.name.startswith("_")
            or source.is_relative_to(ELSEWHERE)
        ):
            continue
        counts = lines_of(source)
        missed = sorted(number for number, count in counts.items() if not count)
        share = 1 - len(missed) / len(counts)
        missing = " ".join(map(str, missed))
        print(f"{source!s:40} {len(counts):5} {len(missed):5} {share:6.0%}   {missing}")
    print(f"{ELSEWHERE} runs on a real Xen only: make xenlab")


if __name__ == "__main__":
    main()
