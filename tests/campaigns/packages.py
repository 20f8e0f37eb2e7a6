# SPDX-License-Identifier: GPL-2.0-or-later
"""``make packages``: the way of a newcomer on a fresh Debian 12 and a fresh Debian 13.

In each, made by debootstrap, the package is built and checked by lintian, installed, used for
migrations on the simulated host, upgraded and purged.  Needs root and Debian's mirror.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tree.listing import TREE, files
from tests.xenlab.cache import LabError, say
from xenbackend.hypervisor.debian import mirror, run

RELEASES = ("bookworm", "trixie")
INSIDE = """\
mount -t proc proc /proc
mount -t sysfs sysfs /sys
cd /root/tree
apt-get -qq update
apt-get -qq -y --no-install-recommends install make lintian >/dev/null
make deb
(cd build/deb && lintian --allow-root --fail-on error,warning *.changes)
find / -xdev -path /root -prune -o -iname '*xen-postcopy*' -print | sort >/root/before
apt-get -qq -y --no-install-recommends install ./build/xen-postcopy_*.deb >/dev/null
if find /usr/lib/xen-postcopy -name '*.so' -exec readelf -d {} + | grep -E 'RPATH|RUNPATH'; then
    echo "a native module has a path of its builder"
    exit 1
fi
cd /
sh -e /root/tree/debian/tests/loopback
dpkg -i /root/tree/build/xen-postcopy_*.deb
apt-get -qq -y purge xen-postcopy
find / -xdev -path /root -prune -o -iname '*xen-postcopy*' -print | sort | diff /root/before -
"""
"""What root does in the fresh system."""


def try_release(release: str, root: Path) -> int:
    """Returns the exit status of :data:`INSIDE`."""
    say(f"making a fresh {release}")
    run(["debootstrap", "--variant=minbase", release, str(root), mirror()])
    for path in files():
        to = root / "root/tree" / path
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / path, to)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    environment = {
        **{name: text for name, text in os.environ.items() if name.lower().endswith("_proxy")},
        **clean,
        "DEBIAN_FRONTEND": "noninteractive",
    }
    # The mounts end with the process.
    command = ["unshare", "--mount", "--pid", "--fork", "chroot", str(root), "sh", "-ex"]
    return subprocess.run(command, input=INSIDE, text=True, env=environment, check=False).returncode


def main() -> None:
    if os.geteuid():
        sys.exit("debootstrap needs root")
    for release in RELEASES:
        folder = Path(tempfile.mkdtemp(prefix="xen-postcopy-packages-"))
        folder.chmod(0o755)  # Debian's own users look into their system
        try:
            status = try_release(release, folder)
        except LabError as error:
            sys.exit(str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if status:
            sys.exit(f"the package of {release} failed")
        say(f"{release}: built, installed, tried and purged")


if __name__ == "__main__":
    main()
