# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the hypervisor that fail for a while."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain


def fails(
    patch: pytest.MonkeyPatch, call: str, *, times: int, error: Exception | None = None
) -> list[str]:
    """Make the first calls fail, with ``error`` or as a busy host does.  Returns a list, to which
    the name of each failed call is added.
    """
    original, failed = getattr(SimulatedDomain, call), list[str]()

    def fail_first(self: SimulatedDomain, *arguments: Any, **options: Any) -> Any:
        if len(failed) < times:
            failed.append(call)
            raise error or XenError(call, errno.EBUSY)
        return original(self, *arguments, **options)

    patch.setattr(SimulatedDomain, call, fail_first)
    return failed
