# SPDX-License-Identifier: GPL-2.0-or-later
"""A report: its series, what it shows for what is not known, and what becomes of text of others."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from migrate.cli import shown
from migrate.cli.report import sections, svg
from migrate.cli.report.accepted import accepted
from migrate.cli.report.html import POLICY
from migrate.cli.report.plots import NARROW, Page
from migrate.cli.report.sections import report_of
from migrate.cli.report.series import MOST_VCPUS, Recorded
from migrate.cli.report.strategies import measured_of, strategies
from migrate.errors import MigrationError
from tests.support.reports import HANDOVER, MIB, NAME, START, answers, destination, source
from tests.support.thorough import examples

Change = Callable[[dict[str, Any]], None]


class Text(HTMLParser):
    """The text of a document, the tags in it, and the addresses to which it refers."""

    def __init__(self, document: str):
        super().__init__()
        self.tags = set[str]()
        self.addresses = list[str]()
        self._text = list[str]()
        self.feed(document)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self._text.append(data)


def narrow(draw: Callable[[Page], Figure], text: str) -> list[ET.Element]:
    """Return what ``both`` returns, but for the narrow page only.  A picture takes a second."""
    with svg.settings():
        return [svg.drawn(draw(Page(NARROW)), text)]


def not_drawn(draw: Callable[[Page], Figure], text: str) -> list[ET.Element]:
    return []


@contextmanager
def drawn_by(both: Callable[[Callable[[Page], Figure], str], list[ET.Element]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "both", both)
        yield


@pytest.fixture(scope="module")
def whole() -> str:
    """Return a report as users get it, with each picture for both widths."""
    return report_of(answers())


def test_the_document_has_no_script_and_refers_to_nothing_outside(whole: str) -> None:
    read = Text(whole)
    assert "svg" in read.tags and not read.tags & {"script", "link", "iframe", "object", "img"}
    assert all(one.startswith(("#", "data:image/png")) for one in read.addresses)
    assert POLICY in whole.replace("&#x27;", "'") and POLICY.startswith("default-src 'none'")
    assert not re.search(r"url\((?!#)|@import", whole)
    identifiers = re.findall(r' id="([^"]*)"', whole)
    assert len(identifiers) == len({*identifiers})  # of the pictures, which are in one document
    used = {one[1:] for one in read.addresses if one.startswith("#")}
    used |= {*re.findall(r"url\(#([^)]*)\)", whole)}
    assert used and used <= {*identifiers}


def test_each_picture_has_a_text_and_two_widths(whole: str) -> None:
    assert whole.count('class="wide"') == whole.count('class="narrow"') == 5
    texts = re.findall(r'<svg[^>]* aria-label="([^"]*)"', whole)
    assert len(texts) == 10 and all(len(text) > 40 for text in texts)


def test_text_of_others_is_no_markup() -> None:
    marked = answers()
    for answer in marked:
        answer |= {"peer": "<i>peer</i>", "problem": "<u>why</u>\x1b[2J", "strategy": "<s>"}
    with drawn_by(narrow):
        document = report_of(marked)
    read = Text(document)
    assert not {"b", "i", "u", "s"} & read.tags
    assert NAME in read.text and "<u>why</u>" in read.text
    assert "\x1b" not in document


def marked(*marks: tuple[float, str]) -> dict[str, Any]:
    """Return the source's answer with these requests of an operator."""
    answer = source()
    answer["record"]["marks"] = [
        {"at": START + at, "asked": asked, "values": {}} for at, asked in marks
    ]
    return answer


def test_requests_of_an_operator_are_in_the_timeline(whole: str) -> None:
    text = Text(whole).text
    for part in ("A violet line is a request", "Copying was paused where", "3.000 s pause"):
        assert part in text
    assert "4.500 s set: bandwidth 16.0 MiB/s, timeout none" in text
    # Each picture is there twice: three lines in each of its two panels or more.
    assert whole.count("stroke: var(--purple)") >= 2 * 2 * 3


@pytest.mark.parametrize(
    ("marks", "pauses"),
    [
        ([(3.0, "pause"), (4.0, "set"), (6.0, "resume")], [(3.0, 6.0)]),
        ([(3.0, "pause"), (4.0, "resume"), (9.0, "pause")], [(3.0, 4.0), (9.0, 12.0)]),
        ([(2.0, "resume")], [(0.0, 2.0)]),  # a sender that has died had paused
        ([(2.0, "set")], []),
        ([], []),
    ],
)
def test_a_pause_lasts_until_copying_continues_or_the_migration_ends(
    marks: list[tuple[float, str]], pauses: list[tuple[float, float]]
) -> None:
    found = Recorded([marked(*marks)]).pauses
    assert [pytest.approx(one) for one in pauses] == found
    assert Recorded([destination()]).pauses == []


def test_only_what_is_drawn_is_explained(whole: str) -> None:
    with drawn_by(narrow):
        there = report_of([destination()])
    for about in ("The dirty rate is that of each round", "A violet line", "Copying was paused"):
        assert about in whole and about not in there


def test_figures_are_those_of_show(whole: str) -> None:
    text = Text(whole).text
    for answer in answers():
        lines = list(shown.lines({k: v for k, v in answer.items() if k != "record"}, 0.0))
        assert len(lines) > 10
        for line in lines:
            if "started" not in line and "ended" not in line and "phases" not in line:
                assert " ".join(line.split()) in text


@pytest.mark.parametrize(
    ("end", "known", "unknown"),
    [
        (source, ["Timeline of", "suspend the guest", "dirty rate", "hybrid, as it was"],
         ["how each vCPU"]),
        (destination, ["start the guest", "Map of the guest", "Timeline of"],
         ["only a source that has done a whole round"]),
    ],
)  # fmt: skip
def test_what_an_end_does_not_have_is_unknown(
    end: Callable[[], dict[str, Any]], known: list[str], unknown: list[str]
) -> None:
    with drawn_by(narrow):
        document = report_of([end()])
    for text in known:
        assert text in document
    assert Text(document).text.count("Unknown: ") >= len(unknown)
    if end is source:
        assert "make a report at the destination as well" in document
    else:
        assert "downtime unknown" in Text(document).text


def no_record(answer: dict[str, Any]) -> None:
    answer["record"] = None


def no_samples(answer: dict[str, Any]) -> None:
    answer["record"]["samples"] = {"at": [], "vcpu_block_s": {}}


def one_sample(answer: dict[str, Any]) -> None:
    samples = answer["record"]["samples"]
    for name, values in samples.items():
        if name != "vcpu_block_s":
            samples[name] = values[:1]
    samples["vcpu_block_s"] = {vcpu: [0.1] for vcpu in samples["vcpu_block_s"]}


def no_phases(answer: dict[str, Any]) -> None:
    answer["phases"] = []


def no_faults(answer: dict[str, Any]) -> None:
    answer["details"]["fault_latency_us"] = {
        "count": 0, "mean": 0, "p50": 0, "p99": 0, "max": 0, "histogram": {},
    }  # fmt: skip
    answer["details"]["vcpu_block_s"] = {}
    answer["record"].update(latency_us=[], origins=None)


def nothing_measured(answer: dict[str, Any]) -> None:
    answer.update(details={}, phases=[], record=None, started_at=None, ended_at=None)


def no_page(answer: dict[str, Any]) -> None:
    if origins := answer["record"]["origins"]:
        origins.update(pages=dict.fromkeys(origins["pages"], 0), cells=0, map="eJwDAAAAAAE=")


@pytest.mark.sweep
@pytest.mark.parametrize(
    "change",
    [no_record, no_samples, one_sample, no_phases, no_faults, nothing_measured, no_page],
)
@pytest.mark.parametrize("which", [source, destination])
def test_a_report_can_be_made_of_whatever_is_there(
    change: Change, which: Callable[[], dict[str, Any]]
) -> None:
    answer = copy.deepcopy(which())
    change(answer)
    with drawn_by(narrow):
        assert "All figures" in report_of([answer])


def test_a_daemon_that_was_restarted_is_named() -> None:
    changed = answers()
    changed[1]["record"]["is_whole"] = False
    with drawn_by(not_drawn):
        assert "A daemon was restarted during this migration" in report_of(changed)


# ---- what is damaged ----
ODD: list[Any] = [
    None, True, 0, -1, 1, 5e-324, float("nan"), float("inf"), -float("inf"), 2**63, 10**400, 1e308,
    1e12, "", "0", "a" * 300, "\x1b[2J\n\ud800", [], [1], [None], [[1, 2, 3]], [{}], {}, {"0": 1},
    {"a": {"b": [1]}},
]  # fmt: skip
"""Values that a damaged file, or another program, may have in the place of any other."""
Place = tuple[Any, ...]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Yield where a value of JSON can be changed: each key, and some items of each list."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = [*value]
    elif isinstance(value, list):
        keys = sorted({*range(min(len(value), 4)), *range(max(len(value) - 1, 0), len(value))})
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


WHOLE = json.dumps(answers())
PLACES = [*places(json.loads(WHOLE))]
RECORDED = [place for place in PLACES if {"record", "phases", "details"} & {*place}]


def damage(whole: Any, place: Place, how: str, value: Any) -> None:
    """Change one place, if a change before has left it."""
    try:
        for key in place[:-1]:
            whole = whole[key]
        at = place[-1]
        match how:
            case "removed":
                del whole[at]
            case "halved":
                whole[at] = whole[at][: len(whole[at]) // 2]
            case "doubled":
                whole[at] = whole[at] * 2
            case "moved":
                whole["eta_s"] = whole.pop(at)
            case _:
                whole[at] = value
    except (KeyError, IndexError, TypeError, AttributeError):
        return


def damages(where: list[Place]) -> st.SearchStrategy[list[tuple[Place, str, Any]]]:
    how = st.sampled_from(["replaced"] * 4 + ["removed", "halved", "doubled", "moved"])
    return st.lists(
        st.tuples(st.sampled_from(where), how, st.sampled_from(ODD)), min_size=1, max_size=4
    )


def reported(changes: list[tuple[Place, str, Any]], *, by_one_end: bool) -> str:
    """Return the report of damaged answers; empty if they are refused, with one line."""
    whole = json.loads(WHOLE)
    for place, how, value in changes:
        damage(whole, place, how, copy.deepcopy(value))
    try:
        found = [accepted(one) for one in whole if isinstance(one, dict)] or [accepted({})]
    except MigrationError as error:
        assert "\n" not in str(error)
        return ""
    again = [accepted(one) for one in found]
    assert json.dumps(again, sort_keys=True) == json.dumps(found, sort_keys=True)
    document = report_of(found[:1] if by_one_end else found)
    assert document.encode()
    return document


HISTOGRAM = "details", "fault_latency_us", "histogram"


@given(damages(PLACES), st.booleans())
@example(
    changes=[((0, key), "replaced", None) for key in ("started_at", "details")], by_one_end=False
)
@example(changes=[((1, "direction"), "replaced", "\x1b[2J\n\ud800")], by_one_end=False)
@example(changes=[((1, *HISTOGRAM), "replaced", 0)], by_one_end=False)
@example(changes=[((0, *HISTOGRAM), "replaced", 0)], by_one_end=True)
@settings(max_examples=examples(150))
def test_damaged_answers_are_reported_in_part_or_refused(
    changes: list[tuple[Place, str, Any]], by_one_end: bool
) -> None:
    with drawn_by(not_drawn):
        reported(changes, by_one_end=by_one_end)


@given(damages(RECORDED))
@settings(max_examples=3)
def test_what_is_left_of_damaged_answers_can_be_drawn(
    changes: list[tuple[Place, str, Any]],
) -> None:
    with drawn_by(narrow):
        reported(changes, by_one_end=False)


def test_an_answer_that_is_whole_is_accepted_as_it_is() -> None:
    for answer in json.loads(WHOLE):
        answer["record"].setdefault("latency_us", None)  # a source has none
        assert json.dumps(accepted(answer)) == json.dumps(answer)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [("id", None, "its key id has None"), ("direction", "up", "its key direction has 'up'"),
     ("phase", [1], r"its key phase has \[1\]")],
)  # fmt: skip
def test_an_answer_about_no_migration_is_refused(key: str, value: Any, what: str) -> None:
    with pytest.raises(MigrationError, match=f"the answer of a daemon is damaged: {what}"):
        report_of([{**source(), key: value}])


def test_an_answer_without_its_phase_is_refused() -> None:
    answer = source()
    del answer["phase"]
    with pytest.raises(MigrationError, match="its key phase has no value"):
        report_of([answer])


@pytest.mark.parametrize(
    ("part", "value", "unknown"),
    [
        ("origins", {"pages": {}}, "the destination has it after the end"),
        ("steps", [{"step": "suspend the guest"}], ""),
        ("latency_us", [[1, 2]], ""),
        ("samples", {"at": [float("nan")]}, "the times at which vCPUs waited"),
    ],
)
def test_a_damaged_part_is_unknown_and_the_others_are_shown(
    part: str, value: Any, unknown: str
) -> None:
    answer = destination()
    answer["record"][part] = value
    with drawn_by(narrow):
        text = Text(report_of([answer])).text
    assert f"Unknown: {unknown}" in text or not unknown
    assert "All figures" in text and "faults" in text


# ---- series ----
def test_a_rate_is_that_of_the_counts() -> None:
    recorded = Recorded(answers())
    rate = recorded.rate(recorded.source, "bytes_sent")
    assert rate is not None and len(rate.edges) == len(rate.values) + 1
    assert np.allclose(rate.values, 60 * MIB)
    assert recorded.rate(None, "bytes_sent") is None


def test_the_share_of_time_for_which_a_vcpu_waits_is_at_most_all_of_it() -> None:
    answer = destination()
    waits = answer["record"]["samples"]["vcpu_block_s"]
    waits.update({str(n): [float(i) for i in range(120)] for n in range(10, 40)})
    blocked = Recorded([answer]).blocked()
    assert len(blocked) == MOST_VCPUS and list(blocked) == sorted(blocked)
    assert all(series.values.min() >= 0 and series.most <= 1 for series in blocked.values())
    only = Recorded([destination()]).blocked()
    last = [series.values[-1] for series in only.values()]
    assert np.allclose(last, [0.2, 0.4, 0.6])  # 0.02 s each tenth of a second


def test_phases_follow_each_other() -> None:
    phases = Recorded(answers()).phases
    assert [phase.name for phase in phases][2:5] == ["precopy", "switchover", "postcopy"]
    assert phases[4].begins == pytest.approx(HANDOVER / 10) and phases[-1].ends == 12.0


def test_ends_whose_clocks_differ_have_the_same_start() -> None:
    far = destination()
    samples = far["record"]["samples"]
    samples["at"] = [at + 3600 for at in samples["at"]]
    far |= {"started_at": far["started_at"] + 3600}
    recorded = Recorded([source(), far])
    assert recorded.destination is not None
    assert recorded.time_of(recorded.destination)[-1] == pytest.approx(11.9)


# ---- other strategies ----
def test_strategies_are_compared_by_what_was_measured() -> None:
    measured = measured_of(Recorded(answers()))
    assert measured is not None and measured.memory_pages == 512 * MIB // 4096
    assert [s for s, _pages in measured.dirtied] == sorted(s for s, _pages in measured.dirtied)
    expected = {one.strategy.value: one for one in strategies(measured)}
    assert set(expected) == {"hybrid", "postcopy", "precopy"}
    assert expected["precopy"].freeze_s > expected["postcopy"].downtime_s > 0


def test_without_a_round_nothing_is_expected() -> None:
    one = source()
    one["details"]["expected"]["bytes_per_s"] = 0
    assert measured_of(Recorded([one])) is None
    assert measured_of(Recorded([destination()])) is None
