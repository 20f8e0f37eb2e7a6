# SPDX-License-Identifier: GPL-2.0-or-later
"""The Xen for which this program was built, and the Xen on which it runs."""

from __future__ import annotations

import re
from pathlib import Path

NATIVE = Path(__file__).parent / "libxenctrl"
RUNNING = Path("/sys/hypervisor")
SONAME = re.compile(rb"\0libxenctrl\.so\.([\d.]+)\0")


def built_for() -> str:
    """Return the release of the Xen libraries that the native module was linked with, such as
    ``4.17``; empty if that module was not built.

    The module itself has the name of the library, which changes with each release of Xen.
    """
    for module in NATIVE.glob("_xen.*.so"):
        if found := SONAME.search(module.read_bytes()):
            return found[1].decode()
    return ""


def running() -> str:
    """Return the release of the hypervisor on which this host runs, such as ``4.17.5``; empty if
    that is no Xen.
    """
    try:
        if (RUNNING / "type").read_text().strip() != "xen":
            return ""
        parts = [(RUNNING / "version" / part).read_text() for part in ("major", "minor", "extra")]
    except OSError:
        return ""
    return "{}.{}{}".format(*map(str.strip, parts))


def in_words() -> str:
    """Return both for people, in one line."""
    built, runs = built_for(), running()
    return "; ".join(
        (
            f"built for Xen {built}" if built else "built without Xen's libraries",
            f"this host runs Xen {runs}" if runs else "this host runs no Xen",
        )
    )


def mismatch() -> str:
    """Return why this program cannot work with the Xen that runs, in one line; empty if it can, or
    if the release of one of them is not known.

    Xen refuses the calls of another release's libraries (EACCES), unless both releases have the
    same version of the interface.
    """
    built, runs = built_for(), running()
    if not built or not runs or release_of(runs) == release_of(built):
        return ""
    return (
        f"this program was built for Xen {built}, and this host runs Xen {runs}: restart the host "
        f"with Xen {built}, or install the package for Xen {runs}"
    )


def release_of(version: str) -> tuple[int, ...]:
    """Return the release in a version: ``(4, 17)`` for ``4.17.5``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
