# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on one network, each with our package: ``xl migrate GUEST HOST``, as an administrator
types it; with TLS, and without.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.xenlab.dom0.guests import STEPS_PER_S, STUB, guest
from tests.xenlab.dom0.host import check_clock
from tests.xenlab.dom0.package import CONFIG
from tests.xenlab.dom0.pair import Pair, check_arrived, connect_without_tls, on_both
from tests.xenlab.dom0.waiting import WAIT_S
from tests.xenlab.parts import HOST_NAMES, address

pytestmark = pytest.mark.hypervisors("hosts")


def test_xl_migrates_to_another_host_and_back(packaged_hosts: Pair) -> None:
    first, second = packaged_hosts
    with guest("far") as made:
        made.wait_for_heartbeats(2)
        said = first.run("xl", "migrate", "far", second.name, XEN_POSTCOPY="require")
        assert "Migration successful" in said
        check_arrived("far", first, second, "far--incoming")
        said = second.run(
            "xl",
            "migrate",
            "far",
            first.name,
            XEN_POSTCOPY="require",
            XEN_POSTCOPY_STRATEGY="postcopy",
        )
        assert "Migration successful" in said
        check_arrived("far", second, first, "far--incoming")


def test_the_command_line_migrates_to_another_host(packaged_hosts: Pair) -> None:
    first, second = packaged_hosts
    with guest("plain") as made:
        made.wait_for_heartbeats(2)
        try:
            print(
                first.run("xen-postcopy", "migrate", "plain", address(1), "--strategy", "postcopy")
            )
            check_arrived("plain", first, second, "plain")
        finally:
            second.run("xl", "destroy", "plain", ok=False)


def test_the_clock_of_a_guest_on_a_host_that_has_run_for_another_time(packaged_hosts: Pair) -> None:
    first, second = packaged_hosts
    uptimes = [float(host.run("cat", "/proc/uptime").split()[0]) for host in packaged_hosts]
    print(f"the hosts have run for {uptimes} s")
    with guest("clock", options=f"rate={STEPS_PER_S} clocks=1") as made:
        check_clock(made)
        first.run("xl", "migrate", "clock", second.name, XEN_POSTCOPY="require")
        check_clock(check_arrived("clock", first, second, "clock--incoming"))
        second.run("xl", "migrate", "clock", first.name, XEN_POSTCOPY="require")
        check_clock(check_arrived("clock", second, first, "clock--incoming"))


def test_the_commands_that_init_prints_connect_the_hosts_with_tls(
    packaged_hosts: Pair, tmp_path: Path
) -> None:
    first, second = packaged_hosts
    init = (*PROGRAM, "init", *HOST_NAMES, "--directory", str(tmp_path / "made"))
    made_files = zygote.run(init, timeout=WAIT_S)
    assert made_files.returncode == 0, made_files.stderr
    commands = [line[4:] for line in made_files.stdout.splitlines() if line.startswith("    ")]
    *to_connect, without_toolstack, under_xl = commands
    try:
        for command in to_connect:
            said = first.run("bash", "-c", command)
            print(f"{command}\n{said}")
            if "restart-idle" in command:
                for host in packaged_hosts:
                    host.wait_until_active()
            if "preflight --peer" in command:
                assert "its certificate: accepted here" in said
                assert "our certificate: accepted there" in said
        for host in packaged_hosts:
            assert "unencrypted" not in host.run("grep", "-v", "^#", CONFIG)
        with guest("plain", kind=STUB) as made:
            made.wait_for_heartbeats(2)
            print(first.run("bash", "-c", without_toolstack.replace("GUEST", "plain")))
            check_arrived("plain", first, second, "plain")
            second.run("xl", "destroy", "plain")
        with guest("tls", kind=STUB) as made:
            made.wait_for_heartbeats(2)
            said = first.run("bash", "-c", under_xl.replace("GUEST", "tls"))
            assert "Migration successful" in said
            check_arrived("tls", first, second, "tls--incoming")
            said = second.run("xl", "migrate", "tls", first.name, XEN_POSTCOPY_STRATEGY="postcopy")
            assert "Migration successful" in said
            check_arrived("tls", second, first, "tls--incoming")
    finally:
        on_both(packaged_hosts, connect_without_tls)
