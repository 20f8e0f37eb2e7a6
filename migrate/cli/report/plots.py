# SPDX-License-Identifier: GPL-2.0-or-later
"""The pictures of a report.  Each function draws one, for a wide page or a narrow one.

The colours are those of Okabe and Ito, which people with any kind of colour vision distinguish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from migrate.cli.report import svg
from migrate.cli.report.series import Phase, Recorded, Series, cells_of
from migrate.units import human_bytes, human_us

MIB, PAGE = 2**20, 4096
WIDE, NARROW = 9.2, 4.3
"""The widths in inches."""
LETTER = 0.085
"""The width of a letter in inches, about."""
ORIGINS: dict[str, tuple[str, str]] = {
    "precopy": ("precopy", "#0072b2"),
    "switchover": ("sent while the guest was suspended", "#cc79a7"),
    "pushed": ("pushed after the handover", "#56b4e9"),
    "fault": ("fetched, because a vCPU waited", "#d55e00"),
    "read_ahead": ("read ahead", "#e69f00"),
    "given_away": ("given away by the guest before it came", "#009e73"),
    "missing": ("still to come", "#7f7f7f"),
    "unknown": ("unknown: it came before this daemon was started", "#b0a990"),
    "nothing": ("no memory at this address", "#00000000"),
}
"""What each origin of ``receiver/origins.py`` is called, and its colour."""
PHASES = {"precopy": svg.BLUE, "postcopy": svg.ORANGE, "switchover": svg.RED}


@dataclass(frozen=True)
class Page:
    """The page for which a picture is drawn."""

    width: float

    @property
    def is_narrow(self) -> bool:
        return self.width == NARROW


def both(draw: Callable[[Page], Figure], text: str) -> list[ET.Element]:
    """Return a picture twice: for a wide page and for a narrow one."""
    pictures = []
    with svg.settings():
        for kind, width in (("wide", WIDE), ("narrow", NARROW)):
            picture = svg.drawn(draw(Page(width)), text)
            picture.set("class", kind)
            pictures.append(picture)
    return pictures


# ---- the timeline ----
@dataclass(frozen=True)
class Line:
    """One line of a panel of the timeline."""

    series: Series
    name: str
    colour: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    lines: Sequence[Line]


def timeline(recorded: Recorded, panels: Sequence[Panel], page: Page) -> Figure:
    """Draw the phases, and below them a panel for each kind of values."""
    heights = [0.42, *[1.75 if page.is_narrow else 1.6 for _panel in panels]]
    figure = svg.new_figure(page.width, sum(heights) + 0.5)
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    _strip(axes[0], recorded.phases, recorded.seconds, page)
    for panel, on in zip(panels, axes[1:], strict=True):
        for line in panel.lines:
            _draw_line(on, line)
        on.set_title(panel.title)
        on.set_ylabel(panel.unit)
        on.set_ylim(bottom=0)
        on.yaxis.set_major_locator(MaxNLocator(4))
        for phase in recorded.phases[1:]:
            on.axvline(phase.begins, color=svg.MUTED, linewidth=0.6, linestyle=(0, (2, 2)))
        for began, ended in recorded.pauses:
            on.axvspan(began, ended, color=svg.MUTED, alpha=0.2, linewidth=0)
        for mark in recorded.marks:
            on.axvline(mark.at, color=svg.PURPLE, linewidth=1.2)
        if len(panel.lines) > 1:
            on.legend(loc="upper right", ncols=1 if page.is_narrow else len(panel.lines))
            on.set_ylim(top=on.get_ylim()[1] * (1.45 if page.is_narrow else 1.25))
    axes[-1].set_xlabel("seconds since the start")
    axes[0].set_xlim(0, recorded.seconds)
    return figure


def _strip(on: Axes, phases: Sequence[Phase], seconds: float, page: Page) -> None:
    """Draw the phases as a strip, with their names where they fit."""
    inches = page.width - 0.8
    for phase in phases:
        length = phase.ends - phase.begins
        colour = PHASES.get(phase.name, svg.MUTED)
        on.barh(0, length, left=phase.begins, height=1, color=colour, edgecolor=svg.PAGE, lw=0.5)
        if length / seconds * inches > len(phase.name) * LETTER:
            middle = phase.begins + length / 2
            on.text(middle, 0, phase.name, ha="center", va="center", color=svg.PAGE)
        elif phase.name == "switchover":
            at_right = phase.begins > seconds * 0.8
            on.annotate(
                "switchover", (phase.begins, 0.5), (-2 if at_right else 2, 2),
                textcoords="offset points", ha="right" if at_right else "left", color=svg.RED,
                annotation_clip=False,
            )  # fmt: skip
    on.set_ylim(-0.5, 0.5)
    on.set_yticks([])
    on.grid(visible=False)
    on.tick_params(bottom=False, labelbottom=False)
    for side in ("left", "bottom"):
        on.spines[side].set_visible(False)


def _draw_line(on: Axes, line: Line) -> None:
    series = line.series
    options: dict[str, Any] = {"color": line.colour, "label": line.name, "ls": line.style}
    if len(series.edges) > len(series.values):
        on.stairs(series.values, series.edges, baseline=None, **options)
    else:
        on.plot(series.edges, series.values, drawstyle="steps-post", **options)


# ---- the downtime ----
def steps(of_ends: Sequence[tuple[str, Sequence[tuple[str, float]]]], page: Page) -> Figure:
    """Draw the steps of the switchover, of one end or of both: (title, [(step, seconds)])."""
    rows = [len(steps) for _title, steps in of_ends]
    height = sum(0.36 * count + 0.55 for count in rows) + 0.4
    figure = svg.new_figure(page.width, height)
    axes = figure.subplots(
        len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows}
    )[:, 0]
    for (title, of_end), on in zip(of_ends, axes, strict=True):
        began = 0.0
        for row, (step, s) in enumerate(of_end):
            on.barh(row + 0.24, s * 1000, left=began * 1000, height=0.36, color=svg.BLUE)
            on.text(
                0.004, row - 0.22, f"{step}: {human_us(s * 1e6)}", va="center",
                transform=on.get_yaxis_transform(),
            )  # fmt: skip
            began += s
        on.set_title(f"{title}: {human_us(began * 1e6)}")
        on.set_ylim(len(of_end) - 0.5, -0.5)
        on.set_yticks([])
        on.spines["left"].set_visible(False)
    axes[-1].set_xlabel("milliseconds since the guest was suspended")
    axes[0].set_xlim(left=0)
    return figure


# ---- the latency of faults ----
def histogram(
    latencies: Sequence[tuple[float, float, int]],
    marks: Sequence[tuple[str, float]],
    page: Page,
    guests_own: Sequence[tuple[float, float, int]] = (),
) -> Figure:
    """Draw how many faults took how long.  ``marks``: names of values, in microseconds."""
    figure = svg.new_figure(page.width, 3.4)
    on = figure.subplots()
    low, high, counts = (
        np.array(column, dtype=np.float64) for column in zip(*latencies, strict=True)
    )
    on.bar(low, counts, width=high - low, align="edge", color=svg.BLUE, edgecolor=svg.PAGE, lw=0.3,
           label="from the request to the answer")  # fmt: skip
    if guests_own:
        low, high, counts = (
            np.array(one, dtype=np.float64) for one in zip(*guests_own, strict=True)
        )
        on.step([*low, high[-1]], [*counts, 0], where="post", color=svg.ORANGE,
                label="as the guest itself has measured")  # fmt: skip
        on.legend(loc="upper left" if page.is_narrow else "upper right")
    top = on.get_ylim()[1]
    on.set_ylim(0, top * (1.75 if guests_own and page.is_narrow else 1.5))
    on.set_xscale("log")
    middle = math.sqrt(on.get_xlim()[0] * on.get_xlim()[1])
    for number, (name, us) in enumerate(marks):
        height, at_left = top * (1.3 - 0.14 * number), us > middle
        on.plot([us, us], [0, height], color=svg.RED, linewidth=0.9, linestyle=(0, (3, 2)))
        on.annotate(
            f"{name} {human_us(us)}", (us, height), (-3 if at_left else 3, -1),
            textcoords="offset points", ha="right" if at_left else "left", va="center",
            color=svg.RED, bbox={"facecolor": svg.PAGE, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    on.xaxis.set_major_formatter(FuncFormatter(lambda us, _at: human_us(us)))
    on.xaxis.set_minor_formatter(NullFormatter())
    on.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    on.set_xlabel("latency of a fault (logarithmic)")
    on.set_ylabel("faults")
    return figure


# ---- the waits of vCPUs ----
def waits(blocked: dict[int, Series], seconds: float, page: Page) -> Figure:
    """Draw for each vCPU the share of time for which it waited."""
    figure = svg.new_figure(page.width, 0.5 * len(blocked) + 0.8)
    axes = figure.subplots(len(blocked), 1, sharex=True, squeeze=False)[:, 0]
    for (vcpu, series), on in zip(blocked.items(), axes, strict=True):
        on.stairs(series.values * 100, series.edges, fill=True, color=svg.RED)
        on.set_ylim(0, 100)
        on.set_yticks([0, 100], ["0%", "100%"], fontsize=7)
        on.set_ylabel(f"vCPU {vcpu}", rotation=0, ha="right", va="center")
    axes[-1].set_xlabel("seconds since the start")
    axes[0].set_xlim(0, seconds)
    return figure


# ---- the map ----
def _columns(cells: int, shape: float) -> int:
    """Return the number of columns with which the map is about ``shape`` times as wide as high."""
    wanted = math.sqrt(max(cells, 1) * shape)
    there: list[int] = sorted(factor * 2**power for power in range(2, 12) for factor in (2, 3))
    return min(there, key=lambda columns: abs(math.log(columns / wanted)))


def _brief(count: int) -> str:
    """Return a size without the decimals of a whole number."""
    return human_bytes(count).replace(".0 ", " ")


def memory_map(origins: dict[str, object], page: Page) -> Figure:
    """Draw where each page came from; one dot is one page, by its address."""
    cells = cells_of(origins)
    pages_per_cell = int(str(origins["pages_per_cell"]))
    columns = _columns(len(cells), 1.1 if page.is_narrow else 2.2)
    rows = -(-max(len(cells), 1) // columns)
    names = list(origins["pages"])  # type: ignore[call-overload]
    padded = np.full(rows * columns, names.index("nothing"), dtype=np.uint8)
    padded[: len(cells)] = cells
    there = [name for name in ORIGINS if origins["pages"][name]]  # type: ignore[index]
    inches = page.width - 0.9
    legend_rows = -(-len(there) // (1 if page.is_narrow else 2))
    height = inches * rows / columns + 0.85 + 0.2 * legend_rows
    figure = svg.new_figure(page.width, height)
    ratios = [height - 0.2 * legend_rows, 0.2 * legend_rows + 0.1]
    on, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": ratios})
    colours = ListedColormap([ORIGINS[name][1] for name in names])
    on.imshow(
        padded.reshape(rows, columns), cmap=colours, vmin=0, vmax=len(names) - 1, aspect="equal",
        resample=False,
    )  # fmt: skip
    on.grid(visible=False)
    row_bytes = columns * pages_per_cell * PAGE
    step = 2 ** math.ceil(math.log2(rows * row_bytes / 8))
    addresses = range(0, rows * row_bytes + 1, step)
    on.set_yticks([at / row_bytes - 0.5 for at in addresses], [_brief(at) for at in addresses])
    on.set_xticks([])
    on.set_xlabel(f"a row is {_brief(row_bytes)} of the guest's memory")
    on.set_ylabel("guest-physical address")
    patches = [
        Patch(facecolor=ORIGINS[name][1], edgecolor=svg.MUTED, label=ORIGINS[name][0], lw=0.5)
        for name in there
    ]
    below.axis("off")
    columns = 1 if page.is_narrow else 2
    below.legend(handles=patches, loc="upper left", ncols=columns, borderaxespad=0)
    return figure
