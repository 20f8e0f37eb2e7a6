# SPDX-License-Identifier: GPL-2.0-or-later
"""Spin searches every state of the models of the handover; each mutation of a model must make that
model fail.

``python -m tests.campaigns.model.check``, or ``make model``; ``--unmutated`` leaves the mutations
out.  Needs Debian's package spin, and gcc.
A mutation is searched until one property notices the mutation.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
MODEL, TOOLSTACK, SHARED = (HERE / f"{name}.pml" for name in ("session", "toolstack", "link"))
NO_CLAIM = "assertions, dead ends"
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


def properties(model: Path) -> list[str]:
    return [NO_CLAIM, *re.findall(r"^ltl (\w+)", model.read_text(), re.MULTILINE)]


def mutations(model: Path) -> list[tuple[str, int]]:
    """Return the names and numbers of a model's mutations."""
    text = model.read_text()
    limits = set(re.findall(r"#ifndef (\w+)", text))
    found = re.findall(r"#define (\w+) +(\d+)\n", text)
    return [(name, int(number)) for name, number in found if name not in limits]


class Verifier:
    """A model, or one mutation of a model, as spin's programs.  ``directory`` is used by this
    verifier alone.
    """

    def __init__(self, directory: Path, model: Path, mutation: int = 0):
        directory.mkdir()
        self._directory = directory
        for source in (model, SHARED):
            (directory / source.name).write_text(source.read_text())
        run("spin", "-a", f"-DMUTATION={mutation}", model.name, cwd=directory)

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


def check_model(directory: Path, model: Path) -> list[str]:
    """Return the properties that do not hold."""
    failed = []
    verifier = Verifier(directory, model)
    for property_ in properties(model):
        errors, states, output = verifier.search(property_)
        name = f"{model.stem}, {property_}"
        print(f"{name}: {states} states, {errors} errors", flush=True)
        if errors:
            failed.append(name)
            print(output, verifier.trail() if property_ == NO_CLAIM else "", sep="\n")
    return failed


def check_mutation(directory: Path, model: Path, mutation: str, number: int) -> list[str]:
    """Return the mutation's name if no property notices the mutation."""
    verifier = Verifier(directory, model, number)
    found = (property_ for property_ in properties(model) if verifier.search(property_)[0])
    noticed = next(found, None)
    name = f"{model.stem}, mutation {mutation.lower()}"
    print(f"{name}: {f'noticed by {noticed}' if noticed else 'NOT NOTICED'}", flush=True)
    return [] if noticed else [name]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.model.check")
    parser.add_argument("--unmutated", action="store_true", help="leave the mutations out")
    mutated = not parser.parse_args().unmutated
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = []
        for model in (MODEL, TOOLSTACK):
            checks.append(pool.submit(check_model, Path(folder, model.stem), model))
            for name, number in mutations(model) if mutated else ():
                directory = Path(folder, f"{model.stem}-{name}")
                checks.append(pool.submit(check_mutation, directory, model, name, number))
        try:
            failed = [name for check in checks for name in check.result()]
        except ModelError as error:
            sys.exit(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
