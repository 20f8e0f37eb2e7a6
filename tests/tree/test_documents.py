# SPDX-License-Identifier: GPL-2.0-or-later
"""Documents name what there is, and what there is has its place in a document."""

from __future__ import annotations

import ast
import re
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
from tests.tree.listing import SOURCES, TREE, files, ours

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
