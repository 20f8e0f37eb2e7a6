# SPDX-License-Identifier: GPL-2.0-or-later
"""The reasons why a host or a domain is refused, from its facts.  ``tests/xenlab`` has the reasons
that a real Xen can be made to have.
"""

from __future__ import annotations

import errno
import sys
from dataclasses import replace

import pytest

from xenbackend.choose import open_hypervisor
from xenbackend.errors import XenError
from xenbackend.libxenctrl import preflight as refusals
from xenbackend.libxenctrl.preflight import DomainFacts, HostFacts

FIT_HOST = HostFacts(paging=True, dom0_hvm=False, hap=True, populate_evicted=True, free_pages=1)
FIT_DOMAIN = DomainFacts(hvm=True, hap=True, pod_entries=0, pci_devices=False, ring_taken=False)


def test_what_is_fit_is_not_refused() -> None:
    assert FIT_HOST.problems() == [] and FIT_DOMAIN.problems() == []
    assert FIT_HOST.way == "native"
    assert replace(FIT_HOST, populate_evicted=False).way == "fallback"


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (replace(FIT_HOST, paging=False, dom0_hvm=True), "the package xen-hypervisor-paging"),
        (replace(FIT_HOST, dom0_hvm=True), "without dom0=pvh"),
        (replace(FIT_HOST, hap=False), "firmware"),
        (replace(FIT_DOMAIN, hvm=False, hap=False), "PV guest"),
        (replace(FIT_DOMAIN, hap=False), "hap=1"),
        (replace(FIT_DOMAIN, pci_devices=True), "detach"),
        (replace(FIT_DOMAIN, pod_entries=7), "maxmem"),
        (replace(FIT_DOMAIN, ring_taken=True), "xenpaging"),
    ],
)
def test_each_reason_is_one_line_that_says_what_to_do(
    facts: HostFacts | DomainFacts, word: str
) -> None:
    (problem,) = facts.problems()
    assert word in problem and "\n" not in problem


def test_several_reasons_are_several_lines() -> None:
    assert len(replace(FIT_DOMAIN, hap=False, pod_entries=1).problems()) == 2


def test_what_xen_itself_refuses_is_reported_in_the_same_words() -> None:
    assert refusals.ENABLE_ERRORS[errno.EMLINK] == refusals.IOMMU
    assert refusals.ENABLE_ERRORS[errno.EXDEV] == refusals.POD


def test_without_its_native_part_the_rest_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("xenbackend.libxenctrl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "xenbackend.libxenctrl._xen", None)
    with pytest.raises(XenError, match="install libxen-dev"):
        open_hypervisor(None)
