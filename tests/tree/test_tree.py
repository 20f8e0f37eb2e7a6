# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules of the tree itself: licence lines, which folder imports which, and documents that name
existing things.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from migrate import __version__
from migrate.cli import COMMANDS, cli
from receiver.ownership import TABLE as RECEIVERS
from sender.ownership import TABLE as SENDERS
from tests.checks.stages import TIERS
from tests.tree.listing import TREE, files

TAG, LICENCE = "SPDX-License-Identifier", "GPL-2.0-or-later"
SOURCES = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".sh",
    ".pml",
    ".toml",
    ".yaml",
    ".yml",
    ".service",
    ".socket",
    ".target",
    ".tmpfiles",
}


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


# ---- which folder imports which ----
FOLDERS = ("migrate", "sender", "receiver", "xenbackend")
GROUND = tuple(
    f"migrate/{name}.py"
    for name in ("__init__", "errors", "units", "options", "outcomes", "tasks", "logs", "streams")
)
LAYERS: list[list[tuple[str, ...]]] = [
    [("xenbackend/",)],
    [GROUND],
    [("migrate/protocol/",)],
    [("migrate/fastpath/",)],
    [("migrate/lanes/",)],
    [("migrate/service/",)],
    [("migrate/control/",)],
    [("migrate/metrics/",)],
    [("migrate/xl/",), ("sender/",), ("receiver/",)],
    [("migrate/cli/", "sender/command.py", "receiver/command.py")],
]
"""The rooms.  Each imports itself, and the rooms of earlier lines.  A file belongs to the last room
that names it.
"""
BACKENDS = ("xenbackend.choose", "xenbackend.libxenctrl", "xenbackend.simulated")
"""The backends.  A daemon is given its backend and names none."""
FOR_XL = {
    "migrate/control/client.py",
    "migrate/errors.py",
    "migrate/outcomes.py",
    "migrate/streams.py",
} | {str(path) for path in files() if path.match("migrate/xl/*.py")}
"""The files that xl's helper loads.  It has to start fast, so they import no installed package."""


def imports(path: Path) -> Iterator[str]:
    """Yield the imported modules, also those that are imported inside functions."""
    for node in ast.walk(ast.parse((TREE / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            # The name may be a module of the package, or a name in the package itself.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours() -> list[tuple[str, Path]]:
    return [
        (path.parts[0], path)
        for path in files()
        if path.suffix == ".py" and path.parts[0] in FOLDERS
    ]


def room(place: str) -> tuple[int, tuple[str, ...]] | None:
    """Return the line of ``LAYERS`` and the room of a file's path; ``None`` for installed
    packages.
    """
    found = [
        (number, room)
        for number, rooms in enumerate(LAYERS)
        for room in rooms
        if place.startswith(room)
    ]
    return found[-1] if found else None


def path_of(module: str) -> str:
    """Return the path of a module, or of a name in a module, relative to the tree."""
    name = module.replace(".", "/")
    return (
        f"{name}.py"
        if (TREE / f"{name}.py").is_file()
        else f"{name}/"
        if (TREE / name).is_dir()
        else name
    )


def test_folders_import_in_one_direction() -> None:
    """A room imports lower rooms, and no room beside it."""
    wrong = []
    for path in (path for _folder, path in ours()):
        own = room(str(path))
        assert own, f"{path} is in no room"
        for module in imports(path):
            assert not module.startswith("tests"), f"{path} imports {module}"
            other = room(path_of(module)) or room(path_of(module.rpartition(".")[0]))
            if other and other[1] != own[1] and other[0] >= own[0]:
                wrong.append(f"{path} imports {module}")
    assert wrong == []


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports, also in functions and for the type checker."""
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for _folder, path in ours()
    }
    graph = {}
    for module, path in modules.items():
        # The imported name is a module, or a name in one.
        names = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = (names & set(modules)) - {module}
    return graph


def in_circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph after modules that import nothing, or that no module imports, were removed
    repeatedly.

    Nothing is left if there is no circle.
    """
    while True:
        imported = set().union(*graph.values())
        outside = {module for module, needs in graph.items() if not needs or module not in imported}
        if not outside:
            return graph
        graph = {
            module: needs - outside for module, needs in graph.items() if module not in outside
        }


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = import_graph()
    assert len(graph) > 90 and sum(map(len, graph.values())) > 300
    assert in_circles({"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {
        "b": {"c"},
        "c": {"b"},
    }
    assert in_circles(graph) == {}, (
        "Move what these modules need of each other into a module below them."
    )


def test_daemons_know_no_backend_by_name() -> None:
    wrong = [
        f"{path} imports {module}"
        for folder, path in ours()
        if folder in ("sender", "receiver")
        for module in imports(path)
        if module.startswith(BACKENDS)
    ]
    assert wrong == []


def test_the_helper_under_xl_imports_nothing_that_is_installed() -> None:
    assert len(FOR_XL) > 8
    wrong = [
        f"{path} imports {module}"
        for path in sorted(FOR_XL)
        for module in imports(Path(path))
        if module.split(".")[0] in {"trio", "numpy", "msgpack", "cffi", "click"}
        or (
            module.startswith("migrate.")
            and not module.startswith(
                (
                    "migrate.control.client",
                    "migrate.errors",
                    "migrate.outcomes",
                    "migrate.streams",
                    "migrate.xl",
                )
            )
        )
    ]
    assert wrong == []


# ---- how long a file and a function may be ----
MOST_LINES = 500
MOST_LINES_OF_A_FUNCTION = 60


def product() -> dict[str, str]:
    """Return the text of each file of Python or C."""
    found = [
        path for path in files() if path.suffix in (".py", ".c", ".h") and path.parts[0] in FOLDERS
    ]
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
    lines = {path: text.count("\n") for path, text in product().items()}
    assert len(lines) > 110
    too_long = {path: n for path, n in lines.items() if n > MOST_LINES}
    assert too_long == {}, f"Cut these files by subject: at most {MOST_LINES} lines."


def test_functions_are_short_enough_to_be_read() -> None:
    lines = {
        name: n for path, text in product().items() for name, n in functions(path, text).items()
    }
    assert len([name for name in lines if ".c:" in name]) > 150 and len(lines) > 1200
    too_long = {name: n for name, n in lines.items() if n > MOST_LINES_OF_A_FUNCTION}
    assert too_long == {}, f"Cut these functions: at most {MOST_LINES_OF_A_FUNCTION} lines."


def test_no_test_imports_a_test() -> None:
    """The helpers that several tests need are in ``tests/support``."""
    tests = [path for path in files() if path.parts[0] == "tests" and path.suffix == ".py"]
    wrong = [
        f"{path} imports {module}"
        for path in tests
        for module in imports(path)
        if re.match(r"tests\..*\btest_\w+\.", module)
    ]
    assert wrong == []


# ---- documents ----
INVARIANTS = TREE / "docs/invariants.md"
CITATION = re.compile(r"[Ii]nvariants?\s+(\d+(?:(?:,|\s+and)\s+\d+)*)")
PLACE = re.compile(r"`([\w/.-]+\.(?:py|c|h|pml))(?:::([\w.]+))?`")
NAMING = ("docs/invariants.md", "docs/threat-model.md", "CONTRIBUTING.md")
"""The documents that name places in the code as ``file`` or ``file::name``."""
CONTRIBUTING = (TREE / "CONTRIBUTING.md").read_text()
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_LINES_OF_A_DECISION = 60


def documents() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


def test_invariants_are_cited_by_numbers_that_there_are() -> None:
    stated = {
        int(number) for number in re.findall(r"^## (\d+)\. ", INVARIANTS.read_text(), re.MULTILINE)
    }
    cited: dict[bool, set[int]] = {False: set(), True: set()}
    for path in files():
        if path.suffix not in (".py", ".c", ".h") or path.name == Path(__file__).name:
            continue
        for numbers in CITATION.findall((TREE / path).read_text()):
            for number in map(int, re.findall(r"\d+", numbers)):
                assert number in stated, f"{path}: invariant {number}"
                cited[path.parts[0] == "tests"].add(number)
    assert stated == set(range(1, 11))
    assert cited == {False: stated, True: stated}, (
        "each is cited by the code that keeps it and by a test that breaks it"
    )


@cache
def definitions(path: Path) -> set[str]:
    """Return the functions and classes, with those that contain them (``Session._check``), and a
    module's constants.
    """
    text = (TREE / path).read_text()
    if path.suffix != ".py":
        return set(re.findall(r"^[\w][^\n;=]*?\b(\w+)\([^;]*?\)\s*\{", text, re.MULTILINE))
    found = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")
            elif not prefix and isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update(target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(text), "")
    return found


@pytest.mark.parametrize("document", NAMING)
def test_documents_name_what_there_is(document: str) -> None:
    places = PLACE.findall((TREE / document).read_text())
    assert places
    wrong = [
        f"{path}::{name}" if name else path
        for path, name in places
        if not (TREE / path).is_file() or (name and name not in definitions(Path(path)))
    ]
    assert wrong == [], f"{document} names these places, which do not exist: name their successors."


def test_documents_name_files_that_there_are() -> None:
    """A document may leave out the folders of a file.  Documents about the past may name removed
    files.
    """
    ends = {"/".join(path.parts[i:]) for path in files() for i in range(len(path.parts))}
    wrong = [
        f"{document}: {path}"
        for document in documents()
        if document.parent.name not in ("decisions", "hypervisor") and document.stem != "CHANGELOG"
        for path, _name in PLACE.findall((TREE / document).read_text())
        if path not in ends
    ]
    assert wrong == [], "These documents name files that do not exist: name their successors."


def test_code_names_documents_that_there_are() -> None:
    wrong = [
        f"{path}: {document}"
        for path in files()
        if path.suffix in (*SOURCES, ".md") or path.name == "Makefile"
        for document in re.findall(r"\bdocs/[\w/-]+\.md\b", (TREE / path).read_text())
        if not (TREE / document).is_file()
    ]
    assert wrong == [], "These files name documents that do not exist."


def test_every_document_is_in_the_list_of_documents() -> None:
    """Every decision, with its number, its date and its commits, is in the list of decisions."""
    for folder in ("docs", "docs/decisions"):
        listed = LINK.findall((TREE / folder / "README.md").read_text())
        there = {path.name for path in documents() if str(path.parent) == folder} - {"README.md"}
        assert there <= set(listed), f"List these documents in {folder}/README.md."
    decisions = list((TREE / "docs/decisions").glob("[0-9]*.md"))
    assert len({path.name[:4] for path in decisions}) == len(decisions), "Each has its own number."
    for path in decisions:
        title, _empty, date, *rest = path.read_text().splitlines()
        assert path.name[4] == "-" and title.startswith(f"# {path.name[:4]}. ")
        assert re.match(r"20\d\d-\d\d-\d\d.*, commits? ([0-9a-f]{7}(, |\.|$))+", date), path
        assert len(rest) <= MOST_LINES_OF_A_DECISION, path


def test_documents_name_targets_that_make_has() -> None:
    targets = set(re.findall(r"^([a-z][\w -]*):", (TREE / "Makefile").read_text(), re.MULTILINE))
    known = {target for names in targets for target in names.split()}
    for document in (path for path in files() if path.suffix == ".md"):
        named = re.findall(
            r"(?:^    |`)make ([a-z][\w-]*)", (TREE / document).read_text(), re.MULTILINE
        )
        assert {*named} <= known, f"{document}: {sorted({*named} - known)}"


def test_every_phase_that_an_operator_sees_is_explained() -> None:
    """Every phase is in the man page, and has a heading of its own in docs/operating.md."""
    phases = {phase for row in RECEIVERS.values() for phase in (row.phase, row.if_lost)} - {""}
    for row in SENDERS.values():
        phases |= {row.phase, row.if_lost, row.if_given_up} - {""}
    assert {"precopy", "switchover", "interrupted", "in doubt", "refused"} <= phases
    manual = (TREE / "systemd/man/xen-postcopy.8").read_text()
    section = manual.split(".SH PHASES")[1].split(".SH ")[0]
    commands = {"list", "show", "reconnect", "decide"}
    assert phases == set(re.findall(r"^\.B ([a-z ]+)$", section, re.M)) - commands
    explained = (TREE / "docs/operating.md").read_text()
    assert phases == set(re.findall(r"^### `([a-z ]+)`$", explained, re.M))


def options_of(name: str, command: click.Command) -> Iterator[tuple[str, str]]:
    """Yield pairs of a command and one of its options, including subcommands."""
    for inner_name, inner in getattr(command, "commands", {}).items():
        yield from options_of(f"{name} {inner_name}", inner)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from ((name, option) for option in parameter.opts)


def test_every_option_is_described_where_its_command_is_named() -> None:
    described = set()
    text = (TREE / "docs/commands.md").read_text().split("\n## Options\n")[1].split("\n## ")[0]
    for section in text.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        options = {
            option
            for cell in re.findall(r"^\| ([^|]*) \|", body, re.MULTILINE)
            for option in re.findall(r"`(-[\w-]+)", cell)
        }
        described |= {
            (name, option) for name in re.findall("`(.*?)`", heading) for option in options
        }
    there = set()
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        there |= {*options_of(name, command)}
    assert len(there) > 60
    assert described == there, "Describe these options in docs/commands.md."


def test_every_module_is_in_the_description_of_the_architecture() -> None:
    described = (TREE / "docs/architecture.md").read_text()
    modules = [path.name for _folder, path in ours() if path.stem not in ("__init__", "__main__")]
    assert len(modules) > 80
    missing = [
        name for name in modules if f"`{name}`" not in described and f"/{name}`" not in described
    ]
    assert missing == [], "Describe these modules in docs/architecture.md."


def test_the_table_of_checks_has_each_stage_where_it_runs() -> None:
    rows = re.findall(
        r"^\|[^|]*\|[^|]*\| `make ([\w-]+)` \| *([^|]*?) *\| *([^|]*?) *\|$",
        CONTRIBUTING,
        re.MULTILINE,
    )
    for column, tier in ((1, "gate"), (2, "everything")):
        run = {argument for stage in TIERS[tier] for argument in stage.command[2:3]} - {"tools"}
        assert run | {"check"} == {row[0] for row in rows if row[column]}, (
            f"{tier}; test runs check"
        )


def test_the_core_is_the_same_in_the_makefile_and_in_contributing() -> None:
    makefile = (TREE / "Makefile").read_text().replace("\\\n", " ")
    core = re.findall(r"^CORE := (.*)$", makefile, re.MULTILINE)[0].split()
    (listed,) = re.findall(r"Modules that decide are sans-IO[^(]*\(([^)]*)\)", CONTRIBUTING)
    assert sorted(core) == sorted(re.findall("`(.*?)`", listed))


def test_the_version_has_an_entry_in_the_changelog() -> None:
    newest = re.search(r"^## \[(.+?)\]", (TREE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == __version__


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for path in (path for path in files() if path.suffix == ".md"):
        for link in LINK.findall((TREE / path).read_text()):
            if "://" in link:
                continue
            to, _, anchor = link.partition("#")
            target = (TREE / path).parent / to if to else TREE / path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{path}: {link}")
    assert wrong == [], "Mend these links: the file or heading does not exist."
