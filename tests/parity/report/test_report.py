"""The report as a value: verdicts, exit codes, JSON, and files that are whole or not there."""

import io
import json
import math

import pytest
from rich.console import Console

from parity.report import Divergence, Level, Report
from parity.report.record import Record, Verdict, judge

SUBJECT = {"torch": "torch_gpt", "flax": "flax_gpt", "num_params": 7, "config": {}}
GOOD = judge("probe", "float64", "max_abs", 3.1e-15, 1e-12, 100)
CLOSE = judge("other", "float64", "max_abs", 9e-13, 1e-12, 50)
BAD = judge("probe", "float32", "error_ratio", math.nan, 4.0, 100, note="a reason")


def report(*levels: Level, divergence=None) -> Report:
    """A report of these levels."""
    return Report({"python": "3"}, SUBJECT, levels, divergence)


def test_exit_codes_tell_equal_from_different_from_broken():
    error = Record("x", "", "ran", None, None, 0, Verdict.ERROR, note="boom")
    abstain = Record("x", "", "ran", None, None, 0, Verdict.ABSTAIN, note="no decoder")
    assert report(Level("a", 1.0, (GOOD,))).exit_code == 0
    assert report(Level("a", 1.0, (GOOD,)), Level("b", 1.0, (abstain,))).exit_code == 0
    assert report(Level("a", 1.0, (GOOD, BAD)), Level("b", 0.0, (), blocked=True)).exit_code == 1
    assert report(Level("a", 1.0, (GOOD, error))).exit_code == 2
    assert report(Level("a", 1.0, ())).exit_code == 2, "nothing was compared"
    assert report(Level("a", 1.0, (abstain,))).exit_code == 2, "nothing could be compared"
    assert report().exit_code == 2


def test_json_has_the_schema_and_holds_nan():
    parted = Divergence("blocks.1.mlp", "forward", 0, math.inf)
    made = report(Level("logits", 2.123456, (GOOD, BAD)), divergence=parted)
    document = json.loads(made.to_json(), parse_constant=pytest.fail)
    assert list(document) == [
        "schema", "verdict", "environment", "subject", "levels", "divergence", "evidence",
    ]  # fmt: skip
    assert document["schema"] == 1 and document["verdict"] == "FAIL"
    (level,) = document["levels"]
    assert (level["name"], level["verdict"], level["seconds"]) == ("logits", "FAIL", 2.123)
    assert level["records"][0] == {
        "name": "probe", "dtype": "float64", "metric": "max_abs", "value": 3.1e-15, "bound": 1e-12,
        "count": 100, "verdict": "PASS", "noise": None, "note": None, "where": "", "step": 0,
    }  # fmt: skip
    assert level["records"][1]["value"] == "nan"
    assert document["divergence"]["where"] == "blocks.1.mlp"
    assert document["divergence"]["value"] == "inf" and document["divergence"]["cause"] is None
    assert document["evidence"] is None


def test_a_level_shows_what_failed_or_what_came_closest_to_failing():
    assert Level("a", 1.0, (GOOD, CLOSE)).headline("float64") is CLOSE
    assert Level("a", 1.0, (GOOD, BAD)).headline("float32") is BAD
    assert Level("a", 1.0, (GOOD,)).headline("float32") is None


def test_the_table_fits_a_terminal_and_names_what_failed():
    parted = Divergence("blocks.1.mlp", "forward", 0, 1.3e-3, "matches with the exact GELU")
    made = report(
        Level("logits", 2.0, (GOOD, BAD)), Level("cache", 0.0, (), blocked=True), divergence=parted
    )
    console = Console(width=80, file=io.StringIO())
    console.print(made)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for words in ("FAIL", "BLOCKED", "a reason", "blocks.1.mlp", "exact GELU", "nan"):
        assert words in text


def test_markdown_has_one_row_per_level():
    made = report(Level("logits", 2.0, (GOOD, CLOSE)), Level("cache", 1.0, (GOOD,)))
    lines = made.to_markdown().splitlines()
    assert len(lines) == 4 and "9e-13 (1e-12)" in lines[2] and lines[3].startswith("| cache |")
