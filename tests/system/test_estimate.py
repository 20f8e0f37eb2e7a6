# SPDX-License-Identifier: GPL-2.0-or-later
"""``estimate`` and ``migrate --dry-run`` with daemons as processes: nothing is left on."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World, loopback_world, start_sender, verify_migrated
from migrate.errors import MigrationError
from tests.bench.safety import tls_config
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import COMMAND_S, PROGRAM
from tests.support.daemons import SLOW, begin, boot, copying, kill, listed, phase, world
from tests.support.waiting import until
from xenbackend.simulated.guest import GuestSpec

__all__ = ["world"]
LONG = "60"
STRATEGIES = ("precopy", "hybrid", "postcopy")


def command(world: World, *words: str) -> list[str]:
    destination = f"127.0.0.1:{world.port}"
    return [*PROGRAM, *words, destination, "--socket", str(world.sender_socket)]


def run(world: World, *words: str) -> subprocess.CompletedProcess[str]:
    return zygote.run(command(world, *words), timeout=COMMAND_S)


def estimate(world: World, *words: str) -> subprocess.CompletedProcess[str]:
    return run(world, "estimate", "guest", "--seconds", "0.2", *words)


def found(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    estimated: dict[str, Any] = json.loads(result.stdout)
    return estimated


def log_dirty(world: World) -> bool:
    with world.source.open("guest") as guest:
        return guest.log_dirty_is_on()


def begin_measuring(world: World) -> subprocess.Popen[str]:
    """Begin a measurement of a minute, and wait until log-dirty is on."""
    process: subprocess.Popen[str] = zygote.Popen(
        command(world, "estimate", "guest", "--seconds", LONG),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: log_dirty(world), "log-dirty is not on")
    return process


def arrives(world: World, spec: GuestSpec) -> None:
    """Migrate the guest.  A measurement ends a moment after it has switched log-dirty off."""
    request = {"domain": spec.name, "destination": f"127.0.0.1:{world.port}"}

    def migrated() -> bool:
        try:
            world.ask("sender", command="migrate", **request)
        except MigrationError as error:
            if "is being measured" not in str(error):
                raise
            return False
        return True

    until(migrated, "the measurement does not end")
    verification, _view = verify_migrated(world, spec)
    assert verification.problems == []


def test_an_estimate_migrates_nothing_and_leaves_nothing_on(world: World) -> None:
    spec = boot(world)
    free = world.destination.free_bytes()
    result = estimate(world, "--json")
    assert result.returncode == 0, result.stderr
    shown = found(result)
    assert list(shown["strategies"]) == list(STRATEGIES)
    measured = shown["measured"]
    assert measured["memory_bytes"] == measured["needed_bytes"] == 16 * MIB
    assert measured["free_bytes"] == free and not measured["encrypted"]
    assert measured["content_share"] == 1.0
    assert 0 < measured["dirtied"][0][1] <= measured["dirtied"][-1][1]
    for expected in shown["strategies"].values():
        assert not expected["problem"] and expected["total_s"] > 0
        assert 0 < expected["downtime_ms"] <= expected["freeze_ms"]
    assert shown["recommended"] in STRATEGIES and shown["reason"]
    assert not log_dirty(world)
    assert not listed(world, "sender") and not listed(world, "receiver")
    assert world.destination.free_bytes() == free
    arrives(world, spec)


def test_the_text_has_each_strategy_and_one_line_with_the_recommendation(world: World) -> None:
    boot(world, rate=10, working_set_bytes=16 * 4096)
    result = estimate(world)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"guest to 127.0.0.1:{world.port}"
    assert lines[1] == "  memory    16.0 MiB, 0% of it zero; 256.0 MiB are free there"
    assert [line.split()[0] for line in lines[6:9]] == list(STRATEGIES)
    assert lines[9].startswith("recommended: precopy: it freezes the guest for ")
    assert len(lines) == 10


def test_options_change_the_estimate(world: World) -> None:
    boot(world, rate=10)
    (fast, slow) = (
        found(estimate(world, "--json", *words)) for words in ((), ("--bandwidth", "1M"))
    )
    assert slow["strategies"]["precopy"]["total_s"] > 15
    assert fast["strategies"]["precopy"]["total_s"] < 15


def test_a_time_limit_that_contradicts_a_strategy_is_a_problem_of_it_alone(world: World) -> None:
    boot(world)
    result = estimate(world, "--json", "--timeout", "60", "--on-timeout", "postcopy")
    problems = {name: one["problem"] for name, one in found(result)["strategies"].items()}
    assert "cannot end in postcopy" in problems["precopy"]
    assert not problems["hybrid"] and not problems["postcopy"]


def test_the_link_of_a_measurement_is_encrypted(tmp_path: Path) -> None:
    with tls_config() as config, loopback_world(64 * MIB, config=config) as world:
        boot(world)
        assert found(estimate(world, "--json"))["measured"]["encrypted"]


# ---- what is not possible ----
def test_a_destination_without_paging_leaves_precopy() -> None:
    with loopback_world(64 * MIB, host_options=("--no-paging",)) as world:
        boot(world)
        result = estimate(world)
        dry = run(world, "migrate", "guest", "--dry-run")
        dry_precopy = run(world, "migrate", "guest", "--dry-run", "--strategy", "precopy")
    assert result.returncode == 0, result.stderr
    assert "recommended: precopy: " in result.stdout
    assert "no other strategy is possible" in result.stdout
    assert "  hybrid    not possible: " in result.stdout and "paging" in result.stdout
    assert dry.returncode == 1 and "guest cannot be migrated in this way: " in dry.stderr
    assert dry_precopy.returncode == 0, dry_precopy.stderr


def test_a_destination_without_memory_takes_no_guest(world: World) -> None:
    boot(world)
    with world.destination.create_guest(GuestSpec("other", 250 * MIB).to_bytes()):
        result = estimate(world)
    assert result.returncode == 1
    assert result.stdout.count("not possible: ") == 3 and "recommended" not in result.stdout
    assert "guest cannot be migrated to 127.0.0.1" in result.stderr


def test_a_guest_that_is_being_migrated_is_not_measured(world: World) -> None:
    boot(world)
    begin(world, "guest", strategy="precopy", bandwidth=SLOW)
    until(lambda: copying(world), "precopy does not begin")
    result = estimate(world)
    assert result.returncode == 1
    assert "domain guest is being migrated already: see `xen-postcopy list`" in result.stderr
    assert log_dirty(world)
    world.ask("sender", command="cancel", migration="guest")
    until(lambda: phase(world, "sender") == "failed", "it was not cancelled")
    until(lambda: not log_dirty(world), "log-dirty is still on")
    assert estimate(world).returncode == 0


def test_log_dirty_of_another_program_is_left_on(world: World) -> None:
    boot(world)
    with world.source.open("guest") as guest:
        guest.log_dirty_enable()
        result = estimate(world)
        assert result.returncode == 1 and "log-dirty is on for guest" in result.stderr
        assert guest.log_dirty_is_on()


def test_a_measurement_notices_that_log_dirty_was_switched_off(world: World) -> None:
    boot(world)
    with world.control() as client:
        client.send(
            command="estimate", domain="guest", destination=f"127.0.0.1:{world.port}", seconds=1
        )
        until(lambda: log_dirty(world), "log-dirty is not on")
        with world.source.open("guest") as guest:
            guest.log_dirty_disable()
        with pytest.raises(MigrationError, match="another program has switched log-dirty off"):
            client.answer()


@pytest.mark.parametrize("seconds", [0.01, 601, float("nan"), "x"])
def test_a_time_out_of_bounds_is_refused(world: World, seconds: object) -> None:
    boot(world)
    request = {"domain": "guest", "destination": f"127.0.0.1:{world.port}", "seconds": seconds}
    with pytest.raises(MigrationError, match=r"measured for|could not convert"):
        world.ask("sender", command="estimate", **request)


def test_the_receiver_is_not_asked_for_an_estimate(world: World) -> None:
    with pytest.raises(MigrationError, match="`estimate` needs the sender's"):
        world.ask("receiver", command="estimate", domain="guest")


# ---- a measurement that is interrupted ----
def test_ctrl_c_ends_the_measurement(world: World) -> None:
    spec = boot(world)
    process = begin_measuring(world)
    process.send_signal(signal.SIGINT)
    _out, error = process.communicate(timeout=COMMAND_S)
    assert process.returncode == 130, error
    until(lambda: not log_dirty(world), "log-dirty is still on")
    arrives(world, spec)


def test_a_migration_waits_for_the_end_of_a_measurement(world: World) -> None:
    spec = boot(world)
    process = begin_measuring(world)
    try:
        for words in (("migrate", "guest"), ("estimate", "guest")):
            result = run(world, *words)
            assert result.returncode == 1
            assert "is being measured by `xen-postcopy estimate`" in result.stderr
    finally:
        process.kill()
        process.communicate()
    until(lambda: not log_dirty(world), "log-dirty is still on")
    arrives(world, spec)


def test_a_sender_that_is_stopped_ends_its_measurements(world: World) -> None:
    boot(world)
    process = begin_measuring(world)
    world.stop("sender")
    _out, error = process.communicate(timeout=COMMAND_S)
    assert process.returncode == 1, error
    assert not log_dirty(world)


def test_the_successor_of_a_killed_sender_switches_log_dirty_off(world: World) -> None:
    spec = boot(world)
    process = begin_measuring(world)
    kill(world, "sender")
    _out, error = process.communicate(timeout=COMMAND_S)
    assert process.returncode == 1, error
    assert log_dirty(world)
    start_sender(world)
    assert not log_dirty(world)
    assert estimate(world).returncode == 0
    assert not [*world.directory.glob("source.sock.state/sender/*.measured")]
    arrives(world, spec)


@pytest.mark.parametrize("words", [("estimate", "guest"), ("evacuate", "--dry-run")])
def test_log_dirty_can_be_taken_from_a_program_that_has_ended(
    world: World, words: tuple[str, ...]
) -> None:
    boot(world)
    with world.source.open("guest") as guest:
        guest.log_dirty_enable()
    result = run(world, *words, "--seconds", "0.2", "--take-log-dirty")
    assert result.returncode == 0, result.stderr
    assert not log_dirty(world)


# ---- migrate --dry-run ----
def test_a_dry_run_prints_the_estimate(world: World, tmp_path: Path) -> None:
    spec = boot(world)
    file = tmp_path / "estimate.json"
    result = run(world, "migrate", "guest", "--dry-run", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "recommended: " in result.stdout
    written = json.loads(file.read_text())
    assert written["strategy"] == "hybrid" and list(written["strategies"]) == list(STRATEGIES)
    assert not listed(world, "sender")
    arrives(world, spec)
