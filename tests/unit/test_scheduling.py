# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads that serve faults run before other programs only where a CPU is left to those."""

from __future__ import annotations

import os
import threading

import pytest

from migrate.lanes import scheduling
from migrate.lanes.scheduling import URGENT_NICE, prompt_nice


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the nice values that threads are given, in their order."""
    values: list[int] = []
    monkeypatch.setattr(scheduling, "_set", lambda _policy, nice, _slice: values.append(nice))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    return values


def run(*calls: object) -> None:
    thread = threading.Thread(target=lambda: [call() for call in calls if callable(call)])
    thread.start()
    thread.join(50)


@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
def test_one_cpu_is_always_left_to_other_programs(cpus: int) -> None:
    raised = 0
    for _ in range(20):
        raised += prompt_nice(raised, cpus) == URGENT_NICE
    assert raised == cpus - 1


def test_a_thread_that_ends_makes_room_for_another(given: list[int]) -> None:
    ends, began = threading.Event(), threading.Event()
    first = threading.Thread(
        target=run, args=(scheduling.be_prompt, began.set, lambda: ends.wait(50), scheduling.reset)
    )
    first.start()
    assert began.wait(50)
    run(scheduling.be_prompt, scheduling.reset)
    ends.set()
    first.join(50)
    run(scheduling.be_prompt, scheduling.reset)
    assert given == [URGENT_NICE, 0, 0, 0, URGENT_NICE, 0]


def test_a_thread_that_serves_faults_again_counts_once(given: list[int]) -> None:
    run(scheduling.be_prompt, scheduling.be_prompt, scheduling.be_bulk)
    run(scheduling.be_prompt, scheduling.be_urgent)
    run(scheduling.be_prompt, scheduling.reset)
    assert given == [URGENT_NICE, URGENT_NICE, 0, URGENT_NICE, URGENT_NICE, URGENT_NICE, 0]
