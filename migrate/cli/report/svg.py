# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of matplotlib as SVG elements of an HTML document, in the colours of the reader's theme.

This module and ``plots.py`` are the only ones that import matplotlib.  It draws each colour of
:data:`THEME` as a colour that nothing else has, which is then replaced by a variable of the style
sheet.  So one picture serves light and dark screens, and print.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

THEME = {
    "#010203": "var(--text)",
    "#040506": "var(--muted)",
    "#070809": "var(--grid)",
    "#0a0b0c": "var(--blue)",
    "#0d0e0f": "var(--orange)",
    "#101112": "var(--green)",
    "#131415": "var(--red)",
    "#161718": "var(--purple)",
    "#191a1b": "var(--band)",
    "#1c1d1e": "var(--page)",
}
TEXT, MUTED, GRID, BLUE, ORANGE, GREEN, RED, PURPLE, BAND, PAGE = THEME
SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "xen-postcopy",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "image.interpolation": "none",  # each cell of the map stays one dot
}
IN_FONT = re.compile(r"font:\s*([\d.]+)px[^;]*")
NAMESPACE = re.compile(r"\{[^}]*\}")
_numbers = iter(range(10**9))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.  Sizes are in inches; a point of the font is a 72nd of one."""
    return Figure(figsize=(width, height), layout="constrained")


def drawn(figure: Figure, text: str) -> ET.Element:
    """Return the figure as an SVG element.  ``text`` describes it to those who do not see it."""
    file = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(file, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(file.getvalue())
    number = next(_numbers)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = NAMESPACE.sub("", element.tag)
        element.attrib = {
            NAMESPACE.sub("", key): _value(value, number) for key, value in element.attrib.items()
        }
        if "id" in element.attrib:
            element.set("id", f"p{number}-{element.attrib['id']}")
    for size in ("width", "height"):
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-label", text)
    return root


def _value(value: str, number: int) -> str:
    """Return an attribute's value with variables in place of colours, and with references to the
    identifiers of this picture.
    """
    for colour, variable in THEME.items():
        value = value.replace(colour, variable)
    value = IN_FONT.sub(r"font-size: \1px", value)
    value = value.replace("url(#", f"url(#p{number}-")
    return f"#p{number}-{value[1:]}" if value.startswith("#") and len(value) > 7 else value


def settings() -> Any:
    """Return the context in which figures are made."""
    return mpl.rc_context(SETTINGS)
