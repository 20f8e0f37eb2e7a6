# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain as the simulated host has it.

Its memory, its p2m and its log-dirty bitmap are in memory files; its vCPUs are native threads.
"""

from __future__ import annotations

import errno
import mmap
import os
from io import FileIO
from typing import Any

import msgpack
import numpy as np

from xenbackend.contract import DomainConfig, DomainState
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE
from xenbackend.simulated._sim import ffi, lib
from xenbackend.simulated.guest import GuestSpec

CRASH_TEXT = {
    lib.CRASH_VCPU_INFO: "register_vcpu_info failed: err=-22 (vCPU {vcpu}, pfn {pfn:#x} is paged "
    "out)",
    lib.CRASH_NO_RING: "vCPU {vcpu} touched paged-out pfn {pfn:#x} and nobody serves the paging "
    "ring",
    lib.CRASH_BAD_ACCESS: "vCPU {vcpu} touched pfn {pfn:#x}, which is no memory",
    lib.CRASH_SHUT_DOWN: "the guest has shut down",
    lib.CRASH_REBOOTED: "the guest has rebooted",
}


class HostedDomain:
    """One domain: its memory files, its native half, its state."""

    def __init__(self, domid: int, spec: GuestSpec, config: DomainConfig):
        self.domid = domid
        self.handle = spec.handle
        self.spec = spec
        self.config = config
        self.suspended = False
        self.paused = 0
        """How often clients have paused the domain."""
        self.refused: tuple[int, frozenset[str]] = 0, frozenset()
        """Requests that fail, and the client that has asked for that and that may make them."""
        self.ring_fds: list[int] = []
        self.pager = 0
        """The client that serves the ring; 0 if there is none, or if it is gone."""
        self.hold_maps: dict[int, int] = {}
        """A memory file for each client, with a byte for each pfn: 1 if the client holds the
        page.
        """
        self._ring_page: Any = None
        self.control_fd, self.memory_fd = _files(
            (f"domain-{domid}-control", lib.sim_control_bytes(config.nr_pfns)),
            (f"domain-{domid}-memory", config.nr_pfns * PAGE_SIZE),
        )
        self.map = ffi.new("struct sim_map *")
        rc = lib.sim_attach(self.map, self.control_fd, self.memory_fd, lib.SIM_HOST_OWNER)
        if rc:
            raise XenError("create", -rc)
        self.dom = self.map.dom
        self.dom.magic = lib.SIM_MAGIC
        self.dom.nr_pfns = config.nr_pfns
        self.dom.nr_vcpus = config.vcpus
        self.dom.max_pages = config.max_pages
        self.dom.program = spec.program()[0]
        for vcpu in range(config.vcpus):
            self.dom.vcpu[vcpu].vcpu_info_pfn = config.nr_pfns - 1 - vcpu
        self.p2m = np.frombuffer(ffi.buffer(self.map.p2m, config.nr_pfns * 4), dtype=np.uint32)
        self.p2m[:] = lib.P2M_HOLE
        self.native = lib.sim_host_new(self.map)
        if self.native == ffi.NULL:
            raise XenError("create", errno.EAGAIN, why="no threads for its vCPUs")

    def boot(self) -> None:
        """Populate all memory with the image, and start the guest."""
        spec = self.spec
        pfns = [slice(spec.pfn(piece[0]), spec.pfn(piece[-1]) + 1) for piece in spec.pieces]
        for piece in pfns:
            self.p2m[piece] = lib.P2M_RAM_RW
        self.dom.tot_pages = spec.pages
        if spec.image is None:
            lib.sim_generate_image(self.map, 0, spec.pages)
        else:
            with open(spec.image, "rb", buffering=0) as image:
                for piece in pfns:
                    self._read_image(image, piece)
        self.start()

    def _read_image(self, image: FileIO, pfns: slice) -> None:
        """Read the next pages of an image, which may end before."""
        memory = memoryview(ffi.buffer(self.map.memory, pfns.stop * PAGE_SIZE))
        at = pfns.start * PAGE_SIZE
        while n := image.readinto(memory[at : at + 2**24]):
            at += n
        self.p2m[pfns.start : at // PAGE_SIZE] |= np.uint32(lib.P2M_TOUCHED)

    def start(self) -> None:
        self.dom.ever_ran = True
        self.suspended = False
        rc = lib.sim_host_resume_guest(self.native)
        lib.sim_host_unpause(self.native)
        if rc:
            raise XenError("start", -rc, why=self.reason)

    def suspend(self) -> None:
        if self.state is not DomainState.RUNNING:
            raise XenError("suspend", errno.EINVAL, why=f"the domain is {self.state.value}")
        lib.sim_host_pause(self.native)
        self.suspended = True

    def shut_down(self, *, reboot: bool) -> None:
        lib.sim_host_pause(self.native)
        self.dom.crash = lib.CRASH_REBOOTED if reboot else lib.CRASH_SHUT_DOWN

    def resume(self) -> None:
        if not self.suspended:
            raise XenError(
                "resume", errno.EINVAL, why=f"the domain is {self.state.value}, not suspended"
            )
        self.suspended = False
        lib.sim_host_unpause(self.native)

    @property
    def state(self) -> DomainState:
        if self.dom.crash:
            ended = self.dom.crash in (lib.CRASH_SHUT_DOWN, lib.CRASH_REBOOTED)
            return DomainState.SHUT_DOWN if ended else DomainState.CRASHED
        if self.suspended:
            return DomainState.SUSPENDED
        if not self.dom.ever_ran:
            return DomainState.INCOMING
        return DomainState.PAUSED if self.paused else DomainState.RUNNING

    @property
    def reason(self) -> str:
        text: str = CRASH_TEXT.get(self.dom.crash, "")
        return text.format(vcpu=self.dom.crash_vcpu, pfn=self.dom.crash_pfn)

    def info(self) -> dict[str, Any]:
        return {
            "domid": self.domid,
            "name": self.config.name,
            "state": self.state.value,
            "nr_pfns": self.dom.nr_pfns,
            "tot_pages": self.dom.tot_pages,
            "vcpus": self.dom.nr_vcpus,
            "reason": self.reason,
            "handle": self.handle,
            "paged_pages": self.dom.paged_pages,
        }

    def context(self) -> bytes:
        if not self.suspended:
            raise XenError(
                "context", errno.EINVAL, why="only a suspended domain has a context to take"
            )
        vcpus = [self.dom.vcpu[v] for v in range(self.dom.nr_vcpus)]
        state = [[v.count, v.errors, v.first_error_pfn, v.vcpu_info_pfn] for v in vcpus]
        return bytes(msgpack.packb([state, self.dom.balloon_steps]))

    def set_context(self, context: bytes) -> None:
        try:
            vcpus, balloon_steps = msgpack.unpackb(context)
            if self.dom.ever_ran or len(vcpus) != self.dom.nr_vcpus:
                raise ValueError
            for vcpu, (count, errors, first_error_pfn, vcpu_info_pfn) in enumerate(vcpus):
                if vcpu_info_pfn >= self.dom.nr_pfns:
                    raise ValueError
                arch = self.dom.vcpu[vcpu]
                arch.count, arch.errors = count, errors
                arch.first_error_pfn, arch.vcpu_info_pfn = first_error_pfn, vcpu_info_pfn
            self.dom.balloon_steps = balloon_steps
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise XenError(
                "set_context", errno.EINVAL, why="not a context of this domain"
            ) from error

    def report(self) -> dict[str, Any]:
        """Return what the guest has counted: positions, errors, and its stalls, in 8 buckets for
        each power of two of microseconds.
        """
        vcpus = []
        for v in range(self.dom.nr_vcpus):
            arch = self.dom.vcpu[v]
            stalls = ffi.unpack(arch.stalls, lib.SIM_STALL_BUCKETS)
            vcpus.append(
                {
                    "count": arch.count,
                    "errors": arch.errors,
                    "first_error_pfn": arch.first_error_pfn,
                    "faults": arch.faults,
                    "block_ns": arch.block_ns,
                    "max_block_ns": arch.max_block_ns,
                    "first_instruction_ns": arch.first_instruction_ns,
                    "stalls": {bucket: n for bucket, n in enumerate(stalls) if n},
                }
            )
        return {
            **self.info(),
            "vcpu": vcpus,
            "spurious_responses": self.dom.spurious_responses,
            "premature_responses": self.dom.premature_responses,
            "lost_drops": self.dom.lost_drops,
            "balloon_steps": self.dom.balloon_steps,
            "overlaid": self.dom.overlaid,
        }

    def paging_enable(self) -> list[int]:
        if self.ring_fds:
            raise XenError("mem_paging_enable", errno.EBUSY, why="the domain has a pager already")
        ring = os.memfd_create(f"domain-{self.domid}-ring")
        os.ftruncate(ring, PAGE_SIZE)
        to_pager = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        from_pager = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ring_page = ffi.from_buffer(mmap.mmap(ring, PAGE_SIZE), require_writable=True)
        self.ring_fds = [ring, to_pager, from_pager]
        lib.sim_host_paging_enable(self.native, self._ring_page, to_pager, from_pager)
        return self.ring_fds

    def paging_disable(self) -> None:
        rc = lib.sim_host_paging_disable(self.native)
        if rc:
            raise XenError("mem_paging_disable", -rc, why="vCPUs wait for a slot in the ring")
        for fd in self.ring_fds:
            os.close(fd)
        self.ring_fds = []

    def hold_map(self, client: int) -> int:
        if client not in self.hold_maps:
            self.hold_maps[client] = os.memfd_create(f"domain-{self.domid}-held-{client}")
            os.ftruncate(self.hold_maps[client], self.config.nr_pfns)
        return self.hold_maps[client]

    def drop_hold_map(self, client: int) -> None:
        if client in self.hold_maps:
            os.close(self.hold_maps.pop(client))

    def close(self) -> None:
        """Free the domain's memory.  Pages that no client holds become holes, also for clients that
        are still attached.
        """
        lib.sim_host_free(self.native)
        gone = np.ones(self.config.nr_pfns, dtype=np.bool_)
        for client, fd in list(self.hold_maps.items()):
            gone &= np.frombuffer(os.pread(fd, self.config.nr_pfns, 0), dtype=np.uint8) == 0
            self.drop_hold_map(client)
        self.p2m[gone] = lib.P2M_HOLE
        for fd in (*self.ring_fds, self.control_fd, self.memory_fd):
            os.close(fd)
        self.ring_fds = []
        del self.p2m
        lib.sim_detach(self.map)


def _files(*wanted: tuple[str, int]) -> list[int]:
    """Make files in memory, each with a name and a size.  Raises ``OSError``, and leaves no file
    then.
    """
    made: list[int] = []
    try:
        for name, size in wanted:
            made.append(os.memfd_create(name))
            os.ftruncate(made[-1], size)
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return made
