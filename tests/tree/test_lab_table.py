# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of ``docs/lab.md`` has the rows of ``tests/xenlab/table.py``, and each row a test."""

from __future__ import annotations

import re

import pytest

from tests.xenlab.__main__ import SCENARIOS, SHARDS
from tests.xenlab.table import BEGIN, DOCUMENT, END, ROOT, ROWS, Row, table

RECORD = {
    "started": "2026-11-30T05:00:00+00:00",
    "commit": "0123456789",
    "stages": [
        {
            "name": "xenlab",
            "tests": [[f"xenlab-{ROWS[0].shard}: tests.xenlab.dom0.{ROWS[0].test}", "failed", 1]],
        }
    ],
}


def test_the_document_has_each_row() -> None:
    rows = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-2]] for line in rows]
    assert cells == [row.cells() for row in ROWS], "run: python -m tests.xenlab.table"


@pytest.mark.parametrize("row", [row for row in ROWS if row.shard])
def test_each_row_names_a_test_of_its_shard(row: Row) -> None:
    module, _, test = row.test.partition("::")
    (shard,) = (shard for shard in SHARDS if str(shard) == row.shard)
    assert shard.paths == (SCENARIOS,) or f"{SCENARIOS}/{module}.py" in shard.paths
    text = (ROOT / SCENARIOS / f"{module}.py").read_text()
    assert re.search(rf"def {test.partition('[')[0]}\(", text)


def test_a_result_has_the_record_s_day_and_commit() -> None:
    lines = table(RECORD).splitlines()
    assert lines[2].endswith("| failed, 2026-11-30, 0123456 |")
    assert lines[3].endswith("| not in the record |")
