# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of the simulated host: memory, program, options.

A guest's program is a pure function of its options and of the number of steps that each vCPU has
done; ``native/program.c`` has the theory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack

from xenbackend.contract import DomainConfig
from xenbackend.errors import GuestOptionError
from xenbackend.pages import PAGE_SIZE
from xenbackend.simulated._sim import ffi, lib

WORKLOADS = {
    "random": lib.PROGRAM_RANDOM,
    "sequential": lib.PROGRAM_SEQUENTIAL,
    "hotset": lib.PROGRAM_HOTSET,
    "stride": lib.PROGRAM_STRIDE,
    "idle": lib.PROGRAM_RANDOM,
}
IDLE_RATE = 50
"""The accesses of each vCPU in a second, in the mostly idle guest."""
MAX_VCPUS: int = lib.SIM_MAX_VCPUS
MAX_MEMORY_BYTES = 2**40


@dataclass(frozen=True)
class GuestSpec:
    """The options of a guest.  Raises :class:`GuestOptionError` if they are not possible."""

    name: str
    memory_bytes: int
    vcpus: int = 1
    workload: str = "random"
    working_set_bytes: int | None = None
    """The number of bytes, from the first page on, that the program touches; default: half of the
    memory.
    """
    write_permille: int = 1000
    rate: int | None = None
    """The accesses of each vCPU in a second; ``None``: as many as it can make (idle: 50)."""
    stride_pages: int = 16
    image: str | None = None
    """A file with the first pages of the memory; the rest is zero.  ``None``: the memory is
    generated.
    """
    zero_permille: int = 250
    """The share of zero pages in a generated image."""
    balloon_pages: int = 0
    balloon_every: int = 100
    balloon_back: bool = False
    """The pages that were given away are taken back, given away again, and so on."""
    mmio_hole_bytes: int = 0
    """The size of a hole for devices behind the first quarter of the memory.  A guest of more than
    3.75 GiB has such a hole below 4 GiB.
    """
    seed: int = 1
    handle: bytes = b""
    """The guest's UUID; if empty, the host gives the guest one when it boots."""

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise GuestOptionError(message)

        require(
            bool(self.name) and len(self.name) <= 64 and self.name.isprintable(),
            "the guest needs a name of 1 to 64 characters",
        )
        require(1 <= self.vcpus <= MAX_VCPUS, f"{self.vcpus} vCPUs: a guest has 1 to {MAX_VCPUS}")
        require(
            self.memory_bytes % PAGE_SIZE == 0,
            f"memory of {self.memory_bytes} bytes is not a multiple of {PAGE_SIZE}",
        )
        require(
            64 * PAGE_SIZE <= self.memory_bytes <= MAX_MEMORY_BYTES,
            f"memory of {self.memory_bytes} bytes: a guest has 256 KiB to 1 TiB",
        )
        require(
            self.workload in WORKLOADS,
            f"unknown workload {self.workload!r}: one of {', '.join(WORKLOADS)}",
        )
        require(
            self.rate is None or 1 <= self.rate < 2**63,
            f"a rate of {self.rate} accesses a second: at least 1, or none for as fast as it can",
        )
        require(0 <= self.write_permille <= 1000, "the share of writes is 0 to 1")
        require(0 <= self.zero_permille <= 1000, "the share of zero pages is 0 to 1")
        require(
            1 <= self.stride_pages <= MAX_MEMORY_BYTES,
            f"a stride of {self.stride_pages} pages: 1 to {MAX_MEMORY_BYTES} are possible",
        )
        require(
            0 <= self.balloon_pages <= MAX_MEMORY_BYTES and 1 <= self.balloon_every < 2**31,
            "ballooning: pages at least 0, one after every 1 or more accesses",
        )
        require(
            self.mmio_hole_bytes in range(0, MAX_MEMORY_BYTES + 1, PAGE_SIZE),
            f"a hole of {self.mmio_hole_bytes} bytes: a multiple of {PAGE_SIZE}, at most 1 TiB",
        )
        require(0 <= self.seed < 2**63, "a seed is 0 to 2^63 - 1")
        require(len(self.handle) in (0, 16), "a UUID has 16 bytes")
        if self.working_set_bytes is not None:
            require(
                self.working_set_bytes <= self.memory_bytes,
                f"a working set of {self.working_set_bytes} bytes is above the memory of "
                f"{self.memory_bytes}",
            )
            require(
                self.working_set_bytes >= PAGE_SIZE,
                "a working set has at least one page (4096 bytes)",
            )
        require(
            self.balloon_pages == 0
            or self.working_pages + self.vcpus + self.balloon_pages <= self.pages,
            "the balloon cannot take pages of the working set: make one of them smaller",
        )

    @property
    def pages(self) -> int:
        """The number of pages of memory."""
        return self.memory_bytes // PAGE_SIZE

    @property
    def nr_pfns(self) -> int:
        return self.pages + self.mmio_hole_bytes // PAGE_SIZE

    @property
    def pieces(self) -> list[range]:
        """The guest's pages in pieces that have consecutive pfns."""
        below = self.pages // 4 if self.mmio_hole_bytes else 0
        return [piece for piece in (range(below), range(below, self.pages)) if piece]

    def pfn(self, page: int) -> int:
        """Return the pfn of one of the guest's pages, which are numbered from 0."""
        return page + (self.nr_pfns - self.pages if page >= self.pieces[-1].start else 0)

    @property
    def working_pages(self) -> int:
        """The number of pages of the working set."""
        return (self.working_set_bytes or self.memory_bytes // 2) // PAGE_SIZE

    @property
    def content_bytes(self) -> int:
        """The most memory of its host that the guest uses.  Zero pages that the guest never writes
        use none.
        """
        begins = (
            image_bytes(self.image)
            if self.image is not None
            else self.memory_bytes * (1000 - self.zero_permille) // 1000
        )
        written = self.working_pages * PAGE_SIZE if self.write_permille else 0
        return min(begins + written, self.memory_bytes)

    def check_image(self) -> None:
        """Raises :class:`GuestOptionError` for an image that cannot be loaded."""
        if self.image is None:
            return
        size = image_bytes(self.image)
        if size > self.memory_bytes:
            raise GuestOptionError(
                f"image {self.image} has {size} bytes, more than the guest's memory "
                f"({self.memory_bytes}): give it more --memory"
            )

    def program(self) -> Any:
        """Return the native ``struct sim_program``."""
        program = ffi.new("struct sim_program *")
        program.kind = WORKLOADS[self.workload]
        program.nr_vcpus = self.vcpus
        program.seed = self.seed
        program.pages = self.working_pages
        program.stride = self.stride_pages
        program.write_permille = self.write_permille
        program.generated = self.image is None
        program.rate = self.rate or (IDLE_RATE if self.workload == "idle" else 0)
        program.balloon_pages = self.balloon_pages
        program.balloon_every = self.balloon_every
        program.balloon_back = self.balloon_back
        program.hole_at = self.pieces[-1].start
        program.hole_pfns = self.nr_pfns - self.pages
        program.image_seed = self.seed ^ 0x1A6E
        program.zero_permille = self.zero_permille
        return program

    def to_bytes(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> GuestSpec:
        """Return the guest that these bytes describe.  Raises :class:`GuestOptionError` for any
        other bytes.
        """
        try:
            options = msgpack.unpackb(data, strict_map_key=True)
            known = {field.name for field in fields(cls)}
            if not isinstance(options, dict) or set(options) != known:
                raise GuestOptionError("not the description of a simulated guest")
            for field in fields(cls):
                value = options[field.name]
                kind = {"str": str, "bytes": bytes, "bool": bool}.get(
                    str(field.type).split(" ")[0], int
                )
                if not (isinstance(value, kind) or (value is None and "None" in str(field.type))):
                    raise GuestOptionError(
                        f"not the description of a simulated guest: {field.name}"
                    )
            return cls(**options)
        except (ValueError, msgpack.UnpackException) as error:
            raise GuestOptionError(str(error)) from error

    def domain_config(self) -> DomainConfig:
        return DomainConfig(self.name, self.nr_pfns, self.pages, self.vcpus, self.to_bytes())


def available_bytes() -> int:
    """Return the memory that processes can still have, on this machine and in this control
    group.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, StopIteration, KeyError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup") / next(line for line in groups if line.startswith("0::"))[
            3:
        ].lstrip("/")
        limit = int((group / "memory.max").read_text())  # "max" is no number
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, limit - int(used["anon"]) - int(used["shmem"]))
    return max(available, 0)


def image_bytes(path: str) -> int:
    """Return the size of a memory image.  Raises :class:`GuestOptionError` unless it is whole
    pages.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise GuestOptionError(f"image {path} is not a regular file: copy what it has into one")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise GuestOptionError(f"image {path}: {error.strerror}") from error
    except ValueError as error:
        raise GuestOptionError(f"image {path!r}: {error}") from error
    size = status.st_size
    if size == 0 or size % PAGE_SIZE:
        raise GuestOptionError(
            f"image {path} has {size} bytes: a memory image is a multiple of {PAGE_SIZE} "
            f"(pad it with: truncate -s %{PAGE_SIZE} FILE)"
        )
    return size
