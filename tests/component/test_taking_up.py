# SPDX-License-Identifier: GPL-2.0-or-later
"""The time between the start of a daemon and the moment at which it has found its predecessor's
domain.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from migrate.cli.world import World
from migrate.errors import MigrationError
from migrate.service.journal import Journal
from tests.support.left import left_by_a_receiver, left_by_a_sender


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        ("deciding", "interrupted"),
        ("handed over", "interrupted"),
        ("completing", "completing"),
        ("going back", "interrupted"),
        ("decided here", "interrupted"),
        ("decided elsewhere", "interrupted"),
    ],
)
async def test_what_was_handed_over_is_not_cancelled_before_it_is_taken_up(
    clean_hosts: World, tmp_path: Path, step: str, phase: str
) -> None:
    """The successor of a sender can receive requests, or be stopped, before the hypervisor has
    found the domain.  To resume the guest here would make a second one.
    """
    left = left_by_a_sender(clean_hosts.source, Journal(tmp_path), step)
    assert left.phase == phase
    for cancel in (
        left.requests.ask_to_cancel,
        lambda: left.requests.cancel("by the test"),
    ):
        with pytest.raises(MigrationError, match="too late"):
            cancel()
    if step != "handed over":
        with pytest.raises(MigrationError, match=r"already|nothing to decide"):
            await left.requests.decide(here=False)


@pytest.mark.parametrize("step", ["begun", "suspending"])
async def test_what_was_not_handed_over_can_be_cancelled_before_it_is_taken_up(
    clean_hosts: World, tmp_path: Path, step: str
) -> None:
    left_by_a_sender(clean_hosts.source, Journal(tmp_path), step).requests.ask_to_cancel()


@pytest.mark.parametrize(
    ("step", "phase", "needed"),
    [
        ("made", "precopy", False),
        ("suspended", "in doubt", True),
        ("ready", "in doubt", True),
        ("taken over", "interrupted", True),
        ("finishing", "completing", True),
        ("lost", "lost", True),
        ("held", "held", True),
    ],
)
async def test_a_receiver_s_successor_asks_to_wait_until_it_has_taken_up_what_was_left(
    clean_hosts: World, tmp_path: Path, step: str, phase: str, needed: bool
) -> None:
    """No decision is taken about a guest whose state has not been read, and a guest that needs a
    pager keeps the daemon running.
    """
    left = left_by_a_receiver(clean_hosts.destination, Journal(tmp_path), step)
    assert (left.phase, left.needed) == (phase, needed)
    with pytest.raises(MigrationError, match="being resumed"):
        left.requests.ask_to_cancel()
    for here in (True, False):
        with pytest.raises(MigrationError, match="being resumed"):
            await left.requests.decide(here=here)


@pytest.mark.parametrize(
    ("step", "counted"), [("handed over", False), ("deciding", False), ("completing", True)]
)
async def test_a_sender_s_successor_states_what_it_does_not_know(
    clean_hosts: World, tmp_path: Path, step: str, counted: bool
) -> None:
    left = left_by_a_sender(clean_hosts.source, Journal(tmp_path), step)
    assert "memory_bytes" in left.unknown and "downtime_s" in left.unknown
    assert ("outstanding" not in left.unknown) is counted
    left.context.lost_at = time.monotonic() - 60
    away = "it has not been connected since this sender was started, 60 s ago"
    assert away in left.requests.known_of_peer
    assert left.outstanding_in_words == (
        "0 pages to go" if counted else "its missing pages are not counted yet"
    )


async def test_a_sender_s_successor_does_not_know_when_the_last_checkpoint_came(
    clean_hosts: World, tmp_path: Path
) -> None:
    """Before, a guest with a checkpoint was shown as one with 0 checkpoints."""
    left = left_by_a_sender(clean_hosts.source, Journal(tmp_path), "handed over")
    assert "checkpoints" not in left.unknown
    left.context.entry.applied = True
    assert {"checkpoints", "checkpoint_age_s"} <= set(left.unknown)
    assert "checkpoint arrived before this sender was started" in left.requests.known_of_peer
    left.progress.checkpoint_at = time.monotonic()
    assert "checkpoints" not in left.unknown
    assert "checkpoint arrived 0 s ago" in left.requests.known_of_peer


async def test_a_receiver_s_successor_states_what_it_has_not_counted_yet(
    clean_hosts: World, tmp_path: Path
) -> None:
    left = left_by_a_receiver(clean_hosts.destination, Journal(tmp_path), "taken over").measurement
    assert left.unknown == ("outstanding", "waiting")
    assert left.outstanding_in_words == "its missing pages are not counted yet"
