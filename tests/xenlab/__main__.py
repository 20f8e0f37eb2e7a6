# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.xenlab [--hypervisor KIND] COMMAND...``: run a command in the dom0 of a real
Xen.

The command runs in a copy of the working tree, which is read-only there.  Files that the command
leaves in the folder $LAB_OUT are brought back, with its output and exit status, the consoles of
guests, and the console of Xen and dom0.

    python -m tests.xenlab xl info
    python -m tests.xenlab --hypervisor debian --keep /tmp/lab -- xl list
    python -m tests.xenlab --build
    python -m tests.xenlab --tests
    python -m tests.xenlab --tests --gate --hypervisor paging --junit results
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.xenlab import machine, parts
from tests.xenlab.cache import LabError, directory, say

PYTEST = ("-o", "timeout=1800", "--durations=5", "-rA", "--show-capture=no")
CONFORMANCE, SCENARIOS = "tests/conformance/test_conformance.py", "tests/xenlab/dom0"


@dataclass(frozen=True)
class Shard:
    """The tests that one start of a machine runs; each test itself has the shards to which it
    belongs.
    """

    kind: str
    paths: tuple[str, ...] = (SCENARIOS,)
    name: str = ""
    in_gate: bool = True
    """Whether any of its tests is in the gate."""
    seconds: float = 300.0
    """How long it takes, if there is no record of an earlier run."""

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}" if self.name else self.kind


def _scenarios(*modules: str) -> tuple[str, ...]:
    return tuple(f"{SCENARIOS}/{module}.py" for module in modules)


def _shards(kind: str) -> Iterator[Shard]:
    """Yield the shards of a hypervisor with memory paging.  There are several, because a machine
    that gets stuck begins its shard again.
    """
    yield Shard(kind, (CONFORMANCE,), "conformance", seconds=400)
    yield Shard(kind, _scenarios("test_xl", "test_hypervisors", "test_vcpus"), "xl", seconds=400)
    yield Shard(kind, _scenarios("test_administrators"), "administrators", in_gate=False)
    yield Shard(kind, _scenarios("test_disks", "test_networks"), "devices", in_gate=False)


SHARDS = (
    *_shards("populate-evicted"),
    *_shards("paging"),
    Shard("paging", _scenarios("test_hvm"), "hvm", in_gate=False, seconds=900),
    Shard("debian", seconds=150),
    Shard("debian-13", in_gate=False),
    Shard(parts.HOSTS, _scenarios("test_package", "test_two_hosts"), in_gate=False, seconds=1900),
    Shard(parts.HOSTS, _scenarios("test_virsh"), "libvirt", in_gate=False, seconds=2100),
    Shard(parts.RELEASES, in_gate=False, seconds=900),
)


def run_tests(kinds: Sequence[str], *, gate: bool, junit: Path | None, timeout_s: float) -> int:
    """Run the tests of these machines, two machines at a time.  Returns the exit status.

    The shard that took longest in the last run starts first.  ``junit``: a folder for pytest's
    XML of each shard, and for the seconds that each took.
    """
    shards = chosen(kinds, gate=gate)
    needed = list(dict.fromkeys(shard.kind for shard in shards))
    parts.build(needed)
    machine.save_all(needed)
    memory = directory() / ("seconds-gate.json" if gate else "seconds.json")
    seconds: dict[str, float] = json.loads(memory.read_text()) if memory.exists() else {}
    shards.sort(key=lambda shard: -seconds.get(str(shard), shard.seconds))
    failed = []
    for shard, done in each(shards, lambda shard: _run_shard(shard, gate, timeout_s)):
        try:
            result = done.result()
        except LabError as error:
            say(f"{shard}: {error}")
            failed.append(str(shard))
            if junit:
                write_junit(junit, shard, None, str(error))
            continue
        print(f"---- {shard} ----\n{result.output}", flush=True)
        seconds[str(shard)] = round(result.seconds, 1)
        if result.status:
            failed.append(str(shard))
        if junit:
            write_junit(junit, shard, result, f"exit status {result.status}")
    memory.write_text(json.dumps(seconds))
    say(
        f"tests failed on: {', '.join(failed)}"
        if failed
        else "all tests passed on every hypervisor"
    )
    return int(bool(failed))


def chosen(kinds: Sequence[str], *, gate: bool) -> list[Shard]:
    """Return the shards of these machines; with ``gate`` those that have tests of the gate."""
    return [shard for shard in SHARDS if shard.kind in kinds and (shard.in_gate or not gate)]


def each(
    shards: Sequence[Shard], run: Callable[[Shard], machine.Result]
) -> Iterator[tuple[Shard, Future[machine.Result]]]:
    """Run each shard, and yield the shard with its result as soon as it is done.  A pair of hosts
    is two machines, so pairs run alone, and first.
    """
    pairs = [shard for shard in shards if len(parts.KINDS[shard.kind]) > 1]
    others = [shard for shard in shards if shard not in pairs]
    for group, at_once in ((pairs, 1), (others, machine.AT_ONCE)):
        with ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(run, shard): shard for shard in group}
            for done in as_completed(running):
                yield running[done], done


def _run_shard(shard: Shard, gate: bool, timeout_s: float) -> machine.Result:
    options = ("-m", "gate") if gate else ()
    if CONFORMANCE in shard.paths:  # the conftest.py of the other folder chooses tests
        options = ("-p", f"{SCENARIOS}.conftest".replace("/", "."), *options)
    command = [*PYTEST, *options, "--junit-xml=$LAB_OUT/junit.xml", *shard.paths]
    return machine.boot(shard.kind, command, timeout_s=timeout_s, live=False)


def write_junit(folder: Path, shard: Shard, result: machine.Result | None, problem: str) -> None:
    """Write pytest's XML, or an XML with an error if the machine has not ended by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    to = folder / f"xenlab-{shard}.xml"
    if result and (result.out / "junit.xml").exists():
        shutil.copy(result.out / "junit.xml", to)
    else:
        suite = ElementTree.Element("testsuite", name=str(shard), tests="1", errors="1")
        case = ElementTree.SubElement(
            suite, "testcase", classname="tests.xenlab", name=str(shard), time="0"
        )
        ElementTree.SubElement(case, "error", message=problem.splitlines()[0]).text = problem
        ElementTree.ElementTree(suite).write(to, encoding="unicode")
    took = folder / "xenlab.json"
    figures = json.loads(took.read_text()) if took.exists() else {}
    if result:
        ready_s = round(result.ready_s, 1)
        figures[str(shard)] = {
            "ready_s": ready_s,
            "seconds": round(result.seconds, 1),
            "status": result.status,
        }
    took.write_text(json.dumps(figures, indent=1) + "\n")


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.xenlab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--hypervisor", choices=list(parts.KINDS), action="append",
        help=f"where to run (default: {parts.HYPERVISORS[0]}; of the tests: all; may be given "
             "again for them)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=7200.0, help="seconds for one machine (default 7200)"
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=machine.MEMORY_MIB,
        help="MiB of one machine (default %(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help=f"folder for results (default: a new one under {directory()}/runs)",
    )
    parser.add_argument(
        "--build", action="store_true", help="build every part, save every machine, run nothing"
    )
    parser.add_argument(
        "--tests", action="store_true", help="run the lab's tests on each hypervisor"
    )
    parser.add_argument(
        "--gate", action="store_true", help="of the tests those that every change must pass"
    )
    parser.add_argument("--junit", type=Path, help="folder for the tests' results as JUnit XML")
    parser.add_argument(
        "command", nargs="*", help="a shell command; put -- before options of its own"
    )
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    kinds = options.hypervisor or list(parts.KINDS)
    try:
        if options.build:
            parts.build(kinds)
            machine.save_all(kinds)
            return
        if options.tests:
            sys.exit(
                run_tests(kinds, gate=options.gate, junit=options.junit, timeout_s=options.timeout)
            )
        if not options.command:
            parser.error("a command, --build or --tests")
        words = options.command
        result = machine.boot(
            kinds[0],
            words[3:] if words[:3] == ["python3", "-m", "pytest"] else " ".join(words),
            timeout_s=options.timeout,
            keep=options.keep,
            memory_mib=options.memory,
        )
    except LabError as error:
        sys.exit(f"xenlab: {error}")
    sys.exit(result.status)


if __name__ == "__main__":
    main()
