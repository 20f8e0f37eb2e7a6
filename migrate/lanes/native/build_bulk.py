# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the code that moves many pages through a socket (cffi, API mode), as
``migrate.lanes._bulk``.
"""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parents[2]
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.cdef((HERE / "bulk_api.h").read_text())
ffi.set_source(
    "migrate.lanes._bulk",
    '#include <stddef.h>\n#include "bulk_api.h"',
    sources=[str((HERE / "bulk.c").relative_to(ROOT))],
    include_dirs=[str(HERE.relative_to(ROOT))],
    depends=[str((HERE / "bulk_api.h").relative_to(ROOT))],
    extra_compile_args=FLAGS,
)
