# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts that are built once and kept in the user's cache folder, by their name and by what they are
made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from xenbackend.hypervisor.debian import BuildError

LabError = BuildError
"""The lab cannot do what it should; the text has the reason and what to do."""


def directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xen-postcopy" / "xenlab"


def say(text: str) -> None:
    print(f"xenlab: {text}", file=sys.stderr, flush=True)


def fingerprint(*ingredients: str | bytes | Path) -> str:
    """Return the fingerprint of texts and files."""
    digest = hashlib.sha256()
    for one in ingredients:
        data = (
            one.read_bytes()
            if isinstance(one, Path)
            else one.encode()
            if isinstance(one, str)
            else one
        )
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def part(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a part, which ``build`` fills the first time.  An older folder of the
    same name is removed.
    """
    where = directory() / f"{name}-{key}"
    directory().mkdir(parents=True, exist_ok=True)
    with (directory() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if where.exists():
            return where
        unfinished = directory() / f".{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        say(f"building {name} ...")
        started = time.monotonic()
        with contextlib.ExitStack() as failing:
            failing.callback(shutil.rmtree, unfinished, ignore_errors=True)
            build(unfinished)
            failing.pop_all()
        for old in directory().glob(f"{name}-" + "[0-9a-f]" * 16):
            shutil.rmtree(old)
        unfinished.rename(where)
        say(f"{name}: {time.monotonic() - started:.0f} s")
    return where
