# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts are set up by the commands that ``init`` prints, and migrate a guest over TLS.

A host is an address of loopback that no other test has, so that the daemons can listen at their
usual ports.  Programs in the place of ssh and scp reach it in a folder of its own.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.cli.authority import Authority
from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.waiting import WAIT_S, until
from tests.tree.listing import TREE
from xenbackend.simulated.guest import GuestSpec

SSH = """\
#!/bin/sh
host=${1#root@}
export XEN_POSTCOPY_SOCKETS=ROOT/$host/run
shift 2
[ $1 != preflight ] || set -- "$@" --config ROOT/$host/etc/xen-postcopy/config.toml
exec PYTHON -P -m migrate.cli "$@"
"""
SCP = """\
#!/bin/bash
[ $1 = -p ] || exit 1
target=${@: -1}
host=${target#root@}
exec cp -p "${@:2:$#-2}" ROOT/${host%%:*}${host#*:}
"""


def address() -> str:
    return "127." + ".".join(str(random.randint(1, 254)) for _ in range(3))


@dataclass
class Two:
    """Two simulated hosts, each with a folder for what it has in /etc and /run."""

    world: World
    names: tuple[str, str]

    def root(self, name: str) -> Path:
        return self.world.directory / name

    def config(self, name: str) -> Path:
        return self.root(name) / "etc/xen-postcopy/config.toml"

    def start_daemons(self, name: str) -> None:
        simulated = ("source", "destination")[self.names.index(name)]
        for end in ("receiver", "sender"):
            self.world.start(
                f"{name}-{end}", end, "--config", str(self.config(name)), "--socket",
                f"{self.root(name)}/run/{end}.sock", "--state", f"{self.root(name)}/state",
                "--simulated", f"{self.world.directory}/{simulated}.sock",
            )  # fmt: skip

    def init(self, *words: str) -> list[str]:
        """Returns the commands that ``init`` prints."""
        directory = str(self.world.directory / "files")
        done = zygote.run([*PROGRAM, "init", *words, "--directory", directory], timeout=WAIT_S)
        assert done.returncode == 0, done.stderr
        return [line[4:] for line in done.stdout.splitlines() if line.startswith("    ")]

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.world.directory}/bin:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", command], env={**os.environ, "PATH": path, "PYTHONPATH": str(TREE)},
            capture_output=True, text=True, check=False, timeout=WAIT_S,
        )  # fmt: skip


@pytest.fixture
def two() -> Iterator[Two]:
    with loopback_world(128 * MIB, daemons=False) as world:
        made = Two(world, (address(), address()))
        for name in made.names:
            made.config(name).parent.mkdir(parents=True)
            (made.root(name) / "run").mkdir()
        for program, text in (("ssh", SSH), ("scp", SCP)):
            file = world.directory / "bin" / program
            file.parent.mkdir(exist_ok=True)
            text = text.replace("ROOT", str(world.directory)).replace("PYTHON", sys.executable)
            file.write_text(text)
            file.chmod(0o755)
        yield made


def test_the_printed_commands_set_up_two_hosts(two: Two, name: str) -> None:
    spec = GuestSpec(name, 16 * MIB)
    with two.world.source.create_guest(spec.to_bytes()) as guest:
        wait_for_steps(guest, 5)
    outputs: dict[str, str] = {}
    for command in two.init(*two.names):
        if command.endswith("restart-idle"):
            two.start_daemons(command.split()[1].removeprefix("root@"))
        elif " xl " not in command:
            done = two.shell(command.replace("GUEST", name))
            assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
            outputs[command] = done.stdout
            if " preflight --peer " in command:  # which begins no migration
                assert (
                    two.shell(f"ssh root@{two.names[1]} xen-postcopy list --json").stdout == "[]\n"
                )
    copies = [command for command in outputs if command.startswith("scp ")]
    tries = [command for command in outputs if " preflight --peer " in command]
    assert len(copies) == len(tries) == 2 and len(outputs) == 5
    for host in two.names:
        assert (two.config(host).parent / "host.key").stat().st_mode & 0o777 == 0o600
    for command in tries:
        for line in ("its certificate: accepted here", "our certificate: accepted there", "paging"):
            assert line in outputs[command], outputs[command]
    assert f"{name} migrated" in [*outputs.values()][-1]
    verified, _stalls = verify_migrated(two.world, spec)
    assert verified.problems == []
    logs = [process.tail() for process in two.world.processes.values()]
    assert not [log for log in logs if "WARNING" in log or "ERROR" in log], logs


def test_a_guest_that_does_not_fit_there_is_named(two: Two, name: str) -> None:
    source, destination = two.names
    for command in two.init(source, destination):
        if command.startswith("scp "):
            assert two.shell(command).returncode == 0
    two.start_daemons(destination)
    with two.world.destination.create_guest(GuestSpec("other", 100 * MIB).to_bytes()):
        two.world.source.create_guest(GuestSpec(name, 32 * MIB).to_bytes()).close()
        done = two.shell(
            f"ssh root@{source} xen-postcopy preflight {name} --peer {destination} --json "
            f"--simulated {two.world.directory}/source.sock"
        )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["ready"] is False and found["peer"] == f"{destination}:8013"
    assert found["problems"] == [
        f"{destination}, memory: the guest needs 32.0 MiB, and 28.0 MiB are free: make room there"
    ]
    by_name = {check["what"]: check["result"] for check in found["checks"]}
    assert by_name["this host, sender"] == "note"  # it does not run


def test_a_daemon_names_what_is_wrong_with_its_certificate_and_runs(two: Two) -> None:
    """Its successor may be the pager of guests, and renewed files need no restart."""
    first, second = two.names
    for command in two.init(first, second):
        if command.startswith("scp "):
            assert two.shell(command).returncode == 0
    folder = two.config(first).parent
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    authority = Authority.make(long_ago)
    expired = authority.issue((first,), 1, long_ago)
    (folder / "authority.pem").write_bytes(authority.certificate())
    (folder / "host.pem").write_bytes(expired.certificate)
    (folder / "host.key").write_bytes(expired.key)
    (folder / "host.key").chmod(0o644)
    two.start_daemons(first)
    for end in ("receiver", "sender"):
        log = two.world.processes[f"{first}-{end}"].log
        until(lambda: "(mode 0644)" in log.read_text(), "the key is not named")
        assert f"{folder}/host.pem: it has expired on 2020-01-02: renew it" in log.read_text()
    two.world.check_alive()
    done = two.shell(
        f"ssh root@{first} xen-postcopy preflight --simulated {two.world.directory}/source.sock"
    )
    assert done.returncode == 1
    assert f"this host: warning: [tls] key {folder}/host.key" in done.stderr
    assert f"this host: [tls] certificate {folder}/host.pem: it has expired" in done.stderr
