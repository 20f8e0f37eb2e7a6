# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on one network.  The tests run on the first host, and use the second host by ssh."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from migrate.control.client import Json
from tests.xenlab.dom0.guests import CONSOLES, Guest
from tests.xenlab.dom0.host import check_heartbeat
from tests.xenlab.dom0.package import CONFIG, HELPER, Host
from tests.xenlab.dom0.waiting import until
from tests.xenlab.parts import HOST_NAMES, address

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
    """A guest of another host."""

    host: Host

    def console(self) -> str:
        return self.host.run("cat", str(CONSOLES / f"guest-{self.name}.log"))


def both() -> Pair:
    """Return the hosts, as soon as the second one answers."""
    first, second = (Host(name) for name in HOST_NAMES)
    until(lambda: second.run("true", ok=False) == "", "the other host does not answer")
    return first, second


@contextmanager
def packaged() -> Iterator[Pair]:
    """Yield both hosts with our package, which xl uses."""
    pair = both()
    on_both(pair, lambda host, _number: host.install())
    on_both(pair, connect_without_tls)
    yield pair
    for host in pair:
        print(host.run("journalctl", "-u", "xen-postcopy-*", ok=False))
        host.purge()


def on_both(pair: Pair, act: Callable[[Host, int], None]) -> None:
    """Call a function with each host and its number, at once, because each host is slow."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(act, pair, range(len(pair))))


def configure(host: Host, number: int, helper: str) -> None:
    """Name the helper to xl, and the host's address to the daemons."""
    host.write("/etc/environment", f"LIBXL_SAVE_HELPER={helper}\n")
    host.write(CONFIG, CONFIGURATION.format(address=address(number)))


def connect_without_tls(host: Host, number: int) -> None:
    configure(host, number, HELPER)
    host.run("systemctl", "restart", "xen-postcopy.target")
    host.wait_until_active()


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
    )


def check_moved(name: str, source: Host, to: Host, console: str) -> GuestThere:
    """Check that the guest runs at the destination without an error, and not at the source any
    more.
    """
    there = GuestThere(console, 0, to)
    check_heartbeat(there)
    assert names(to) == ["Domain-0", name]
    until(lambda: names(source) == ["Domain-0"], f"something is left: {names(source)}")
    return there


def check_arrived(name: str, source: Host, to: Host, console: str) -> GuestThere:
    """Check in addition that all pages have arrived."""
    wait_until_completed((source, to))
    return check_moved(name, source, to, console)
