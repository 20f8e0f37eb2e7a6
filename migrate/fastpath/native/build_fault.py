# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the fast path of a fault (cffi, API mode) as ``migrate.fastpath._fault``."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parents[2]
FOLDER = HERE.relative_to(ROOT)
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]
SOURCES = ("lock", "checksum", "frame", "lane", "source", "destination")
SEEN_BY_PYTHON = ("page_states.h", "fault_api.h")
RING = "xenbackend/native"

ffi = FFI()
ffi.include(runpy.run_path(str(ROOT / RING / "build_ring.py"))["ffi"])
for header in SEEN_BY_PYTHON:
    ffi.cdef((HERE / header).read_text())
ffi.set_source(
    "migrate.fastpath._fault",
    '#include "internal.h"',
    sources=[str(FOLDER / f"{name}.c") for name in SOURCES],
    include_dirs=[str(FOLDER), RING],
    depends=[str(FOLDER / name) for name in (*SEEN_BY_PYTHON, "internal.h")]
    + [f"{RING}/ring_api.h", f"{RING}/vm_event.h"],
    extra_compile_args=FLAGS,
)
