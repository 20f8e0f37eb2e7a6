# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples of README, documents and man pages, taken from these as they are.

A block of commands is run by a shell, and a block of the configuration is loaded, unless
:data:`ELSEWHERE` names what tries the block.  So an example that is new or was changed is tried.

Two things are not as a reader has them: the blocks run in a folder that has links to the files of
the tree, so that the tree stays as it is; and ``make`` only checks that its targets exist, because
its stages are run by themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.service.config import load
from tests.checks.stages import TIERS
from tests.tree.listing import TREE, files

EXAMPLE_S = 200.0
FLAGS = re.MULTILINE | re.DOTALL
NOT_IN = ("docs/decisions", "CHANGELOG.md")
"""The documents about the past."""
LAB = "tests/xenlab/dom0"
ELSEWHERE = {
    "make deb && apt install ./build/xen-postcopy_*.deb": f"{LAB}/test_package.py::installed",
    "make hypervisor-deb": (
        "tests/unit/test_hypervisor_package.py::"
        "test_the_package_is_installed_beside_the_distribution_s"
    ),
    "LIBXL_SAVE_HELPER=/usr/bin/xen-postcopy-xl-helper xl migrate GUEST HOST": (
        f"{LAB}/test_two_hosts.py::test_xl_migrates_to_another_host_and_back"
    ),
    "xen-postcopy migrate GUEST HOST": (
        f"{LAB}/test_two_hosts.py::test_the_command_line_migrates_to_another_host"
    ),
    "journalctl XEN_POSTCOPY_MIGRATION=": (
        f"{LAB}/test_package.py::"
        "test_xl_migrates_and_a_daemon_that_is_stopped_says_what_it_waits_for"
    ),
    "[Service]\nEnvironment=LIBXL_SAVE_HELPER=": (
        f"{LAB}/test_virsh.py::test_virsh_migrates_by_postcopy"
    ),
    "apt-get build-dep xen": "tests/xenlab/parts.py::hypervisor",
    "make xenlab ": "stage xenlab",
    ".venv/bin/python -m tests.xenlab xl info": "stage xenlab",
    ".venv/bin/python -m tests.campaigns.underload -- ": "stage underload",
    ".venv/bin/python -m pip install pre-commit": "a contributor, with a network",
    "sender                                   receiver": "no commands",
    "web: precopy, round 2, ": "no commands",
    "STRATEGY  TOTAL  DOWNTIME ": "no commands",
    "xen-postcopy estimate GUEST HOST": (
        "tests/system/test_estimate.py::test_an_estimate_migrates_nothing_and_leaves_nothing_on"
    ),
    "xen-postcopy report web -o web.html": (
        "tests/system/test_report.py::"
        "test_a_report_is_made_before_and_after_the_end_and_after_a_restart"
    ),
    "xen-postcopy evacuate --dry-run HOST1 ": (
        "tests/system/test_evacuation.py::test_of_two_destinations_each_takes_what_fits"
    ),
    "7 of 20 guests gone, ": "no commands",
    "xen-postcopy set GUEST ": (
        "tests/system/test_adjusting.py::test_precopy_is_slowed_down_paused_and_resumed"
    ),
    "apt install python3-prometheus-client": "an administrator, with a network",
}
"""The first words of a block, and what runs it."""
OF_THE_SYSTEM = re.compile(r"\b(apt|apt-get|dpkg|systemctl|xl|virsh|update-grub|reboot)\s")
"""Commands that change this system, or need Xen."""


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_configuration(self) -> bool:
        return self.text.startswith("[") and not self.elsewhere

    @property
    def elsewhere(self) -> str | None:
        found = [where for start, where in ELSEWHERE.items() if self.text.startswith(start)]
        return found[0] if found else None


def in_markdown(document: str, text: str) -> Iterator[Block]:
    """Yield the indented blocks.  Those between fences are pictures."""
    text = re.sub(r"^```\n.*?^```$", lambda found: "\n" * found[0].count("\n"), text, flags=FLAGS)
    for found in re.finditer(r"(?<=\n\n)(?:(?: {4,}\S.*)\n)+", text):
        lines = found[0].splitlines()
        yield Block(
            document,
            text.count("\n", 0, found.start()) + 1,
            "".join(f"{line.strip()}\n" for line in lines),
        )


def in_manual(document: str, text: str) -> Iterator[Block]:
    for found in re.finditer(r"^\.(?:EX|RS)\n(.*?)^\.(?:EE|RE)\n", text, flags=FLAGS):
        block = re.sub(r"\\f.|\\(?=-)", "", found[1])
        yield Block(document, text.count("\n", 0, found.start()) + 2, block)


def blocks() -> list[Block]:
    found: list[Block] = []
    for path in files():
        if path.suffix == ".md" and not str(path).startswith(NOT_IN):
            found += in_markdown(str(path), (TREE / path).read_text())
        elif path.parent.name == "man":
            found += in_manual(str(path), (TREE / path).read_text())
    return found


HERE = [block for block in blocks() if not block.elsewhere and not block.is_configuration]
SAFE = [block for block in HERE if not OF_THE_SYSTEM.search(block.text)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like the tree.  `.venv` is that of this process."""
    for path in TREE.iterdir():
        if path.name not in (".venv", "build"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    stub = tmp_path / ".stub/make"
    stub.parent.mkdir()
    make = shutil.which("make")
    stub.write_text(f'#!/bin/sh\nexec {make} -C {TREE} --dry-run "$@" >/dev/null\n')
    stub.chmod(0o755)
    return tmp_path


@pytest.fixture
def alone() -> Iterator[None]:
    """The examples listen at fixed ports, so one process at a time runs them."""
    with (Path(tempfile.gettempdir()) / f"xen-postcopy-examples-{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.serial  # a command waits 10 s at most for a daemon that an example has just started
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the examples use .venv")
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("block", SAFE, ids=str)
def test_an_example_runs_as_it_stands(block: Block, folder: Path) -> None:
    path = os.pathsep.join((str(folder / ".stub"), f"{sys.prefix}/bin", os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(TREE)}
    shell = subprocess.Popen(
        ["bash", "-e", "-c", block.text], cwd=folder, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _none = shell.communicate(timeout=EXAMPLE_S)
        assert shell.returncode == 0, f"{block}: {output}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


@pytest.mark.parametrize("block", [block for block in blocks() if block.is_configuration], ids=str)
def test_an_example_of_the_configuration_is_accepted(block: Block, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(block.text)
    assert load(config) != load(None)


def test_no_example_that_runs_here_changes_this_system() -> None:
    changes = [f"{block}: {block.text}" for block in HERE if OF_THE_SYSTEM.search(block.text)]
    assert changes == [], "ELSEWHERE has to name what runs these"


def test_the_examples_are_found() -> None:
    texts = [block.text for block in HERE]
    assert any("simulated-guest verify" in text for text in texts)
    assert any("loopback" in text for text in texts)
    assert {"README.md", "systemd/man/xen-postcopy.8"} <= {block.document for block in HERE}


@pytest.mark.parametrize("start", ELSEWHERE)
def test_what_is_said_to_run_an_example_exists(start: str) -> None:
    assert any(block.text.startswith(start) for block in blocks()), "no document has this example"
    where = ELSEWHERE[start]
    if where.startswith("tests/"):
        path, _, name = where.partition("::")
        assert re.search(rf"^def {name}\(", (TREE / path).read_text(), re.MULTILINE), where
    elif where.startswith("stage "):
        assert where[6:] in {stage.name for tier in TIERS.values() for stage in tier}, where
