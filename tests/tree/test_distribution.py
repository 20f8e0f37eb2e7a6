# SPDX-License-Identifier: GPL-2.0-or-later
"""A source distribution, a wheel and the Debian package have every file that they should have."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from migrate import __version__
from tests.tree.listing import TREE, files

PACKAGES = ("migrate", "receiver", "sender", "xenbackend")
BUILT_FROM = (".c", ".h", ".patch", ".py", ".pyi", ".typed", "README.md")
MADE = re.compile(r"PKG-INFO|setup\.cfg|xen_postcopy\.egg-info/.*")
"""The files that setuptools adds to a source distribution."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that are part of the project, and of nothing that was built."""
    to = tmp_path_factory.mktemp("clone")
    for path in files():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / path, to / path)
    return to


def setup(clone: Path, *arguments: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    done = subprocess.run(command, cwd=clone, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_source_distribution_has_the_files_of_the_repository(clone: Path) -> None:
    there = {str(path) for path in files()}
    setup(clone, "sdist", "--dist-dir", "dist")
    with tarfile.open(clone / "dist" / f"xen_postcopy-{__version__}.tar.gz") as archive:
        names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    assert {name for name in names if not MADE.fullmatch(name)} == there, "see MANIFEST.in"


def test_a_wheel_has_the_packages_with_their_sources_and_types(clone: Path) -> None:
    wanted = {
        str(path)
        for path in files()
        if path.parts[0] in PACKAGES and path.name.endswith(BUILT_FROM)
    }
    assert {"migrate/py.typed", "xenbackend/_ring.pyi", "migrate/lanes/native/bulk.c"} <= wanted
    setup(clone, "build_py", "--build-lib", "lib")
    assert under(clone / "lib") == wanted, "see package-data in pyproject.toml"


# ---- the Debian package ----
def test_the_debian_package_has_the_version_of_the_program() -> None:
    first = (TREE / "debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"xen-postcopy ({__version__}) ")


def test_the_debian_package_is_built_with_all_that_the_program_depends_on() -> None:
    """dh_python3 has the dependencies of the package from pyproject.toml, but not those of its
    build.
    """
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    needed = {f"python3-{re.split('[^a-z]', one)[0]}" for one in project["dependencies"]}
    control = (TREE / "debian/control").read_text().partition("\n\n")[0]
    assert needed <= set(re.findall(r"[\w-]+", control))


def test_shell_scripts_and_rules_can_be_executed() -> None:
    scripts = [path for path in files() if path.parts[0] == "debian"]
    assert len(scripts) > 15
    for path in scripts:
        text = ""
        with contextlib.suppress(UnicodeDecodeError):
            text = (TREE / path).read_text()
        is_maintainer_script = path.suffix in (".postinst", ".postrm", ".prerm", ".preinst")
        if text.startswith("#!") and not is_maintainer_script:
            assert (TREE / path).stat().st_mode & 0o111, path
