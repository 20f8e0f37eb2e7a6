# SPDX-License-Identifier: GPL-2.0-or-later
"""One host's Xen, and its xenstored."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import subprocess
from typing import Any

from xenbackend.contract import Domain, DomainConfig, DomainInfo, DomainState, Hypervisor, Preflight, ToolstackPorts
from xenbackend.errors import NoSuchDomainError, XenError, check_handle
from xenbackend.libxenctrl import builder as incoming
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.domain import XenDomain, check, state_of
from xenbackend.libxenctrl.preflight import HostFacts
from xenbackend.pages import PAGE_SIZE

LIST_BATCH = 64
FIRST_RESERVED_DOMID = 0x7FF0  # xen/include/public/xen.h
XL_TIMEOUT_S = 60


def beside(config: DomainConfig) -> str:
    """The name of an incoming domain on the host that the guest comes from.  xl uses the same
    suffix.
    """
    return config.name + "--incoming"


class XenHypervisor(Hypervisor):
    """Raises ``XenError`` where there is no Xen, or this is not its dom0."""

    def __init__(self) -> None:
        out = ffi.new("struct xen_host **")
        rc = lib.xen_host_open(out)
        if rc:
            raise XenError(
                "Xen", -rc,
                why=f"{XenError('', -rc).why}: this is no dom0 of a running Xen, or xenstored does not run, or one "
                "must be root; without Xen, use --simulated SOCKET with a simulated host",
            )  # fmt: skip
        self.native: Any = out[0]
        self._opened: set[XenDomain] = set()

    def close(self) -> None:
        if self.native:
            for domain in list(self._opened):
                domain.close()
            lib.xen_host_close(self.native)
            self.native = ffi.NULL

    # ---- domains ----
    def domains(self) -> list[DomainInfo]:
        found: list[DomainInfo] = []
        batch, first = ffi.new("struct xen_info[]", LIST_BATCH), 0
        while n := check("getdomaininfolist", lib.xen_domain_list(self.native, first, batch, LIST_BATCH)):
            found += [self.describe(batch[i], 0) for i in range(n) if batch[i].domid and not batch[i].dying]
            first = batch[n - 1].domid + 1
        return found

    def describe(self, info: Any, nr_pfns: int) -> DomainInfo:
        """Of a ``struct xen_info``."""
        state, reason = state_of(info)
        name = self.store_read(f"/local/domain/{info.domid}/name") or ""
        handle = bytes(ffi.buffer(info.handle))
        return DomainInfo(
            info.domid, name, state, nr_pfns, info.tot_pages, info.vcpus, reason, handle, info.paged_pages
        )

    def open(self, domid: int, handle: bytes | None = None) -> XenDomain:
        if not 0 < domid < FIRST_RESERVED_DOMID:
            raise NoSuchDomainError(domid)
        domain = XenDomain(self, domid)
        check_handle(domid, domain.handle, handle)
        return self._remember(domain)

    def _remember(self, domain: XenDomain) -> XenDomain:
        self._opened.add(domain)
        return domain

    def forget(self, domain: XenDomain) -> None:
        """It has been closed."""
        self._opened.discard(domain)

    def config_of(self, domain: XenDomain) -> DomainConfig:
        info = domain.native_info()
        if not info.hvm:
            raise XenError("config", errno.EINVAL, why="a PV guest cannot be migrated by this program")
        name = self.store_read(f"/local/domain/{domain.domid}/name") or f"domain-{domain.domid}"
        platform = incoming.Platform.of(domain).pack()
        # After ``xl mem-set`` downwards a domain may have more for a while than it may get.
        most = max(info.max_pages, info.tot_pages)
        return DomainConfig(name, domain.nr_pfns, most, info.vcpus, platform)

    # ---- what a host can take in ----
    def facts(self) -> HostFacts:
        facts = ffi.new("struct xen_facts *")
        check("physinfo", lib.xen_facts(self.native, facts))
        return HostFacts(
            bool(facts.paging),
            bool(facts.dom0_hvm),
            bool(facts.hap),
            bool(facts.populate_evicted),
            int(facts.free_pages),
        )

    def preflight(self, config: DomainConfig | None, *, paging: bool) -> Preflight:
        facts = self.facts()
        problems = facts.problems() if paging else []
        if config is not None:
            try:
                self._name_for(config)
            except XenError as error:
                problems.append(error.why)
            needed = config.max_pages + incoming.SPARE_PAGES + (incoming.paging_pool_mib(config) << 8)
            if needed > facts.free_pages:
                problems.append(
                    f"not enough memory: the guest needs {needed * PAGE_SIZE >> 20} MiB and "
                    f"{facts.free_pages * PAGE_SIZE >> 20} MiB are free: make room or choose another host"
                )
        return Preflight(tuple(problems), facts.way)

    def create_incoming(self, config: DomainConfig, *, instead_of: Domain | None = None) -> XenDomain:
        if instead_of is None:
            config = dataclasses.replace(config, name=self._name_for(config))
            if config.max_pages > self.facts().free_pages:
                raise XenError("create", errno.ENOMEM, why="not enough memory")
        return self._remember(incoming.create(self, config, reserve=instead_of is None))

    def abandoned(self, config: DomainConfig, *, instead_of: Domain | None = None) -> list[Domain]:
        """Found by the handle, which is the guest's.  The domain gets its name at the end of
        :meth:`create_incoming`.
        """
        handle = incoming.Platform.unpack(config.platform).handle
        names = ("", config.name) if instead_of is not None else ("", config.name, beside(config))
        found: list[Domain] = []
        for info in self.domains():
            if info.state is not DomainState.PAUSED or info.name not in names or info.handle != handle:
                continue
            started, libxl_s = f"/local/domain/{info.domid}/store/port", f"/libxl/{info.domid}"
            if self.store_read(started) is None and self.store_read(libxl_s) is None:
                found.append(self._remember(XenDomain(self, info.domid)))
        return found

    def reopen_incoming(
        self, domid: int, config: DomainConfig, *, lent: bool, handle: bytes | None = None
    ) -> XenDomain:
        self.open(domid, handle).close()
        return self._remember(incoming.reopen(self, domid, config, lent=lent))

    def bind_incoming(self, domid: int, config: DomainConfig, ports: ToolstackPorts) -> XenDomain:
        return self._remember(incoming.bind(self, domid, config, ports))

    def _name_for(self, config: DomainConfig) -> str:
        """Its own; on the host that it comes from, where it is in use still, another, as xl does it.

        Raises ``XenError`` (EEXIST) where that is another domain's.
        """
        handle = incoming.Platform.unpack(config.platform).handle
        handles = {info.name: info.handle for info in self.domains()}
        if config.name not in handles:
            return config.name
        if handles[config.name] != handle or beside(config) in handles:
            why = f"a domain named {config.name!r} is there already: rename or destroy it first"
            raise XenError("create", errno.EEXIST, why=why)
        return beside(config)

    def destroy(self, domid: int) -> None:
        """With xl where its devices are libxl's, otherwise by ourselves."""
        self._xl(domid, "destroy", str(domid))
        rc = lib.xen_destroy(self.native, domid)
        if rc not in (0, -errno.ESRCH):
            raise XenError("destroydomain", -rc)
        vm = self.store_read(f"/local/domain/{domid}/vm")
        for path in (f"/local/domain/{domid}", *([vm] if vm else [])):
            lib.xen_store_remove(self.native, path.encode())

    def rename(self, domid: int, name: str) -> None:
        if not self._xl(domid, "rename", str(domid), name):
            self.store_write(f"/local/domain/{domid}/name", name)

    def _xl(self, domid: int, *arguments: str) -> bool:
        """Of a domain that libxl has made: have it do its part as well."""
        xl = shutil.which("xl")
        if xl is None or self.store_read(f"/libxl/{domid}") is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run([xl, *arguments], check=False, capture_output=True, timeout=XL_TIMEOUT_S)
            return done.returncode == 0
        return False

    # ---- xenstore ----
    def store_read(self, path: str) -> str | None:
        buffer = ffi.new("char[]", 4096)
        length = lib.xen_store_read(self.native, path.encode(), buffer, len(buffer))
        if length == -errno.ENOENT:
            return None
        return bytes(ffi.buffer(buffer, min(check("xenstore", length), len(buffer)))).decode(errors="replace")

    def store_write(self, path: str, value: str) -> None:
        data = value.encode()
        check(f"xenstore {path}", lib.xen_store_write(self.native, path.encode(), data, len(data)))

    def store_permit(self, path: str, *, owner: int, may_read: int | None = None) -> None:
        rc = lib.xen_store_permit(self.native, path.encode(), owner, owner if may_read is None else may_read)
        check(f"xenstore {path}", rc)

    def store_introduce(self, domid: int, gfn: int, port: int) -> None:
        check("xenstore introduce", lib.xen_store_introduce(self.native, domid, gfn, port))

    def store_resume(self, domid: int) -> None:
        check("xenstore resume", lib.xen_store_resume(self.native, domid))
