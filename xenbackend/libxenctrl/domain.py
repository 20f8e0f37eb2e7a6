# SPDX-License-Identifier: GPL-2.0-or-later
"""One domain of the real Xen: the contract's operations, batch by batch.

Most operations are hypercalls.  The guest is asked to suspend through xenstore, as libxl does.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Callable
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
    Preflight,
    Reservation,
)
from xenbackend.errors import LOG_DIRTY, NoSuchDomainError, XenError, check_handle, no_such_domain
from xenbackend.keeper import Keeper
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.context import HvmContext
from xenbackend.libxenctrl.held import HeldPages, XenMappedPages
from xenbackend.libxenctrl.host import XenHost, check
from xenbackend.libxenctrl.params import (
    CONTEXT_PARAMS,
    HVM_PARAM_CALLBACK_IRQ,
    HVM_PARAM_CONSOLE_PFN,
    HVM_PARAM_PAGING_RING_PFN,
    HVM_PARAM_STORE_PFN,
    RINGS_TO_CLEAR,
)
from xenbackend.libxenctrl.platform import Platform, device_memory
from xenbackend.libxenctrl.preflight import ENABLE_ERRORS, DomainFacts
from xenbackend.libxenctrl.ring import XenPagingRing
from xenbackend.libxenctrl.states import SHUTDOWN_SUSPEND, end_of, state_of
from xenbackend.libxenctrl.wiring import Wiring
from xenbackend.pages import (
    Buffer,
    MappedPages,
    NativePages,
    PageStatus,
    PfnArray,
    batch_error,
    page_bytes,
)

NO_PFN = np.uint64(2**64 - 1)
LOOK_PFNS = 1024
SUSPEND_TIMEOUT_S = 60.0
"""How long a guest may take to suspend; libxl's limit is the same."""


def gfn_array(pfns: PfnArray) -> Any:
    return ffi.from_buffer("uint64_t[]", np.ascontiguousarray(pfns, dtype=np.uint64))


class XenDomain(Domain):
    """One domain.  ``nr_pfns`` and ``wiring`` are given for ``builder.py`` only."""

    def __init__(
        self, host: XenHost, domid: int, nr_pfns: int | None = None, wiring: Wiring | None = None
    ):
        self._host = host
        self._xen = host.native
        self._wiring = wiring
        self.domid = domid
        info = self._native_info()  # a field lives as long as its struct
        self.handle = bytes(ffi.buffer(info.handle))
        if nr_pfns is None:
            out = ffi.new("uint64_t *")
            check("maximum_gpfn", lib.xen_nr_gfns(self._xen, domid, out))
            nr_pfns = int(out[0])
        self.nr_pfns = nr_pfns
        self._held: HeldPages | None = None
        self._native = ffi.new("struct xen_domain *", [self._xen, domid])  # for native_pages()
        self._keeper: Keeper | None = None
        self._pager: Any = None
        self._ring: XenPagingRing
        self._ring_pfn = self.param(HVM_PARAM_PAGING_RING_PFN) if info.hvm else 0
        host.opened.add(self)

    # ---- what the domain is ----
    def native_info(self) -> Any:
        """Return a ``struct xen_info``.  Raises :class:`NoSuchDomainError` for a domain that is
        being torn down, although its pages may still be mapped.
        """
        info = self._native_info()
        check_handle(self.domid, bytes(ffi.buffer(info.handle)), self.handle)
        return info

    def _native_info(self) -> Any:
        info = ffi.new("struct xen_info *")
        rc = lib.xen_domain_info(self._xen, self.domid, info)
        if rc == -errno.ESRCH or (rc == 0 and info.dying):
            raise no_such_domain(self.domid)
        check("getdomaininfo", rc)
        return info

    def _remnant(self) -> Any:
        """Return a ``struct xen_info``, also of a domain that is being torn down, or ``None``."""
        info = ffi.new("struct xen_info *")
        rc = lib.xen_domain_info(self._xen, self.domid, info)
        return None if rc or bytes(ffi.buffer(info.handle)) != self.handle else info

    def info(self) -> DomainInfo:
        restoring = self._wiring is not None
        return self._host.describe(self.native_info(), self.nr_pfns, restoring=restoring)

    def state(self) -> DomainState:
        return state_of(self.native_info(), restoring=self._wiring is not None)[0]

    def config(self) -> DomainConfig:
        info = self.native_info()
        if not info.hvm:
            raise XenError(
                "config", errno.EINVAL, why="a PV guest cannot be migrated by this program"
            )
        name = self._host.store_read(f"/local/domain/{self.domid}/name") or f"domain-{self.domid}"
        platform = Platform(
            bool(info.hap), info.emulation_flags, info.misc_flags, bytes(ffi.buffer(info.handle)),
            self.param(HVM_PARAM_PAGING_RING_PFN), *self.cpu_policy(),
        )  # fmt: skip
        # After ``xl mem-set`` downwards a domain may have more frames for a while than it may get.
        most = max(info.max_pages, info.tot_pages)
        return DomainConfig(name, self.nr_pfns, most, info.vcpus, platform.pack())

    def devices(self) -> list[str]:
        return self._host.devices(self.domid)

    def cpu_policy(self) -> tuple[bytes, bytes]:
        nr, sizes = ffi.new("uint32_t[2]"), (lib.XEN_CPUID_LEAF_BYTES, lib.XEN_MSR_ENTRY_BYTES)
        check("cpu policy", lib.xen_cpu_policy_size(self._xen, nr, nr + 1))
        into = [ffi.new("uint8_t[]", nr[i] * sizes[i]) for i in range(2)]
        check("cpu policy", lib.xen_cpu_policy(self._xen, self.domid, into[0], nr, into[1], nr + 1))
        leaves, msrs = (bytes(ffi.buffer(into[i], nr[i] * sizes[i])) for i in range(2))
        return leaves, msrs

    def close(self) -> None:
        if self._pager is not None:
            self._ring.close()
            lib.xen_pager_close(self._xen, self._pager)
            self._pager = None
        if self._keeper is not None:
            self._keeper.end()
        if self._held is not None:
            self._held.close()
        self._keeper = self._held = None
        self._host.opened.discard(self)

    def preflight(self) -> Preflight:
        info, pod = self.native_info(), ffi.new("uint64_t *")
        if info.hvm:
            check("get_pod_target", lib.xen_pod_entries(self._xen, self.domid, pod))
        taken = self._pager is None and lib.xen_has_ring(self._xen, self.domid) == 1
        # Xen does not report whether the IOMMU is on for the domain; it only refuses a ring then.
        pci = "pci" in self.devices()
        host = self._host.facts()
        domain = DomainFacts(bool(info.hvm), bool(info.hap), int(pod[0]), pci, taken)
        return Preflight(tuple(host.problems() or domain.problems()), host.way)

    def rename(self, name: str) -> None:
        self._host.rename(self.domid, name)

    def reservation(self) -> Reservation:
        info = self.native_info()
        return Reservation(int(info.tot_pages), int(info.max_pages), int(info.paged_pages))

    def set_max_pages(self, pages: int) -> None:
        check("setmaxmem", lib.xen_set_max_pages(self._xen, self.domid, pages))

    # ---- running ----
    def suspend(self) -> None:
        state = self.state()
        if state is not DomainState.RUNNING:
            raise XenError("suspend", errno.EINVAL, why=f"the domain is {state.value}")
        if not self.param(HVM_PARAM_CALLBACK_IRQ):  # the guest has no PV drivers
            check("shutdown", lib.xen_shutdown(self._xen, self.domid, SHUTDOWN_SUSPEND))
        else:
            self._ask_to_suspend("suspend")
        deadline = time.monotonic() + SUSPEND_TIMEOUT_S
        while True:
            info = self.native_info()
            if info.shutdown:
                break
            if time.monotonic() > deadline:
                self._ask_to_suspend("")
                why = f"the guest does not suspend within {SUSPEND_TIMEOUT_S:g} s"
                why += ": has it Xen's suspend support?"
                raise XenError("suspend", errno.ETIMEDOUT, why=why)
            time.sleep(0.0005)
        if info.shutdown_reason != SHUTDOWN_SUSPEND:
            raise XenError(
                "suspend",
                errno.EINVAL,
                why=f"the guest shut down instead (reason {info.shutdown_reason})",
            )

    def _ask_to_suspend(self, request: str) -> None:
        self._host.store_write(f"/local/domain/{self.domid}/control/shutdown", request)

    def resume(self) -> None:
        state = self.state()
        if state is not DomainState.SUSPENDED:
            raise XenError(
                "resume", errno.EINVAL, why=f"the domain is {state.value}, not suspended"
            )
        check("resumedomain", lib.xen_resume(self._xen, self.domid))
        self._host.store_resume(self.domid)

    def start(self) -> None:
        if self._wiring is not None:
            self._wiring.introduce(self.domid, *self.toolstack_gfns())
        self.unpause()
        self._wiring = None

    def pause(self) -> None:
        check("pausedomain", lib.xen_pause(self._xen, self.domid))

    def unpause(self) -> None:
        check("unpausedomain", lib.xen_unpause(self._xen, self.domid))

    def end(self) -> End:
        """Return how the domain ended, from a remnant of the domain.  The remnant exists for as
        long as a process maps one of its pages, as the domain's pager does.
        """
        info = self._remnant()
        return End.DESTROYED if info is None else end_of(info)

    def has_run(self) -> bool:
        info = self._remnant()
        return info is not None and bool(info.cpu_ns)

    def destroy(self) -> None:
        self.native_info()
        self.close()
        self._host.destroy(self.domid)

    def context(self) -> bytes:
        if self.state() is not DomainState.SUSPENDED:
            raise XenError(
                "context", errno.EINVAL, why="only a suspended domain has a context to take"
            )
        size = check("gethvmcontext", lib.xen_hvm_context(self._xen, self.domid, ffi.NULL, 0))
        buffer = bytearray(size)
        size = check(
            "gethvmcontext",
            lib.xen_hvm_context(self._xen, self.domid, ffi.from_buffer("uint8_t[]", buffer), size),
        )
        tsc = ffi.new("struct xen_tsc *")
        check("gettscinfo", lib.xen_tsc_get(self._xen, self.domid, tsc))
        params = {index: value for index in CONTEXT_PARAMS if (value := self.param(index))}
        return HvmContext(params, tsc, bytes(buffer[:size])).pack()

    def set_context(self, context: bytes) -> None:
        new = HvmContext.unpack(context)
        for index, value in new.params.items():
            if index in RINGS_TO_CLEAR:
                self.write_pages(np.array([value], dtype=np.uint64), None)
            check("hvm_param_set", lib.xen_param_set(self._xen, self.domid, index, value))
        check("settscinfo", lib.xen_tsc_set(self._xen, self.domid, new.tsc))
        if self._wiring is not None:
            self._wiring.connect(self.domid, *self.toolstack_gfns())
        records = ffi.from_buffer("uint8_t[]", new.records)
        size = len(new.records)
        check("sethvmcontext", lib.xen_set_hvm_context(self._xen, self.domid, records, size))

    def toolstack_gfns(self) -> tuple[int, int]:
        return self.param(HVM_PARAM_STORE_PFN), self.param(HVM_PARAM_CONSOLE_PFN)

    def param(self, index: int) -> int:
        out = ffi.new("uint64_t *")
        check("hvm_param_get", lib.xen_param_get(self._xen, self.domid, index, out))
        return int(out[0])

    # ---- log-dirty ----
    def log_dirty_enable(self) -> None:
        rc = lib.xen_log_dirty_enable(self._xen, self.domid)
        if rc:
            raise XenError("enable_logdirty", -rc, why=LOG_DIRTY if rc == -errno.EBUSY else "")

    def log_dirty_disable(self) -> None:
        check("logdirty off", lib.xen_log_dirty_disable(self._xen, self.domid))

    def log_dirty_is_on(self) -> bool:
        return check("logdirty", lib.xen_log_dirty_is_on(self._xen, self.domid)) == 1

    def log_dirty(self, *, clean: bool) -> NDArray[np.uint8]:
        bitmap = np.zeros((self.nr_pfns + 63) // 64 * 8, dtype=np.uint8)
        into = ffi.from_buffer("uint8_t[]", bitmap)
        check("logdirty", lib.xen_log_dirty(self._xen, self.domid, clean, into, self.nr_pfns))
        return bitmap

    # ---- pages ----
    def map_pages(self, pfns: PfnArray) -> MappedPages:
        status, addresses = (
            np.zeros(len(pfns), dtype=np.uint8),
            np.zeros(len(pfns), dtype=np.uint64),
        )
        rest, done = np.ones(len(pfns), dtype=np.bool_), contextlib.ExitStack()
        with contextlib.ExitStack() as failing:
            failing.enter_context(done)
            if self._held is not None:
                there, used = self._held.use(pfns, addresses)
                rest = ~there
                done.callback(self._held.used, used)
            if rest.any():
                view = ffi.new("struct xen_view *")
                status[rest], addresses[rest] = self._map(pfns[rest], view)
                done.callback(lib.xen_unmap, self._xen, view)
            failing.pop_all()
        return XenMappedPages(ffi.from_buffer("const void *[]", addresses), status, done.close)

    def _map(self, pfns: PfnArray, view: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Return the status and the address of each pfn; all are holes if the domain is gone."""
        status, addresses = (
            np.empty(len(pfns), dtype=np.uint8),
            np.zeros(len(pfns), dtype=np.uint64),
        )
        gfns, into = gfn_array(self._without_ring(pfns)), ffi.from_buffer("uint8_t[]", status)
        pages = ffi.from_buffer("const void *[]", addresses)
        rc = lib.xen_map(self._xen, self.domid, gfns, len(pfns), into, pages, view)
        if (rc or status.any()) and self._held is not None and self._is_gone():
            lib.xen_unmap(self._xen, view)
            return np.full(len(pfns), PageStatus.HOLE, dtype=np.uint8), addresses
        check("map", rc)
        return status, addresses

    def _is_gone(self) -> bool:
        try:
            self.native_info()
        except NoSuchDomainError:
            return True
        return False

    def hold(self, pfns: PfnArray) -> None:
        check("hold", self._holding().add(pfns[pfns != self._ring_pfn]))

    def _holding(self) -> HeldPages:
        if self._held is None:
            self._held = HeldPages(self._xen, self.domid, self.nr_pfns)
        return self._held

    def keep(self, path: Path) -> None:
        if self._keeper is None:
            self._holding()
            pages = self.native_pages()
            self._keeper = Keeper(path, self.nr_pfns, pages, ffi.sizeof("struct xen_domain"))

    def release(self, pfns: PfnArray) -> None:
        if self._held is not None:
            self._held.release(pfns)

    def _types(self, pfns: PfnArray) -> NDArray[np.uint8]:
        types = np.empty(len(pfns), dtype=np.uint8)
        gfns, into = gfn_array(self._without_ring(pfns)), ffi.from_buffer("uint8_t[]", types)
        check("getpageframeinfo", lib.xen_page_types(self._xen, self.domid, gfns, len(pfns), into))
        return types

    def _without_ring(self, pfns: PfnArray) -> PfnArray:
        """Replace the pfn of the page that is set aside for a ring by a pfn that no domain has.

        This page is no memory of the guest, with or without a ring, because each host has its own.
        """
        return np.where(pfns == self._ring_pfn, NO_PFN, pfns) if self._ring_pfn else pfns

    def present(self, pfns: PfnArray) -> NDArray[np.bool_]:
        types = self._types(pfns)
        there: NDArray[np.bool_] = (types == PageStatus.DATA) | (types == PageStatus.PAGED)
        return there

    def paged_out(self) -> PfnArray:
        """Return the paged-out pfns.

        Xen distinguishes a paged-out pfn from a hole only by a hypercall for each pfn, but reports
        the number of paged-out pfns at once.  A guest's memory is at the lowest pfns, and a few
        pages are at the highest.  The holes between them, of which there may be a million, are
        therefore examined last.
        """
        left, found = int(self.native_info().paged_pages), [np.empty(0, dtype=np.uint64)]
        pieces = deque(range(0, self.nr_pfns, LOOK_PFNS))
        while pieces and left > 0:
            base = pieces.popleft() if len(found) % 2 else pieces.pop()
            pfns = np.arange(base, min(base + LOOK_PFNS, self.nr_pfns), dtype=np.uint64)
            found.append(pfns[self._types(pfns) == PageStatus.PAGED])
            left -= len(found[-1])
        return np.sort(np.concatenate(found))

    def reserve(self, pages: int) -> None:
        check("claim_pages", lib.xen_claim(self._xen, self.domid, pages))

    def populate(self, pfns: PfnArray) -> None:
        self._batch("populate_physmap", lib.xen_populate, pfns)

    def depopulate(self, pfns: PfnArray) -> None:
        self._batch("decrease_reservation", lib.xen_depopulate, pfns)

    def write_pages(self, pfns: PfnArray, pages: Buffer | None) -> None:
        self._batch("foreign write", lib.xen_write, pfns, self._pages(pages, len(pfns)))

    def pinned(self, pfns: PfnArray) -> PfnArray:
        return self._found("pinned set", lib.xen_pinned, pfns)

    def held(self, pfns: PfnArray) -> PfnArray:
        if self._held is not None:
            pfns = pfns | self._held.holds(pfns).astype(np.uint64) << np.uint64(lib.HOLDS_SHIFT)
        return self._found("held pages", lib.xen_held, pfns)

    def device_memory(self, pfns: PfnArray) -> PfnArray:
        return device_memory(pfns)

    def _found(self, what: str, find: Callable[..., int], pfns: PfnArray) -> PfnArray:
        out = np.empty(len(pfns) + 1, dtype=np.uint64)
        into = ffi.from_buffer("uint64_t[]", out)
        n = check(what, find(self._xen, self.domid, gfn_array(pfns), len(pfns), into))
        return np.sort(out[:n])

    # ---- paging ----
    def has_pager(self) -> bool:
        return check("paging ring", lib.xen_has_ring(self._xen, self.domid)) == 1

    def paging_enable(self) -> XenPagingRing:
        pager = ffi.new("struct xen_pager *")
        rc = lib.xen_paging_enable(self._xen, self.domid, self.nr_pfns, pager)
        if rc:
            raise XenError("mem_paging_enable", -rc, why=ENABLE_ERRORS.get(-rc, ""))
        return self._serve(pager, resume=False)

    def paging_attach(self) -> XenPagingRing:
        pager = ffi.new("struct xen_pager *")
        rc = lib.xen_paging_attach(self._xen, self.domid, pager)
        if rc:
            why = {
                errno.EBUSY: "its pager lives",
                errno.ENODEV: "it has no paging ring of ours",
            }.get(-rc, "")
            raise XenError("paging_attach", -rc, why=why)
        return self._serve(pager, resume=True)

    def _serve(self, pager: Any, *, resume: bool) -> XenPagingRing:
        self._pager, self._ring_pfn = pager, int(pager.ring_gfn)
        self._ring = XenPagingRing(pager, resume=resume)
        return self._ring

    def paging_disable(self) -> None:
        if self._pager is None:
            raise XenError("mem_paging_disable", errno.ENODEV, why="this is not its pager")
        check("mem_paging_disable", lib.xen_paging_disable(self._xen, self.domid, self._pager))
        self._ring.close()
        self._pager = None

    def populate_evicted(self, pfns: PfnArray) -> None:
        self._batch("populate_evicted", lib.xen_populate_evicted, pfns)

    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        results = np.zeros(len(pfns), dtype=np.int32)
        if len(pfns):
            into = ffi.from_buffer("int32_t[]", results)
            source = self._pages(pages, len(pfns))
            check(
                "mem_paging_load",
                lib.xen_load(self._xen, self.domid, gfn_array(pfns), len(pfns), source, into),
            )
        return results

    def native_pages(self) -> NativePages:
        held = ffi.NULL if self._held is None else self._held.native
        self._native.ring_gfn, self._native.held = self._ring_pfn, held
        names = ("xen_look_at", "xen_looked_at", "xen_load_at")
        pointers = (self._native, *(ffi.addressof(lib, name) for name in names))
        return NativePages(*(int(ffi.cast("uintptr_t", pointer)) for pointer in pointers))

    @staticmethod
    def _pages(pages: Buffer | None, count: int) -> Any:
        if pages is None:
            return ffi.NULL
        return ffi.from_buffer("uint8_t[]", page_bytes(pages, count))

    def _batch(
        self, operation: str, call: Callable[..., int], pfns: PfnArray, *arguments: Any
    ) -> None:
        if not len(pfns):
            return
        done = ffi.new("size_t *")
        rc = call(self._xen, self.domid, gfn_array(pfns), len(pfns), *arguments, done)
        if rc:
            raise batch_error(operation, -rc, pfns, int(done[0]))
