"""The page of a check: what it says first, what it draws, and that it stands alone."""

import dataclasses
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from parity.check.check import check
from parity.check.levels.names import HORIZON
from parity.faults import Edit, mutated
from parity.report import Divergence, Level, Report
from parity.report.page import SHOWN
from parity.report.page import page as html_page
from parity.report.plot_data import Flip, Generation, LossCurves, ModuleGaps, PlotData
from parity.report.record import Record, Verdict, judge
from parity.report.svg import linear_scale, log_scale
from parity.report.table import number

LEVELS = "weights", "logits", "trajectory", "tokens"
SUBJECT = {"torch": "torch_gpt", "flax": "flax_gpt", "num_params": 7, "config": {}}
GOOD = judge("probe", "float64", "max_abs", 3.1e-15, 1e-12, 100)
SECTIONS = "Gap of every module", "Losses", "Tokens"


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        """All text that is shown, with single spaces."""
        return " ".join(" ".join(self.text).split())


def plots(text: str) -> list[ET.Element]:
    """The drawings of a page; they are well-formed XML and hold only finite numbers."""
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    for svg in found:
        assert svg.find("title").text and svg.find("desc").text
        for element in svg.iter():
            for name in ("d", "x", "y", "cx", "cy", "width", "height"):
                assert not re.search("nan|inf", element.get(name, ""))
    return found


def report(*levels: Level, divergence=None, plot_data=None) -> Report:
    """A report of these levels."""
    return Report({"python": "3"}, SUBJECT, levels, divergence, plot_data)


@pytest.fixture(scope="module")
def passed(small) -> Report:
    """A pair that is one function."""
    return check(small(), levels=LEVELS, steps=HORIZON, plot_data=True)


@pytest.fixture(scope="module")
def failed(small) -> Report:
    """A pair whose torch side has GELU in its other form."""
    edit = Edit("layers.py", 'approximate="tanh")', 'approximate="none")')
    with mutated("torch_gpt", [edit]) as wrong:
        pair = small(torch_package=wrong)
        return check(pair, levels=LEVELS, dtypes=("float64",), plot_data=True)


def test_a_pass_is_said_first_and_drawn(passed):
    page = Page(html_page(passed))
    count = sum(level.count for level in passed.levels)
    outcome = f"PASS. The same function on everything compared: {count:,} numbers."
    assert page.words.index(outcome) < page.words.index("Levels")
    for name in LEVELS:
        assert name in page.words
    assert "First differs" not in page.words and "What did not pass" not in page.words
    places = [page.words.index(section) for section in (*SECTIONS, "Environment", "Excluded")]
    assert places == sorted(places)
    assert "positions are padding, not compared" in page.words


def test_every_module_is_drawn_below_the_bound_where_all_is_rounding(passed):
    seen = passed.plot_data.modules
    paths = [path for path, _ in seen.gaps]
    assert {"token_embedding", "blocks.0", "blocks.1.mlp.up", "GPT"} <= set(paths)
    assert paths.index("blocks.0.mlp") < paths.index("blocks.0") < paths.index("blocks.1.norm_1")
    assert paths[-1] == "GPT"
    assert all(gap <= seen.bound for _, gap in seen.gaps)
    assert any(gap > 0 for _, gap in seen.gaps)
    drawing, *_ = plots(html_page(passed))
    dots = drawing.findall("circle[@class='dot']")
    assert [dot.find("title").text.partition(":")[0] for dot in dots] == paths
    across = [float(dot.get("cx")) for dot in dots]
    assert across == sorted(set(across)) and 0 < across[0] and across[-1] < 860
    (floor,) = (path.get("d") for path in drawing.findall("path[@class='rule ']"))
    bound = float(re.match(r"M\S+ (\S+)H", floor)[1])
    assert all(float(dot.get("cy")) > bound for dot in dots), "y grows downwards"
    assert drawing.find("circle[@class='ring']") is None
    assert "blocks.1" in [text.text for text in drawing.findall("text")]


def test_a_failure_says_where_first_and_marks_the_divergent_module(failed):
    page = Page(html_page(failed))
    words = page.words
    assert "FAIL. Not the same function. First differs at blocks.0.mlp phase forward gap" in words
    assert failed.divergence.detail in words
    order = "First differs at", "Levels", "What did not pass", "Gap of every module", "Environment"
    places = [words.index(heading) for heading in order]
    assert places == sorted(places)
    bad = next(record for level in failed.levels for record in level.unpassed)
    assert f"logits FAIL {bad.name} float64 max abs" in words
    assert "Losses" not in words and "Tokens" not in words, "blocked levels have seen nothing"
    (drawing,) = plots(html_page(failed))
    assert [text.text for text in drawing.findall("text[@class='named']")] == ["blocks.0.mlp"]
    ring = drawing.find("circle[@class='ring']")
    circles = drawing.findall("circle[title]")
    dots = {circle.find("title").text.partition(":")[0]: circle for circle in circles}
    divergent = dots["blocks.0.mlp"]
    assert (ring.get("cx"), ring.get("cy")) == (divergent.get("cx"), divergent.get("cy"))
    assert divergent.get("class") == "dot off"
    assert dots["blocks.0.mlp.up"].get("class") == dots["blocks.0.attention"].get("class") == "dot"


def test_the_plot_is_of_the_probe_that_failed(small):
    """A side that is wrong only on the second probe."""
    pair = small()

    def forward(module, tokens, *rest):
        logits = pair.torch.forward(module, tokens, *rest)
        return logits + 1.0 if tokens.shape[1] == 47 else logits

    wrong = dataclasses.replace(pair, torch=dataclasses.replace(pair.torch, forward=forward))
    found = check(wrong, levels=["logits"], dtypes=("float64",), plot_data=True)
    assert found.verdict is Verdict.FAIL and found.plot_data.modules.probe == "context - 1"


def test_losses_and_margins_are_drawn_in_every_dtype(passed):
    _, *curves, greedy, drawn = plots(html_page(passed))
    assert [x.find("title").text for x in curves] == ["Losses in float64", "Losses in float32"]
    for drawing, seen in zip(curves, passed.plot_data.losses, strict=True):
        assert len(seen.flax) == len(seen.torch) == HORIZON and seen.flax != seen.torch
        for side in ("flax", "torch"):
            assert drawing.find(f"path[@class='line {side}']").get("d").count("L") == HORIZON - 1
        assert drawing.find("path[@class='dots']").get("d").count("M") == HORIZON
    for drawing, seen in zip((greedy, drawn), passed.plot_data.generations, strict=True):
        assert list(seen.reach) == ["float64", "float32"]
        rows = drawing.findall("path[@class='dots light']")
        assert [row.get("d").count("M") for row in rows] == [16] * 4
        limits = drawing.findall("path[@class='rule limit']")
        lines = [re.match(r"M\S+ (\S+)H", limit.get("d"))[1] for limit in limits]
        lowest = max(float(y) for row in rows for y in re.findall(r" ([\d.]+)h", row.get("d")))
        assert all(float(line) > lowest for line in lines), "what rounding reaches is below"
        smallest = min(map(min, seen.margins))
        assert drawing.find("desc").text == f"The smallest margin is {number(smallest)}."


def test_nothing_is_kept_that_was_not_asked_for(small, passed):
    plain = check(small(), levels=["weights", "logits"], dtypes=("float64",))
    assert plain.plot_data is None and json.loads(plain.to_json())["evidence"] is None
    page = Page(html_page(plain))
    assert "svg" not in page.tags
    assert not [section for section in SECTIONS if section in page.words]
    document = json.loads(passed.to_json())["evidence"]
    assert len(document["modules"]["gaps"]) == len(passed.plot_data.modules.gaps) > 20
    assert len(document["losses"][1]["torch"]) == HORIZON
    assert document["generations"][0]["tokens"] == passed.plot_data.generations[0].tokens


def test_a_capture_that_fails_is_told_and_changes_no_verdict(small, monkeypatch):
    def broken(subject, batch):
        raise RuntimeError("no <hook> fits")

    monkeypatch.setattr("parity.check.check.gaps_by_module", broken)
    found = check(small(), levels=["weights", "logits"], dtypes=("float64",), plot_data=True)
    assert found.verdict is Verdict.PASS
    page = html_page(found)
    assert re.search(r"RuntimeError at test_page\.py:\d+: no &lt;hook&gt; fits", page)
    assert plots(page) == []


def test_the_page_stands_alone_and_escapes_what_it_is_told(passed):
    name = "a<b>&\"c'"
    seen = PlotData(ModuleGaps(name, ((name, 1.0), ("x", 0.0)), 1e-12))
    bad = judge(name, "float64", "max_abs", 1.0, 1e-12, 1, note=name).at(name)
    level = Level("logits", 1.0, (bad, judge("x", "float64", "max_abs", 0.0, 1.0, 1, note=name)))
    found_at = Divergence(name, "forward", 0, 1.0, name, name)
    made = Report({"python": name}, SUBJECT | {"torch": name}, (level,), found_at, seen)
    for text in (html_page(made), html_page(passed)):
        assert not re.search(r"https?:|//\w|url\(|@import", text)
        page = Page(text)
        assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
        keys = {key for key, _ in page.attributes}
        assert not {"src", "href", "style", "onclick"} & keys
        assert dict(page.attributes)["charset"] == "utf-8"
        plots(text)
    assert Page(html_page(made)).words.count(name) > 10
    drawing = plots(html_page(made))[0]
    assert drawing.find("text[@class='named']").text == name
    assert f"First to diverge: {name}." in drawing.find("desc").text


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0, 5e-324, 1e308])
def test_numbers_that_have_no_place_break_no_plot(odd):
    found_at = Divergence("m", "forward", 0, odd)
    for others in ([], [1e-15, 2.0]):
        values = (odd, *others, odd)
        curve = LossCurves("float64", values, values[::-1], 1e-12)
        tokens = Generation(
            "greedy", [list(range(len(values)))], [list(values)], {"float32": odd},
            [Flip("run", "float32", 0, 1)],
        )  # fmt: skip
        gaps = tuple((f"m{'.1' * n}", value) for n, value in enumerate(values))
        seen = PlotData(ModuleGaps("probe", gaps, 1e-12), [curve], [tokens])
        page = html_page(report(Level("a", 1.0, (GOOD,)), divergence=found_at, plot_data=seen))
        assert len(plots(page)) == 3


def test_what_holds_no_number_is_not_drawn():
    empty = PlotData(
        ModuleGaps("probe", (), 1e-12), [LossCurves("float64", (), (), 1e-12)],
        [Generation("greedy", [[], []], [[], []], {"float64": 0.0})],
    )  # fmt: skip
    page = html_page(report(Level("a", 1.0, (GOOD,)), plot_data=empty))
    assert plots(page) == [] and "There are none to draw." in page and "Losses" not in page


def test_a_flip_is_ringed_and_told_in_its_row():
    tokens = Generation(
        "greedy", [[1, 2], [3, 4]], [[1.0, 0.5], [0.25, 2.0]], {"float32": 1e-5},
        [Flip("torch_gpt, cached", "float32", 1, 0)],
    )  # fmt: skip
    made = report(Level("tokens", 1.0, (GOOD,)), plot_data=PlotData(generations=[tokens]))
    (drawing,) = plots(html_page(made))
    (ring,) = drawing.findall("circle[@class='ring']")
    words = "torch_gpt, cached, float32: row 1 flips at token 1"
    assert ring.find("title").text == words
    rows = re.findall(r"<tr><td>\d</td>.*?</tr>", html_page(made), re.DOTALL)
    assert "none" in rows[0] and "torch_gpt, cached, float32: token 1" in rows[1]
    assert "0.50" in rows[0] and "0.25" in rows[1]


def test_what_failed_is_listed_up_to_some_dozens_and_then_counted():
    bad = [judge(f"leaf {n}", "float32", "max_abs", 1.0, 0.5, 1) for n in range(SHOWN + 12)]
    page = Page(html_page(report(Level("a", 1.0, tuple(bad)), Level("b", 0.0, (), blocked=True))))
    assert f"leaf {SHOWN - 1}" in page.words and f"leaf {SHOWN} " not in page.words
    assert "And 12 more." in page.words and "BLOCKED" in page.words
    few = Page(html_page(report(Level("a", 1.0, tuple(bad[:SHOWN])))))
    assert "more." not in few.words


def test_an_error_is_told_in_its_own_words():
    error = Record("logits", "", "ran", None, None, 0, Verdict.ERROR, note="RuntimeError: boom")
    words = Page(html_page(report(Level("logits", 1.0, (error,))))).words
    assert "ERROR. The check did not run to its end." in words and "RuntimeError: boom" in words


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0], [1.0, 1.0 + 2e-16], [-3.0, 7.5], [1e-9, 4e5], [math.nan, 2.0], [0, 99.5]],
)
def test_axes_hold_every_value_between_round_numbers(values):
    for scale in (linear_scale(values), log_scale(values)):
        places = [place for place, _ in scale.ticks]
        assert places == sorted(set(places)) and 2 <= len(places) <= 9
        assert scale.low <= places[0] and places[-1] <= scale.high
        assert all(0 <= scale.share(x) <= 1 for x in values if math.isfinite(x))
    assert [label for _, label in linear_scale([1, 99]).ticks] == "0 20 40 60 80 100".split()
    assert log_scale([1e-3, 0.5]).share(1e-2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_zero_and_what_is_no_number_lie_apart_from_all_numbers_and_are_named(odd):
    scale = log_scale([1e-3, 0.0, 1.0, odd])
    assert scale.share(0.0) == 0 < scale.share(1e-3) < scale.share(1.0) < scale.share(odd) == 1
    assert (scale.ticks[0][1], scale.ticks[-1][1]) == ("0", "inf, nan")
    assert math.isnan(linear_scale([1.0, odd]).share(odd))
