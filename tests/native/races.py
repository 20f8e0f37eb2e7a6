# SPDX-License-Identifier: GPL-2.0-or-later
"""The native modules' threads under ThreadSanitizer: ``make races``.

ThreadSanitizer needs all code that takes locks to be compiled for it.  If the interpreter is not,
it seems to have a race whenever its lock changes hands.  So each ``races/*.c`` is a program of its
own, compiled as a whole.  Any reported race makes the check fail, and so does an exit status other
than 0.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.campaigns.fuzz.native.build import write_kinds
from tests.native.c_files import BUILD, INCLUDE, run_all

SIMULATED_FILES = ("hypercalls", "program", "pause", "paging", "balloon", "vcpu")
SIMULATED = [f"xenbackend/simulated/native/{name}.c" for name in SIMULATED_FILES]
FAST_PATH_FILES = ("lock", "checksum", "frame", "lane", "source", "destination")
FAST_PATH = [f"migrate/fastpath/native/{name}.c" for name in FAST_PATH_FILES]
PROGRAMS = {
    "migration": [
        "migrate/lanes/native/bulk.c",
        *FAST_PATH,
        "xenbackend/native/ring.c",
        *SIMULATED,
    ],
    "records": ["-lssl", "-lcrypto"],  # the program includes the file itself
    "held": ["xenbackend/libxenctrl/native/one_page.c", "xenbackend/native/ring.c"],
}
FLAGS = ["-g", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", "-fsanitize=thread"]
ROUNDS = 5
TIMEOUT_S = "120"
"""The limit for a program that waits for ever; a round takes a second or two."""


def main() -> None:
    write_kinds()
    folder = BUILD / "races"
    folder.mkdir(parents=True, exist_ok=True)
    compiled = run_all(
        [
            "clang",
            *FLAGS,
            *INCLUDE,
            f"tests/native/races/{name}.c",
            *sources,
            "-o",
            str(folder / name),
        ]
        for name, sources in PROGRAMS.items()
    )
    if compiled:
        sys.exit("races: the programs do not compile")
    command = ["timeout", TIMEOUT_S]
    # If addresses are random over a wide range, the sanitizer finds no place for its own memory.
    if subprocess.run(["setarch", "-R", "true"], check=False, capture_output=True).returncode == 0:
        command += ["setarch", "-R"]
    os.environ["TSAN_OPTIONS"] = "exitcode=66:history_size=4"
    programs = [str(folder / name) for name in PROGRAMS] * ROUNDS
    failed = run_all([*command, program] for program in programs)
    if failed:
        sys.exit(f"races: {failed} of {len(programs)} runs have failed")
    print(f"races: none in {ROUNDS} runs each of {', '.join(PROGRAMS)}")


if __name__ == "__main__":
    main()
