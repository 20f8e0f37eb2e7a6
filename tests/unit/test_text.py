# SPDX-License-Identifier: GPL-2.0-or-later
"""Text for terminals."""

from __future__ import annotations

import pytest

from migrate.cli.text import table
from migrate.units import counted


def test_a_long_text_does_not_run_into_the_next_column() -> None:
    """Before, the name of a guest did if it had 20 characters or more."""
    name = "a-guest-with-a-long-name"
    shown = table(("ID", "NAME", "PAGES", "WHY"), [(1, name, 7, ""), (22, "web", 12345, "gone")],
                  numbers="ID PAGES")  # fmt: skip
    assert shown.splitlines() == [
        "ID  NAME                      PAGES  WHY",
        f" 1  {name}      7",
        "22  web                       12345  gone",
    ]


def test_a_row_is_one_line_without_control_characters() -> None:
    assert table(("A",), [("one\ntwo\x1b[2J",)]).splitlines() == ["A", "one two\ufffd[2J"]


def test_a_table_without_rows_has_its_titles() -> None:
    assert table(("A", "B"), []) == "A  B"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 pages"), (1, "1 page"), (2, "2 pages")], ids=str
)
def test_one_is_counted_in_the_singular(count: int, shown: str) -> None:
    assert counted(count, "page") == shown
