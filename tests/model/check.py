# SPDX-License-Identifier: GPL-2.0-or-later
"""Spin goes through every state of the model of the handover; each mutation of the model must make it fail.

``python -m tests.model.check``, or ``make model``.  Needs Debian's package spin, and gcc.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).with_name("session.pml")
PROPERTIES = ("one_owner", "no_page_is_lost")
DEPTH = 1_000_000


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def search(directory: Path, *defines: str, claim: str | None = None) -> tuple[int, int, str]:
    """Errors, states, and what pan said."""
    for left in directory.iterdir():
        left.unlink()
    (directory / MODEL.name).write_text(MODEL.read_text())
    run("spin", "-a", *defines, MODEL.name, cwd=directory)
    options = () if claim else ("-DNOCLAIM",)
    run("gcc", "-O2", "-w", "-DSAFETY", "-DMEMLIM=3000", "-DCOLLAPSE", *options, "-o", "pan", "pan.c", cwd=directory)
    pan = subprocess.run(
        ["./pan", f"-m{DEPTH}", "-E", *(("-N", claim) if claim else ())],
        cwd=directory, check=False, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    said = pan.stdout + pan.stderr
    errors, states = re.search(r"errors: (\d+)", said), re.search(r"(\d+) states, stored", said)
    if errors is None or states is None or "max search depth too small" in said or "memory" in said.split("errors:")[0]:
        sys.exit(f"the search did not come to its end:\n{said}")
    return int(errors[1]), int(states[1]), said


def main() -> None:
    mutations = re.findall(r"#define ([A-Z_]+) +(\d+)\n", MODEL.read_text())
    mutations = [(name, number) for name, number in mutations if name not in ("CUTS", "KILLS", "MUTATION")]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for claim in (None, *PROPERTIES):
            errors, states, said = search(directory, claim=claim)
            what = claim or "assertions, dead ends"
            print(f"{what}: {states} states, {errors} errors", flush=True)
            if errors:
                failed.append(what)
                print(said, run("./pan", "-r", cwd=directory) if claim is None else "", sep="\n")
        for name, number in mutations:
            noticed = []
            for claim in (None, *PROPERTIES):
                errors, _states, _said = search(directory, f"-DMUTATION={number}", claim=claim)
                if errors:
                    noticed.append(claim or "assertions, dead ends")
            print(
                f"mutation {name.lower()}: {'noticed by ' + ', '.join(noticed) if noticed else 'NOT NOTICED'}",
                flush=True,
            )
            if not noticed:
                failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
