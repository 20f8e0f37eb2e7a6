# SPDX-License-Identifier: GPL-2.0-or-later
"""One trial under xl: when its helpers have ended, xl decides at a random instant where the guest
runs, and meanwhile and afterwards daemons are killed.  The guest must be where xl has put it, with
every byte.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from migrate.cli.world import start_receiver, start_sender, verify_migrated, wait_for_steps
from tests.campaigns.chaos.trial import END_S, MIB, destroy
from tests.campaigns.chaos.world import ChaosWorld, LostError
from tests.support.keepers import keepers, sockets_of_keepers
from tests.support.xl import Xl
from xenbackend.contract import DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.guest import GuestSpec

WINDOW_S = 1.2
"""The time in which daemons are killed, from the end of the helpers on."""
BOTH, STAYS = 0.3, 0.2
"""The shares of kills that end both daemons, and of trials in which the guest stays."""


class XlTrial:
    def __init__(self, seed: int, world: ChaosWorld):
        self._world, self._id = world, ""
        r = self._random = random.Random(seed)
        self.spec = GuestSpec(
            f"xl{seed}", r.choice([4, 8, 16, 32]) * MIB, r.choice([1, 2, 4]), workload="random",
            write_permille=r.choice([0, 300, 1000]), rate=5000, seed=seed,
        )  # fmt: skip
        self.strategy = r.choice(["hybrid", "postcopy", "postcopy"])
        self.stays = r.random() < STAYS
        at = sorted(r.uniform(0, WINDOW_S) for _ in range(r.choice([1, 1, 2, 3])))
        both = ["sender", "receiver"]
        self._steps = [(s, "kill", both if r.random() < BOTH else ["sender"]) for s in at]
        started, ended = r.uniform(0, WINDOW_S / 2), r.uniform(0, WINDOW_S)
        steps = [(started, "stay")] if self.stays else [(started, "start"), (ended, "destroy")]
        self._steps = sorted([*self._steps, *((s, what, []) for s, what in steps)])

    def __str__(self) -> str:
        spec = self.spec
        steps = ", ".join(f"{' '.join([w, *on])} at {s:.3f} s" for s, w, on in self._steps)
        return f"{spec.name}: {spec.memory_bytes // MIB} MiB, {self.strategy}; {steps}"

    @property
    def happened(self) -> Counter[str]:
        return Counter(f"{' '.join([what, *on])} under xl" for _s, what, on in self._steps)

    def run(self) -> str:
        """Run the trial.  Returns where the guest was in the end.  Raises :class:`LostError`."""
        world, spec = self._world, self.spec
        with world.source.create_guest(spec.to_bytes()) as guest:
            wait_for_steps(guest, 50)
        with (
            TemporaryDirectory() as folder,
            contextlib.closing(Xl(world, spec, Path(folder))) as xl,
        ):
            xl.save.environment["XEN_POSTCOPY_STRATEGY"] = self.strategy
            if xl.run() != ((0, 0), (0, 0)):
                raise LostError(f"the helpers failed: {xl.save.log}{xl.restore.log}")
            port = world.ask("sender", command="status")["port"]
            self._id, began = xl.line("sender")["id"], time.monotonic()
            for at, what, on in self._steps:
                time.sleep(max(0.0, began + at - time.monotonic()))
                self._do(xl, what, on, port)
            self._wait(xl)
            where = self._verify(xl)
        world.check()
        return where

    def _do(self, xl: Xl, what: str, on: list[str], port: int) -> None:
        match what:
            case "start":
                xl.destination.start()
            case "destroy":
                xl.source.destroy()
            case "stay":
                with contextlib.suppress(XenError):  # the sender has resumed the guest
                    xl.stay()
            case "kill":
                for which in on:
                    self._world.check_alive_of(which)
                    self._world.stop(which, signal.SIGKILL)
                time.sleep(self._random.choice([0, 0, 0.1, 0.3]))
                if "sender" in on:
                    start_sender(self._world, port)
                if "receiver" in on:
                    start_receiver(self._world, self._world.port)

    def _wait(self, xl: Xl) -> None:
        """Wait until nothing of the migration is left to do."""
        deadline = time.monotonic() + END_S
        while self._left(xl):
            if time.monotonic() > deadline:
                raise LostError(
                    f"it does not end, {self._left(xl)}: {xl.line('sender')}, {xl.line('receiver')}"
                )
            time.sleep(0.05)

    def _left(self, xl: Xl) -> str:
        world = self._world
        for which in ("sender", "receiver"):
            # The end of a guest that stays is kept for a receiver that may dial.
            if not self.stays and (world.state(which) / f"{self._id}.json").exists():
                return f"the {which} has a journal"
        if sockets_of_keepers(world) or keepers(world.processes["sender"].popen.pid):
            return "a keeper is left"
        if not self.stays and len(xl.destination.paged_out()):
            return "pages are missing"
        if self.stays and xl.source.state() is not DomainState.RUNNING:
            return "the guest is not resumed"
        return ""

    def _verify(self, xl: Xl) -> str:
        if not self.stays:
            verification, _view = verify_migrated(self._world, self.spec)
            if verification.problems:
                raise LostError("; ".join(verification.problems))
            destroy(self._world.destination, self.spec.name)
            return "destination"
        wait_for_steps(xl.source, 50)
        errors = [vcpu["errors"] for vcpu in xl.source.report()["vcpu"]]
        others = [i.name for i in self._world.destination.domains() if i.name == self.spec.name]
        if any(errors) or others:
            raise LostError(f"it stays with {errors} errors, and there is {others}")
        destroy(self._world.source, self.spec.name)
        return "source"
