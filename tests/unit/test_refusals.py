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
from xenbackend.libxenctrl import features
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


# ---- what a guest would lose ----
def leaves(*values: tuple[int, int, int, int, int, int]) -> bytes:
    return b"".join(features.LEAF.pack(*value) for value in values)


NONE = features.NONE
SOURCE = leaves(
    (0x1, NONE, 0x630F10, 0, 1 << 25 | 1 << 31 | 1 << 27, 1 << 28 | 1),  # aesni; fpu
    (0x7, 0, 0, 1 << 5 | 1 << 3, 0, 0),  # avx2, bmi1
    (0x80000001, NONE, 0, 0, 1 << 6, 1 << 29),  # sse4a; lm
)


def test_each_feature_that_a_guest_would_lose_is_named() -> None:
    here = leaves((0x1, NONE, 0, 0, 0, 1), (0x7, 0, 0, 1 << 3, 1, 0))
    assert features.lost(SOURCE, here) == ["aesni", "avx2", "lm", "sse4a"]
    assert "aesni, avx2" in features.complaint(features.lost(SOURCE, here))


def test_other_features_and_what_xen_sets_by_itself_are_no_loss() -> None:
    more = leaves(
        (0x1, NONE, 0, 0, 1 << 25 | 1, 3),
        (0x7, 0, 0, 1 << 5 | 1 << 3, 0, 0),
        (0x80000001, NONE, 0, 0, 1 << 6, 1 << 29),
    )
    assert features.lost(SOURCE, SOURCE) == features.lost(SOURCE, more) == []
    assert features.lost(SOURCE[:-1], more + b"rest") == []


def test_every_bit_of_a_register_has_a_name_or_a_dash() -> None:
    registers = ((0x1, NONE), (0x7, 0), (0xD, 1))
    every = leaves(*((leaf, subleaf, NONE, NONE, NONE, NONE) for leaf, subleaf in registers))
    names = features.lost(every, b"")
    assert len(names) == len(set(names)) > 80
    assert {"sse2", "x2apic", "avx512vl", "enqcmd", "ssbd", "xsaves"} <= set(names)


@pytest.mark.parametrize(
    ("refused", "word"),
    [
        ((0x80000000, NONE, NONE), "CPUID leaf 0x80000000,"),
        ((0x7, 0, NONE), "CPUID leaf 0x7, subleaf 0,"),
        ((NONE, NONE, 0xCE), "MSR 0xce"),
    ],
)
def test_the_part_of_a_policy_that_xen_refuses_is_named(
    refused: tuple[int, int, int], word: str
) -> None:
    assert word in features.refusal(*refused)


def test_emulated_devices_that_differ_are_named() -> None:
    text = features.other_devices(0b10_1111_1111, 0b1_1011_1111)
    assert "vga only at the source, pit only here, pirq only at the source" in text
