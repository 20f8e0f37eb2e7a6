# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a machine: hypervisor, kernel, dom0's disks, its initial RAM disk, and a guest.

Each part is built when it is needed for the first time; together that takes some minutes.
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests.xenlab.cache import LabError, fingerprint, part
from tests.xenlab.debian import DEBIAN_12, DEBIAN_13, Dom0
from tests.xenlab.dom0.guests import LINUX_OPTIONS, STEPS_PER_S
from xenbackend.hypervisor.build import PAGING_CONFIG, compile_hypervisor
from xenbackend.hypervisor.debian import run

HERE = Path(__file__).parent
NATIVE_HALF = Path("xenbackend/libxenctrl/_xen.abi3.so")
"""The native half of ``xenbackend.libxenctrl`` in a tree.  Every Python finds a module of this
name.
"""

HYPERVISORS = ("populate-evicted", "paging", "debian")
"""The hypervisors: with memory paging and our hypercall; with memory paging; as Debian ships it,
without memory paging.
"""


@dataclass(frozen=True)
class Machine:
    """What a machine is."""

    dom0: Dom0
    hypervisor: str
    """One of :data:`HYPERVISORS`."""
    is_host: bool = False
    """Whether dom0 runs systemd, and has a network card: one of two hosts."""


HOSTS, RELEASES = "hosts", "12-to-13"
"""Two hosts on one network.  The command runs in the first dom0.  Of :data:`HOSTS` both have the
first hypervisor, and our package is built for them.  Of :data:`RELEASES` the second is Debian 13.
"""
MACHINES = {
    **{name: Machine(DEBIAN_12, name) for name in HYPERVISORS},
    DEBIAN_13.part("debian"): Machine(DEBIAN_13, "debian"),
    "host": Machine(DEBIAN_12, HYPERVISORS[0], is_host=True),
    DEBIAN_13.part("host"): Machine(DEBIAN_13, "debian", is_host=True),
}
KINDS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name, machine in MACHINES.items() if not machine.is_host},
    HOSTS: ("host", "host"),
    RELEASES: ("host", DEBIAN_13.part("host")),
}
"""The machines that a run starts, by the name of the run's kind."""
HOST_NAMES = ("host1", "host2")
PACKAGE = f"xen-postcopy_*~deb{DEBIAN_12.release.number}_amd64.deb"
"""Our Debian package, in ``build``."""

DISK_SIZE = "2000M"
HOST_KEY = "etc/ssh/ssh_host_ed25519_key"
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
CD_DRIVERS = (
    "scsi_common.ko", "scsi_mod.ko", "libata.ko", "ata_piix.ko", "cdrom.ko", "sr_mod.ko",
)  # fmt: skip
"""The drivers for a CD that the device model emulates."""
GUEST_COMMANDS = ("poweroff", "reboot")
"""The commands that a guest's kernel runs when a toolstack asks for them."""
PROGRAMS = [
    HERE / "dom0" / name for name in ("init.sh", "runner.sh", "runner.py", "xenlab.service")
]
"""The programs that dom0 starts before it has the working tree."""
BOOT_DISK_BYTES = 32 * 2**20
BOOT_OPTIONS = f"initrd=initramf {LINUX_OPTIONS}rate={STEPS_PER_S} pages=4000"
"""The command line of the kernel that a firmware boots; FAT has names of eight characters."""
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
    "qemu-img": "qemu-utils", "/bin/busybox": "busybox-static", "xz": "xz-utils", "zstd": "zstd",
    "ssh-keygen": "openssh-client", "syslinux": "syslinux", "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
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


def _xen_source(dom0: Dom0) -> Path:
    release = dom0.release

    def fetch(where: Path) -> None:
        dom0.apt().source("xen", release.source, where).rename(where / "tree")

    return part(dom0.part("xen-source"), fingerprint(release.source), fetch) / "tree"


def hypervisor(machine: Machine) -> Path:
    """Return the unpacked multiboot image."""
    release = machine.dom0.release

    def unpack(where: Path) -> None:
        machine.dom0.apt().unpack(f"xen-hypervisor-{release.xen}-amd64={release.source}", where)
        image = next((where / "boot").glob("xen-*-amd64.gz"))
        (where / "xen").write_bytes(gzip.decompress(image.read_bytes()))

    def build(where: Path) -> None:
        tree = where / "tree"
        shutil.copytree(_xen_source(machine.dom0), tree, symlinks=True)
        compile_hypervisor(tree, patch).image.rename(where / "xen")
        shutil.rmtree(tree)

    name = machine.dom0.part(f"hypervisor-{machine.hypervisor}")
    if machine.hypervisor == "debian":
        return part(name, fingerprint(release.source), unpack) / "xen"
    patch = release.patch if machine.hypervisor == "populate-evicted" else None
    key = fingerprint(release.source, PAGING_CONFIG, *([patch] if patch else []))
    return part(name, key, build) / "xen"


def kernel(dom0: Dom0) -> Path:
    """Return the folder with Debian's kernel: ``vmlinuz``, the unpacked ``vmlinux`` (which a PVH
    guest boots faster), and ``modules``, unpacked as well.
    """

    def build(where: Path) -> None:
        apt = dom0.apt()
        apt.unpack(apt.newest_kernel(), where)
        image = next((where / "boot").glob("vmlinuz-*"))
        (where / "vmlinux").write_bytes(kernel_in(image.read_bytes()))
        image.rename(where / "vmlinuz")
        modules = next(path for path in where.glob("**/lib/modules") if path.is_dir())
        modules.rename(where / "modules")
        run(["find", str(where / "modules"), "-name", "*.ko.xz", "-exec", "unxz", "{}", "+"])
        for package in where.glob("*.deb"):
            package.unlink()

    return part(dom0.part("kernel"), fingerprint("unpacked"), build)


def kernel_in(image: bytes) -> bytes:
    """Return the kernel in a bzImage (Linux's Documentation/arch/x86/boot.rst).  Raises
    :class:`LabError` if it is packed neither by xz nor by zstd.
    """
    setup_sectors = image[0x1F1]
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length - 4]  # without the unpacked size
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.decompress(payload)
    unpacked = subprocess.run(["zstd", "-dc"], input=payload, capture_output=True, check=False)
    if unpacked.returncode:
        raise LabError(f"the kernel cannot be unpacked: {unpacked.stderr.decode()}")
    return unpacked.stdout


def disk(dom0: Dom0) -> Path:
    """Return the folder with ``disk``, an ext4 image of Debian with the toolstack, which is used as
    a snapshot and never written; and with ``sysroot``: libxen-dev.
    """

    def build(where: Path) -> None:
        if os.geteuid():
            raise LabError(
                "the disk of dom0 is made with debootstrap, which needs root: run the lab as root"
            )
        root = where / "root"
        dom0.debootstrap(root)
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
        dom0.part("dom0"),
        fingerprint(
            *(dom0.release.source, DISK_SIZE, *LIBRARIES, *dom0.packages, *HOST_NAMES),
            *dom0.further_packages,
            _ssh_keys().name,
        ),
        build,
    )


def _introduce_hosts(root: Path) -> None:
    """Make the hosts resolve each other's names, and let root use ssh from one to the other.  All
    hosts have the same keys.
    """
    names = "".join(f"{address(number)} {name}\n" for number, name in enumerate(HOST_NAMES))
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{names}")
    keys = root / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    for name, to in (("user", keys / "id_ed25519"), ("host", root / HOST_KEY)):
        shutil.copy(_ssh_keys() / name, to)
        shutil.copy(_ssh_keys() / f"{name}.pub", f"{to}.pub")
    shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
    host_key = (root / f"{HOST_KEY}.pub").read_text()
    (keys / "known_hosts").write_text(f"{','.join(HOST_NAMES)} {host_key}")


def _ssh_keys() -> Path:
    """Return the folder with the keys ``user`` and ``host``, and their public halves."""

    def make(where: Path) -> None:
        for name in ("user", "host"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(where / name)])

    return part("ssh-keys", fingerprint("ed25519"), make)


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


def initramfs(dom0: Dom0) -> Path:
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
            path.stem.replace("-", "_"): path for path in kernel(dom0).glob("modules/**/*.ko")
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

    key = fingerprint(kernel(dom0).name, *MODULES, HERE / "dom0/initramfs.sh", *PROGRAMS)
    return part(dom0.part("initramfs"), key, build) / "initramfs"


def packages(dom0: Dom0) -> Path:
    """Return the folder with ``disk``, an ext4 image of the packages of the virtual environment
    that dom0 needs, with their dependencies.
    """

    def build(where: Path) -> None:
        root = where / "root"
        root.mkdir()
        for distribution in _distributions(dom0.from_environment):
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

    key = fingerprint(*dom0.from_environment, HERE.parents[1] / "requirements.lock")
    return part(dom0.part("packages"), key, build)


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


def guest(dom0: Dom0) -> Path:
    """Return a folder with what a guest boots: ``vmlinux`` and ``initramfs``, or ``stub``; with a
    device model ``vmlinuz`` and ``initramfs-hvm``, or ``boot.disk``, which has both.
    """
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
            shutil.copy(next(kernel(dom0).glob(f"modules/**/{driver}")), root)
        _archive(root, where / "initramfs")
        for driver in CD_DRIVERS:
            shutil.copy(next(kernel(dom0).glob(f"modules/**/{driver}")), root)
        _archive(root, where / "initramfs-hvm")
        shutil.rmtree(root)
        for name in ("vmlinux", "vmlinuz"):
            shutil.copy(kernel(dom0) / name, where)
        _boot_disk(where)
        sources = [str(folder / "entry.S"), str(folder / "stub.c")]
        run([*gcc, *FREESTANDING, "-o", str(where / "stub"), *sources])

    ingredients: list[str | Path] = [kernel(dom0).name, Path(__file__), *sorted(folder.iterdir())]
    return part(dom0.part("guest"), fingerprint(*ingredients), build)


def _boot_disk(where: Path) -> None:
    """Make a disk from which the firmware of a guest boots the kernel that is in the folder."""
    disk, config = where / "boot.disk", where / "syslinux.cfg"
    config.write_text(f"default lab\nlabel lab\n kernel vmlinuz\n append {BOOT_OPTIONS}\n")
    with disk.open("wb") as file:
        file.truncate(BOOT_DISK_BYTES)
    run(["mkfs.vfat", str(disk)])
    for name in ("vmlinuz", "initramfs-hvm"):
        run(["mcopy", "-i", str(disk), str(where / name), f"::{name[:8]}"])
    run(["mcopy", "-i", str(disk), str(config), "::syslinux.cfg"])
    run(["syslinux", "--install", str(disk)])
    config.unlink()


def package() -> None:
    """Build our Debian package in the working tree, for :data:`HOSTS`, which have the release of
    this machine.
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


def build(kinds: Iterable[str]) -> None:
    """Build everything that runs of these kinds need, but our package, which is built for each run
    of :data:`HOSTS`.
    """
    check_tools()
    chosen = [MACHINES[name] for name in machines(kinds)]
    for dom0 in dict.fromkeys(machine.dom0 for machine in chosen):
        disk(dom0)  # first, because it needs root
        for one in (kernel, initramfs, packages, guest, backend):
            one(dom0)
    for machine in chosen:
        hypervisor(machine)


def machines(kinds: Iterable[str]) -> list[str]:
    """Return the machines that runs of these kinds start, each once."""
    return list(dict.fromkeys(name for kind in kinds for name in KINDS[kind]))


def backend(dom0: Dom0) -> Path:
    """Return the native half of ``xenbackend.libxenctrl``, compiled for the libraries of dom0."""
    root = HERE.parents[1]
    folders = [Path("xenbackend") / name for name in ("native", "libxenctrl/native")]

    def build(where: Path) -> None:
        for folder in folders:
            shutil.copytree(root / folder, where / folder)
        program = where / folders[-1] / "build_xen.py"
        run([sys.executable, str(program)], env={"XEN_SYSROOT": str(disk(dom0) / "sysroot")})
        next(where.glob("xenbackend/libxenctrl/_xen.*.so")).rename(where / NATIVE_HALF.name)

    files = [path for folder in folders for path in sorted((root / folder).iterdir())]
    sources = [path for path in files if path.suffix in {".c", ".h", ".py"}]
    key = fingerprint(disk(dom0).name, *sources)
    return part(dom0.part("backend"), key, build) / NATIVE_HALF.name
