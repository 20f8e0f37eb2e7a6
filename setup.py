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


def has_headers(*names: str) -> bool:
    """Whether this host has these headers."""
    program = "".join(f"#include <{name}>\n" for name in ("stddef.h", "stdint.h", *names))
    compiler = [os.environ.get("CC", "cc"), "-fsyntax-only", "-x", "c", "-"]
    if sysroot := os.environ.get("XEN_SYSROOT"):
        compiler.append(f"-I{sysroot}/usr/include")
    try:
        checked = subprocess.run(
            compiler, input=program, text=True, capture_output=True, check=False
        )
    except OSError:
        return False
    return checked.returncode == 0


modules = [
    "migrate/lanes/native/build_bulk.py:ffi",
    "migrate/fastpath/native/build_fault.py:ffi",
    "xenbackend/native/build_ring.py:ffi",
    "xenbackend/native/build_keeper.py:ffi",
    "xenbackend/simulated/native/build_sim.py:ffi",
]
# Without these two modules the package can be used.  The daemons report what is missing when a
# backend for the real Xen is requested, and TLS goes through Python.
if has_headers(*XEN_HEADERS):
    modules.append("xenbackend/libxenctrl/native/build_xen.py:ffi")
else:
    print("xenbackend.libxenctrl is not built: install libxen-dev for it", file=sys.stderr)
if has_headers("openssl/ssl.h", "openssl/core.h"):  # core.h: since OpenSSL 3
    modules.append("migrate/lanes/native/build_records.py:ffi")
else:
    print("migrate.lanes._records is not built: install libssl-dev for it", file=sys.stderr)

setup(cffi_modules=modules)
