# SPDX-License-Identifier: GPL-2.0-or-later
"""The handle of one host's Xen: the abilities of the host, its domains, and xenstored.

The other modules of this folder are built on this one.  A domain is given its host; the host uses
no class of a domain.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from typing import Any

from xenbackend.contract import Domain, DomainInfo
from xenbackend.errors import XenError
from xenbackend.libxenctrl._xen import ffi, lib
from xenbackend.libxenctrl.preflight import HostFacts
from xenbackend.libxenctrl.states import state_of

LIST_BATCH = 64
XL_TIMEOUT_S = 60
DEVICES = ("vbd", "vif", "pci", "9pfs", "pvcalls", "vfb", "vkb", "vtpm", "vusb", "vdispl", "vsnd")
"""The kinds of devices that libxl may give a domain, except consoles."""


def check(operation: str, rc: int) -> int:
    """Return ``rc``, unless it is an error.  Raises ``XenError``."""
    if rc < 0:
        raise XenError(operation, -rc)
    return rc


class XenHost:
    """One host's Xen.  Raises ``XenError`` if there is no Xen, or if this is not its dom0."""

    def __init__(self) -> None:
        out = ffi.new("struct xen_host **")
        rc = lib.xen_host_open(out)
        if rc:
            raise XenError(
                "Xen", -rc,
                why=f"{XenError('', -rc).why}: this is no dom0 of a running Xen, or xenstored does "
                    "not run, or you " "are not root; without Xen, use --simulated SOCKET with a "
                                       "simulated host",
            )  # fmt: skip
        self.native: Any = out[0]
        self.opened: set[Domain] = set()
        """The open domains, which are closed before the handle is.  A domain adds itself when it is
        opened, and removes itself when it is closed.
        """

    def close(self) -> None:
        if self.native:
            for domain in list(self.opened):
                domain.close()
            lib.xen_host_close(self.native)
            self.native = ffi.NULL

    # ---- domains ----
    def domains(self) -> list[DomainInfo]:
        found: list[DomainInfo] = []
        batch, first = ffi.new("struct xen_info[]", LIST_BATCH), 0
        while n := check(
            "getdomaininfolist", lib.xen_domain_list(self.native, first, batch, LIST_BATCH)
        ):
            found += [
                self.describe(batch[i], 0)
                for i in range(n)
                if batch[i].domid and not batch[i].dying
            ]
            first = batch[n - 1].domid + 1
        return found

    def describe(self, info: Any, nr_pfns: int, *, restoring: bool = False) -> DomainInfo:
        """Return the description of a domain from its ``struct xen_info``.  ``restoring`` is that
        of :func:`state_of`.
        """
        state, reason = state_of(info, restoring=restoring)
        name = self.store_read(f"/local/domain/{info.domid}/name") or ""
        handle = bytes(ffi.buffer(info.handle))
        return DomainInfo(
            info.domid,
            name,
            state,
            nr_pfns,
            info.tot_pages,
            info.vcpus,
            reason,
            handle,
            info.paged_pages,
        )

    def devices(self, domid: int) -> list[str]:
        """Return the kinds of devices that libxl has given a domain, except consoles."""
        found = [
            kind for kind in DEVICES if self.store_read(f"/libxl/{domid}/device/{kind}") is not None
        ]
        if self.store_read(f"/local/domain/0/device-model/{domid}") is not None:
            found.append("device model")
        return found

    def destroy(self, domid: int) -> None:
        """Destroy a domain: with xl if libxl has made its devices, otherwise directly.  If xl
        fails, the domain is destroyed directly as well.
        """
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
        """Run xl for a domain that libxl has made.  Returns whether xl has done its part, within
        its time.  Raises ``XenError`` if xl cannot be started: the call can be repeated then.
        """
        xl = shutil.which("xl")
        if xl is None or self.store_read(f"/libxl/{domid}") is None:
            return False
        try:
            done = subprocess.run(
                [xl, *arguments], check=False, capture_output=True, timeout=XL_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:  # xl was killed; the caller acts without xl
            return False
        except OSError as error:
            number = error.errno or errno.EIO
            why = f"{xl} cannot be started: {os.strerror(number)}"
            raise XenError(f"xl {arguments[0]}", number, why=why) from error
        return done.returncode == 0

    # ---- what the host can do ----
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

    # ---- xenstore ----
    def store_read(self, path: str) -> str | None:
        buffer = ffi.new("char[]", 4096)
        length = lib.xen_store_read(self.native, path.encode(), buffer, len(buffer))
        if length == -errno.ENOENT:
            return None
        return bytes(ffi.buffer(buffer, min(check("xenstore", length), len(buffer)))).decode(
            errors="replace"
        )

    def store_write(self, path: str, value: str) -> None:
        data = value.encode()
        check(f"xenstore {path}", lib.xen_store_write(self.native, path.encode(), data, len(data)))

    def store_permit(self, path: str, *, owner: int, may_read: int | None = None) -> None:
        rc = lib.xen_store_permit(
            self.native, path.encode(), owner, owner if may_read is None else may_read
        )
        check(f"xenstore {path}", rc)

    def store_introduce(self, domid: int, gfn: int, port: int) -> None:
        check("xenstore introduce", lib.xen_store_introduce(self.native, domid, gfn, port))

    def store_resume(self, domid: int) -> None:
        check("xenstore resume", lib.xen_store_resume(self.native, domid))
