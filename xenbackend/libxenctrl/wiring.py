# SPDX-License-Identifier: GPL-2.0-or-later
"""The connections of a domain to xenstored and to the console's daemon."""

from __future__ import annotations

import uuid

from xenbackend.contract import DomainConfig, ToolstackPorts
from xenbackend.libxenctrl._xen import lib
from xenbackend.libxenctrl.host import XenHost, check
from xenbackend.libxenctrl.params import HVM_PARAM_CONSOLE_EVTCHN, HVM_PARAM_STORE_EVTCHN
from xenbackend.libxenctrl.platform import Platform


class Wiring:
    """xenstored's and the console's ends of a domain, which a toolstack has made."""

    def __init__(self, host: XenHost, ports: ToolstackPorts):
        self._host = host
        self._ports = ports

    def connect(self, domid: int, store: int, console: int) -> None:
        """Give the domain the event channels and grants that the guest expects.

        ``store`` and ``console`` are the gfns of the rings, whose pages have to be present.
        """
        host, ports = self._host.native, self._ports
        for param, port in (
            (HVM_PARAM_STORE_EVTCHN, ports.store),
            (HVM_PARAM_CONSOLE_EVTCHN, ports.console),
        ):
            check("hvm_param_set", lib.xen_param_set(host, domid, param, port))
        seeded = lib.xen_seed_grants(
            host, domid, console, store, ports.console_domid, ports.store_domid
        )
        check("gnttab seed", seeded)

    def introduce(self, domid: int, store: int, console: int) -> None:
        """Do nothing, because the toolstack introduces the domain to xenstored and the console's
        daemon.
        """


class OwnWiring(Wiring):
    """xenstored's and the console's ends of a domain, which this process makes itself."""

    def __init__(
        self,
        host: XenHost,
        config: DomainConfig,
        platform: Platform,
        ports: ToolstackPorts | None = None,
    ):
        super().__init__(host, ports or ToolstackPorts(0, 0))
        self._config, self._platform = config, platform

    def connect(self, domid: int, store: int, console: int) -> None:
        ports = [
            check("evtchn_alloc_unbound", lib.xen_event_channel(self._host.native, domid))
            for _ in range(2)
        ]
        self._ports = ToolstackPorts(*ports)
        super().connect(domid, store, console)

    def introduce(self, domid: int, store: int, console: int) -> None:
        write, root = self._host.store_write, f"/local/domain/{domid}"
        handle = str(uuid.UUID(bytes=self._platform.handle))
        memory_kib = self._config.max_pages * 4
        write(f"/vm/{handle}/name", self._config.name)
        for key, value in {
            "vm": f"/vm/{handle}", "domid": domid, "memory/static-max": memory_kib,
            "memory/target": memory_kib, "control/platform-feature-multiprocessor-suspend": 1,
            "console/backend-id": 0, "console/limit": 1048576, "console/type": "xenconsoled",
            "console/output": "pty", "console/tty": "", "console/ring-ref": console,
            "console/port": self._ports.console, "store/ring-ref": store,
            "store/port": self._ports.store,
        }.items():  # fmt: skip
            write(f"{root}/{key}", str(value))
        for key in ("control/shutdown", "device", "data"):
            write(f"{root}/{key}", "")
            self._host.store_permit(f"{root}/{key}", owner=domid)
        for key in ("", "/console", "/store", "/memory", "/control"):
            self._host.store_permit(root + key, owner=0, may_read=domid)
        self._host.store_introduce(domid, store, self._ports.store)
