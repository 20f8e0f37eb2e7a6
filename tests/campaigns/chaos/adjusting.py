# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator changes at random instants: options, and whether memory is copied."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import trio

from migrate.errors import MigrationError
from tests.campaigns.chaos.trial import MIB, Fault, Trial

SETTINGS: dict[str, dict[str, Any]] = {
    "--bandwidth none": {"bandwidth_bytes_per_s": None},
    "--bandwidth 32M": {"bandwidth_bytes_per_s": 32 * MIB},
    "--bandwidth 4M": {"bandwidth_bytes_per_s": 4 * MIB},
    "--postcopy-bandwidth none": {"postcopy_bandwidth_bytes_per_s": 0},
    "--postcopy-bandwidth 16M": {"postcopy_bandwidth_bytes_per_s": 16 * MIB},
    "--downtime-target 1": {"downtime_target_ms": 1.0},
    "--max-rounds 1": {"max_rounds": 1},
    "--timeout 0.1 --on-timeout suspend": {"timeout_s": 0.1, "on_timeout": "suspend"},
}
COMMANDS = ("pause", "resume", *(f"set {setting}" for setting in SETTINGS))


async def pause(trial: Trial) -> None:
    """Pause copying once or more often.  A pause that is not ended here is ended when everything
    else has happened.
    """
    for _ in range(trial.random.choice([1, 1, 3])):
        for word in ("pause", "resume"):
            async with trial.killing:
                with contextlib.suppress(MigrationError):  # it may be too late
                    await trial.answered(
                        functools.partial(
                            trial.world.ask, "sender", command=word, migration=trial.id
                        )
                    )
            await trio.sleep(trial.random.uniform(0, 0.4))
            if trial.random.random() < 0.3:
                return


ADJUSTING: list[Fault] = [Fault("copying paused", pause, "nobody")] * 4
