# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend by which daemons attach to a simulated host: the contract, over shared memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xenbackend.contract import (
    Domain,
    DomainConfig,
    DomainInfo,
    DomainState,
    End,
    Hypervisor,
    Preflight,
    Reservation,
    ToolstackPorts,
)
from xenbackend.errors import XenError, check_handle, no_such_domain
from xenbackend.keeper import Keeper
from xenbackend.pages import (
    PAGE_SIZE,
    Buffer,
    MappedPages,
    NativePages,
    PageStatus,
    PfnArray,
    batch_error,
    page_bytes,
)
from xenbackend.ring import PagingRing
from xenbackend.simulated._sim import ffi, lib
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.rpc import HostConnection

RAM_TYPES = (lib.P2M_RAM_RW, lib.P2M_RAM_LOGDIRTY)
LOOK_PFNS = 1 << 18
PAGING_TYPES = (lib.P2M_RAM_PAGING_OUT, lib.P2M_RAM_PAGED, lib.P2M_RAM_PAGING_IN)
IS_PRESENT = np.isin(np.arange(256), (*RAM_TYPES, *PAGING_TYPES))
"""For each p2m type: whether it is memory of the guest, present or paged out."""


def domain_info(fields: dict[str, Any]) -> DomainInfo:
    return DomainInfo(**{**fields, "state": DomainState(fields["state"])})


def _pfns(pfns: PfnArray) -> Any:
    return ffi.from_buffer("uint64_t[]", np.ascontiguousarray(pfns, dtype=np.uint64))


def _preflight(reply: dict[str, Any]) -> Preflight:
    return Preflight(tuple(reply["problems"]), reply["populate_evicted"])


def _kind(config: DomainConfig) -> DomainConfig:
    """Return what a domain is, without its name and its UUID."""
    spec = dataclasses.replace(GuestSpec.from_bytes(config.platform), handle=b"")
    return dataclasses.replace(config, name="", platform=spec.to_bytes())


def _pages(pages: Buffer | None, count: int) -> Any:
    if pages is None:
        return ffi.NULL
    return ffi.from_buffer("uint8_t[]", page_bytes(pages, count))


class SimulatedDomain(Domain):
    def __init__(self, host: SimulatedHypervisor, domid: int, handle: bytes | None = None):
        self._host = host
        self.domid = domid
        self.handle = domain_info(host.call("info", domid=domid)).handle
        check_handle(domid, self.handle, handle)
        reply, fds = host.call_fds("attach", domid=domid)
        control_fd, self._memory_fd = fds
        self._map = ffi.new("struct sim_map *")
        rc = lib.sim_attach(self._map, control_fd, self._memory_fd, host.client_id)
        os.close(control_fd)
        if rc:
            raise XenError("attach", -rc)
        self.nr_pfns: int = self._map.dom.nr_pfns
        self._native_populate_evicted: bool = reply["populate_evicted"]
        self._ring_fds: list[int] = []
        self._held: NDArray[np.uint8] | None = None
        self._holder: HostConnection | None = None
        """A connection for what is held, and for nothing else.  If the keeper has it, the host
        repairs what this process has left unfinished nevertheless.
        """
        self._keeper: Keeper | None = None
        self._memory = memoryview(
            ffi.buffer(self._map.memory, self.nr_pfns * PAGE_SIZE)
        ).toreadonly()

    # ---- life ----
    def info(self) -> DomainInfo:
        try:
            info = domain_info(self._host.call("info", domid=self.domid))
        except XenError as error:
            if error.errno == errno.ESRCH:
                raise no_such_domain(self.domid) from error
            raise
        check_handle(self.domid, info.handle, self.handle)
        return info

    def state(self) -> DomainState:
        return self.info().state

    def config(self) -> DomainConfig:
        return DomainConfig(**self._host.call("config", domid=self.domid))

    def cpu_policy(self) -> tuple[bytes, bytes]:
        return b"", b""

    def close(self) -> None:
        self._release_all()
        lib.sim_detach(self._map)
        for fd in (self._memory_fd, *self._ring_fds):
            if fd >= 0:
                os.close(fd)
        self._memory_fd, self._ring_fds = -1, []

    def preflight(self) -> Preflight:
        return _preflight(
            self._host.call("domain_preflight", domid=self.domid, client=self._host.client_id)
        )

    def rename(self, name: str) -> None:
        self._host.call("rename", domid=self.domid, name=name)

    def reservation(self) -> Reservation:
        dom = self._map.dom
        return Reservation(dom.tot_pages, dom.max_pages, dom.paged_pages)

    def set_max_pages(self, pages: int) -> None:
        if pages >= self._map.dom.max_pages:
            self._map.dom.max_pages = pages
        else:
            self._host.call("set_max_pages", domid=self.domid, pages=pages)

    def suspend(self) -> None:
        self._host.call("suspend", domid=self.domid)

    def resume(self) -> None:
        self._host.call("resume", domid=self.domid)

    def start(self) -> None:
        self._host.call("start", domid=self.domid)

    def pause(self) -> None:
        self._host.call("pause", domid=self.domid)

    def unpause(self) -> None:
        self._host.call("unpause", domid=self.domid)

    def shut_down(self, *, reboot: bool = False) -> None:
        """Have the guest's kernel end the guest, as after ``xl shutdown``."""
        self._host.call("shut_down", domid=self.domid, reboot=reboot)

    def end(self) -> End:
        dom = self._map.dom
        if dom.crash:
            ends = {lib.CRASH_SHUT_DOWN: End.SHUT_DOWN, lib.CRASH_REBOOTED: End.REBOOTED}
            return ends.get(dom.crash, End.CRASHED)
        return End.SUSPENDED if dom.ended_suspended else End.DESTROYED

    def has_run(self) -> bool:
        return bool(self._map.dom.ever_ran)

    def destroy(self) -> None:
        self.info()
        self._release_all()
        self._host.call("destroy", domid=self.domid)

    def context(self) -> bytes:
        return bytes(self._host.call("context", domid=self.domid))

    def set_context(self, context: bytes) -> None:
        self._host.call("set_context", domid=self.domid, context=context)

    def toolstack_gfns(self) -> tuple[int, int]:
        return 0, 1

    # ---- log-dirty ----
    def log_dirty_enable(self) -> None:
        self._host.call("log_dirty", domid=self.domid, enable=True)

    def log_dirty_disable(self) -> None:
        self._host.call("log_dirty", domid=self.domid, enable=False)

    def log_dirty_is_on(self) -> bool:
        return bool(self._map.dom.log_dirty)

    def log_dirty(self, *, clean: bool) -> NDArray[np.uint8]:
        bitmap = np.empty((self.nr_pfns + 63) // 64 * 8, dtype=np.uint8)
        lib.sim_log_dirty(self._map, ffi.from_buffer("uint64_t[]", bitmap), clean)
        return bitmap

    # ---- pages ----
    def map_pages(self, pfns: PfnArray) -> MappedPages:
        status = np.empty(len(pfns), dtype=np.uint8)
        runs = ffi.new("struct sim_run[]", len(pfns))
        n = lib.sim_look(
            self._map, _pfns(pfns), len(pfns), ffi.from_buffer("uint8_t[]", status), runs
        )
        memory = self._memory
        data = [
            memory[run.first * PAGE_SIZE : (run.first + run.pages) * PAGE_SIZE] for run in runs[0:n]
        ]
        return MappedPages(status, data)

    def hold(self, pfns: PfnArray) -> None:
        if self._held is None:
            holder = self._holding()
            _reply, (fd,) = holder.call_fds("hold_map", domid=self.domid, client=holder.client_id)
            self._held = np.frombuffer(mmap.mmap(fd, self.nr_pfns), dtype=np.uint8)
            os.close(fd)
        with self.map_pages(pfns) as mapped:
            if (mapped.status >= PageStatus.PAGED).any():
                raise XenError("hold", errno.EIO)
        self._held[pfns] = 1

    def _holding(self) -> HostConnection:
        if self._holder is None:
            self._holder = HostConnection(self._host.path)
        return self._holder

    def keep(self, path: Path) -> None:
        if self._keeper is None:
            size, alive = ffi.sizeof("struct sim_map"), self._holding().fileno()
            self._keeper = Keeper(path, self.nr_pfns, self.native_pages(), size, alive)

    def release(self, pfns: PfnArray) -> None:
        if self._held is not None:
            self._held[pfns] = 0

    def _release_all(self) -> None:
        if self._keeper is not None:
            self._keeper.end()
        if self._held is not None:
            self._held[:] = 0
        if self._holder is not None:
            self._holder.close()
        self._keeper = self._held = self._holder = None

    def present(self, pfns: PfnArray) -> NDArray[np.bool_]:
        return IS_PRESENT[self.p2m_types(pfns)]

    def paged_out(self) -> PfnArray:
        found = [np.empty(0, dtype=np.uint64)]
        for base in range(0, self.nr_pfns, LOOK_PFNS):
            pfns = np.arange(base, min(base + LOOK_PFNS, self.nr_pfns), dtype=np.uint64)
            found.append(pfns[np.isin(self.p2m_types(pfns), PAGING_TYPES)])
        return np.concatenate(found)

    def reserve(self, pages: int) -> None:
        self._host.call("reserve", domid=self.domid, pages=pages)

    def populate(self, pfns: PfnArray) -> None:
        self._batch("populate_physmap", lib.sim_populate, pfns)

    def depopulate(self, pfns: PfnArray) -> None:
        self._batch("decrease_reservation", lib.sim_depopulate, pfns)

    def write_pages(self, pfns: PfnArray, pages: Buffer | None) -> None:
        self._batch("foreign write", lib.sim_write, pfns, _pages(pages, len(pfns)))

    def pinned(self, pfns: PfnArray) -> PfnArray:
        return self._found(lib.sim_pinned, pfns)

    def held(self, pfns: PfnArray) -> PfnArray:
        return self._found(lib.sim_held, pfns) if self._native_populate_evicted else pfns[:0]

    def _found(self, find: Callable[..., int], pfns: PfnArray) -> PfnArray:
        found = np.empty(len(pfns), dtype=np.uint64)
        n = find(self._map, _pfns(pfns), len(pfns), ffi.from_buffer("uint64_t[]", found))
        return np.sort(found[:n])

    # ---- paging ----
    def has_pager(self) -> bool:
        return bool(self._host.call("has_pager", domid=self.domid))

    def paging_enable(self) -> PagingRing:
        return self._ring("paging_enable", resume=False)

    def paging_attach(self) -> PagingRing:
        return self._ring("paging_attach", resume=True)

    def _ring(self, operation: str, *, resume: bool) -> PagingRing:
        _reply, fds = self._host.call_fds(operation, domid=self.domid, client=self._host.client_id)
        ring_fd, request_fd, response_fd = fds
        page = mmap.mmap(ring_fd, PAGE_SIZE)
        os.close(ring_fd)
        self._ring_fds = [request_fd, response_fd]
        return PagingRing(page, request_fd, response_fd, resume=resume)

    def paging_disable(self) -> None:
        self._host.call("paging_disable", domid=self.domid)

    def populate_evicted(self, pfns: PfnArray) -> None:
        if self._native_populate_evicted:
            self._batch("populate_evicted", lib.sim_populate_evicted, pfns)
        else:
            self._evict_one_by_one(pfns)

    def _evict_one_by_one(self, pfns: PfnArray) -> None:
        """Evict as on a hypervisor without the batched operation: populate the holes, nominate,
        evict.
        """
        holes = ~self.present(pfns)
        for done, pfn in enumerate(pfns):
            if holes[done]:
                try:
                    self.populate(pfns[done : done + 1])
                except XenError as error:
                    why = errno.EINVAL if pfn >= self.nr_pfns else errno.EBUSY
                    raise XenError("populate_evicted", why, pfn=int(pfn), done=done) from error
            rc = lib.sim_nominate(self._map, pfn) or lib.sim_evict(self._map, pfn)
            if rc:
                raise XenError("populate_evicted", -rc, pfn=int(pfn), done=done)

    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        results = np.empty(len(pfns), dtype=np.int32)
        if len(pfns):
            rc = lib.sim_load(
                self._map,
                _pfns(pfns),
                len(pfns),
                _pages(pages, len(pfns)),
                ffi.from_buffer("int32_t[]", results),
            )
            if rc < 0:
                raise XenError("mem_paging_load", -rc)
        return results

    def native_pages(self) -> NativePages:
        domain, look, load = (
            self._map,
            ffi.addressof(lib, "sim_look_at"),
            ffi.addressof(lib, "sim_load_at"),
        )
        return NativePages(
            *(int(ffi.cast("uintptr_t", pointer)) for pointer in (domain, look, ffi.NULL, load))
        )

    def _batch(
        self, operation: str, call: Callable[..., int], pfns: PfnArray, *arguments: Any
    ) -> None:
        if not len(pfns):
            return
        done = ffi.new("size_t *")
        rc = call(self._map, _pfns(pfns), len(pfns), *arguments, done)
        if rc:
            raise batch_error(operation, -rc, pfns, int(done[0]))

    # ---- beyond the contract: for tests, verification and tools of the simulated host ----
    def set_page(
        self, pfn: int, *, p2m_type: int = -1, refs: int = -1, type_count: int = -1
    ) -> None:
        """Cause a state for which the real Xen answers EBUSY: extra references, type counts, mmio,
        broken.
        """
        rc = lib.sim_set_page(self._map, pfn, p2m_type, refs, type_count)
        if rc:
            raise XenError("set_page", -rc, pfn=pfn)

    @contextlib.contextmanager
    def grant(self, pfn: int) -> Iterator[memoryview]:
        """Map a page writably, as a back end maps a page that the guest has granted.  Log-dirty
        records what is written when the mapping ends.
        """
        rc = lib.sim_map_grant(self._map, pfn)
        if rc:
            raise XenError("map_grant_ref", -rc, pfn=pfn)
        try:
            yield memoryview(ffi.buffer(self._map.memory + pfn * PAGE_SIZE, PAGE_SIZE))
        finally:
            lib.sim_unmap_grant(self._map, pfn)

    def refuse(self, *operations: str) -> None:
        """Have these requests of other clients about the domain fail with EBUSY, and no others, as
        calls of the real Xen may fail for a while.
        """
        client = self._host.client_id
        self._host.call("refuse", domid=self.domid, client=client, operations=list(operations))

    def p2m_types(self, pfns: PfnArray) -> NDArray[np.uint8]:
        types = np.empty(len(pfns), dtype=np.uint8)
        if len(pfns):
            lib.sim_page_types(
                self._map, _pfns(pfns), len(pfns), ffi.from_buffer("uint8_t[]", types)
            )
        return types

    def report(self) -> dict[str, Any]:
        """Return what the guest itself has counted and measured; see the host's ``report``."""
        result: dict[str, Any] = self._host.call("report", domid=self.domid)
        return result

    def raw_memory(self, first_pfn: int, pages: memoryview) -> None:
        """Read the bytes of the memory file, without regard to the p2m."""
        os.preadv(self._memory_fd, [pages], first_pfn * PAGE_SIZE)


class SimulatedHypervisor(Hypervisor):
    """A client of the host that listens at ``path``.  Raises ``XenError`` if no host listens."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self._connection = HostConnection(path)
        self._lock = threading.Lock()
        self.client_id = self._connection.client_id

    def call(self, op: str, **arguments: Any) -> Any:
        with self._lock:
            return self._connection.call(op, **arguments)

    def call_fds(self, op: str, **arguments: Any) -> tuple[Any, list[int]]:
        with self._lock:
            return self._connection.call_fds(op, **arguments)

    def close(self) -> None:
        self._connection.close()

    def domains(self) -> list[DomainInfo]:
        return [domain_info(fields) for fields in self.call("list")]

    def open(self, domid: int | str, handle: bytes | None = None) -> SimulatedDomain:
        """Open a domain by its number or, beyond the contract, by its name, which tests and tools
        of the simulated host use.  A text is never taken for a number.
        """
        for info in self.domains():
            if domid == (info.name if isinstance(domid, str) else info.domid):
                return SimulatedDomain(self, info.domid, handle)
        raise no_such_domain(domid)

    def preflight(self, config: DomainConfig | None, *, paging: bool) -> Preflight:
        return _preflight(self.call("preflight", config=config and config.__dict__, paging=paging))

    def free_bytes(self) -> int:
        return int(self.call("free"))

    def create_incoming(
        self, config: DomainConfig, *, instead_of: Domain | None = None
    ) -> SimulatedDomain:
        leaving = None if instead_of is None else instead_of.domid
        domid = self.call("create_incoming", config=config.__dict__, leaving=leaving)
        try:
            return SimulatedDomain(self, domid)
        except XenError:
            self.call("destroy", domid=domid)
            raise

    def abandoned(self, config: DomainConfig, *, instead_of: Domain | None = None) -> list[Domain]:
        leaving = None if instead_of is None else instead_of.domid
        return [
            SimulatedDomain(self, info.domid)
            for info in self.domains()
            if (info.name, info.state) == (config.name, DomainState.INCOMING)
            and info.domid != leaving
        ]

    def reopen_incoming(
        self, domid: int, config: DomainConfig, *, lent: bool, handle: bytes | None = None
    ) -> SimulatedDomain:
        return self.open(domid, handle)

    def bind_incoming(
        self, domid: int, config: DomainConfig, ports: ToolstackPorts
    ) -> SimulatedDomain:
        domain = self.open(domid)
        if _kind(domain.config()) != _kind(config):
            domain.close()
            why = "the domain that the toolstack made is of another kind than the source"
            raise XenError("bind", errno.EINVAL, why=why)
        return domain

    # ---- beyond the contract ----
    def create_guest(self, spec: bytes, *, domid: int | None = None) -> SimulatedDomain:
        """Boot a guest (a ``GuestSpec``'s bytes).  ``domid``: the number of a domain that is gone,
        to be used again.
        """
        return SimulatedDomain(self, self.call("create", spec=spec, domid=domid))

    def history(self) -> list[dict[str, Any]]:
        """Return the last reports of domains that are gone."""
        result: list[dict[str, Any]] = self.call("history")
        return result
