# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules of each source file: its licence line, its white space, and its size."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from tests.tree.listing import SOURCES, TREE, files

TAG, LICENCE = "SPDX-License-Identifier", "GPL-2.0-or-later"


def is_source(path: Path) -> bool:
    """Whether the file is source text, by its name, or by its first bytes if it has no suffix."""
    if path.suffix in SOURCES or path.name == "Makefile":
        return True
    with (TREE / path).open("rb") as file:
        return file.read(2) == b"#!"


# ---- licences ----
def test_every_source_file_names_its_licence() -> None:
    """The line is one of the first, so that a copy of one file alone has the terms."""
    sources = [path for path in files() if is_source(path)]
    assert len(sources) > 150  # the list is not empty for another reason
    without = [
        str(path)
        for path in sources
        if f"{TAG}: {LICENCE}"
        not in "".join((TREE / path).read_text().splitlines(keepends=True)[:3])
    ]
    assert without == [], f"Begin these files with `{TAG}: {LICENCE}` in a comment."


def test_the_licence_of_all_other_files_is_stated_at_the_top() -> None:
    (annotation,) = tomllib.loads((TREE / "REUSE.toml").read_text())["annotations"]
    assert annotation["path"] == "**"
    assert annotation[TAG] == LICENCE
    assert "GNU GENERAL PUBLIC LICENSE" in (TREE / "LICENSE").read_text()


# ---- white space ----
NOT_TEXT = ("tests/campaigns/fuzz/corpus/*", "tests/campaigns/fuzz/native/corpus/*/*", "*.patch")
"""The files in which white space has a meaning."""
MOST_COLUMNS = 100
PROSE_TOO_LONG = re.compile(rf"(?=.{{{MOST_COLUMNS + 1}}})(?!\||    )(?:[-*] )?+\S+ +\S")
"""A line that could be broken: no table, no code, more than one word."""
CODE = {".c", ".h", ".pml", ".sh", ".service", ".socket", ".target", ".toml"}
"""The files whose lines are measured here.  ruff measures those of Python."""


def test_lines_end_where_their_text_ends() -> None:
    """The last line ends with a newline, and nothing follows."""
    wrong = []
    for path in files():
        if any(path.match(pattern) for pattern in NOT_TEXT):
            continue
        text = (TREE / path).read_text()
        wrong += [
            f"{path}:{n}" for n, line in enumerate(text.split("\n"), 1) if line != line.rstrip()
        ]
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            wrong.append(f"{path}: its end")
    assert wrong == [], "Remove white space at the end of lines; end a file with one newline."


def test_documents_are_wrapped() -> None:
    wrong = [
        f"{path}:{n}"
        for path in files()
        if path.suffix == ".md" or path.parent.name == "man"
        for n, line in enumerate((TREE / path).read_text().splitlines(), 1)
        if PROSE_TOO_LONG.match(line)
    ]
    assert wrong == [], f"Wrap these lines at {MOST_COLUMNS} columns."


def test_lines_of_code_are_short_enough() -> None:
    """ruff checks the lines of Python, by the same limit."""
    settings = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["ruff"]
    assert settings["line-length"] == settings["lint"]["pycodestyle"]["max-line-length"]
    assert settings["line-length"] == MOST_COLUMNS
    measured = [path for path in files() if path.suffix in CODE]
    assert len(measured) > 50
    wrong = [
        f"{path}:{n}"
        for path in measured
        for n, line in enumerate((TREE / path).read_text().splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]
    assert wrong == [], f"Break these lines at {MOST_COLUMNS} columns."


# ---- how long a file and a function may be ----
MOST_LINES = 500
MOST_LINES_OF_A_FUNCTION = 60
LONG = {"tests/conformance/test_conformance.py"}
"""One suite for every hypervisor, which is read beside the contract (xenbackend/contract.py)."""


def code() -> dict[str, str]:
    """Return the text of each file of Python or C."""
    found = [path for path in files() if path.suffix in (".py", ".c", ".h")]
    return {str(path): (TREE / path).read_text() for path in found}


def functions(path: str, text: str) -> dict[str, int]:
    """Return the number of lines of each function."""
    if path.endswith(".py"):
        nodes = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        return {
            f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
            for node in nodes
        }
    # In C, a function's first and last bracket are alone at the margin.
    found, start, before = {}, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line == "{":
            start, name = number, before
        elif line == "}" and start:
            found[f"{path}:{start} {name}"] = number - start + 2
            start = 0
        before = line
    return found


def test_files_are_short_enough_to_be_read() -> None:
    lines = {path: text.count("\n") for path, text in code().items()}
    assert len(lines) > 450
    too_long = {path for path, n in lines.items() if n > MOST_LINES}
    assert too_long == LONG, f"Cut these files by subject: at most {MOST_LINES} lines."


def test_functions_are_short_enough_to_be_read() -> None:
    lines = {name: n for path, text in code().items() for name, n in functions(path, text).items()}
    assert len([name for name in lines if ".c:" in name]) > 300 and len(lines) > 4000
    too_long = {name: n for name, n in lines.items() if n > MOST_LINES_OF_A_FUNCTION}
    assert too_long == {}, f"Cut these functions: at most {MOST_LINES_OF_A_FUNCTION} lines."
