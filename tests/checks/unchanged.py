# SPDX-License-Identifier: GPL-2.0-or-later
"""Stages whose result follows from files and tools alone.

A stage of this kind that has passed would pass again with the same files and tools.  So the gate
takes the earlier outcome, and names the commit on which the stage ran.  ``make everything``, and a
run that names the stage, run it whatever is known.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tests.checks.record import Outcome
from tests.checks.stages import Stage
from tests.tree.listing import TREE, files
from tests.xenlab.cache import directory, fingerprint


def key(stage: Stage) -> str:
    """Return the fingerprint of a stage's command, files and tools."""
    taken = [
        path
        for path in sorted(files())
        if any(fnmatch(str(path), pattern) for pattern in stage.files)
    ]
    return fingerprint(
        *stage.command,
        *(part for path in taken for part in (str(path), TREE / path)),
        *map(_output, stage.tools),
    )


def _output(command: str) -> bytes:
    try:
        return subprocess.run(command.split(), capture_output=True, check=False).stdout
    except OSError:
        return b"missing"


def _file(stage: Stage) -> Path:
    return directory().parent / "checks" / f"{stage.name}-{key(stage)}.json"


def earlier(stage: Stage) -> Outcome | None:
    """Return the outcome of a stage that has passed with the same files and tools."""
    if not stage.files:
        return None
    try:
        noted: dict[str, Any] = json.loads(_file(stage).read_text())
        found = Outcome(**{**noted, "tests": (), "before": (), "figures": ()})
    except (OSError, ValueError, TypeError):
        return None
    return found if found.passed else None


def note(stages: Sequence[Stage], outcomes: Sequence[Outcome], commit: str) -> None:
    """Note which of these stages have passed on a commit."""
    passed = {outcome.name: outcome for outcome in outcomes if outcome.passed}
    for stage in stages:
        if stage.files and stage.name in passed:
            path = _file(stage)
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({**asdict(passed[stage.name]), "commit": commit}))
