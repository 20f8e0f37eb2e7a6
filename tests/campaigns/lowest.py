# SPDX-License-Identifier: GPL-2.0-or-later
"""``make lowest``: the unit tests, and a migration, with the lowest version of each dependency that
pyproject.toml allows.

They run in a virtual environment and a copy of the tree, both in ``build/lowest``.  What only tests
need has the locked version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib

from tests.tree.listing import TREE, files

FOLDER = TREE / "build/lowest"
CLONE, PYTHON = FOLDER / "tree", FOLDER / "venv/bin/python"
TOOLS = ("pytest", "pytest-timeout", "pytest-trio", "pytest-xdist", "hypothesis", "trustme", "pyte")
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())
IGNORED = ("-W", "ignore::DeprecationWarning")
"""An old version of a dependency may use what the newest version of another has deprecated."""
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not serial", "-n", "3", *IGNORED)


def lowest() -> list[str]:
    """Return the lowest versions, also of what the native modules are built with, for pip."""
    project = PROJECT["project"]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", one) for one in wanted), wanted
    return sorted({one.replace(">=", "==") for one in wanted})


def tools() -> list[str]:
    locked = re.findall(r"^([\w-]+)==([\d.]+)", (TREE / "requirements.lock").read_text(), re.M)
    return [f"{name}=={version}" for name, version in locked if name in TOOLS]


def run(*command: str) -> None:
    print("+", *command, flush=True)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    if status := subprocess.run(command, cwd=CLONE, env=environment, check=False).returncode:
        sys.exit(status)


def main() -> None:
    required = PROJECT["project"]["requires-python"].removeprefix(">=")
    if "{}.{}".format(*sys.version_info) != required:
        print(f"left out: pip has the lowest versions for Python {required} only")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    for path in files():
        (CLONE / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / path, CLONE / path)
    run(sys.executable, "-m", "venv", str(FOLDER / "venv"))
    pip = (str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *lowest(), *tools())
    run(str(PYTHON), "setup.py", "--quiet", "build_ext", "--inplace")
    run(str(PYTHON), *PYTEST, "tests/unit")
    run(str(PYTHON), "-m", "migrate.cli", "loopback", "--memory", "64M")


if __name__ == "__main__":
    main()
