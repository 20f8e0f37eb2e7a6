# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the part of the lab that runs on the host."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.xenlab import parts, qemu
from tests.xenlab.__main__ import SCENARIOS, SHARDS, Shard, chosen, each, write_junit
from tests.xenlab.cache import LabError
from tests.xenlab.machine import Result

LEAF_1, LEAF_EXTENDED = 0x00000001, 0x80000001


def cpuid(*leaves: tuple[int, int]) -> bytes:
    """Return a ``struct kvm_cpuid2`` with the ECX of these leaves."""
    entries = (struct.pack("10I", leaf, 0, 0, 0, 0, ecx, 0, 0, 0, 0) for leaf, ecx in leaves)
    return struct.pack("2I", len(leaves), 0) + b"".join(entries) + bytes(40)


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ([(LEAF_1, 1 << 5)], True),
        ([(LEAF_1, 0), (LEAF_EXTENDED, 1 << 2)], True),
        ([(LEAF_1, 1 << 2), (LEAF_EXTENDED, 1 << 5)], False),
        ([(7, 1 << 5 | 1 << 2)], False),
        ([], False),
    ],
)
def test_kvm_is_used_where_it_offers_guests_of_guests(
    leaves: list[tuple[int, int]], expected: bool
) -> None:
    assert qemu.nests(cpuid(*leaves)) == expected


def test_a_host_without_kvm_emulates(tmp_path: Path) -> None:
    assert not qemu.kvm_nests(tmp_path / "kvm")
    (tmp_path / "kvm").touch()
    assert not qemu.kvm_nests(tmp_path / "kvm")


def test_a_machine_without_results_is_an_error(tmp_path: Path) -> None:
    write_junit(tmp_path, SHARDS[0], None, "the machine died (Panic on CPU)\nlast words")
    suite = ElementTree.parse(tmp_path / f"xenlab-{SHARDS[0]}.xml").getroot()
    (case,) = suite.iter("testcase")
    error = case.find("error")
    assert error is not None and error.get("message") == "the machine died (Panic on CPU)"


def bzimage(payload: bytes) -> bytes:
    """Return a kernel's image with a payload behind three sectors of setup."""
    setup = bytearray(4 * 512)
    setup[0x1F1] = 3
    struct.pack_into("<II", setup, 0x248, 16, len(payload) + 4)
    return bytes(setup) + bytes(16) + payload + bytes(4) + b"what follows"


def test_a_kernel_is_found_in_its_image() -> None:
    kernel = b"\x7fELF" + bytes(range(256)) * 10
    assert parts.kernel_in(bzimage(lzma.compress(kernel))) == kernel
    if shutil.which("zstd"):
        packed = subprocess.run(["zstd", "-c"], input=kernel, capture_output=True, check=True)
        assert parts.kernel_in(bzimage(packed.stdout)) == kernel
        with pytest.raises(LabError, match="cannot be unpacked"):
            parts.kernel_in(bzimage(b"neither"))


def test_every_machine_has_tests() -> None:
    assert {shard.kind for shard in SHARDS} == set(parts.KINDS)


@pytest.mark.parametrize("kind", ["populate-evicted", "paging"])
def test_every_module_has_a_shard_or_belongs_to_other_machines(kind: str) -> None:
    chosen = {path for shard in SHARDS if shard.kind == kind for path in shard.paths}
    for module in (parts.HERE / "dom0").glob("test_*.py"):
        elsewhere = "pytestmark = pytest.mark.hypervisors(" in module.read_text()
        assert elsewhere or f"{SCENARIOS}/{module.name}" in chosen


def test_the_gate_builds_no_machine_that_has_none_of_its_tests() -> None:
    kinds = {shard.kind for shard in chosen(list(parts.KINDS), gate=True)}
    assert kinds == set(parts.HYPERVISORS)


def test_no_machine_runs_beside_a_pair_of_hosts(tmp_path: Path) -> None:
    pairs = {kind for kind, machines in parts.KINDS.items() if len(machines) > 1}
    alone = threading.Lock()

    def run(shard: Shard) -> Result:
        if shard.kind in pairs:
            assert alone.acquire(blocking=False)
            assert not other_began.wait(0.1)
            alone.release()
        else:
            other_began.set()
        return Result(0, "", tmp_path, tmp_path, 0.0, 0.0)

    other_began = threading.Event()
    done = [(shard, future.result()) for shard, future in each(SHARDS, run)]
    assert {shard for shard, _ in done} == set(SHARDS)
    assert pairs == {parts.HOSTS, parts.RELEASES}


HALTED = "RIP=ffff82d04030ec16 RFL=00000202 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1"
PENDING = "ISR\t (none)\nIRR\t 251 \n\nAPR 0x01"


@pytest.mark.parametrize(
    ("registers", "lapic", "expected"),
    [
        (HALTED, PENDING, True),
        (HALTED.replace("HLT=1", "HLT=0"), PENDING, False),
        (HALTED.replace("202", "002"), PENDING, False),
        (HALTED, PENDING.replace("251", "(none)"), False),
        ("", "", False),
    ],
)
def test_a_processor_that_lost_its_wake_up_is_told_from_an_idle_one(
    registers: str, lapic: str, expected: bool
) -> None:
    assert qemu.is_stuck(registers, lapic) is expected
