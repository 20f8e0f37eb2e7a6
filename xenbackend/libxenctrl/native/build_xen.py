# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles the hypercalls (cffi, API mode) as ``xenbackend.libxenctrl._xen``, against this host's
libxen-dev.

``XEN_SYSROOT``: a folder with another host's ``usr/include`` and ``usr/lib``, to compile for that
host.
"""

import os
import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# setuptools wants source paths relative to the project's root.
ROOT = HERE.parent.parent.parent
SYSROOT = os.environ.get("XEN_SYSROOT", "")
LIBRARIES = [
    "xenctrl",
    "xenguest",
    "xencall",
    "xendevicemodel",
    "xenforeignmemory",
    "xenevtchn",
    "xenstore",
]
SOURCES = ["call.c", "host.c", "memory.c", "pinned.c", "paging.c", "one_page.c", "state.c"]
HEADERS = ["api.h", "internal.h", "../../native/vm_event.h"]
FLAGS = runpy.run_path(str(ROOT / "xenbackend/native/flags.py"))["FLAGS"]

ffi = FFI()
ffi.cdef((HERE / "api.h").read_text())
ffi.set_source(
    "xenbackend.libxenctrl._xen",
    '#include <stddef.h>\n#include <stdint.h>\n#include "api.h"',
    sources=[str((HERE / name).relative_to(ROOT)) for name in SOURCES],
    include_dirs=[str(HERE.relative_to(ROOT))] + ([f"{SYSROOT}/usr/include"] if SYSROOT else []),
    library_dirs=[f"{SYSROOT}/usr/lib/x86_64-linux-gnu"] if SYSROOT else [],
    libraries=LIBRARIES,
    depends=[str((HERE / name).resolve().relative_to(ROOT)) for name in HEADERS],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread", "-Wl,--allow-shlib-undefined"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffi.compile(tmpdir=str(ROOT))
