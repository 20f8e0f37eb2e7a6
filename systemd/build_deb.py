# SPDX-License-Identifier: GPL-2.0-or-later
"""``make deb``: a Debian package of this tree for the Xen that its native part was compiled for.

The package depends only on Python and Xen's libraries.  Everything else is copied from the virtual
environment, as it was locked and installed there, into a folder of the package's own, because a
dom0 of Debian 12 has no trio that is new enough.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

TREE = Path(__file__).parents[1]
NAME = "xen-postcopy"
LIBRARY = Path("usr/lib") / NAME
PACKAGES = ("migrate", "sender", "receiver", "xenbackend")
XEN_LIBRARIES = (
    "libxenmisc4.17", "libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1",
    "libxenstore4",
)  # fmt: skip
SCRIPT = """\
#!/usr/bin/python3 -sP
import sys
sys.path.insert(0, "/{library}")
from {module} import main
main()
"""
CONTROL = """\
Package: {name}
Version: {version}
Architecture: amd64
Maintainer: xen-postcopy developers <xen-postcopy@localhost>
Section: admin
Priority: optional
Depends: python3 (>= 3.11), python3 (<< 3.12), libc6, {libraries}
Recommends: xen-utils-4.17
Installed-Size: {size}
Description: postcopy live migration of Xen guests
 Moves the vCPUs of a guest first and fetches its missing pages when it touches
 them, so that guests that write faster than the network carries are migrated
 with a short freeze.  Two daemons, a command, and a helper that the unmodified
 xl starts.
"""
POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ] && [ -d /run/systemd/system ]; then
    systemd-tmpfiles --create xen-postcopy.conf || true
    systemctl daemon-reload
    systemctl enable --quiet xen-postcopy.target \\
        xen-postcopy-sender.service xen-postcopy-receiver.service
    # Not restarted on an upgrade: guests may depend on the daemons that run.
    systemctl start --no-block xen-postcopy.target || true
fi
"""
PRERM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet --now xen-postcopy.target \\
        xen-postcopy-sender.socket xen-postcopy-receiver.socket \\
        xen-postcopy-sender.service xen-postcopy-receiver.service
fi
"""


def needed(
    name: str, found: dict[str, metadata.Distribution] | None = None
) -> dict[str, metadata.Distribution]:
    """The installed distributions that one depends on, without it."""
    found = {} if found is None else found
    for requirement in metadata.requires(name) or ():
        wanted, _, marker = requirement.partition(";")
        project = re.match(r"[\w.-]+", wanted)
        if project is None or "extra" in marker or project[0].lower() in found:
            continue
        try:
            found[project[0].lower()] = metadata.distribution(project[0])
        except metadata.PackageNotFoundError:
            continue  # for another system
        needed(project[0], found)
    return found


def copy_distribution(distribution: metadata.Distribution, to: Path) -> None:
    for file in distribution.files or ():
        if ".." in file.parts or "__pycache__" in file.parts or "tests" in file.parts:
            continue
        target = to / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.locate(), target)


def copy_ourselves(to: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = [path for package in PACKAGES for path in (TREE / package).rglob("*.py")]
    natives = [
        path
        for package in PACKAGES
        for path in (TREE / package).rglob("*.so")
        if path.name.endswith((suffix, ".abi3.so"))
    ]
    if not any(path.name.startswith("_xen.") for path in natives):
        sys.exit(
            "the part that talks to Xen is not compiled: apt install libxen-dev, and then: touch "
            "setup.py && make deb"
        )
    for path in (*sources, *natives):
        target = to / path.relative_to(TREE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def write(path: Path, text: str | bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)


def build(out: Path) -> Path:
    """Returns the package."""
    version = metadata.version(NAME)
    root = TREE / "build" / "deb" / "root"
    shutil.rmtree(root, ignore_errors=True)
    library = root / LIBRARY
    for distribution in needed(NAME).values():
        copy_distribution(distribution, library)
    copy_ourselves(library)
    for command, module in ((NAME, "migrate.cli"), (f"{NAME}-xl-helper", "migrate.xl.helper")):
        write(root / "usr/bin" / command, SCRIPT.format(library=LIBRARY, module=module), 0o755)
    units = TREE / "systemd"
    for unit in (*units.glob("*.service"), *units.glob("*.socket"), *units.glob("*.target")):
        write(root / "lib/systemd/system" / unit.name, unit.read_bytes())
    write(
        root / "usr/lib/tmpfiles.d/xen-postcopy.conf",
        (units / "xen-postcopy.tmpfiles").read_bytes(),
    )
    write(root / "etc/xen-postcopy/config.toml", (units / "config.toml").read_bytes())
    for page in (units / "man").iterdir():
        write(
            root / f"usr/share/man/man{page.suffix[1:]}" / f"{page.name}.gz",
            gzip.compress(page.read_bytes(), mtime=0),
        )
    for document in ("README.md", "CHANGELOG.md"):
        write(root / "usr/share/doc" / NAME / document, (TREE / document).read_bytes())
    write(root / "usr/share/doc" / NAME / "copyright", (TREE / "LICENSE").read_bytes())
    compile_all = [
        sys.executable,
        "-m",
        "compileall",
        "-q",
        "-s",
        str(root),
        "-p",
        "/",
        str(library),
    ]
    subprocess.run(compile_all, check=True)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024
    control = CONTROL.format(
        name=NAME, version=version, size=size, libraries=", ".join(XEN_LIBRARIES)
    )
    write(root / "DEBIAN/control", control)
    write(root / "DEBIAN/conffiles", "/etc/xen-postcopy/config.toml\n")
    write(root / "DEBIAN/postinst", POSTINST, 0o755)
    write(root / "DEBIAN/prerm", PRERM, 0o755)
    out.mkdir(parents=True, exist_ok=True)
    package = out / f"{NAME}_{version}_amd64.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", str(root), str(package)],
        check=True,
    )
    return package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TREE / "build")
    print(build(parser.parse_args().out))


if __name__ == "__main__":
    main()
