# SPDX-License-Identifier: GPL-2.0-or-later
"""``virsh migrate`` between two hosts with Debian's libvirt: libvirt's daemon has our helper in its
environment, and nothing else of libvirt is changed.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xenlab.dom0.guests import LINUX, STEPS_PER_S, Guest, write_config
from tests.xenlab.dom0.host import check_heartbeat
from tests.xenlab.dom0.package import HELPER, Host
from tests.xenlab.dom0.pair import GuestThere, Pair, migrations, wait_until_completed
from tests.xenlab.dom0.waiting import until

pytestmark = pytest.mark.hypervisors("hosts")
DAEMON = "libvirtd.service"
DROP_IN = f"/etc/systemd/system/{DAEMON}.d/xen-postcopy.conf"
ENVIRONMENT = f"""\
[Service]
Environment=LIBXL_SAVE_HELPER={HELPER} XEN_POSTCOPY=require XEN_POSTCOPY_STRATEGY=postcopy
"""
CPU_MODEL = "/usr/share/libvirt/cpu_map/x86_486.xml"
SENDER_STATE = Path("/var/lib/xen-postcopy/sender")
VIRSH = ("virsh", "--connect", "xen:///system")


def virsh(host: Host, *words: str, ok: bool = True) -> str:
    return host.run(*VIRSH, *words, ok=ok)


def domains(host: Host) -> list[str]:
    """Return the names of the guests that a host has, running or paused."""
    return [name for name in virsh(host, "list", "--name").split() if name != "Domain-0"]


def is_paused(host: Host, name: str) -> bool:
    return virsh(host, "domstate", name, ok=False).strip() == "paused"


def restart_libvirt(pair: Pair) -> None:
    for host in pair:
        host.run("systemctl", "restart", DAEMON)
    for host in pair:

        def answers(host: Host = host) -> bool:
            return "Running hypervisor: Xen" in virsh(host, "version", ok=False)

        try:
            until(answers, f"libvirt of {host.name} does not answer")
        except AssertionError:
            print(host.run("journalctl", "-u", DAEMON, ok=False))
            raise


@pytest.fixture(scope="module")
def hosts(packaged_hosts: Pair) -> Iterator[Pair]:
    for host in packaged_hosts:
        # Each of libvirt's models of a CPU has this feature, which QEMU does not emulate.
        host.run("sed", "-i", "/'vme'/d", CPU_MODEL)
        host.run("mkdir", "-p", str(Path(DROP_IN).parent))
        host.write(DROP_IN, ENVIRONMENT)
        host.run("systemctl", "daemon-reload")
    restart_libvirt(packaged_hosts)
    yield packaged_hosts
    for host in packaged_hosts:
        host.run("systemctl", "stop", DAEMON, ok=False)


@contextmanager
def guest_of_libvirt(pair: Pair, name: str) -> Iterator[Guest]:
    """Yield a guest that libvirt has started at the first host."""
    here, _there = pair
    boots = LINUX.boots(f"rate={STEPS_PER_S}")
    config = write_config(name, LINUX, LINUX.memory_mib, 1, boots)
    description = virsh(here, "domxml-from-native", "xen-xl", str(config))
    here.write(f"/tmp/{name}.xml", description)
    try:
        virsh(here, "create", f"/tmp/{name}.xml")
        made = Guest(name, int(virsh(here, "domid", name)))
        made.wait_for_heartbeats(2)
        yield made
    finally:
        for host in pair:
            virsh(host, "destroy", name, ok=False)


def migration(pair: Pair, name: str, *options: str) -> list[str]:
    """Return virsh's words for a migration to the second host."""
    _here, there = pair
    return ["migrate", "--live", *options, name, f"xen+ssh://{there.name}/system"]


def migrate(pair: Pair, name: str, *options: str) -> str:
    return virsh(pair[0], *migration(pair, name, *options))


def kill_virsh_in_a_migration(pair: Pair, name: str, *options: str) -> None:
    """Begin to migrate a guest, and kill virsh when the sender has begun as well."""

    def journals() -> set[Path]:
        return set(SENDER_STATE.glob("*.json"))

    before = journals()
    with subprocess.Popen([*VIRSH, *migration(pair, name, *options)]) as moving:
        try:
            # The test reads the folder, because the daemon needs seconds for an answer.
            until(lambda: journals() - before, "no migration begins")
        finally:
            moving.kill()
    assert moving.returncode == -signal.SIGKILL


def check_runs_there(pair: Pair, name: str) -> None:
    here, there = pair
    check_heartbeat(GuestThere(name, 0, there))
    assert domains(there) == [name]
    until(lambda: domains(here) == [], "the guest is at its source as well")


def test_virsh_migrates_by_postcopy(hosts: Pair) -> None:
    with guest_of_libvirt(hosts, "virt1"):
        print(migrate(hosts, "virt1"))
        assert migrations(hosts[0])[-1]["strategy"] == "postcopy"
        wait_until_completed(hosts)
        check_runs_there(hosts, "virt1")


def test_a_guest_that_virsh_leaves_paused_gets_its_memory(hosts: Pair) -> None:
    with guest_of_libvirt(hosts, "virt2"):
        print(migrate(hosts, "virt2", "--suspend"))
        wait_until_completed(hosts)
        assert is_paused(hosts[1], "virt2")
        virsh(hosts[1], "resume", "virt2")
        check_runs_there(hosts, "virt2")


@pytest.mark.timeout(3600)
def test_an_administrator_ends_what_a_killed_virsh_has_begun(hosts: Pair) -> None:
    """Without virsh nothing finishes the migration at the destination, or confirms the migration
    at the source.  Both of libvirt's daemons wait for these steps, and until they are restarted
    they refuse each command that would change the guest.
    """
    here, there = hosts
    with guest_of_libvirt(hosts, "virt3"):
        kill_virsh_in_a_migration(hosts, "virt3")

        def arrived() -> bool:
            lines = migrations(there)
            return bool(
                lines and lines[-1]["phase"] == "deciding" and lines[-1]["outstanding"] == 0
            )

        until(arrived, "the guest's memory does not arrive")
        assert is_paused(there, "virt3")
        assert migrations(here)[-1]["phase"] == "deciding"
        restart_libvirt(hosts)
        assert "resumed" in virsh(there, "resume", "virt3")
        wait_until_completed(hosts)
        check_runs_there(hosts, "virt3")


def test_a_killed_virsh_changes_nothing_if_libvirts_daemons_migrate_by_themselves(
    hosts: Pair,
) -> None:
    with guest_of_libvirt(hosts, "virt4"):
        kill_virsh_in_a_migration(hosts, "virt4", "--p2p")
        wait_until_completed(hosts)
        check_runs_there(hosts, "virt4")
