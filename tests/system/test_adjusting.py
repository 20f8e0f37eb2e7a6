# SPDX-License-Identifier: GPL-2.0-or-later
"""``set``, ``pause``, ``resume`` and ``--timeout`` with daemons as processes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import (
    World,
    loopback_world,
    start_receiver,
    start_sender,
    verify_migrated,
    wait_for_steps,
)
from migrate.errors import MigrationError
from migrate.options import LEAST_BANDWIDTH
from migrate.outcomes import ENDED
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import COMMAND_S, PROGRAM
from tests.support.daemons import begin, boot, copying, kill, lines, phase, states, world
from tests.support.waiting import until
from tests.support.xl import Xl, check_arrived, check_stayed
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec

__all__ = ["world"]
HARDLY = LEAST_BANDWIDTH


def run(world: World, *words: str) -> subprocess.CompletedProcess[str]:
    return zygote.run([*PROGRAM, *words, "--socket", str(world.sender_socket)], timeout=COMMAND_S)


def done(world: World, *words: str) -> str:
    result = run(world, *words)
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


def shown(world: World) -> dict[str, Any]:
    (found,) = json.loads(done(world, "show", "guest", "--json"))
    assert isinstance(found, dict)
    return found


def in_postcopy(world: World) -> GuestSpec:
    """Begin a migration whose push does not continue by itself.  The guest never touches a half of
    its memory.
    """
    spec = boot(world, rate=100)
    begin(world, "guest", bandwidth=HARDLY)
    both = ("sender", "receiver")
    until(lambda: {phase(world, which) for which in both} == {"postcopy"}, "no postcopy")
    return spec


def arrives(world: World, spec: GuestSpec) -> None:
    both = ("sender", "receiver")
    until(lambda: {phase(world, which) for which in both} == {"completed"}, "it does not complete")
    verification, _view = verify_migrated(world, spec)
    assert verification.problems == []


def refusal(world: World, **request: Any) -> str:
    with pytest.raises(MigrationError) as refused:
        world.ask("sender", migration="guest", **request)
    return str(refused.value)


# ---- the commands ----
def test_precopy_is_slowed_down_paused_and_resumed(world: World) -> None:
    spec = boot(world)
    begin(world, "guest", strategy="hybrid", bandwidth=HARDLY)
    until(lambda: copying(world), "no precopy")
    done(world, "pause", "guest")
    (line,) = json.loads(done(world, "list", "--json"))
    assert line["paused"] is True and line["phase"] == "precopy"
    assert "its copying is paused: `xen-postcopy resume guest`" in done(world, "list")
    until(lambda: lines(world, "receiver")[-1]["quiet_s"], "the receiver does not notice the pause")
    before = line["pages_done"]
    with world.source.open("guest") as guest:
        wait_for_steps(guest, 100)
    assert lines(world, "sender")[-1]["pages_done"] == before
    assert "first `xen-postcopy resume guest`" in refusal(world, command="postcopy-now")
    used = done(world, "set", "guest", "--bandwidth", "none", "--downtime-target", "7")
    assert used == "guest: the sender now uses --bandwidth none, --downtime-target 7.0\n"
    capped = done(world, "set", "guest", "--postcopy-bandwidth", "400M")
    assert capped == "guest: the sender now uses --postcopy-bandwidth 400.0 MiB/s\n"
    options = shown(world)["options"]
    assert options["bandwidth_bytes_per_s"] is None and options["downtime_target_ms"] == 7.0
    assert "downtime target 7 ms" in done(world, "show", "guest")
    done(world, "resume", "guest")
    arrives(world, spec)
    assert shown(world)["paused"] is False
    marks = world.ask("sender", command="record", migration="guest")["record"]["marks"]
    assert [mark["asked"] for mark in marks] == ["pause", "set", "set", "resume"]
    assert marks[1]["values"] == {"bandwidth_bytes_per_s": None, "downtime_target_ms": 7.0}


def test_what_comes_too_late_is_refused_with_the_reason(world: World) -> None:
    in_postcopy(world)
    late = run(world, "set", "guest", "--downtime-target", "7")
    assert late.returncode == 1 and "too late for --downtime-target" in late.stderr
    nothing = run(world, "set", "guest")
    assert nothing.returncode == 2 and "at least one of --max-rounds" in nothing.stderr
    assert "is not paused" in run(world, "resume", "guest").stderr
    for word in ("pause", "resume", "set"):
        with pytest.raises(MigrationError, match="ask the sender at its source"):
            world.ask("receiver", command=word, migration="guest", values={})


@pytest.mark.parametrize("killed", ["sender", "receiver"])
def test_a_daemon_is_killed_in_a_pause_and_the_guest_is_whole_after_it(
    world: World, killed: str
) -> None:
    """Invariants 2, 3 and 6: faults are served before and after the restart, and every byte is the
    guest's.
    """
    spec = in_postcopy(world)
    done(world, "pause", "guest")
    done(world, "set", "guest", "--postcopy-bandwidth", "1G")
    for _ in range(2):
        kill(world, killed)
        if killed == "sender":
            start_sender(world)
        else:
            start_receiver(world, world.port)
        until(lambda: phase(world, "sender") == phase(world, "receiver") == "postcopy", "not back")
        with world.destination.open("guest") as guest:
            wait_for_steps(guest, 20)
    (line,) = lines(world, "sender")
    assert line["paused"] is True and line["outstanding"] > 0
    assert shown(world)["options"]["postcopy_bandwidth_bytes_per_s"] == 2**30
    done(world, "resume", "guest")
    arrives(world, spec)


def test_a_daemon_that_is_being_stopped_names_the_pause_that_it_waits_for(world: World) -> None:
    spec = in_postcopy(world)
    done(world, "pause", "guest")
    world.processes["sender"].popen.terminate()
    until(lambda: "and copying is paused" in world.processes["sender"].tail(), "it is not named")
    done(world, "set", "guest", "--postcopy-bandwidth", "none")
    done(world, "resume", "guest")
    world.processes["sender"].popen.wait(60)
    verification, _view = verify_migrated(world, spec)
    assert verification.problems == []


# ---- a limit of precopy ----
def migrate(world: World, *options: str) -> subprocess.CompletedProcess[str]:
    return run(world, "migrate", "guest", f"127.0.0.1:{world.port}", *options)


def test_a_migration_that_takes_too_long_is_cancelled(world: World) -> None:
    boot(world)
    ended = migrate(world, "--bandwidth", "4K", "--timeout", "0.2", "--on-timeout", "cancel")
    assert ended.returncode == 1
    reason = "cancelled after [0-9.]* s of precopy, by its time limit of 0.2 s"
    assert re.search(
        f"guest was not migrated: {reason}; the guest continues at the source", ended.stderr
    )
    assert states(world, "guest") == {"source": ["running"], "destination": []}


def test_a_migration_that_takes_too_long_switches_over(world: World) -> None:
    spec = boot(world)
    ended = migrate(world, "--bandwidth", "4K", "--postcopy-bandwidth", "none", "--timeout", "0.2")
    assert ended.returncode == 0, ended.stderr
    arrives(world, spec)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--strategy", "precopy", "--timeout", "5"], "cannot end in postcopy"),
        (["--on-timeout", "cancel"], "only with --timeout"),
        (["--timeout", "0"], "is not a number from 0.001"),
        (["--postcopy-bandwidth", "1"], "at least one page"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_start(
    world: World, options: list[str], reason: str
) -> None:
    refused = migrate(world, *options)
    assert refused.returncode == 2 and reason in refused.stderr


# ---- under xl ----
SLOWLY = '[migration]\nbandwidth = "4K"\npostcopy_bandwidth = "none"\n'


@contextlib.contextmanager
def under_xl(directory: Path, config: str) -> Iterator[Xl]:
    spec = GuestSpec("guest", 16 * MIB, vcpus=2, workload="random", rate=2000)
    with loopback_world(256 * MIB, config=SLOWLY + config) as world:
        with world.source.create_guest(spec.to_bytes()) as domain:
            wait_for_steps(domain, 20)
        with contextlib.closing(Xl(world, spec, directory)) as xl:
            yield xl


def test_under_xl_precopy_is_paused_and_continued(tmp_path: Path) -> None:
    with under_xl(tmp_path, "") as xl:
        xl.start()
        until(lambda: xl.line("sender").get("pages_done"), "no precopy")
        xl.world.ask("sender", command="pause", migration="guest")
        wait_for_steps(xl.source, 100)
        assert xl.source.info().state is DomainState.RUNNING
        assert xl.line("sender")["paused"] is True
        values = {"bandwidth_bytes_per_s": None}
        xl.world.ask("sender", command="set", migration="guest", values=values)
        xl.world.ask("sender", command="resume", migration="guest")
        assert xl.wait() == ((0, 0), (0, 0))
        xl.go()
        xl.wait_for("completed", "completed")
        check_arrived(xl)


@pytest.mark.parametrize("action", ["postcopy", "suspend"])
def test_under_xl_a_time_limit_ends_precopy(tmp_path: Path, action: str) -> None:
    with under_xl(tmp_path, f'timeout_s = 0.2\non_timeout = "{action}"\n') as xl:
        assert xl.run() == ((0, 0), (0, 0))
        xl.go()
        xl.wait_for("completed", "completed")
        missing = xl.world.ask("sender", command="show", migration="guest")["details"]["switchover"]
        assert (missing["missing_pages"] > 0) is (action == "postcopy")
        check_arrived(xl)


def test_under_xl_a_time_limit_cancels(tmp_path: Path) -> None:
    with under_xl(tmp_path, 'timeout_s = 0.2\non_timeout = "cancel"\n') as xl:
        xl.start()
        until(lambda: xl.line("sender")["phase"] in ENDED, "it does not end")
        assert re.fullmatch("cancelled after .* time limit of 0.2 s", xl.line("sender")["problem"])
        xl.save.wait()
        assert xl.save.result[0] == -1
        assert xl.source.info().state is DomainState.RUNNING
        xl.stay()
        check_stayed(xl)
