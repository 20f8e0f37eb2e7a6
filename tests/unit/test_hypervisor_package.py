# SPDX-License-Identifier: GPL-2.0-or-later
"""The package of the hypervisor, and the patches of the releases."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from pathlib import Path

import pytest

from xenbackend.hypervisor.build import RELEASES, TRIXIE, Built
from xenbackend.hypervisor.debian import Apt, BuildError, run
from xenbackend.hypervisor.package import NAME, fetch_source, package, release_of
from xenbackend.libxenctrl.preflight import NO_PAGING

VERSION = "4.20.4+63-g7abfd2bce2-0+deb13u1"
UPDATE_GRUB = """\
#!/bin/sh
ls "$DPKG_ROOT/boot" | tr '\\n' ' ' >> {log}
echo >> {log}
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Return the package of a hypervisor that is no hypervisor."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("this is no Debian")
    for name in ("xen", "xen.gz", "config", "debian/copyright", "debian/changelog"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    built = Built(tmp_path / "xen", tmp_path / "xen.gz", tmp_path / "config")
    return package(built, TRIXIE, tmp_path, VERSION, tmp_path / "out")


def test_the_package_is_installed_beside_the_distribution_s(made: Path) -> None:
    assert made.name == f"{NAME}_{VERSION}+paging1_amd64.deb"
    fields = ["Package", "Version", "Recommends", "Conflicts"]
    shown = run(["dpkg-deb", "--field", str(made), *fields])
    assert f"Version: {VERSION}+paging1\n" in shown
    assert "xen-utils-4.20" in shown and "Conflicts" not in shown
    listed = re.findall(r"\./(\S+[^/\s])\n", run(["dpkg-deb", "--contents", str(made)]))
    documents = f"usr/share/doc/{NAME}"
    assert sorted(listed) == [
        "boot/xen-4.20-paging.config",
        "boot/xen-4.20-paging.gz",
        f"{documents}/README.md.gz",
        f"{documents}/changelog.Debian.gz",
        f"{documents}/copyright",
        f"{documents}/populate-evicted-4.20.patch.gz",
    ]


def test_the_changelog_begins_with_this_build_and_the_sums_are_right(
    made: Path, tmp_path: Path
) -> None:
    root = tmp_path / "unpacked"
    run(["dpkg-deb", "--raw-extract", str(made), str(root)])
    packed = (root / f"usr/share/doc/{NAME}/changelog.Debian.gz").read_bytes()
    entry, _, before = gzip.decompress(packed).decode().rpartition("\n\n")
    assert before == "debian/changelog"
    assert entry.startswith(f"xen ({VERSION}+paging1) trixie; urgency=medium\n")
    assert len(run(["md5sum", "--check", "DEBIAN/md5sums"], cwd=root).splitlines()) == 6


def test_grub_lists_it_before_the_distribution_s(made: Path) -> None:
    """GRUB takes what follows the first dash of a name in ``/boot`` for a version
    (``/usr/share/grub/grub-mkconfig_lib``), and boots the newest.
    """
    run(["dpkg", "--compare-versions", "4.20-paging.gz", "gt", "4.20-amd64.gz"])
    run(["dpkg", "--compare-versions", "4.20-paging.gz", "gt", "4.17-paging.gz"])


@pytest.mark.skipif(os.geteuid() != 0, reason="dpkg needs root, also in a folder")
def test_grub_is_updated_after_the_files_have_come_and_after_they_have_gone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, programs, log = tmp_path / "root", tmp_path / "bin", tmp_path / "log"
    for folder in ("boot/grub", "var/lib/dpkg/updates", "var/lib/dpkg/info"):
        (root / folder).mkdir(parents=True)
    for name in ("status", "available"):
        (root / "var/lib/dpkg" / name).touch()
    programs.mkdir()
    (programs / "update-grub").write_text(UPDATE_GRUB.format(log=log))
    (programs / "update-grub").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin")
    dpkg = ["dpkg", f"--root={root}", "--force-script-chrootless", "--force-architecture"]
    run([*dpkg, "--install", str(made)])
    run([*dpkg, "--purge", NAME])
    assert log.read_text().splitlines() == [
        "grub xen-4.20-paging.config xen-4.20-paging.gz ",
        "grub ",
    ]
    left = [path for path in root.rglob("*") if NAME in path.name or "paging" in path.name]
    assert not left


def test_preflight_names_the_package() -> None:
    assert f"the package {NAME}" in NO_PAGING


def test_a_release_without_a_patch_is_refused() -> None:
    assert [release_of(release.codename) for release in RELEASES] == list(RELEASES)
    with pytest.raises(BuildError, match="Xen of bookworm, trixie, and this is sid"):
        release_of("sid")


def test_a_source_that_can_be_had_is_named_if_the_newest_cannot(tmp_path: Path) -> None:
    class Mirror(Apt):
        def __init__(self) -> None:
            pass

        def source(self, package: str, version: str | None, where: Path) -> Path:
            raise BuildError(f"{package}: 404")

    with pytest.raises(BuildError, match=r"xen: 404\n.*SOURCE=4\.20\.4"):
        fetch_source(Mirror(), TRIXIE, None, tmp_path)
    with pytest.raises(BuildError, match=r"^xen: 404$"):
        fetch_source(Mirror(), TRIXIE, "4.20.5", tmp_path)


def added(patch: Path) -> list[str]:
    """Return the lines that a patch adds."""
    lines = patch.read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]
