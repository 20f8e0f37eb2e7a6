# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon finds entries in its journal that it cannot read or act on: each is left, and reported,
and the daemon serves other migrations.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest

from migrate.cli.world import World, start_receiver, start_sender
from migrate.errors import MigrationError, RefusedError, UnknownSessionError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.service.journal import BOOT_ID, Journal
from receiver.migration import IncomingMigration
from sender.migration import OutgoingMigration
from tests.support.daemons import migrates, world
from tests.support.left import Ends

__all__ = ["world"]
ENTRIES: dict[str, str | dict[str, Any]] = {
    "garbage": "\n\x00\x00\x00",
    "of another form": '\n{"boot": "BOOT", "phase": 7}',
    "of other types": '\n{"boot": "BOOT", "dials": 5, "step": [], "domid": "x", "offer": 1, '
    '"key": 2, "xl": 0, "domain": 3}',
    "deep": "\n" + "[" * 100_000,
    "empty": "",
    "of another step": {"step": "warming"},
    "of a strange domid": {"domid": "x"},
    "of a domid too large": {"domid": 10**30},
    "of a handle too short": {"handle": "0909"},
    "without a key": {"key": ""},
    "of a strange address": {"dials": ["nowhere", 99999999]},
}
FACTS: dict[str, dict[str, Any]] = {
    "sender": {
        "step": "handed over",
        "xl": False,
        "domid": 9,
        "handle": "09" * 16,
        "domain": "guest",
        "key": "00",
        "dials": None,
        "strategy": "postcopy",
        "bandwidth": None,
        "checkpoints": None,
        "successor": None,
    },
    "receiver": {
        "step": "taken over",
        "xl": False,
        "domid": 9,
        "handle": "09" * 16,
        "key": "00",
        "dials": None,
        "offer": {
            "name": "guest",
            "nr_pfns": 64,
            "max_pages": 64,
            "vcpus": 1,
            "platform": "",
            "paging": True,
            "checkpoint_ms": 0,
        },
    },
}


def entry(which: str, text: str | dict[str, Any]) -> str:
    """Return an entry.  ``text``: the entry itself, or its differences from a valid one."""
    if isinstance(text, str):
        return text.replace("BOOT", BOOT_ID.read_text().strip())
    return "\n" + json.dumps({"boot": BOOT_ID.read_text().strip(), **FACTS[which], **text})


async def test_an_entry_of_another_release_is_left_and_its_session_is_not_called_unknown(
    world: World,
) -> None:
    """If a peer is answered that a session is unknown, it releases what it keeps for the session.
    Nor is a new session of that name received (without a token), which would replace the entry.
    """
    files = {}
    for which, start in (("sender", start_sender), ("receiver", start_receiver)):
        world.stop(which)
        state = (
            world.directory
            / f"{'source' if which == 'sender' else 'destination'}.sock.state"
            / which
        )
        for number, text in enumerate(ENTRIES.values()):
            path = state / f"session{number}.json"
            files[path] = entry(which, text)
            path.write_text(files[path])
        start(world)
        port = world.ask(which, command="status")["port"]
        for number, token in itertools.product(range(len(ENTRIES)), (b"token", b"")):
            lanes = DialledLanes(("127.0.0.1", port), f"session{number}", Terms(), token)
            with pytest.raises(
                RefusedError,
                match="journal of that session was not resumed: `xen-postcopy list`",
            ) as caught:
                await lanes.push()
            assert not isinstance(caught.value, UnknownSessionError)
        assert world.ask(which, command="list")["migrations"] == []
    await migrates(world)
    assert {path: path.read_text() for path in files} == files
    for which in ("sender", "receiver"):
        assert (
            "this release does not have the step 'warming'"
            in (world.directory / f"{which}.log").read_text()
        )


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_value_that_no_release_has_written_is_not_acted_on(
    which: str, clean_hosts: World, tmp_path: Path
) -> None:
    """If a wrong domid were taken for the number of a domain that has ended, what a guest needs
    would be given up.
    """

    def take_up(facts: dict[str, Any]) -> None:
        journal, lanes = Journal(tmp_path), cast(Any, Ends([]))
        if which == "sender":
            OutgoingMigration.of_predecessor("session", clean_hosts.source, lanes, journal, facts)
        else:
            IncomingMigration.of_predecessor(
                clean_hosts.destination, "session", lanes, journal, facts
            )

    good = FACTS[which]
    take_up(good)
    for name in good:
        with pytest.raises((ValueError, MigrationError)):
            take_up({**good, name: b"neither"})
        with pytest.raises((ValueError, MigrationError)):
            take_up({key: value for key, value in good.items() if key != name and name != "handle"})
