# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables for terminals."""

from __future__ import annotations

from migrate.cli.text import table


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
