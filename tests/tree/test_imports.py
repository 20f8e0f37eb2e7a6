# SPDX-License-Identifier: GPL-2.0-or-later
"""Which folder imports which, and what the helper under xl and the daemons do not import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.tree.listing import TREE, files, ours

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
