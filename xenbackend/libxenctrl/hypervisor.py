# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract's hypervisor: the domains of one host, and the host's abilities."""

from __future__ import annotations

import dataclasses
import errno

from xenbackend.contract import (
    Domain,
    DomainConfig,
    DomainInfo,
    DomainState,
    Hypervisor,
    Preflight,
    ToolstackPorts,
)
from xenbackend.errors import NoSuchDomainError, XenError, check_handle, no_such_domain
from xenbackend.libxenctrl import builder
from xenbackend.libxenctrl.domain import XenDomain
from xenbackend.libxenctrl.host import XenHost
from xenbackend.libxenctrl.platform import Platform
from xenbackend.pages import PAGE_SIZE

FIRST_RESERVED_DOMID = 0x7FF0  # xen/include/public/xen.h


def beside(config: DomainConfig) -> str:
    """Return the name of an incoming domain on the guest's source host, with xl's suffix."""
    return config.name + "--incoming"


class XenHypervisor(Hypervisor):
    """The hypervisor of this host.  Raises ``XenError`` if there is no Xen, or if this is not its
    dom0.
    """

    def __init__(self) -> None:
        self.host = XenHost()

    def close(self) -> None:
        self.host.close()

    # ---- domains ----
    def domains(self) -> list[DomainInfo]:
        return self.host.domains()

    def open(self, domid: int, handle: bytes | None = None) -> XenDomain:
        if not 0 < domid < FIRST_RESERVED_DOMID:
            raise no_such_domain(domid)
        domain = XenDomain(self.host, domid)
        try:
            check_handle(domid, domain.handle, handle)
        except NoSuchDomainError:
            domain.close()
            raise
        return domain

    # ---- incoming domains ----
    def preflight(self, config: DomainConfig | None, *, paging: bool) -> Preflight:
        facts = self.host.facts()
        problems = facts.problems() if paging else []
        if config is not None:
            try:
                self._name_for(config)
            except XenError as error:
                problems.append(error.why)
            needed = config.max_pages + builder.SPARE_PAGES + (builder.paging_pool_mib(config) << 8)
            if needed > facts.free_pages:
                problems.append(
                    f"not enough memory: the guest needs {needed * PAGE_SIZE >> 20} MiB and "
                    f"{facts.free_pages * PAGE_SIZE >> 20} MiB are free: make room or choose "
                    "another host"
                )
        return Preflight(tuple(problems), facts.way)

    def free_bytes(self) -> int:
        return self.host.facts().free_pages * PAGE_SIZE

    def create_incoming(
        self, config: DomainConfig, *, instead_of: Domain | None = None
    ) -> XenDomain:
        if instead_of is None:
            config = dataclasses.replace(config, name=self._name_for(config))
            if config.max_pages > self.host.facts().free_pages:
                raise XenError("create", errno.ENOMEM, why="not enough memory")
        return builder.create(self.host, config, reserve=instead_of is None)

    def abandoned(self, config: DomainConfig, *, instead_of: Domain | None = None) -> list[Domain]:
        """Find the domains by their handle, which is the guest's, because a domain gets its name
        only at the end of :meth:`create_incoming`.
        """
        handle = Platform.unpack(config.platform).handle
        names = ("", config.name) if instead_of is not None else ("", config.name, beside(config))
        found: list[Domain] = []
        for info in self.domains():
            if (
                info.state is not DomainState.PAUSED
                or info.name not in names
                or info.handle != handle
            ):
                continue
            started, libxl_s = f"/local/domain/{info.domid}/store/port", f"/libxl/{info.domid}"
            if self.host.store_read(started) is None and self.host.store_read(libxl_s) is None:
                found.append(XenDomain(self.host, info.domid))
        return found

    def reopen_incoming(
        self, domid: int, config: DomainConfig, *, lent: bool, handle: bytes | None = None
    ) -> XenDomain:
        self.open(domid, handle).close()
        return builder.reopen(self.host, domid, config, lent=lent)

    def bind_incoming(self, domid: int, config: DomainConfig, ports: ToolstackPorts) -> XenDomain:
        return builder.bind(self.host, domid, config, ports)

    def _name_for(self, config: DomainConfig) -> str:
        """Return the name for an incoming domain.  On the guest's source host its own name is still
        in use, so another name is used, as by xl.

        Raises ``XenError`` (EEXIST) if another domain has the name.
        """
        handle = Platform.unpack(config.platform).handle
        handles = {info.name: info.handle for info in self.domains()}
        if config.name not in handles:
            return config.name
        if handles[config.name] != handle or beside(config) in handles:
            why = f"a domain named {config.name!r} is there already: rename or destroy it first"
            raise XenError("create", errno.EEXIST, why=why)
        return beside(config)
