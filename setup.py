# SPDX-License-Identifier: GPL-2.0-or-later
"""Only what pyproject.toml cannot express: the native modules, compiled by cffi at install."""

import os
import subprocess
import sys

from setuptools import setup

XEN_HEADERS = (
    "xenctrl.h",
    "xenguest.h",
    "xencall.h",
    "xendevicemodel.h",
    "xenevtchn.h",
    "xenforeignmemory.h",
    "xenstore.h",
)


def has_xen_headers() -> bool:
    """Whether this host has Xen's headers.  Without them the rest of the package is usable, and
    reports what is missing when a backend for the real Xen is requested.
    """
    program = "".join(f"#include <{name}>\n" for name in ("stddef.h", "stdint.h", *XEN_HEADERS))
    compiler = [os.environ.get("CC", "cc"), "-fsyntax-only", "-x", "c", "-"]
    if sysroot := os.environ.get("XEN_SYSROOT"):
        compiler.append(f"-I{sysroot}/usr/include")
    try:
        checked = subprocess.run(
            compiler, input=program, text=True, capture_output=True, check=False
        )
    except OSError:
        return False
    if checked.returncode:
        print("xenbackend.libxenctrl is not built: install libxen-dev for it", file=sys.stderr)
    return checked.returncode == 0


modules = [
    "migrate/lanes/native/build_bulk.py:ffi",
    "migrate/fastpath/native/build_fault.py:ffi",
    "xenbackend/native/build_ring.py:ffi",
    "xenbackend/native/build_keeper.py:ffi",
    "xenbackend/simulated/native/build_sim.py:ffi",
]
if has_xen_headers():
    modules.append("xenbackend/libxenctrl/native/build_xen.py:ffi")

setup(cffi_modules=modules)
