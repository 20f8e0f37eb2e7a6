# SPDX-License-Identifier: GPL-2.0-or-later
"""Policies that tests give to a migration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sender.policy import Decision, DefaultPolicy, PrecopyProgress


@dataclass(frozen=True)
class Watched(DefaultPolicy):
    """The default policy, and what it was asked at the end of each round."""

    asked: ClassVar[list[PrecopyProgress]] = []
    """A test patches this list with an empty one first."""

    def decide(self, progress: PrecopyProgress) -> Decision:
        if progress.round_finished:
            self.asked.append(progress)
        return super().decide(progress)
