"""Metrics and verdicts: what a comparison may and may not pass."""

import math

import numpy as np
import pytest

from parity.check.metrics import (
    different_bits,
    error_ratio,
    largest,
    max_abs,
    relative_l2,
    rms_error,
)
from parity.report.record import Verdict, judge, worst


def test_a_value_at_the_bound_passes_and_one_above_fails():
    assert judge("x", "float64", "max_abs", 1e-12, 1e-12, 5).verdict is Verdict.PASS
    assert judge("x", "float64", "max_abs", 1.1e-12, 1e-12, 5).verdict is Verdict.FAIL


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_never_passes(value):
    assert judge("x", "float64", "max_abs", value, 1e-12, 5).verdict is Verdict.FAIL


def test_nothing_compared_is_an_error_and_not_a_pass():
    record = judge("x", "float64", "max_abs", 0.0, 1e-12, 0)
    assert record.verdict is Verdict.ERROR and record.note == "nothing was compared"
    assert worst([]) is Verdict.ERROR


def test_the_worst_verdict_wins():
    assert worst([Verdict.PASS, Verdict.TIE]) is Verdict.TIE
    assert worst([Verdict.FAIL, Verdict.PASS, Verdict.ABSTAIN]) is Verdict.FAIL
    assert worst([Verdict.FAIL, Verdict.ERROR]) is Verdict.FAIL


@pytest.mark.parametrize("metric", [max_abs, relative_l2, rms_error])
def test_every_metric_sees_one_nan_and_a_wrong_shape(metric):
    a = np.array([1.0, 2.0, 3.0])
    assert math.isnan(metric(a, np.array([1.0, np.nan, 3.0])))
    assert math.isnan(metric(np.full(3, np.inf), np.full(3, np.inf)))
    assert metric(a, a[:, None]) == math.inf


def test_metrics_do_not_cancel_signed_differences():
    a, b = np.zeros(2), np.array([1.0, -1.0])
    assert max_abs(a, b) == 1.0 and rms_error(a, b) == 1.0 and relative_l2(a, b) == 1.0
    assert relative_l2(a, a) == 0.0


def test_narrow_types_are_compared_without_rounding_them_first():
    a = np.array([1.0], np.float32)
    assert max_abs(a, np.array([1.0 + 1e-9])) == pytest.approx(1e-9, rel=1e-6)


def test_bits_tell_zero_from_minus_zero_and_a_nan_from_another():
    zeros = np.array([0.0, -0.0])
    assert different_bits(zeros, np.zeros(2)) == 1
    nan = np.array([np.nan])
    assert different_bits(nan, nan.copy()) == 0
    assert different_bits(nan, (nan.view("u8") + 1).view("f8")) == 1
    assert different_bits(zeros, zeros.astype(np.float32)) == 2


def test_the_error_ratio_is_fair_whichever_side_is_worse():
    truth = np.linspace(1.0, 2.0, 100)
    good = (truth + 1e-6).astype(np.float32)
    bad = (truth + 1e-5).astype(np.float32)
    assert error_ratio(good, bad, truth) == error_ratio(bad, good, truth)
    assert 9 < error_ratio(good, bad, truth) < 11


def test_two_errors_below_rounding_are_a_fair_draw():
    truth = np.linspace(1.0, 2.0, 100)
    assert error_ratio(truth.astype(np.float32), truth + 1e-16, truth) == 1.0


def test_a_nan_on_either_side_is_no_fair_draw():
    truth = np.linspace(1.0, 2.0, 100)
    good, bad = truth.astype(np.float32), np.full(100, np.nan, np.float32)
    assert math.isnan(error_ratio(good, bad, truth)) and math.isnan(error_ratio(bad, good, truth))


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_nan_is_the_largest_wherever_it_stands(order):
    values = dict(zip("ab", order, strict=True))
    assert math.isnan(values[largest(values)])
