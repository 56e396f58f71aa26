"""JSON of numbers that JSON does not know."""

import json
import math

from parity.report.json import to_json

DOCUMENT = {"a": [1.5, math.nan], "b": (math.inf, {"c": -math.inf}), "d": "nan", "e": None}


def test_numbers_that_are_not_finite_become_text_or_null():
    same = {"d": "nan", "e": None}
    text = {"a": [1.5, "nan"], "b": ["inf", {"c": "-inf"}]}
    assert json.loads(to_json(DOCUMENT)) == text | same
    null = {"a": [1.5, None], "b": [None, {"c": None}]}
    assert json.loads(to_json(DOCUMENT, as_null=True)) == null | same


def test_a_row_of_metrics_is_one_line():
    assert to_json({"step": 1, "loss": math.nan}, indent=None, as_null=True) == (
        '{"step": 1, "loss": null}\n'
    )
