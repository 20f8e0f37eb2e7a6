# SPDX-License-Identifier: GPL-2.0-or-later
"""``make hypervisor-deb``: the hypervisor with memory paging as a Debian package.

The package is installed beside the distribution's: the names of its files are its own, and GRUB
finds them by itself.  It is built from the source package of the release that this machine runs.
"""

from __future__ import annotations

import argparse
import email.utils
import gzip
import hashlib
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from xenbackend.hypervisor.build import HERE, RELEASES, Built, Release, compile_hypervisor
from xenbackend.hypervisor.debian import Apt, BuildError, run

TREE = Path(__file__).parents[2]
NAME = "xen-hypervisor-paging"
REVISION = 1
"""Raised when a patch or the configuration changes."""
MAINTAINER = "xen-postcopy developers <xen-postcopy@example.org>"
CONTROL = """\
Package: {name}
Source: xen
Version: {version}
Architecture: amd64
Maintainer: {maintainer}
Section: kernel
Priority: optional
Provides: xen-hypervisor
Recommends: xen-utils-{xen}, xen-hypervisor-common
Suggests: xen-postcopy
Installed-Size: {size}
Description: Xen hypervisor with memory paging
 Debian's Xen {xen} built with memory paging, which postcopy live migration
 needs at its destination, and with populate_evicted of xen-postcopy. It is
 installed beside the hypervisor of Debian, and booted from an entry of its own
 in the menu of GRUB. Xen has no security support for memory paging.
"""
CHANGELOG = """\
xen ({version}) {codename}; urgency=medium

  * Build only the hypervisor, with memory paging and with
    {patch}.

 -- {maintainer}  {date}

"""
UPDATE_GRUB = """\
    if command -v update-grub >/dev/null && [ -d "$DPKG_ROOT/boot/grub" ]; then
        update-grub || true
    fi
"""
POSTINST = f"""\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
{UPDATE_GRUB}fi
"""
POSTRM = f"""\
#!/bin/sh
set -e
if [ "$1" = remove ]; then
{UPDATE_GRUB}fi
"""


def package(built: Built, release: Release, source: Path, version: str, out: Path) -> Path:
    """Make the package of a hypervisor; return its path.

    ``source``: Debian's source tree, which has the copyright and the changelog; ``version``: its
    version.
    """
    version = f"{version}+paging{REVISION}"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        documents = root / "usr/share/doc" / NAME
        for path in (root / "boot", root / "DEBIAN", documents):
            path.mkdir(parents=True)
        shutil.copy(built.compressed, root / f"boot/xen-{release.xen}-paging.gz")
        shutil.copy(built.config, root / f"boot/xen-{release.xen}-paging.config")
        shutil.copy(source / "debian/copyright", documents / "copyright")
        entry = CHANGELOG.format(
            version=version, codename=release.codename, patch=release.patch.name,
            maintainer=MAINTAINER, date=email.utils.formatdate(localtime=True),
        )  # fmt: skip
        texts = {
            "changelog.Debian": entry.encode() + (source / "debian/changelog").read_bytes(),
            **{path.name: path.read_bytes() for path in (release.patch, HERE / "README.md")},
        }
        for name, text in texts.items():
            (documents / f"{name}.gz").write_bytes(gzip.compress(text, mtime=0))
        write_control(root, release, version)
        out.mkdir(parents=True, exist_ok=True)
        made = out / f"{NAME}_{version}_amd64.deb"
        run(["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(made)])
    return made


def write_control(root: Path, release: Release, version: str) -> None:
    """Write the control files of the package: its description, checksums and scripts."""
    files = {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    size = sum(len(data) for data in files.values()) // 1024
    control = CONTROL.format(
        name=NAME, version=version, xen=release.xen, size=size, maintainer=MAINTAINER
    )
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  {path}\n" for path, data in files.items())
    (root / "DEBIAN/control").write_text(control)
    (root / "DEBIAN/md5sums").write_text(sums)
    for name, script in (("postinst", POSTINST), ("postrm", POSTRM)):
        (root / "DEBIAN" / name).write_text(script)
        (root / "DEBIAN" / name).chmod(0o755)


def release_of(codename: str) -> Release:
    """Return a release.  Raises :class:`BuildError` if there is no patch for it."""
    for release in RELEASES:
        if codename == release.codename:
            return release
    known = ", ".join(release.codename for release in RELEASES)
    raise BuildError(f"there is a patch for Xen of {known}, and this is {codename or 'no Debian'}")


def fetch_source(apt: Apt, release: Release, version: str | None, where: Path) -> Path:
    """Unpack a version of Debian's source of Xen, or the newest, and return its path.  Raises
    :class:`BuildError`: a mirror may list a newer version than it has.
    """
    try:
        return apt.source("xen", version, where)
    except BuildError as error:
        if version:
            raise
        raise BuildError(
            f"{error}\nthe newest source cannot be had; the lab's tests use an older one: "
            f"make hypervisor-deb SOURCE={release.source}"
        ) from error


def main() -> None:
    """Build the package from the newest source that apt offers, or from the named version."""
    parser = argparse.ArgumentParser(description=__doc__)
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    parser.add_argument("--release", default=codename, help="default: %(default)s")
    parser.add_argument("--source", help="the version of Debian's source package (the newest)")
    parser.add_argument("--out", type=Path, default=TREE / "build")
    options = parser.parse_args()
    where = options.out / "hypervisor"
    try:
        release = release_of(options.release)
        shutil.rmtree(where / "source", ignore_errors=True)
        (where / "source").mkdir(parents=True)
        apt = Apt(where / "apt", release.codename, security=True)
        tree = fetch_source(apt, release, options.source, where / "source")
        version = run(["dpkg-parsechangelog", "-S", "Version"], cwd=tree).strip()
        print(package(compile_hypervisor(tree, release.patch), release, tree, version, options.out))
    except BuildError as error:
        sys.exit(f"hypervisor-deb: {error}")


if __name__ == "__main__":
    main()
