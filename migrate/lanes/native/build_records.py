# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the code that sends and receives over TLS, with the system's OpenSSL (cffi, API mode),
as ``migrate.lanes._records``.
"""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parents[2]
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.cdef("struct iovec { void *iov_base; size_t iov_len; };")
ffi.cdef((HERE / "records_api.h").read_text())
ffi.set_source(
    "migrate.lanes._records",
    '#include <sys/uio.h>\n#include "records_api.h"',
    sources=[str((HERE / "records.c").relative_to(ROOT))],
    include_dirs=[str(HERE.relative_to(ROOT))],
    depends=[str((HERE / "records_api.h").relative_to(ROOT))],
    libraries=["ssl", "crypto"],
    extra_compile_args=FLAGS,
)
