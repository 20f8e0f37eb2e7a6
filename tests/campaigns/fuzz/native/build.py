# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the fuzz targets of the native modules: libFuzzer, AddressSanitizer, UBSan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from migrate.fastpath.api import FAULT, PAGE, ZERO
from tests.native.c_files import FUZZ, INCLUDE, run_all

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
TARGETS: dict[str, list[str]] = {"faults": [], "ring": ["xenbackend/native/ring.c"], "bulk": []}
"""The files with which each target is linked; a target may include others itself."""
FLAGS = [
    "-g",
    "-O1",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fno-sanitize-recover=undefined",
]


def _kind(name: str, kind: Any) -> str:
    numbers = ", ".join(str(byte) for byte in bytes(kind.bytes)[: kind.size])
    value = f"{{ .bytes = {{ {numbers} }}, .size = {kind.size}, .pfn_at = {kind.pfn_at} }}"
    return f"#define {name}_KIND {value}\n"


def write_kinds() -> None:
    """Write the file that faults.c includes, with the frames of the codec."""
    FUZZ.mkdir(parents=True, exist_ok=True)
    kinds = {"FAULT": FAULT, "PAGE": PAGE, "ZERO": ZERO}
    (FUZZ / "kinds.h").write_text("".join(_kind(name, kind) for name, kind in kinds.items()))


def build() -> dict[str, Path]:
    """Build the programs, and return them by their targets' names."""
    write_kinds()
    programs = {name: FUZZ / name for name in TARGETS}
    compiler = ["clang", *FLAGS, "-fsanitize=fuzzer,address,undefined", *INCLUDE]
    targets = {name: [str(HERE / f"{name}.c"), *sources] for name, sources in TARGETS.items()}
    failed = run_all([*compiler, *targets[name], "-o", str(programs[name])] for name in targets)
    if failed:
        sys.exit("fuzz: the native targets do not compile")
    return programs
