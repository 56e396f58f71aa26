"""An examination as a value: its order, where it stops, and how it is told."""

import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from parity.doctor import DETECTORS, Detector, Finding, LanguageModel, examine
from parity.doctor.finding import abstain, failed, judged, passed
from parity.doctor.offers import NAMES
from parity.report.record import Verdict

PASS, FAIL, ABSTAIN, BLOCKED = Verdict.PASS, Verdict.FAIL, Verdict.ABSTAIN, Verdict.BLOCKED


class Bigram(LanguageModel):
    """A model that knows nothing and is always wrong, with no framework behind it."""

    framework, dtype, num_params = "numpy", "float64", 56
    vocab_size, context_length = 7, 12

    def __init__(self, logits=None, name="bigram"):
        self.name, self.given = name, logits

    def logits(self, tokens_BT, counts_B=None):
        return self.given(tokens_BT) if self.given else np.zeros((*tokens_BT.shape, 7))

    def weights(self):
        return {"table": np.zeros((7, 7)), "bias": np.zeros(7)}

    def with_weights(self, leaves):
        return self


def detector(name, finding, **more):
    """A question with a known answer."""
    texts = dict(asks=f"Is {name} well?", matters="It matters <much>.", remedy="Mend [it].")
    return Detector(name, lambda model: finding, **texts, **more)


def verdicts(diagnosis):
    return [x.finding.verdict for x in diagnosis.answers]


GOOD, BAD, NONE = passed("Well."), failed("Not well: 3 of 4.", 3.0, 1.0), abstain("Not asked.")


def test_every_question_is_asked_in_order_and_progress_is_told():
    asked, told = [], []

    def ask(name):
        def examine(model):
            asked.append(name)
            return GOOD

        return dataclasses.replace(detector(name, GOOD), examine=examine)

    found = examine(
        Bigram(),
        detectors=[ask(name) for name in "abcd"],
        progress=lambda name, fraction: told.append((name, fraction)),
    )
    assert asked == list("abcd") and told == [("a", 0.0), ("b", 0.25), ("c", 0.5), ("d", 0.75)]
    assert [x.detector.name for x in found.answers] == asked and found.num_params == 56


def test_what_a_failure_makes_meaningless_is_blocked_and_nothing_else():
    questions = [
        detector("a", GOOD),
        detector("b", BAD),
        detector("c", BAD, after=("a", "b")),
        detector("d", GOOD, after=("c",)),
        detector("e", BAD, after=("a",)),
        detector("f", GOOD, after=("d",)),
    ]
    found = examine(Bigram(), detectors=questions)
    # What was blocked blocks nothing: it was not seen to fail.
    assert verdicts(found) == [PASS, FAIL, BLOCKED, PASS, FAIL, PASS]
    assert found.answers[2].finding.sentence == "Means nothing while b fails."
    assert found.fired == ("b", "e")
    whole = examine(Bigram(), detectors=questions, stop_early=False)
    assert verdicts(whole) == [PASS, FAIL, FAIL, PASS, FAIL, PASS]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_the_examination(number):
    found = examine(Bigram(lambda ids: np.full((*ids.shape, 7), number)))
    assert found.fired == ("initial-loss",)
    assert set(verdicts(found)[1:]) == {BLOCKED}
    assert len(found.answers) == len(DETECTORS)


def test_a_wrong_loss_at_the_start_does_not():
    large = np.random.default_rng(0).normal(0.0, 30.0, (1, 12, 7))
    found = examine(Bigram(lambda ids: large.repeat(len(ids), 0)[:, : ids.shape[1]]))
    assert found.fired[0] == "initial-loss" and PASS in verdicts(found)


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ((GOOD, NONE), 0),
        ((GOOD, BAD, GOOD), 1),
        ((NONE, BAD), 1),
        ((NONE, NONE), 2),
        ((), 2),
    ],
)
def test_exit_codes(findings, code):
    questions = [detector(str(number), finding) for number, finding in enumerate(findings)]
    found = examine(Bigram(), detectors=questions)
    assert found.exit_code == code
    assert ("answers are wrong" in found.summary) == (code == 1)


def test_the_summary_counts_what_was_asked_and_says_where_to_begin():
    questions = [detector("a", GOOD), detector("b", NONE), detector("c", BAD), detector("d", BAD)]
    assert examine(Bigram(), detectors=questions).summary == (
        "2 of 3 answers are wrong. Begin with c."
    )
    assert examine(Bigram(), detectors=questions[:2]).summary.startswith(
        "Nothing wrong in 1 answers."
    )


def test_the_document_for_machines_has_a_schema_and_only_numbers_that_json_has():
    questions = [
        detector("a", judged(math.nan, 1.0, "Well.", "At {value}, above {bound}.")),
        detector("b", judged(math.inf, 1.0, "Well.", "At {value}, above {bound}.")),
        detector("c", judged(0.5, 1.0, "At {value}.", "Bad.")),
        detector("d", NONE, after=("c",)),
    ]
    text = examine(Bigram(), detectors=questions).to_json()
    document = json.loads(text, parse_constant=pytest.fail)
    assert text.endswith("}\n") and document["schema"] == 1
    assert document.keys() == {"schema", "name", "framework", "num_params", "fired", "answers"}
    assert document["fired"] == ["a", "b"]
    assert [x["value"] for x in document["answers"]] == ["nan", "inf", 0.5, None]
    assert [x["bound"] for x in document["answers"]] == [1.0, 1.0, 1.0, None]
    assert document["answers"][0].keys() == {
        "detector", "verdict", "sentence", "value", "bound", "seconds"
    }  # fmt: skip
    assert document["answers"][0]["sentence"] == "At nan, above 1e+00."


def test_real_answers_become_documents_too():
    found = examine(Bigram(), stop_early=False)
    document = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert [x["verdict"] for x in document["answers"]] == verdicts(found)
    assert found.to_html().count("<section>") == len(found.fired) > 0


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_escapes_what_it_is_told():
    name = '<script>alert("1")</script> & co'
    questions = [detector("a", failed("Raised <b>Error</b>: [x].")), detector("b", GOOD)]
    page = examine(Bigram(name=name), detectors=questions).to_html()
    assert not re.search(r"https?:|//\w|url\(|@import", page)
    parsed = Page(page)
    assert parsed.open == []
    assert not parsed.tags & {"script", "link", "img", "iframe", "b"}
    assert not {"src", "href", "style", "onclick"} & {key for key, _ in parsed.attributes}
    text = "".join(parsed.text)
    for told in (
        name,
        "Raised <b>Error</b>: [x].",
        "It matters <much>.",
        "Mend [it].",
        "56 weights",
    ):
        assert told in text
    assert text.count("Mend [it].") == 1  # advice only for what failed
    assert dict(parsed.attributes)["charset"] == "utf-8"


def printed(diagnosis, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(diagnosis)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_terminal_is_told_what_was_seen_why_it_matters_and_what_to_try(width):
    questions = [
        detector("first-question", BAD),
        detector("second", GOOD, after=("first-question",)),
        detector("third", NONE),
    ]
    text = printed(examine(Bigram(name="[red]net[/red]"), detectors=questions), width)
    for told in (
        "[red]net[/red], numpy, 56 weights", "first-question", "FAIL", "not asked: second",
        "not asked: third",
        "seen: Not well: 3 of 4.", "why it matters: It matters <much>.", "try next: Mend [it].",
        "1 of 1 answers are wrong. Begin with first-question.",
    ):  # fmt: skip
        assert told in text
    assert text.count("why it matters") == 1
    assert max(map(len, text.splitlines())) <= width


def test_a_healthy_model_is_told_so_without_advice():
    text = printed(examine(Bigram(), detectors=[detector("a", GOOD)]), 80)
    assert "Nothing wrong in 1 answers" in text and "try next" not in text


def test_what_a_model_raises_is_a_finding_in_one_line():
    def examination(model):
        raise RuntimeError("shapes (3, 4) and (5,)\n  at line 7\nof the kernel " + "x" * 1000)

    question = dataclasses.replace(detector("a", GOOD), examine=examination)
    finding = examine(Bigram(), detectors=[question]).answers[0].finding
    assert finding == Finding(FAIL, "Raised RuntimeError: shapes (3, 4) and (5,)")
    question = dataclasses.replace(question, examine=lambda model: 1 / 0)
    assert question(Bigram()).sentence == "Raised ZeroDivisionError: division by zero"

    def silent(model):
        raise KeyError

    assert len(dataclasses.replace(question, examine=silent)(Bigram()).sentence) < 30


class BrokenCache(Bigram):
    ragged = bounded = False

    @property
    def decoder(self):
        return self

    def empty(self, num_rows, capacity):
        return None

    def read(self, cache, tokens_BT, counts_B=None):
        raise IndexError("index 12 is out of bounds")


def test_so_is_what_its_cache_raises():
    asked = [x for x in DETECTORS if x.name == "cached-equals-uncached"]
    found = examine(BrokenCache(), stop_early=False, detectors=asked)
    assert found.answers[0].finding.sentence == "Raised IndexError: index 12 is out of bounds"


def test_what_a_model_does_not_offer_is_not_asked():
    found = examine(Bigram(), stop_early=False)
    for answer in found.answers:
        if not isinstance(Bigram(), answer.detector.needs):
            assert answer.finding.verdict is ABSTAIN
            assert re.fullmatch(r"The model offers no .+\.", answer.finding.sentence)
            assert not any("_" in word for word in answer.finding.sentence.split())


def test_a_number_that_is_not_there_never_passes():
    assert judged(math.nan, 1.0, "", "").verdict is FAIL
    assert judged(1.0, 1.0, "", "").verdict is PASS


@pytest.mark.parametrize("question", DETECTORS, ids=lambda x: x.name)
def test_every_question_is_put_in_words(question):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", question.name)
    assert question.asks.endswith("?") and len(question.asks) <= 80
    for text in (question.matters, question.remedy):
        assert re.search(r"[.?]$", text) and "\n" not in text and "  " not in text
    assert question.needs is LanguageModel or question.needs in NAMES
    earlier = [x.name for x in DETECTORS[: DETECTORS.index(question)]]
    assert set(question.after) <= set(earlier)


def test_no_two_questions_have_a_name_in_common():
    assert len({x.name for x in DETECTORS}) == len(DETECTORS) >= 20
