# SPDX-License-Identifier: GPL-2.0-or-later
"""The keepers of pages (``xenbackend/keeper.py``) as processes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from migrate.cli.world import World

NAME = "xen-keeper"


def keepers(parent: int | None = None) -> list[int]:
    """Return the pids of the keepers that live: all of them, or those that a process has
    started.
    """
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid, name, state, its_parent = _read(stat)
        if name == NAME and state != "Z" and parent in (None, its_parent):
            found.append(pid)
    return found


def keepers_of(session: str) -> list[int]:
    """Return the pids of the keepers of one migration, also of those whose socket was removed."""
    sockets = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        *_fields, inode, path = [*line.split(maxsplit=7), ""][:8]
        sockets[f"socket:[{inode}]"] = Path(path).name
    found = []
    for pid in keepers():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if sockets.get(os.readlink(f"/proc/{pid}/fd/0")) == f"{session}.keeper":
                found.append(pid)
    return found


def lives(pid: int) -> bool:
    return _read(Path(f"/proc/{pid}/stat"))[1:3] not in [("", ""), (NAME, "Z")]


def keeper_of(world: World) -> int:
    """Return the pid of the only keeper of the sender."""
    (pid,) = keepers(world.processes["sender"].popen.pid)
    return pid


def sockets_of_keepers(world: World) -> list[Path]:
    return list((world.directory / "source.sock.state/sender").glob("*.keeper"))


def _read(stat: Path) -> tuple[int, str, str, int]:
    try:
        text = stat.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, "", "", 0
    state, parent = text[text.rindex(")") + 2 :].split()[:2]
    return (
        int(text[: text.index("(")]),
        text[text.index("(") + 1 : text.rindex(")")],
        state,
        int(parent),
    )
