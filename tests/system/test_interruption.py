# SPDX-License-Identifier: GPL-2.0-or-later
"""A user interrupts a command, or a daemon is stopped: before the handover the guest stays at the
source, afterwards the migration continues in the daemons.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from migrate.cli.world import World, loopback_world, verify_migrated
from tests.conftest import MIB
from tests.support import zygote
from tests.support.command_line import assert_unharmed, boot, request, run
from tests.support.commands import PROGRAM
from tests.support.waiting import WAIT_S, until
from xenbackend.simulated.guest import GuestSpec


def test_ctrl_c_ends_watch_with_one_line(world: World, name: str) -> None:
    boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    socket = ("--socket", world.sender_socket)
    migrating = zygote.Popen(
        [*PROGRAM, *request(world, name, "--bandwidth", "4M")], stderr=subprocess.PIPE, text=True
    )
    with migrating:
        assert migrating.stderr is not None and "precopy" in migrating.stderr.readline()
        watch = [*PROGRAM, "watch", name, *map(str, socket)]
        with zygote.Popen(watch, stderr=subprocess.PIPE, text=True) as watching:
            assert watching.stderr is not None and "precopy" in watching.stderr.readline()
            watching.send_signal(signal.SIGINT)
            output = watching.stderr.read().splitlines()
        assert watching.returncode == 130 and output[-1] == "xen-postcopy: interrupted"
        assert "" not in output
        switched = run("postcopy-now", name, *socket)
        assert switched.stderr == f"{name}: the sender ends precopy and switches over\n"
        assert run("cancel", name, *socket).returncode in (0, 1)
        migrating.stderr.read()


def interrupt_when(
    world: World, spec: GuestSpec, phase: str, *options: str, by: int = signal.SIGINT
) -> tuple[int, str]:
    """Press Ctrl-C when the migration is in a phase.  Returns the status and the output."""
    process = zygote.Popen(
        [*PROGRAM, *request(world, spec.name, *options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    output = ""
    for line in process.stderr:
        output += line
        if f"{spec.name}: {phase}" in line:
            process.send_signal(by)
            break
    with process:
        output += process.stderr.read()
        return process.wait(WAIT_S), output


def test_ctrl_c_before_the_switchover_takes_everything_back(world: World, name: str) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    status, output = interrupt_when(world, spec, "precopy", "--bandwidth", "4M")
    assert status == 130
    assert output.endswith("xen-postcopy: cancelled by Ctrl-C; the guest continues at the source\n")
    assert_unharmed(world, spec)


def test_ctrl_c_after_the_switchover_leaves_the_migration_to_the_daemons(
    world: World, name: str
) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    status, output = interrupt_when(
        world, spec, "postcopy", "--strategy", "postcopy", "--bandwidth", "8M"
    )
    assert status == 130
    (line,) = world.ask("sender", command="list")["migrations"][-1:]
    assert output.endswith(f"continues in the daemons: {follow(world, line)}\n")
    deadline = time.monotonic() + WAIT_S
    while any(info.name == name for info in world.source.domains()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert verify_migrated(world, spec)[0].problems == []


def follow(world: World, line: dict[str, Any]) -> str:
    return f"{hint(world, line, 'watch')} follows it"


def hint(world: World, line: dict[str, Any], command: str) -> str:
    """Return a command as it can be pasted."""
    return f"`xen-postcopy {command} {line['id'][:8]} --socket {world.sender_socket}`"


def test_sigterm_leaves_the_migration_to_the_daemons(world: World, name: str) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    options = ("--bandwidth", "8M")
    status, output = interrupt_when(world, spec, "precopy", *options, by=signal.SIGTERM)
    assert status == 130
    (line,) = world.ask("sender", command="list")["migrations"][-1:]
    take_back = f"{hint(world, line, 'cancel')} takes it back before its handover"
    assert output.endswith(f"continues in the daemons: {follow(world, line)}, {take_back}\n")
    until(lambda: not any(info.name == name for info in world.source.domains()), "it stays")
    assert verify_migrated(world, spec)[0].problems == []


def test_a_second_ctrl_c_waits_no_longer(tmp_path: Path) -> None:
    """The daemon does not answer."""
    path = tmp_path / "sender.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        listener.settimeout(WAIT_S)
        command = [*PROGRAM, "migrate", "guest", "host", "--socket", str(path)]
        with zygote.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _address = listener.accept()
            with connection:
                assert b'"migrate"' in connection.recv(4096)
                connection.sendall(json.dumps({"event": "progress", **PROGRESS}).encode() + b"\n")
                assert (
                    process.stderr is not None
                    and "protected as of 1.5 s ago" in process.stderr.readline()
                )
                process.send_signal(signal.SIGINT)
                assert b'"cancel"' in connection.recv(4096)
                process.send_signal(signal.SIGINT)
                _out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and "not waiting any longer" in err


PROGRESS = {
    "id": "0123456789", "domain": "guest", "phase": "postcopy", "problem": "", "outstanding": 7,
    "checkpoint_age_s": 1.5, "handed_over": True,
}  # fmt: skip


# ---- stopping daemons ----
def test_a_sender_that_is_stopped_takes_its_migrations_back(name: str) -> None:
    with loopback_world(64 * MIB) as world:
        spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
        process = zygote.Popen(
            [*PROGRAM, *request(world, name, "--bandwidth", "4M")],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert any("precopy" in line for line in iter(process.stderr.readline, ""))
        world.stop("sender")
        process.stderr.close()
        assert process.wait(WAIT_S) == 1
        assert_unharmed(world, spec)


def test_a_killed_sender_leaves_the_guest_where_it_was(name: str) -> None:
    """This is before the switchover: the hypervisor's guest does not depend on the daemon."""
    with loopback_world(64 * MIB) as world:
        spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
        with world.control() as client:
            client.send(
                command="migrate",
                domain=name,
                destination=f"127.0.0.1:{world.port}",
                bandwidth=4 * MIB,
            )
            for answer in client.answers():
                if answer["phase"] == "precopy":
                    break
            world.stop("sender", signal.SIGKILL)
        assert_unharmed(world, spec)
