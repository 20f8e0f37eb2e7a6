# SPDX-License-Identifier: GPL-2.0-or-later
"""HTML as elements.  Text is escaped when the document is written, so no name of a guest and no
reason of a peer becomes markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as ET

from migrate.cli.report.style import STYLE
from migrate.units import printable

Child = ET.Element | str
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The document loads nothing, and has no script."""


def element(tag: str, *children: Child, **attributes: str) -> ET.Element:
    """Return an element.  ``class_`` is the attribute ``class``."""
    made = ET.Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    last: ET.Element | None = None
    for child in children:
        if isinstance(child, ET.Element):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + printable(child)
        else:
            last.tail = (last.tail or "") + printable(child)
    return made


def table(
    titles: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", numbers: int = 0
) -> ET.Element:
    """Return a table.  ``numbers``: how many of the last columns have numbers."""
    first = len(titles) - numbers

    def row(tag: str, cells: Sequence[Any]) -> ET.Element:
        return element(
            "tr",
            *[
                element(tag, str(cell), **({"class_": "number"} if at >= first else {}))
                for at, cell in enumerate(cells)
            ],
        )

    parts = [element("caption", caption)] if caption else []
    parts += [element("thead", row("th", titles)), element("tbody", *[row("td", r) for r in rows])]
    return element("div", element("table", *parts), class_="scrolls")


def figure(pictures: Sequence[ET.Element], caption: str) -> ET.Element:
    return element("figure", *pictures, element("figcaption", caption, class_="lead"))


def tiles(values: Sequence[tuple[str, str]]) -> ET.Element:
    """Return the few values that a reader looks for first."""
    return element(
        "dl",
        *[element("div", element("dt", name), element("dd", value)) for name, value in values],
        class_="tiles",
    )


def unknown(text: str) -> ET.Element:
    return element("p", f"Unknown: {text}", class_="unknown")


def document(title: str, *body: ET.Element) -> str:
    """Return the whole document."""
    policy = {"http-equiv": "Content-Security-Policy", "content": POLICY}
    head = element(
        "head",
        element("meta", charset="utf-8"),
        ET.Element("meta", policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", STYLE),
    )
    root = element("html", head, element("body", element("main", *body)), lang="en")
    return "<!doctype html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"
