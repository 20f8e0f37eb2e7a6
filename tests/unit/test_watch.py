# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of several migrations of one guest ``watch`` follows."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.cli import migrations
from migrate.cli.migrations import Answers


def test_a_guest_that_comes_back_is_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, the end of the migration by which the guest had left this host was reported."""
    left: dict[str, Any] = {
        "id": "1" * 32,
        "domain": "web",
        "phase": "failed",
        "problem": "an earlier one",
    }
    comes: dict[str, Any] = {
        "id": "2" * 32,
        "domain": "web",
        "phase": "precopy",
        "problem": "",
        "outstanding": 0,
    }
    answers = [[left, comes], [comes], [comes | {"phase": "completed"}]]
    asked = []

    def ask(_sockets: object, **request: Any) -> Answers:
        asked.append(request["migration"])
        return Answers(answers[len(asked) - 1])

    monkeypatch.setattr(migrations, "_ask_all", ask)
    monkeypatch.setattr(migrations, "WATCH_EVERY_S", 0)
    migrations.watch_command.main(["web"], standalone_mode=False)
    assert asked == ["web", "2" * 32, "2" * 32]
    assert capsys.readouterr().out == "web: completed\n"
