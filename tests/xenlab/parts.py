# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a machine: hypervisor, kernel, dom0's disks, its initial RAM disk, and a guest.

Each part is built when it is needed for the first time; together that takes some minutes.
"""

from __future__ import annotations

import functools
import gzip
import lzma
import os
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from tests.xenlab import debian
from tests.xenlab.cache import LabError, directory, fingerprint, part
from xenbackend.hypervisor.build import BOOKWORM, PAGING_CONFIG, compile_hypervisor
from xenbackend.hypervisor.debian import Apt, run

HERE = Path(__file__).parent

HYPERVISORS = ("populate-evicted", "paging", "debian")
"""The hypervisors: with memory paging and our hypercall; with memory paging; as Debian ships it,
without memory paging.
"""
HOSTS = "hosts"
"""The first kind twice, on one network, with systemd in each dom0, and our package.  The command
runs in the first dom0.
"""
MACHINES = (*HYPERVISORS, HOSTS)
HOST_NAMES = ("host1", "host2")

DOM0_PACKAGES = (
    *(
        "python3",
        "python3-cffi",
        "python3-ply",
    ),  # python3-ply: cffi needs it, and debootstrap does not detect that
    *("iproute2", "kmod", "procps", "systemd-sysv"),
    *("xen-utils-4.17", "xenstore-utils", "libxen-dev"),
    *("openssh-client", "openssh-server"),
    # Our package depends on these.
    *("python3-click", "python3-msgpack", "python3-numpy", "python3-tqdm", "python3-trio"),
)
PACKAGE = f"xen-postcopy_*~deb{debian.RELEASE_NUMBER}_amd64.deb"
"""Our Debian package, in ``build``."""
DISK_SIZE = "1500M"
LIBRARIES = ("usr/include/xen*", "usr/lib/x86_64-linux-gnu/libxen*.so*")

MODULES = (
    *(
        "virtio_ring",
        "virtio",
        "virtio_pci_legacy_dev",
        "virtio_pci_modern_dev",
        "virtio_pci",
        "virtio_blk",
    ),
    *("crc16", "mbcache", "crc32c_generic", "libcrc32c", "jbd2", "ext4"),
    *("netfs", "fscache", "9pnet", "9pnet_virtio", "9p"),
    *("failover", "net_failover", "virtio_net"),
    *("xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs"),
    *("loop", "xen-blkback"),
    *("llc", "stp", "bridge", "xen-netback"),
)
"""The modules, in the order of their dependencies."""
GUEST_DRIVERS = ("xen-blkfront.ko", "xen-netfront.ko")
"""The drivers for a guest's disk and network."""
GUEST_COMMANDS = ("poweroff", "reboot")
"""The commands that a guest's kernel runs when a toolstack asks for them."""
PROGRAMS = [
    HERE / "dom0" / name for name in ("init.sh", "runner.sh", "runner.py", "xenlab.service")
]
"""The programs that dom0 starts before it has the working tree."""
PYTHON_PACKAGES = (
    "pytest",
    "pytest-timeout",
    "pytest-trio",
    "trio",
    "msgpack",
    "cffi",
    "numpy",
    "click",
    "tqdm",
)

FREESTANDING = (
    *("-ffreestanding", "-nostdlib", "-no-pie", "-fno-pic", "-mno-red-zone", "-mgeneral-regs-only"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    # Otherwise gcc makes calls of memset, which does not exist here.
    "-fno-tree-loop-distribute-patterns",
    *("-Wl,-e,start", "-Wl,-Ttext-segment=0x100000", "-Wl,--build-id=none", "-Wl,-z,noexecstack"),
)
"""The options for a program that is a guest's kernel."""

TOOLS = {
    "apt-get": "apt", "debootstrap": "debootstrap", "mke2fs": "e2fsprogs", "cpio": "cpio",
    "gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "patch": "patch",
    "dpkg-source": "dpkg-dev", "dpkg-deb": "dpkg", "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils", "/bin/busybox": "busybox-static",
}  # fmt: skip


def check_tools() -> None:
    """Install the tools that this machine lacks, if we may.  Otherwise raise :class:`LabError` with
    their names.
    """
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if not missing:
        return
    if os.geteuid():
        raise LabError(f"please install first: apt install {' '.join(missing)}")
    run(["apt-get", "-qq", "update"])
    run(["apt-get", "-qq", "install", "--no-install-recommends", *missing])


@functools.cache
def _apt() -> Apt:
    return Apt(directory() / "apt", debian.RELEASE)


def _xen_source() -> Path:
    def fetch(where: Path) -> None:
        _apt().source("xen", debian.XEN_VERSION, where).rename(where / "tree")

    return part("xen-source", fingerprint(debian.XEN_VERSION), fetch) / "tree"


def hypervisor(kind: str) -> Path:
    """Return the unpacked multiboot image of one of :data:`MACHINES`."""
    if kind == HOSTS:
        kind = HYPERVISORS[0]
    if kind == "debian":
        return (
            part("hypervisor-debian", fingerprint(debian.XEN_VERSION), _unpack_hypervisor) / "xen"
        )

    def build(where: Path) -> None:
        tree = where / "tree"
        shutil.copytree(_xen_source(), tree, symlinks=True)
        compile_hypervisor(tree, patch).image.rename(where / "xen")
        shutil.rmtree(tree)

    patch = BOOKWORM.patch if kind == "populate-evicted" else None
    key = fingerprint(debian.XEN_VERSION, PAGING_CONFIG, *([patch] if patch else []))
    return part(f"hypervisor-{kind}", key, build) / "xen"


def _unpack_hypervisor(where: Path) -> None:
    _apt().unpack(f"xen-hypervisor-4.17-amd64={debian.XEN_VERSION}", where)
    (where / "xen").write_bytes(
        gzip.decompress(next((where / "boot").glob("xen-*-amd64.gz")).read_bytes())
    )


def kernel() -> Path:
    """Return the folder with Debian's kernel: ``vmlinuz``, the unpacked ``vmlinux`` (which a PVH
    guest boots faster), and ``lib/modules``.
    """

    def build(where: Path) -> None:
        apt = _apt()
        apt.unpack(apt.newest_kernel(), where)
        image = next((where / "boot").glob("vmlinuz-*"))
        data = image.read_bytes()
        (where / "vmlinux").write_bytes(
            lzma.LZMADecompressor().decompress(data[data.index(b"\xfd7zXZ\x00") :])
        )
        image.rename(where / "vmlinuz")
        for package in where.glob("*.deb"):
            package.unlink()

    return part("kernel", fingerprint("6.1, xz"), build)


def dom0() -> Path:
    """Return the folder with ``disk``, an ext4 image of Debian with the toolstack, which is used as
    a snapshot and never written; and with ``sysroot``: libxen-dev.
    """

    def build(where: Path) -> None:
        if os.geteuid():
            raise LabError(
                "the disk of dom0 is made with debootstrap, which needs root: run the lab as root"
            )
        root = where / "root"
        debian.debootstrap(root, DOM0_PACKAGES)
        for folder in ("mnt/tree", "mnt/io", "mnt/parts", "mnt/packages"):
            (root / folder).mkdir(parents=True)
        shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
        _introduce_hosts(root)
        run(
            [
                "mke2fs",
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-d",
                str(root),
                str(where / "disk"),
                DISK_SIZE,
            ]
        )
        _keep_libraries(root, where / "sysroot")
        shutil.rmtree(root)

    return part(
        "dom0",
        fingerprint(debian.XEN_VERSION, DISK_SIZE, *LIBRARIES, *DOM0_PACKAGES, *HOST_NAMES),
        build,
    )


def _introduce_hosts(root: Path) -> None:
    """Make the hosts, which have one disk, resolve each other's names, and let root use ssh from
    one to the other.
    """
    names = "".join(f"{address(number)} {name}\n" for number, name in enumerate(HOST_NAMES))
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{names}")
    keys = root / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    run(
        [
            "chroot",
            str(root),
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            "",
            "-f",
            "/root/.ssh/id_ed25519",
        ]
    )
    shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
    host_key = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
    (keys / "known_hosts").write_text(f"{','.join(HOST_NAMES)} {host_key}")


def address(number: int) -> str:
    """Return the address of one of :data:`HOST_NAMES`."""
    return f"10.77.0.{number + 1}"


def _keep_libraries(root: Path, sysroot: Path) -> None:
    """Keep Xen's headers and libraries, to compile against those of dom0."""
    for pattern in LIBRARIES:
        for path in root.glob(pattern):
            to = sysroot / path.relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, to)
            else:
                shutil.copy(path, to, follow_symlinks=False)


def _archive(root: Path, out: Path) -> None:
    """Write a cpio archive in the kernel's format."""
    run(
        [
            "sh",
            "-c",
            "find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 | gzip -1 > "
            f"'{out}'",
        ],
        cwd=root,
    )


def initramfs() -> Path:
    """Return dom0's initial RAM disk, which loads modules, mounts the disks and starts the system
    there.
    """

    def build(where: Path) -> None:
        root = where / "root"
        for folder in ("bin", "lib", "proc", "sys", "dev", "root", "xenlab"):
            (root / folder).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin/busybox")
        shutil.copy(HERE / "dom0/initramfs.sh", root / "init")
        (root / "init").chmod(0o755)
        for program in PROGRAMS:
            shutil.copy(program, root / "xenlab")
        modules = {
            path.stem.replace("-", "_"): path for path in kernel().glob("lib/modules/**/*.ko")
        }
        order = []
        for name in MODULES:
            path = modules.get(name.replace("-", "_"))
            if path is not None:  # otherwise the module is built in
                shutil.copy(path, root / "lib")
                order.append(path.name)
        (root / "lib/order").write_text("\n".join(order) + "\n")
        _archive(root, where / "initramfs")
        shutil.rmtree(root)

    key = fingerprint(kernel().name, *MODULES, HERE / "dom0/initramfs.sh", *PROGRAMS)
    return part("initramfs", key, build) / "initramfs"


def packages() -> Path:
    """Return the folder with ``disk``, an ext4 image of the packages of the virtual environment
    that dom0 needs, with their dependencies.
    """

    def build(where: Path) -> None:
        root = where / "root"
        for distribution in _distributions(PYTHON_PACKAGES):
            for file in distribution.files or ():
                to = (root / file).resolve()
                if (
                    root in to.parents
                    and (source := Path(str(distribution.locate_file(file)))).exists()
                ):
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, to)
        run(
            [
                "mke2fs",
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-d",
                str(root),
                str(where / "disk"),
                "300M",
            ]
        )
        shutil.rmtree(root)

    key = fingerprint(*PYTHON_PACKAGES, HERE.parents[1] / "requirements.lock")
    return part("packages", key, build)


def _distributions(names: Iterable[str]) -> list[metadata.Distribution]:
    """Return the distributions of these names, and those that they require."""
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return list(found.values())


def guest() -> Path:
    """Return a folder with what a guest boots: ``vmlinux`` and ``initramfs``, or ``stub``."""
    folder = HERE / "guest"

    def build(where: Path) -> None:
        root = where / "root"
        for name in ("dev", "sbin"):
            (root / name).mkdir(parents=True)
        gcc = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
        run([*gcc, "-pthread", "-o", str(root / "init"), str(folder / "init.c")])
        for name in GUEST_COMMANDS:
            (root / "sbin" / name).symlink_to("/init")
        for driver in GUEST_DRIVERS:
            shutil.copy(next(kernel().glob(f"lib/modules/**/{driver}")), root)
        _archive(root, where / "initramfs")
        shutil.rmtree(root)
        shutil.copy(kernel() / "vmlinux", where)
        sources = [str(folder / "entry.S"), str(folder / "stub.c")]
        run([*gcc, *FREESTANDING, "-o", str(where / "stub"), *sources])

    ingredients: list[str | Path] = [kernel().name, Path(__file__), *sorted(folder.iterdir())]
    return part("guest", fingerprint(*ingredients), build)


def package() -> None:
    """Build our Debian package in the working tree, for dom0, which has the release of this
    machine.
    """
    root = HERE.parents[1]
    sources = [
        path
        for folder in ("debian", "systemd", "migrate", "sender", "receiver", "xenbackend")
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    ]
    built = list((root / "build").glob(PACKAGE))
    if built and built[0].stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return
    run(["make", "deb"], cwd=root)


def build() -> None:
    """Build everything but our package, which only :data:`HOSTS` need."""
    check_tools()
    dom0()  # first, because it needs root
    for kind in HYPERVISORS:
        hypervisor(kind)
    for one in (kernel, initramfs, packages, guest, backend):
        one()


def backend() -> None:
    """Compile the native half of ``xenbackend.libxenctrl`` in the working tree, for the libraries
    that dom0 has.
    """
    root = HERE.parents[1]
    sources = list((root / "xenbackend/libxenctrl/native").iterdir())
    built = list((root / "xenbackend/libxenctrl").glob("_xen.*.so"))
    if built and built[0].stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return
    build = "xenbackend/libxenctrl/native/build_xen.py"
    run([sys.executable, build], cwd=root, env={"XEN_SYSROOT": str(dom0() / "sysroot")})
