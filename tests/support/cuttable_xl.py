# SPDX-License-Identifier: GPL-2.0-or-later
"""xl whose sender is reached over a link that can be cut."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.world import loopback_world, start_receiver, start_sender, wait_for_steps
from migrate.errors import MigrationError
from tests.conftest import MIB
from tests.support.keepers import keeper_of, lives
from tests.support.labs import until
from tests.support.links import LinkInThread
from tests.support.waiting import WAIT_S
from tests.support.xl import Xl
from xenbackend.simulated.guest import GuestSpec

SLOW_PUSH_S = 3 * WAIT_S
"""The limit for pages that are pushed a fifth of the time (sender/pace.py)."""


class CuttableXl(Xl):
    relay: LinkInThread

    def restart(self, which: str, sig: int = signal.SIGKILL) -> None:
        port = self.world.ask("sender", command="status")["port"]
        self.world.stop(which, sig)
        if which == "sender":
            start_sender(self.world, port)
        else:
            start_receiver(self.world, self.world.port)

    def lose_sender(self) -> None:
        """Kill the sender and the keeper of its pages; start a successor."""
        keeper = keeper_of(self.world)
        port = self.world.ask("sender", command="status")["port"]
        self.world.stop("sender", signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not lives(keeper), "the keeper lives")
        start_sender(self.world, port)


LARGE = pytest.mark.parametrize("xl", [64], indirect=True, ids=["64 MiB"])
"""For tests of a guest whose pages must not all arrive while xl decides, on the slowest machine."""


@pytest.fixture
def xl(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CuttableXl]:
    """An xl whose sender is reached over a link that can be cut.  The parameter is the size of the
    guest, in MiB.
    """
    memory = getattr(request, "param", 16) * MIB
    spec = GuestSpec("guest", memory, vcpus=2, workload="random", rate=5000)
    with LinkInThread(("127.0.0.1", 1)) as relay:
        config = f'[sender]\naddress = "127.0.0.1:{relay.link.port}"\n'
        config += '[migration]\nstrategy = "postcopy"\nbandwidth = "16M"\n'
        with loopback_world(256 * MIB, config=config) as world:
            relay.link.to = ("127.0.0.1", world.ask("sender", command="status")["port"])
            domain = world.source.create_guest(spec.to_bytes())
            wait_for_steps(domain, 200)
            domain.close()
            with contextlib.closing(CuttableXl(world, spec, tmp_path)) as made:
                made.relay = relay
                assert made.run() == ((0, 0), (0, 0))
                made.wait_for("deciding", "deciding")
                yield made


def some_have_come(xl: CuttableXl) -> None:
    """Wait until a part of the missing pages has been pushed, while xl decides."""
    total = xl.line("sender")["pages_total"]
    until(lambda: xl.line("sender")["outstanding"] < total, "nothing is pushed")
    assert xl.line("sender")["phase"] == "deciding"


def decide(xl: CuttableXl, *, here: bool, force: bool) -> None:
    """Decide at the sender, whose successor may be resuming the migration."""

    def is_decided() -> bool:
        try:
            xl.world.ask("sender", command="decide", migration=xl.spec.name, here=here, force=force)
        except MigrationError as error:
            if "ask again in a moment" not in str(error):
                raise
            return False
        return True

    until(is_decided, "the migration is not resumed", WAIT_S)


def sender_of(xl: CuttableXl) -> int:
    return xl.world.processes["sender"].popen.pid


def log_of(xl: CuttableXl, which: str) -> str:
    return xl.world.processes[which].log.read_text()
