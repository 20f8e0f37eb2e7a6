"""In dom0: each test belongs on some of the hypervisors, and the others leave it out by name."""

from __future__ import annotations

import os

import pytest

KIND = os.environ.get("LAB_HYPERVISOR", "")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hypervisors(*kinds): where the test belongs")
    if not KIND:
        raise pytest.UsageError("these tests run in a dom0: make xenlab")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def belongs(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("hypervisors")
        return marker is None or KIND in marker.args

    elsewhere = [item for item in items if not belongs(item)]
    items[:] = [item for item in items if belongs(item)]
    config.hook.pytest_deselected(items=elsewhere)
