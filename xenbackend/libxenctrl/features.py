# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest has found when it booted, and would lose here: features of the processor, and
devices that Xen emulates.  Sans-IO.

Xen accepts the CPU policy of an incoming guest, and takes features away that this host does not
have, without an error.  A guest that has found a feature when it booted uses the feature
afterwards.  So the policy that the domain has is compared with the one that was set.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

LEAF = struct.Struct("<6I")
"""``xen_cpuid_leaf_t``: leaf, subleaf, eax, ebx, ecx, edx."""
NONE = NO_SUBLEAF = 0xFFFFFFFF
_ABCD = "eax", "ebx", "ecx", "edx"
_NAMES: dict[tuple[int, int, str], str] = {
    (0x1, NO_SUBLEAF, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 - clflush - "
        "ds - mmx fxsr sse sse2 ss - tm1 - pbe"
    ),
    (0x1, NO_SUBLEAF, "ecx"): (
        "sse3 pclmulqdq dtes64 monitor dscpl vmx smx eist tm2 ssse3 - - fma cx16 xtpr pdcm - "
        "pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline aesni xsave - avx f16c rdrand -"
    ),
    (0x7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm pqm - mpx pqe avx512f "
        "avx512dq rdseed adx smap avx512_ifma - clflushopt clwb proc_trace avx512pf avx512er "
        "avx512cd sha avx512bw avx512vl"
    ),
    (0x7, 0, "ecx"): (
        "prefetchwt1 avx512_vbmi umip pku - - avx512_vbmi2 cet_ss gfni vaes vpclmulqdq "
        "avx512_vnni avx512_bitalg - avx512_vpopcntdq - - - - - - - rdpid - - cldemote - movdiri "
        "movdir64b enqcmd - -"
    ),
    (0x7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - - - - - serialize - "
        "tsxldtrk - - - cet_ibt - - avx512_fp16 - - ibrsb stibp - - - ssbd"
    ),
    (0x7, 1, "eax"): (
        "- - - - avx_vnni avx512_bf16 - - - - fzrm fsrs fsrcs - - - - - - - - - - - - - - - - - - -"
    ),
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves" + " -" * 28,
    (0x80000001, NO_SUBLEAF, "edx"): (
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - ffxsr page1gb rdtscp - lm "
        "3dnowext 3dnow"
    ),
    (0x80000001, NO_SUBLEAF, "ecx"): (
        "lahf_lm - svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
        "wdt - lwp fma4 - - - - tbm topoext - - - dbext - - monitorx - -"
    ),
    (0x80000008, NO_SUBLEAF, "ebx"): "clzero" + " -" * 8 + " wbnoinvd - - ibpb" + " -" * 19,
}
"""The names of the bits of a register, from the lowest bit on.  ``-``: the bit is no feature that a
guest uses, or Xen sets the bit by itself.  The names are those of Xen (``cpufeatureset.h``).
"""


EMULATED = ["lapic", "hpet", "pm", "rtc", "ioapic", "pic", "vga", "iommu", "pit", "pirq", "vpci"]
"""The names of the bits of ``emulation_flags`` (``XEN_X86_EMU_*``)."""


def _registers(leaves: bytes) -> dict[tuple[int, int, str], int]:
    found = {}
    for leaf, subleaf, *values in LEAF.iter_unpack(leaves[: len(leaves) // LEAF.size * LEAF.size]):
        for name, value in zip(_ABCD, values, strict=True):
            found[leaf, subleaf, name] = value
    return found


def lost(source: bytes, here: bytes) -> list[str]:
    """Return the names of features in the leaves of ``source`` that the leaves ``here`` lack."""
    had, has = _registers(source), _registers(here)
    return [
        name
        for key, names in _NAMES.items()
        for bit, name in enumerate(names.split())
        if name != "-" and (had.get(key, 0) & ~has.get(key, 0)) >> bit & 1
    ]


def complaint(names: Iterable[str]) -> str:
    """Return why a guest that has seen these features cannot run here."""
    return (
        f"this host has no {', '.join(names)}, which the guest has found when it booted: choose a "
        "host with these features, or boot the guest without them (cpuid= in its configuration)"
    )


def refusal(leaf: int, subleaf: int, msr: int) -> str:
    """Return which part of a CPU policy Xen has refused; all bits are set where there is none."""
    if msr != NONE:
        return f"this host cannot give the guest MSR {msr:#x} as it is at the source"
    part = f"{leaf:#x}" if subleaf == NO_SUBLEAF else f"{leaf:#x}, subleaf {subleaf}"
    return f"this host cannot give the guest CPUID leaf {part}, which it has at the source"


def other_devices(source: int, here: int) -> str:
    """Return why a domain with other emulated devices than the source's cannot take the guest."""
    names = [
        f"{name} {'only at the source' if source >> bit & 1 else 'only here'}"
        for bit, name in enumerate(EMULATED)
        if (source ^ here) >> bit & 1
    ]
    return (
        "the domain that the toolstack made has other emulated devices than the source "
        f"({', '.join(names)}): the two releases of Xen have different defaults for this type of "
        "guest"
    )
