# SPDX-License-Identifier: GPL-2.0-or-later
"""``restart-idle``: an upgrade restarts the daemons that no guest needs, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrate.cli import restart
from migrate.cli.world import World, wait_for_steps
from migrate.errors import MigrationError
from migrate.options import LEAST_BANDWIDTH
from tests.conftest import MIB
from tests.support.daemons import listed
from tests.support.waiting import until
from xenbackend.pages import PAGE_SIZE
from xenbackend.simulated.guest import GuestSpec

Upgrade = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def booted_with_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(restart, "SYSTEMD", tmp_path)


def test_a_host_without_systemd_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "SYSTEMD", Path("/none"))
    with pytest.raises(MigrationError, match="does not run systemd"):
        restart.restart_idle_command.main([], standalone_mode=False)


@pytest.fixture
def upgrade(world: World, monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    """Runs the command, and returns the daemons that systemd was asked to restart."""
    sockets = {"sender": world.sender_socket, "receiver": world.receiver_socket}
    monkeypatch.setattr(restart, "DAEMONS", sockets)

    def upgrade() -> list[str]:
        restarted: list[str] = []

        def systemctl(verb: str, *arguments: str) -> int:
            if verb == "restart":
                restarted.extend(arguments)
            return 0

        monkeypatch.setattr(restart, "_systemctl", systemctl)
        restart.restart_idle_command.main([], standalone_mode=False)
        return restarted

    return upgrade


def test_a_daemon_without_guests_is_restarted(upgrade: Upgrade) -> None:
    assert upgrade() == ["sender", "receiver"]


def test_a_daemon_that_a_guest_needs_is_named_with_the_guest(
    world: World, name: str, upgrade: Upgrade, capsys: pytest.CaptureFixture[str]
) -> None:
    # The push sends 4 MiB before it waits for the cap, and the guest touches few pages.  The others
    # are missing until the cap is lifted.
    spec = GuestSpec(
        name, 16 * MIB, workload="random", working_set_bytes=4 * PAGE_SIZE, zero_permille=0, rate=50
    )
    guest = world.source.create_guest(spec.to_bytes())
    wait_for_steps(guest, 5)
    guest.close()
    with world.control() as client:
        client.send(
            command="migrate", domain=name, destination=f"127.0.0.1:{world.port}",
            strategy="postcopy", bandwidth=LEAST_BANDWIDTH,
        )  # fmt: skip
        both = ("sender", "receiver")
        until(
            lambda: all(
                [line["phase"] for line in listed(world, end, name)] == ["postcopy"] for end in both
            ),
            "the guest does not run at the destination",
        )
        assert upgrade() == []
        told = capsys.readouterr().out
        assert told.count(f"because guests need it: {name}.") == 2, told
        values = {"bandwidth_bytes_per_s": None}
        world.ask("sender", command="set", migration=name, values=values)
        list(client.answers())
    until(lambda: upgrade() == [*both], "the daemons are needed when the migration has ended")


def test_a_daemon_that_does_not_run_is_not_started(
    upgrade: Upgrade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "_runs", lambda unit: unit == "receiver")
    assert upgrade() == ["receiver"]


def test_the_guests_of_an_earlier_release_are_those_whose_migrations_have_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A daemon of 0.1.0 does not name its guests in the answer to ``status``."""
    phases = {"a": "precopy", "b": "completed", "c": "lost", "d": "failed", "e": "postcopy"}
    lines = [{"domain": name, "phase": phase} for name, phase in phases.items()]

    class Earlier:
        def __init__(self, path: Path, *, answer_s: float):
            pass

        def __enter__(self) -> Earlier:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def call(self, *, command: str) -> dict[str, Any]:
            return {"port": 8013} if command == "status" else {"migrations": lines}

    monkeypatch.setattr(restart, "ControlClient", Earlier)
    assert restart.guests_of(Path("socket")) == ["a", "c", "e"]


def test_a_daemon_that_is_not_restarted_is_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "DAEMONS", {"sender": world.sender_socket})
    monkeypatch.setattr(restart, "_systemctl", lambda verb, *_: verb == "restart")
    with pytest.raises(MigrationError, match="sender was not restarted"):
        restart.restart_idle_command.main([], standalone_mode=False)


def test_what_was_restarted_is_printed_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def guests_of(path: Path) -> list[str]:
        if path.name == "none":
            raise MigrationError("it hangs")
        return ["web"] if path.name == "needed" else []

    names = ("idle", "needed", "none")
    monkeypatch.setattr(restart, "DAEMONS", {name: Path(name) for name in names})
    monkeypatch.setattr(restart, "_systemctl", lambda *_arguments: 0)
    monkeypatch.setattr(restart, "guests_of", guests_of)
    restart.restart_idle_command.main(["--json"], standalone_mode=False)
    assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == [
        {"unit": "idle", "restarted": True, "guests": [], "problem": ""},
        {"unit": "needed", "restarted": False, "guests": ["web"], "problem": ""},
        {"unit": "none", "restarted": False, "guests": [], "problem": "it hangs"},
    ]
