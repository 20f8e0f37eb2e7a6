# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run of the tests takes of long sweeps and searches."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checks.stages import EVERYTHING
from tests.support import thorough


@dataclass(frozen=True)
class Item:
    nodeid: str
    marker: str = ""

    def get_closest_marker(self, name: str) -> str | None:
        return self.marker if name == self.marker else None


ITEMS = [Item(f"test_a.py::test_sweep[{case}]", "sweep") for case in range(7)]
OTHERS = [Item("test_a.py::test_alone"), Item("test_a.py::test_with[a]"), Item("b::test[b]", "x")]


def selected() -> list[Item]:
    deselected: list[Item] = []

    def note(items: list[Item]) -> None:
        deselected.extend(items)

    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=note))
    items: list[Any] = [*ITEMS, *OTHERS]
    thorough.select(config, items)
    assert {*items, *deselected} == {*ITEMS, *OTHERS}
    return items


def test_a_run_takes_a_share_of_each_sweep_and_every_other_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("THOROUGH", raising=False)
    assert selected() == [*(ITEMS[case] for case in (0, 2, 5)), *OTHERS]
    assert (thorough.examples(), thorough.examples(3), thorough.examples(1)) == (25, 1, 1)


@pytest.mark.parametrize("values", range(2, 8))
def test_the_share_of_a_sweep_has_each_value_of_a_parameter(values: int) -> None:
    taken = [number for number in range(1, 8 * values) if thorough.is_in_share(number)]
    assert {number % values for number in taken} == set(range(values))
    assert len(taken) <= 3.2 * values


def test_a_thorough_run_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THOROUGH", "1")
    assert selected() == [*ITEMS, *OTHERS]
    assert (thorough.examples(), thorough.examples(3)) == (100, 3)


@pytest.mark.parametrize("name", ["test", "coverage", "underload", "sanitize"])
def test_everything_runs_all_tests_thoroughly(name: str) -> None:
    (stage,) = [stage for stage in EVERYTHING if stage.name == name]
    assert "THOROUGH=1" in stage.command
