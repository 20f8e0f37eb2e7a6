# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the native modules with AddressSanitizer and UBSan: ``make sanitize``.

The arguments are pytest's.  A copy of the tree is compiled with both sanitizers, under ``build/``,
and is first on the path of every process.  Python itself is not compiled with them.  So their
libraries are preloaded, and Python takes all memory from malloc, whose blocks AddressSanitizer
watches.  Leaks are not searched for, because the interpreter keeps much of its memory until it
ends.

Daemons and simulated hosts are processes of their own.  Every process writes its reports to a file,
and any report makes the check fail, however the process has ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.native.c_files import BUILD, ROOT

TREE, REPORTS = BUILD / "sanitize/tree", BUILD / "sanitize/reports"
PARTS = (
    "migrate",
    "sender",
    "receiver",
    "xenbackend",
    "tests",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)
TESTS = (
    "unit/test_ring.py",
    "unit/test_bulk.py",
    "unit/test_records.py",
    "unit/test_page_states.py",
    "component/test_loading.py",
    "unit/test_fault_path.py",
    "conformance/test_conformance.py",
)
"""test_frames.py runs no native code; test_fault_path.py tests the frames of native code."""
MODULES = (
    "migrate.lanes._bulk",
    "migrate.lanes._records",
    "migrate.fastpath._fault",
    "xenbackend._ring",
    "xenbackend._keeper",
    "xenbackend.simulated._sim",
)
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
LOOPBACK = [
    "-m",
    "migrate.cli",
    "loopback",
    "--memory",
    "64M",
    "--vcpus",
    "2",
    "--workload",
    "random",
]
STEP_BEYOND = """
from xenbackend._ring import ffi, lib
page = ffi.new("char[99]")
lib.ring_begin(ffi.new("struct ring_state *", {"page": page}), 0)
"""
"""A page that is too small.  The check has to find this; otherwise it would find nothing."""


def build() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    TREE.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "corpus", "xenlab")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, TREE / part, ignore=ignored)
        else:
            shutil.copy2(ROOT / part, TREE)
    environment = dict(os.environ, CFLAGS=FLAGS, LDFLAGS=FLAGS)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=TREE, env=environment, check=True)


def environment() -> dict[str, str]:
    def library(name: str) -> str:
        command = ["gcc", f"-print-file-name={name}"]
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
        return str(Path(asked.stdout.strip()).resolve())

    return dict(
        os.environ,
        LD_PRELOAD=f"{library('libasan.so')} {library('libubsan.so')}",
        PYTHONPATH=str(TREE),
        PYTHONMALLOC="malloc",
        ASAN_OPTIONS=f"detect_leaks=0:log_path={REPORTS}/asan",
        UBSAN_OPTIONS=f"print_stacktrace=1:log_path={REPORTS}/ubsan",
    )


def reports() -> list[Path]:
    return sorted(REPORTS.iterdir())


def main() -> None:
    build()
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir()
    env = environment()

    def python(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=TREE,
            env=env,
            text=True,
            check=False,
            capture_output=capture,
        )

    files = ", ".join(f"{module}.__file__" for module in MODULES)
    where = python("-c", f"import {', '.join(MODULES)}; print({files})", capture=True)
    if where.stdout.count(f"{TREE}/") != len(MODULES):
        sys.exit(f"sanitize: Python finds other modules: {where.stdout}{where.stderr}")
    seen = python("-c", STEP_BEYOND, capture=True)
    if seen.returncode == 0 or not reports():
        sys.exit(f"sanitize: a deliberate step beyond a buffer is not seen: {seen.stderr}")
    for report in reports():
        report.unlink()

    tests = [f"tests/{name}" for name in TESTS]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    status = python(*pytest, *sys.argv[1:], *tests).returncode
    status = python(*LOOPBACK).returncode or status
    for report in reports():
        print(f"---- {report.name}\n{report.read_text()}")
    if reports() or status:
        sys.exit(f"sanitize: {len(reports())} reports, of {REPORTS}")
    print("sanitize: no reports")


if __name__ == "__main__":
    main()
