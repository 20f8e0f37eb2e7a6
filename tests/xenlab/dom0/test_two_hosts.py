# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on one network, each with our package: ``xl migrate GUEST HOST``, as an administrator
types it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from migrate.control.client import Json
from tests.xenlab.dom0.guests import CONSOLES, Guest, guest
from tests.xenlab.dom0.package import CONFIG, HELPER, Host
from tests.xenlab.dom0.waiting import until
from tests.xenlab.parts import HOST_NAMES, address

pytestmark = pytest.mark.hypervisors("hosts")
CONFIGURATION = """\
[network]
unencrypted = true
[sender]
listen = "{address}"
[receiver]
listen = "{address}"
"""
Pair = tuple[Host, Host]


@dataclass(frozen=True)
class GuestThere(Guest):
    host: Host

    def console(self) -> str:
        return self.host.run("cat", str(CONSOLES / f"guest-{self.name}.log"))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Pair]:
    first, second = (Host(name) for name in HOST_NAMES)
    until(lambda: second.run("true", ok=False) == "", "the other host does not answer", 120)
    for number, host in enumerate((first, second)):
        host.install()
        host.write("/etc/environment", f"LIBXL_SAVE_HELPER={HELPER}\n")
        host.write(CONFIG, CONFIGURATION.format(address=address(number)))
        host.run("systemctl", "restart", "xen-postcopy.target")
        host.wait_until_active()
    yield first, second
    for host in (first, second):
        host.purge()


def migrations(host: Host) -> list[Json]:
    found: list[Json] = json.loads(host.run("xen-postcopy", "list", "--json"))
    return found


def names(host: Host) -> list[str]:
    """Return the names that ``xl list`` shows."""
    return [line.split()[0] for line in host.run("xl", "list").splitlines()[1:]]


def wait_until_completed(pair: Pair) -> None:
    until(
        lambda: all(migrations(host)[-1]["phase"] == "completed" for host in pair),
        "the pages do not all come",
        240,
    )


def check_arrived(name: str, source: Host, to: Host, console: str) -> None:
    """Check that the guest runs at the destination without an error, and not at the source any
    more.
    """
    there = GuestThere(console, 0, to)
    beats = there.wait_for_heartbeats(3)
    assert [beat.errors for beat in beats] == [0] * len(beats)
    wait_until_completed((source, to))
    assert names(to) == ["Domain-0", name]
    until(lambda: names(source) == ["Domain-0"], f"something is left: {names(source)}", 60)
    there.wait_for_heartbeats(2)


def test_xl_migrates_to_another_host_and_back(hosts: Pair) -> None:
    first, second = hosts
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


def test_the_command_line_migrates_to_another_host(hosts: Pair) -> None:
    first, second = hosts
    with guest("plain") as made:
        made.wait_for_heartbeats(2)
        try:
            print(
                first.run("xen-postcopy", "migrate", "plain", address(1), "--strategy", "postcopy")
            )
            check_arrived("plain", first, second, "plain")
        finally:
            second.run("xl", "destroy", "plain", ok=False)
