# SPDX-License-Identifier: GPL-2.0-or-later
"""The choice of tests in dom0: each test belongs to some of the hypervisors, and is left out on the
others.

A test of the conformance suite belongs to the hypervisor with all operations.  Tests marked
``eviction`` also belong to the hypervisor without the batched operation.  The gate has the suite
without :data:`MINUTES`, and those of the lab's own tests that are marked ``gate``, where this
marker has no argument or names the hypervisor.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.xenlab.dom0.pair import Pair, packaged
from tests.xenlab.parts import HYPERVISORS

HERE = Path(__file__).parent
KIND = os.environ.get("LAB_HYPERVISOR", "")
MINUTES = {"test_a_guest_without_its_pinned_set_dies", "test_batches_of_any_size[100000]"}
"""Tests of the conformance suite that take minutes on an emulated Xen."""


def pytest_configure(config: pytest.Config) -> None:
    if not KIND:
        raise pytest.UsageError("these tests run in a dom0: make xenlab")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def belongs(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("hypervisors")
        if marker is not None:
            return KIND in marker.args
        if HERE in item.path.parents:
            return KIND in HYPERVISORS
        return KIND == "populate-evicted" or (
            KIND == "paging" and item.get_closest_marker("eviction") is not None
        )

    elsewhere = [item for item in items if not belongs(item)]
    items[:] = [item for item in items if belongs(item)]
    config.hook.pytest_deselected(items=elsewhere)
    for item in items:
        if HERE not in item.path.parents and item.name not in MINUTES:
            item.add_marker("gate")


@pytest.fixture(scope="session")
def packaged_hosts() -> Iterator[Pair]:
    """Yield two hosts with our package, which takes minutes to install there."""
    with packaged() as pair:
        yield pair


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print at once why a test fails, because the machine may run for another hour."""
    report = yield
    if report.failed:
        item.config.get_terminal_writer().line(f"\n{report.longreprtext}")
    return report
