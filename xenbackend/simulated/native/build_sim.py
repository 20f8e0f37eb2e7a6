# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the simulated hypervisor (cffi, API mode) as ``xenbackend.simulated._sim``."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parent.parent.parent
SOURCES = ("hypercalls.c", "held.c", "program.c", "pause.c", "paging.c", "balloon.c", "vcpu.c")
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.cdef((HERE / "api.h").read_text())
ffi.set_source(
    "xenbackend.simulated._sim",
    '#include <stddef.h>\n#include <stdint.h>\n#include "api.h"',
    sources=[str((HERE / name).relative_to(ROOT)) for name in SOURCES],
    include_dirs=[str(HERE.relative_to(ROOT))],
    depends=[str((HERE / name).relative_to(ROOT)) for name in ("api.h", "internal.h", "host.h")],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
)
