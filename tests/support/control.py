# SPDX-License-Identifier: GPL-2.0-or-later
"""A control socket whose requests a test answers."""

from __future__ import annotations

from pathlib import Path

import trio

from migrate.control import server as control


async def begin(nursery: trio.Nursery, path: Path, handler: control.Handler) -> None:
    """Serve at a control socket until the nursery is cancelled."""
    await nursery.start(_serve, path, handler)


async def _serve(
    path: Path, handler: control.Handler, *, task_status: trio.TaskStatus[object]
) -> None:
    async with control.listening(path) as listener:
        await control.serve(listener, handler, task_status=task_status)
