# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.xenlab.table [RECORD]``: fill the table of ``docs/lab.md`` from a record of
``make everything`` (default: the newest in docs/results).

Each row of :data:`ROWS` names the test that shows it, or why the row is not possible.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT, RESULTS = ROOT / "docs/lab.md", ROOT / "docs/results"
HEAD = (
    "| Xen of the destination | guest | devices | toolstack | strategy | result |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)
BEGIN, END = "<!-- table: python -m tests.xenlab.table -->\n", "<!-- end of the table -->\n"
BATCHED, PAGING, DEBIAN, DEBIAN_13 = (
    "4.17, paging, patch", "4.17, paging", "4.17 of Debian 12", "4.20 of Debian 13",
)  # fmt: skip
DAEMONS, XL, LIBVIRT = "none", "xl", "libvirt"


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    xen: str
    guest: str
    devices: str
    toolstack: str
    strategy: str
    shard: str
    """The shard that runs the test; empty if the row is not possible."""
    test: str
    """The end of the test's name; or why the row is not possible."""

    def cells(self) -> list[str]:
        return [self.xen, self.guest, self.devices, self.toolstack, self.strategy]


def _paging() -> list[Row]:
    rows = []
    for xen, kind in ((BATCHED, "populate-evicted"), (PAGING, "paging")):
        rows += [
            Row(xen, "PVH, 1 vCPU", "", DAEMONS, "hybrid", f"{kind}-xl",
                "test_hypervisors::test_the_daemons_move_a_guest"),
            Row(xen, "PVH, 1 vCPU", "", XL, "hybrid, postcopy", f"{kind}-xl",
                "test_xl::test_xl_migrates_by_postcopy_and_back"),
        ]  # fmt: skip
        for strategy in ("hybrid", "postcopy"):
            rows += [
                Row(xen, "PVH, 1 vCPU", "blkback", XL, strategy, f"{kind}-devices",
                    f"test_disks::test_a_guest_with_a_disk_arrives[{strategy}]"),
                Row(xen, "PVH, 1 vCPU", "blkback, vif", XL, strategy, f"{kind}-devices",
                    f"test_networks::test_a_guest_with_a_disk_and_a_network_arrives[{strategy}]"),
            ]  # fmt: skip
    rows += [
        Row(PAGING, f"PVH, {vcpus} vCPUs", "", XL, "hybrid, postcopy", "paging-xl",
            f"test_vcpus::test_a_guest_works_on_all_of_its_vcpus_wherever_it_is[{vcpus}]")
        for vcpus in (2, 4)
    ]  # fmt: skip
    rows += [
        Row(PAGING, "PVH, 1 of 2 vCPUs online", "", XL, "postcopy", "paging-xl",
            "test_vcpus::test_a_guest_arrives_with_a_vcpu_that_was_never_online"),
        *(
            Row(PAGING, "HVM, 1 vCPU", "qdisk, CD by IDE, VGA", XL, strategy, "paging-hvm",
                f"test_hvm::test_a_guest_with_disk_cd_and_screen_arrives[{strategy}]")
            for strategy in ("hybrid", "postcopy")
        ),
        Row(PAGING, "HVM, 1 vCPU, from SeaBIOS", "qdisk", XL, "postcopy", "paging-hvm",
            "test_hvm::test_a_guest_that_its_firmware_has_booted_from_a_disk_arrives"),
    ]  # fmt: skip
    return rows


def _hosts() -> list[Row]:
    return [
        Row(BATCHED, "PVH, 1 vCPU, between hosts", "", DAEMONS, "postcopy", "hosts",
            "test_two_hosts::test_the_command_line_migrates_to_another_host"),
        Row(BATCHED, "PVH, 1 vCPU, between hosts", "", XL, "hybrid, postcopy", "hosts",
            "test_two_hosts::test_xl_migrates_to_another_host_and_back"),
        Row(BATCHED, "PVH, 1 vCPU, between hosts", "", XL, "hybrid, postcopy, over TLS", "hosts",
            "test_two_hosts::test_the_commands_that_init_prints_connect_the_hosts_with_tls"),
        Row(BATCHED, "PVH, 1 vCPU, between hosts", "", LIBVIRT, "postcopy", "hosts-libvirt",
            "test_virsh::test_virsh_migrates_by_postcopy"),
        Row(BATCHED, "PVH, 1 vCPU, Debian 13's kernel", "", XL, "hybrid, postcopy", "12-to-13",
            "test_next_kernel::test_a_guest_with_the_kernel_of_the_next_release_arrives"),
        Row(DEBIAN_13, "PVH, 1 vCPU, from 4.17", "", XL, "precopy", "12-to-13",
            "test_two_releases::test_xl_moves_a_guest_to_the_next_release[precopy]"),
        Row(DEBIAN_13, "PVH, 1 vCPU, from 4.17", "", XL, "Xen's own", "12-to-13",
            "test_two_releases::test_xl_moves_a_guest_to_the_next_release[hybrid]"),
    ]  # fmt: skip


def _without_paging() -> list[Row]:
    why = "refused with the reason: Xen is built without memory paging"
    return [
        row
        for xen, shard in ((DEBIAN, "debian"), (DEBIAN_13, "debian-13"))
        for row in (
            Row(xen, "PVH, 1 vCPU", "", DAEMONS, "precopy", shard,
                "test_hypervisors::test_the_daemons_move_a_guest"),
            Row(xen, "PVH, 1 vCPU", "", XL, "precopy, Xen's own", shard,
                "test_xl::test_a_host_that_cannot_page_leaves_it_to_the_stock_helper"),
            Row(xen, "any", "any", "any", "hybrid, postcopy", "", why),
        )
    ]  # fmt: skip


ROWS = (
    *_paging(),
    *_hosts(),
    *_without_paging(),
    Row("4.20, paging", "any", "any", "any", "any", "",
        "Debian 13's source package of Xen cannot be had"),
    Row("any", "PV", "any", "any", "hybrid, postcopy", "", "Xen pages HVM and PVH guests only"),
)  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Return the table with the results of a record."""
    results = {
        name: f"{result}, {record['started'][:10]}, {(stage.get('commit') or record['commit'])[:7]}"
        for stage in record["stages"]
        if stage["name"].startswith("xenlab")
        for name, result, _s in stage["tests"]
    }
    lines = []
    for row in ROWS:
        shown = f"xenlab-{row.shard}: tests.xenlab.dom0.{row.test}"
        outcome = results.get(shown, "not in the record") if row.shard else row.test
        lines.append(f"| {' | '.join([*row.cells(), outcome])} |\n")
    return HEAD + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.xenlab.table", description=__doc__)
    parser.add_argument("record", nargs="?", type=Path)
    path = parser.parse_args().record or sorted(RESULTS.glob("*-everything-*.json"))[-1]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + BEGIN + table(json.loads(path.read_text())) + END + after)


if __name__ == "__main__":
    main()
