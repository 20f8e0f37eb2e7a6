# SPDX-License-Identifier: GPL-2.0-or-later
"""The test modules as pytest caches them: with their assertions rewritten.

Without the cache, as in a fresh checkout, each worker of a run rewrites all modules, which takes
ten CPU seconds each.  So one process does this before the workers start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TAG = f"{sys.implementation.cache_tag}-pytest-{pytest.__version__}"
WRITES_NONE = "PYTHONDONTWRITEBYTECODE"
"""With this variable the workers read the cache, but would not write it."""


def is_cached(module: Path) -> bool:
    cache = module.parent / "__pycache__" / f"{module.stem}.{TAG}.pyc"
    return cache.exists() and cache.stat().st_mtime >= module.stat().st_mtime


def prepare(config: pytest.Config) -> None:
    """Fill the cache if this process is about to start workers for all tests."""
    workers = config.getoption("numprocesses", None)  # of pytest-xdist, which the lab lacks
    if not workers or config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    if not all(map(is_cached, config.rootpath.glob("tests/*/test_*.py"))):
        subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "--numprocesses", "0"],
            cwd=config.rootpath,
            env={name: value for name, value in os.environ.items() if name != WRITES_NONE},
            stdout=subprocess.DEVNULL,
            check=False,  # the workers show what is wrong
        )
