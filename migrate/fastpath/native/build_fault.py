# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the quick way of a fault (cffi, API mode) as ``migrate.fastpath._fault``."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parents[2]
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.include(runpy.run_path(str(ROOT / "xenbackend/native/build_ring.py"))["ffi"])
ffi.cdef((HERE / "fault_api.h").read_text())
ffi.set_source(
    "migrate.fastpath._fault",
    '#include <stddef.h>\n#include <stdint.h>\n#include "ring_api.h"\n#include "fault_api.h"',
    sources=[str((HERE / "fault.c").relative_to(ROOT))],
    include_dirs=[str(HERE.relative_to(ROOT)), "xenbackend/native"],
    depends=[str((HERE / "fault_api.h").relative_to(ROOT)), "xenbackend/native/ring_api.h"],
    extra_compile_args=FLAGS,
)
