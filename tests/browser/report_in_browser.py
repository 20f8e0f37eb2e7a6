# SPDX-License-Identifier: GPL-2.0-or-later
"""A report in a headless Chromium: nothing is asked of a network, nothing overflows, and each theme
has its colours.

Set ``REPORT_PICTURES`` to a folder to look at what the browser shows.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.report.sections import report_of
from tests.support.browser import Browser, browser
from tests.support.reports import NAME, answers

WIDTHS = (1280, 480)
SCHEMES = ("light", "dark")
OVERFLOWS = """[...document.querySelectorAll('body *:not(svg *):not(.scrolls *)')].filter(
  one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(one => one.outerHTML.slice(0, 120))"""
CUT_OFF = """[...document.querySelectorAll('svg')].filter(one => one.clientWidth).flatMap(
  svg => [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect(), frame = svg.getBoundingClientRect();
    return box.left < frame.left - 2 || box.right > frame.right + 2 ||
      box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
  }).map(text => text.textContent))"""
SEEN = "[...document.querySelectorAll('svg')].filter(one => one.clientWidth).length"
SMALLEST = """Math.min(...[...document.querySelectorAll('svg')].filter(one => one.clientWidth)
  .flatMap(svg => [...svg.querySelectorAll('text')].map(
    text => text.getBoundingClientRect().height)).filter(height => height))"""
COLOURS = """(() => { const style = getComputedStyle(document.body);
  return [style.backgroundColor, style.color] })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_of(answers()))
    return path


def luminance(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.strip("rgb()").split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def picture(page: Browser, name: str) -> None:
    folder = os.environ.get("REPORT_PICTURES")
    if folder:
        found: dict[str, Any] = page.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(found["data"]))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_fits_the_page(page: Browser, report: Path, width: int, scheme: str) -> None:
    page.open(report, width=width, scheme=scheme)
    picture(page, f"{width}-{scheme}")
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(OVERFLOWS) == []
    assert page.value(CUT_OFF) == []
    assert page.value(SEEN) == 5  # one of the two forms of each picture
    assert page.value(SMALLEST) >= 8
    background, text = map(luminance, page.value(COLOURS))
    assert (background > text) is (scheme == "light")
    assert abs(background - text) > 150


@pytest.mark.parametrize("scheme", SCHEMES)
def test_paper_is_light(page: Browser, report: Path, scheme: str) -> None:
    page.open(report, width=794, scheme=scheme, media="print")
    picture(page, f"print-{scheme}")
    background, text = map(luminance, page.value(COLOURS))
    assert background > text
    assert page.value(SEEN) == 5


def test_nothing_is_asked_of_a_network(page: Browser, report: Path) -> None:
    page.sent.clear()
    page.complaints.clear()
    page.open(report, width=1280, scheme="light")
    assert [one for one in page.sent if not one.startswith(("file:", "data:"))] == []
    assert [one for one in page.sent if one.startswith("file:")] == [report.as_uri()]
    assert page.complaints == []


def test_the_policy_of_the_document_holds_in_the_browser(
    page: Browser, report: Path, tmp_path: Path
) -> None:
    """Also a script and a picture that something had brought in."""
    added = '<script>document.title = "ran"</script><img src="http://127.0.0.1:9/picture.png">'
    path = tmp_path / "changed.html"
    path.write_text(report.read_text().replace("<h1>", f"{added}<h1>"))
    page.complaints.clear()
    page.open(path, width=1280, scheme="light")
    assert page.value("document.title") != "ran"
    page.value("0")
    assert any("Content Security Policy" in one for one in page.complaints)


def test_the_name_of_a_guest_is_text(page: Browser, report: Path) -> None:
    page.open(report, width=480, scheme="light")
    assert NAME.startswith("<") and NAME in page.value("document.title")
    assert page.value("document.querySelectorAll('script, b').length") == 0
