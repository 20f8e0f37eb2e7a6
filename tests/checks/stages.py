# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks of a change, as stages: each one a target of the Makefile, with the resources that it
needs.

The two tiers are lists of stages.  A stage that exists in both tiers does more in ``everything``:
more trials, more machines, a longer search.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.xenlab.machine import AT_ONCE
from tests.xenlab.parts import HOSTS, KINDS, RELEASES


@dataclass(frozen=True)
class Stage:
    """One command, which passes if its exit status is 0."""

    name: str
    subject: str
    """What the stage checks, for ``--list``."""
    command: tuple[str, ...]
    """Its output goes to a log.  ``JUNIT`` names a folder for the JUnit XML of its tests."""
    limit_s: float
    """A stage that takes longer has failed, and is killed with all that it started."""
    cores: int = 1
    """How many cores the stage uses; a stage that uses all cores of the machine runs alone."""
    has_tests: bool = False
    """A stage with tests that runs none has failed."""
    prints_figures: bool = False
    """The record keeps the end of the output."""
    files: tuple[str, ...] = ()
    """The files from which the result follows, together with the tools; empty if it also follows
    from something else, such as the instants at which threads run.
    """
    tools: tuple[str, ...] = ()
    """The commands that show the versions of the tools."""


THOROUGH = "THOROUGH=1"
"""Has a run of the tests take every case of each sweep (``tests/support/thorough.py``)."""
RUN_BY = ("Makefile", ".ci/*", "requirements.lock")
"""The files by which each stage is run."""
ALONE = 99
"""More cores than a machine has, for a stage that measures time, or that uses the whole machine."""


def _make(target: str, *settings: str) -> tuple[str, ...]:
    return ("make", "--no-print-directory", target, *settings)


def _lab(name: str, subject: str, *kinds: str) -> Stage:
    """Return the stage with every test of some of the lab's machines."""
    chosen = " ".join(f"--hypervisor {kind}" for kind in kinds)
    command = _make("xenlab", f"XENLAB={chosen}")
    return Stage(f"xenlab-{name}", subject, command, 14400, cores=AT_ONCE, has_tests=True)


def _test(*settings: str) -> Stage:
    subject = "style, spelling, types, and every test outside the lab"
    return Stage("test", subject, _make("test", *settings), 1800, has_tests=True)


def _sanitize(setting: str) -> Stage:
    return Stage("sanitize", "memory errors in C", _make("sanitize", setting), 1200, has_tests=True)


STOCK = [kind for kind in KINDS if kind not in (HOSTS, RELEASES, "populate-evicted")]
TOOLS = Stage(
    "tools", "Debian packages that the checks need are installed", _make("tools"), 600, cores=ALONE
)
CORE = Stage(
    "coverage-core", "every branch of the sans-IO core is tested", _make("coverage-core"), 600
)
MODEL = Stage("model", "every state of the handover, and each mutation", _make("model"), 1200)
WARNINGS = Stage(
    "warnings",
    "errors in C that a compiler can see",
    _make("warnings"),
    600,
    files=("*.[ch]", "*/native/*.py", "migrate/fastpath/*.py", "migrate/protocol/*.py", *RUN_BY),
    tools=("gcc --version", "clang --version", "dpkg-query -W libc6-dev libssl-dev libxen-dev"),
)
RACES = Stage("races", "data races in C", _make("races"), 900)
BROWSER = Stage("browser", "a report in a real browser", _make("browser"), 900, has_tests=True)
DEMO = Stage("demo", "the demo of the README", _make("demo", "DEMO_MEMORY=256M"), 300)

GATE = (
    TOOLS,
    Stage(
        "xenlab",
        "a real Xen: conformance, eviction, xl",
        _make("xenlab", "XENLAB=--gate"),
        4000,
        cores=AT_ONCE,
        has_tests=True,
    ),
    _test(),
    Stage("chaos", "faults at random instants", _make("chaos", "CHAOS_TRIALS=30"), 600),
    Stage(
        "model",
        "every state of the handover",
        _make("model", "MODEL=--unmutated"),
        600,
        files=("tests/campaigns/model/*", *RUN_BY),
        tools=("gcc --version", "spin -V"),
    ),
    CORE,
    _sanitize("THOROUGH=0"),
    WARNINGS,
    RACES,
    Stage(
        "fuzz", "what a peer may send and a ring may hold", _make("fuzz", "FUZZ_SECONDS=60"), 300
    ),
    DEMO,
)
EVERYTHING = (
    TOOLS,
    # First, while no other stage runs.
    Stage(
        "bench",
        "figures beside plain C and QEMU",
        _make("bench"),
        7200,
        cores=ALONE,
        prints_figures=True,
    ),
    # Also alone, because this stage starves any other of the CPU.
    Stage(
        "underload",
        "every test on a busy machine",
        _make("underload", THOROUGH),
        7200,
        cores=ALONE,
        has_tests=True,
    ),
    # Alone, because beside other stages a hundred migrations get so little of the CPU that their
    # lanes are given up as silent.
    Stage(
        "many",
        "a hundred migrations at once, a thousand in turn",
        _make("many"),
        1800,
        cores=ALONE,
        prints_figures=True,
    ),
    # Then the longest stages first, so that the cores end together.
    _lab("hosts", "pairs of hosts, of one release and of two", HOSTS, RELEASES),
    _lab("patched", "a real Xen with our patch", "populate-evicted"),
    _lab("stock", "a real Xen without our patch, and Debian's own", *STOCK),
    Stage(
        "fuzz", "what a peer may send and a ring may hold", _make("fuzz", "FUZZ_SECONDS=900"), 3600
    ),
    Stage(
        "chaos",
        "faults at random instants",
        _make("chaos", "CHAOS_TRIALS=500"),
        7200,
        prints_figures=True,
    ),
    # Beside no other stage on two cores, because this stage runs as many processes as the test.
    Stage(
        "coverage",
        "which code all tests together reach",
        _make("coverage", THOROUGH),
        3600,
        cores=AT_ONCE,
        has_tests=True,
        prints_figures=True,
    ),
    _test(THOROUGH),
    Stage(
        "soak",
        "every strategy and workload",
        _make("soak", "SOAK_ROUNDS=2"),
        3600,
        prints_figures=True,
    ),
    Stage("packages", "the Debian package on fresh systems", _make("packages"), 3600),
    Stage("lowest", "the lowest version of each dependency", _make("lowest"), 1800),
    BROWSER,
    Stage("compat", "migrations from and to an earlier release", _make("compat"), 1800),
    Stage(
        "coverage-c",
        "which native code its tests reach",
        _make("coverage-c"),
        1800,
        prints_figures=True,
    ),
    _sanitize(THOROUGH),
    MODEL,
    WARNINGS,
    CORE,
    RACES,
    DEMO,
)
TIERS = {"gate": GATE, "everything": EVERYTHING}
