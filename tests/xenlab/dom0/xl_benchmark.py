# SPDX-License-Identifier: GPL-2.0-or-later
"""``xl migrate`` with ``hybrid`` against Xen's own: for a guest that is nearly idle, for one that
writes 1,000 pages a second, and for one that dirties most of its memory as fast as it can.

Run in dom0 (``make xenlab-xl-bench``), alternately in the same boot.  Two times of each migration
are printed.  One is the longest time without a heartbeat, as dom0 sees it on the guest's console.
The other is the part of it that helpers and daemons cause, from libxl's answer to ``suspend`` until
the restoring helper sends ``complete``. libxl causes the rest: it suspends the guest, and finishes
the new domain.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.control.client import ControlClient
from migrate.xl import stock
from tests.xenlab.dom0.daemons import daemons, write_helper
from tests.xenlab.dom0.guests import Guest, guest, xl
from tests.xenlab.dom0.waiting import until

NAME = "bench"
TAP = """#!{python}
# A helper, and a tap on its messages to libxl and the answers: "time mode number" of each.
import os, struct, subprocess, sys, threading, time
command = [{helper!r}, *sys.argv[1:]]
child = subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
)
def note(what):
    with open({log!r}, "a") as log:
        print(time.monotonic(), sys.argv[1], what, file=log)
def answers():
    while data := os.read(0, 4):
        note("answer")
        os.write(child.stdin.fileno(), data)
threading.Thread(target=answers, daemon=True).start()
while head := child.stdout.read(2):
    body = child.stdout.read(struct.unpack("=H", head)[0])
    number = struct.unpack_from("=H", body)[0]
    if number not in (1, 2):
        note(number)
    os.write(1, head + body)
os._exit(child.wait())
"""
SUSPEND, COMPLETE = "3", "10"
Kinds = dict[str, tuple[tuple[Path, Path], dict[str, str]]]
"""For each kind of migration: the helper and its log, and the environment of xl."""


@dataclass
class Measured:
    gap_s: float
    ours_s: float
    total_s: float
    before_s: float
    """The part of the gap before libxl's answer to ``suspend``."""
    after_s: float
    """The part of the gap after the restoring helper's ``complete``."""


class Console:
    """The times of the heartbeats, from the console that the guest has at the moment."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    _names = (NAME, f"{NAME}--incoming")

    def _watch(self) -> None:
        sizes: dict[str, int] = {}
        while not self._stop.wait(0.005):
            for name in self._names:
                path = Path(f"/var/log/xen/guest-{name}.log")
                size = path.stat().st_size if path.exists() else 0
                if size != sizes.get(name, size):
                    self.times.append(time.monotonic())
                sizes[name] = size

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        yield
        self._stop.set()
        self._thread.join()

    def longest_gap(self) -> tuple[float, float]:
        """Return when the longest time without a heartbeat began and ended."""
        gaps = zip(self.times, self.times[1:], strict=False)
        return max(gaps, key=lambda gap: gap[1] - gap[0])


def tap(directory: Path, name: str, helper: str) -> tuple[Path, Path]:
    program, log = directory / f"tap-{name}", directory / f"tap-{name}.log"
    program.write_text(TAP.format(python=sys.executable, helper=helper, log=str(log)))
    program.chmod(0o755)
    return program, log


def our_part(log: Path) -> tuple[float, float]:
    """Return the times of the answer to suspend and of the restoring side's complete, for the last
    migration.
    """
    lines = [line.split() for line in log.read_text().splitlines()]
    saving = [(float(at), what) for at, mode, what in lines if mode == "--save-domain"]
    asked = max(i for i, (_at, what) in enumerate(saving) if what == SUSPEND)
    suspended = next(at for at, what in saving[asked:] if what == "answer")
    complete = [
        float(at) for at, mode, what in lines if mode == "--restore-domain" and what == COMPLETE
    ]
    return suspended, complete[-1]


def migrate(helper: Path, log: Path, environment: dict[str, str]) -> Measured:
    log.unlink(missing_ok=True)
    console = Console()
    with console.watched():
        time.sleep(2)
        began = time.monotonic()
        done = subprocess.run(
            ["xl", "migrate", "-s", "", NAME, "xl migrate-receive"], check=False,
            capture_output=True, text=True,
            env={**os.environ, "LIBXL_SAVE_HELPER": str(helper), **environment},
        )  # fmt: skip
        total = time.monotonic() - began
        if done.returncode:
            raise SystemExit(done.stderr)
        beats = len(console.times)
        until(lambda: len(console.times) > beats + 20, "the guest has no heartbeat")
    (began, ended), (suspended, complete) = console.longest_gap(), our_part(log)
    return Measured(ended - began, complete - suspended, total, suspended - began, ended - complete)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rate", type=int, action="append", help="steps a second, 0: all it can; several times"
    )
    options = parser.parse_args()
    directory = Path("/tmp/xl-benchmark")
    directory.mkdir()
    helper = write_helper(directory)
    sockets = {
        "XEN_POSTCOPY_SENDER": str(directory / "sender"),
        "XEN_POSTCOPY_RECEIVER": str(directory / "receiver"),
    }
    kinds = {
        "stock": (tap(directory, "stock", stock.program()), {}),
        "hybrid": (tap(directory, "ours", str(helper)), {**sockets, "XEN_POSTCOPY": "require"}),
    }
    with daemons(directory):
        for rate in options.rate or (10, 1000, 0):
            print(f"--- {f'{rate} steps a second' if rate else 'as fast as it can'} ---")
            show(compare(options.memory, rate, kinds, options.rounds, directory))


def compare(
    memory_mib: int, rate: int, kinds: Kinds, rounds: int, directory: Path
) -> dict[str, list[Measured]]:
    """Migrate one guest alternately by each kind.  ``rate``: its steps a second, 0: no limit."""
    found: dict[str, list[Measured]] = {kind: [] for kind in kinds}
    does = f"beat=10 words=8 pages={(memory_mib - 64) * 200} rate={rate}"
    with guest(NAME, memory_mib=memory_mib, options=does) as made:
        made.wait_for_heartbeats(50, timeout_s=300)
        for number in range(rounds):
            for kind, ((program, log), environment) in kinds.items():
                measured = migrate(program, log, environment)
                found[kind].append(measured)
                print(f"round {number + 1}, {kind}: {measured}", flush=True)
                if kind != "stock":
                    until(lambda: phase(directory) == "completed", "pages are missing still")
                    print(expected(directory), flush=True)
                time.sleep(3)
        errors = [Guest(name, 0).heartbeats() for name in (NAME, f"{NAME}--incoming")]
        assert all(beat.errors == 0 for beats in errors for beat in beats)
        print(f"the guest's errors: 0; domid now {xl('domid', NAME).strip()}")
    return found


def show(found: dict[str, list[Measured]]) -> None:
    """Print the medians and their ratios."""
    for part, text in (
        ("ours_s", "suspended to restored"),
        ("gap_s", "longest without a heartbeat"),
        ("total_s", "xl migrate"),
    ):
        ours, theirs = (
            statistics.median(getattr(m, part) for m in found[kind]) for kind in ("hybrid", "stock")
        )
        print(f"{text:30} ratio {ours / theirs:5.2f}   ours {ours:6.2f} s   stock {theirs:6.2f} s")


def expected(directory: Path) -> str:
    """Return how the last migration ended its precopy, and what the policy had compared."""
    with ControlClient(directory / "sender") as client:
        last = client.call(command="list")["migrations"][-1]["id"]
    with ControlClient(directory / "sender") as client:
        details = client.call(command="show", migration=last)["details"]
    parts = {key: details[key] for key in ("precopy", "switchover", "expected", "fault_latency_us")}
    parts["fault_latency_us"].pop("histogram", None)
    return f"    {parts}"


def phase(directory: Path) -> str:
    with ControlClient(directory / "sender") as client:
        return str(client.call(command="list")["migrations"][-1]["phase"])


if __name__ == "__main__":
    main()
