# SPDX-License-Identifier: GPL-2.0-or-later
"""Spin searches every state of the model of the handover; each mutation of the model must make it
fail.

``python -m tests.campaigns.model.check``, or ``make model``.  Needs Debian's package spin, and gcc.
A mutation is searched until one property notices the mutation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MODEL = Path(__file__).with_name("session.pml")
NO_CLAIM = "assertions, dead ends"
PROPERTIES = (NO_CLAIM, "one_owner", "no_page_is_lost")
DEPTH = 1_000_000


class ModelError(Exception):
    """A program failed, or a search did not finish.  The text has the output of the program."""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, check=False, capture_output=True, text=True, timeout=1200
    )
    if done.returncode:
        raise ModelError(
            f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


class Verifier:
    """The model, or one mutation of the model, as spin's programs.  ``directory`` is empty and used
    by this verifier alone.
    """

    def __init__(self, directory: Path, mutation: int = 0):
        self._directory = directory
        (directory / MODEL.name).write_text(MODEL.read_text())
        run("spin", "-a", f"-DMUTATION={mutation}", MODEL.name, cwd=directory)

    def _program(self, property_: str) -> str:
        """Compile the model once for the claims together, and once without them, because only then
        spin searches for dead ends.
        """
        name, options = ("pan", ("-DNOCLAIM",)) if property_ == NO_CLAIM else ("pan-claims", ())
        if not (self._directory / name).exists():
            flags = ("-O2", "-w", "-DSAFETY", "-DMEMLIM=3000", "-DCOLLAPSE", *options)
            run("gcc", *flags, "-o", name, "pan.c", cwd=self._directory)
        return f"./{name}"

    def search(self, property_: str) -> tuple[int, int, str]:
        """Return the errors, the states, and what spin's program printed.  Raises
        :class:`ModelError`.
        """
        claim = () if property_ == NO_CLAIM else ("-N", property_)
        pan = subprocess.run(
            [self._program(property_), f"-m{DEPTH}", "-E", *claim],
            cwd=self._directory, check=False, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        output = pan.stdout + pan.stderr
        errors, states = (
            re.search(r"errors: (\d+)", output),
            re.search(r"(\d+) states, stored", output),
        )
        cut_short = "max search depth too small" in output or "memory" in output.split("errors:")[0]
        if errors is None or states is None or cut_short:
            raise ModelError(f"the search did not come to its end:\n{output}")
        return int(errors[1]), int(states[1]), output

    def trail(self) -> str:
        """Return the steps that lead to the error of the last search without a claim."""
        return run("./pan", "-r", cwd=self._directory)


def check_model(directory: Path) -> list[str]:
    """Return the properties that do not hold."""
    failed = []
    model = Verifier(directory)
    for property_ in PROPERTIES:
        errors, states, output = model.search(property_)
        print(f"{property_}: {states} states, {errors} errors", flush=True)
        if errors:
            failed.append(property_)
            print(output, model.trail() if property_ == NO_CLAIM else "", sep="\n")
    return failed


def check_mutation(directory: Path, name: str, number: int) -> list[str]:
    """Return the mutation's name if no property notices the mutation."""
    directory.mkdir()
    mutated = Verifier(directory, number)
    noticed = next((property_ for property_ in PROPERTIES if mutated.search(property_)[0]), None)
    print(
        f"mutation {name.lower()}: {f'noticed by {noticed}' if noticed else 'NOT NOTICED'}",
        flush=True,
    )
    return [] if noticed else [name]


def main() -> None:
    mutations = re.findall(r"#define ([A-Z_]+) +(\d+)\n", MODEL.read_text())
    mutations = [
        (name, number) for name, number in mutations if name not in ("CUTS", "KILLS", "MUTATION")
    ]
    try:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = check_model(Path(folder))
            checks = [
                pool.submit(check_mutation, Path(folder, name), name, int(n))
                for name, n in mutations
            ]
            failed += [name for check in checks for name in check.result()]
    except ModelError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
