# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the keeper's native half (cffi, API mode) as ``xenbackend._keeper``."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parent.parent
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.cdef((HERE / "keeper_api.h").read_text())
ffi.set_source(
    "xenbackend._keeper",
    '#include <stddef.h>\n#include <stdint.h>\n#include "keeper_api.h"',
    sources=[str((HERE / "keeper.c").relative_to(ROOT))],
    include_dirs=[str(HERE.relative_to(ROOT))],
    depends=[str((HERE / "keeper_api.h").relative_to(ROOT))],
    extra_compile_args=FLAGS,
)
