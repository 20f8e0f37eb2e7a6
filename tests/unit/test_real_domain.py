# SPDX-License-Identifier: GPL-2.0-or-later
"""What the real Xen's backend does without a hypercall."""

from __future__ import annotations

import errno
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.errors import XenError

RING = 9


def domain_without_xen() -> Any:
    pytest.importorskip("xenbackend.libxenctrl._xen", reason="libxen-dev was not there to build it")
    from xenbackend.libxenctrl._xen import ffi
    from xenbackend.libxenctrl.domain import XenDomain

    class Domain(XenDomain):
        def _native_info(self) -> Any:
            return ffi.new("struct xen_info *", {"hvm": 1})

        def param(self, index: int) -> int:
            return RING

    host: Any = SimpleNamespace(native=ffi.NULL, opened=set())
    return Domain(host, 1, nr_pfns=16)


def test_native_code_has_one_address_of_a_domain_before_and_after_pages_are_held() -> None:
    """The fault server requests the addresses anew for each pair of lanes, and a keeper that is
    killed is replaced by one with the addresses of the first.
    """
    domain = domain_without_xen()
    from xenbackend.libxenctrl._xen import ffi

    first = domain.native_pages()
    native = ffi.cast("struct xen_domain *", first.domain)
    assert (native.domid, native.ring_gfn, native.held) == (1, RING, ffi.NULL)
    held = domain._holding()
    assert domain.native_pages() == first
    assert native.held == held.native
    domain.close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("call", ["destroy", "rename"])
def test_a_host_that_cannot_start_xl_is_an_error_that_may_pass(
    call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xenbackend.libxenctrl._xen", reason="libxen-dev was not there to build it")
    from xenbackend.libxenctrl import host as xen

    def no_process(*_arguments: Any, **_options: Any) -> None:
        raise OSError(number, "no")

    host: Any = object.__new__(xen.XenHost)
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/sbin/xl")
    monkeypatch.setattr(host, "store_read", lambda _path: "", raising=False)
    monkeypatch.setattr(subprocess, "run", no_process)
    with pytest.raises(XenError, match=f"xl {call}: /usr/sbin/xl cannot be started: ") as caught:
        host.destroy(5) if call == "destroy" else host.rename(5, "guest")
    assert caught.value.errno == number
