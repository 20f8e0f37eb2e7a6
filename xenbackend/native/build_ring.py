# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the paging ring's native half (cffi, API mode) as ``xenbackend._ring``."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parent.parent
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.cdef((HERE / "ring_api.h").read_text())
ffi.set_source(
    "xenbackend._ring",
    '#include <stdint.h>\n#include "ring_api.h"',
    sources=[str((HERE / "ring.c").relative_to(ROOT))],
    include_dirs=[str(HERE.relative_to(ROOT))],
    depends=[str((HERE / name).relative_to(ROOT)) for name in ("ring_api.h", "vm_event.h")],
    extra_compile_args=FLAGS,
)
