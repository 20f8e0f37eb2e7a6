# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiler warnings and a static analyser over the C files: ``make warnings``.

gcc and clang compile every C file, and clang's analyser reads all files except those of the checks.
Any finding makes the check fail.  A comment ``/* analyser: REASON */`` suppresses what the analyser
finds in the next line.

``-Werror`` is set only here, because an installation must not fail at the new warnings of a newer
compiler.
"""

from __future__ import annotations

import re
import subprocess
import sys

from tests.campaigns.fuzz.native.build import write_kinds
from tests.native.c_files import FLAGS, INCLUDE, ROOT, c_files, in_parallel, run_all

WARNINGS = [
    "-Werror",
    "-Wshadow",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wold-style-definition",
    "-Wredundant-decls",
    "-Wvla",
    "-Wpointer-arith",
    "-Wundef",
    "-Wwrite-strings",
    "-Wformat=2",
    "-Wimplicit-fallthrough",
    "-Wnull-dereference",
]
"""The warnings beyond those of an installation.  ``-Wcast-qual`` is left out, because libxenctrl
and iovec have no const.
"""

CHECKERS = [
    "alpha.core.BoolAssignment",
    "alpha.core.IdenticalExpr",
    "alpha.core.PointerSub",
    "alpha.deadcode.UnreachableCode",
    "alpha.security.ArrayBoundV2",
    "alpha.security.MallocOverflow",
    "alpha.security.MmapWriteExec",
    "alpha.security.ReturnPtrRange",
    "alpha.unix.cstring.OutOfBounds",
    "nullability",
    "optin.portability.UnixAPI",
    "security.FloatLoopCounter",
    "security.insecureAPI.UncheckedReturn",
]
"""The checkers beyond the analyser's defaults, of those that clang 14 and clang 19 both have."""

FINDING = re.compile(r"^([^\s:]+):(\d+):\d+: (?:warning|error): .*$", re.MULTILINE)
SUPPRESSION = "/* analyser: "


def analyse(path: str) -> list[str]:
    """Return what the analyser finds in a file, without suppressed findings."""
    command = ["clang", "--analyze", "--analyzer-output", "text", *FLAGS, *INCLUDE]
    command += ["-Xclang", f"-analyzer-checker={','.join(CHECKERS)}", path]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        return [done.stderr]

    def is_suppressed(finding: re.Match[str]) -> bool:
        lines = (ROOT / finding[1]).read_text().splitlines()
        return lines[int(finding[2]) - 2].strip().startswith(SUPPRESSION)

    if any(not is_suppressed(finding) for finding in FINDING.finditer(done.stderr)):
        return [done.stderr]
    return []


def main() -> None:
    write_kinds()
    files = [str(path) for path in c_files()]
    failed = run_all(
        [compiler, "-c", *FLAGS, *WARNINGS, *INCLUDE, "-o", "/dev/null", path]
        for path in files
        for compiler in ("gcc", "clang")
    )
    checks = ("tests/campaigns/fuzz/", "tests/native/")
    for findings in in_parallel(analyse, [path for path in files if not path.startswith(checks)]):
        failed += len(findings)
        print(*findings, sep="\n", end="")
    if failed:
        sys.exit(f"warnings: {failed} checks of C files have findings")
    print(f"warnings: none in {len(files)} C files")


if __name__ == "__main__":
    main()
