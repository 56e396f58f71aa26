"""When a flipped token is a tie."""

import math

import pytest

from parity.check.bounds import DRAW
from parity.check.ties import overturned, verdict_of_flip
from parity.report.record import Verdict


def test_two_logits_trade_places_when_they_are_less_than_two_errors_apart():
    assert overturned(1e-6) == 2e-6
    assert verdict_of_flip(2e-6, 1e-6) is Verdict.TIE
    assert verdict_of_flip(2.1e-6, 1e-6) is Verdict.FAIL


def test_a_draw_adds_its_own_noise_and_divides_errors_by_the_temperature():
    assert overturned(1e-6, temperature=0.5) == pytest.approx(2 * (2e-6 + DRAW))
    assert verdict_of_flip(9e-6, 1e-6, temperature=0.5) is Verdict.TIE
    assert verdict_of_flip(9e-6, 1e-6) is Verdict.FAIL


def test_noise_past_its_bound_excuses_nothing():
    assert verdict_of_flip(0.0, 1.1e-4, bound=1e-4) is Verdict.FAIL


@pytest.mark.parametrize("margin, noise", [(math.nan, 1.0), (0.0, math.nan)])
def test_nan_is_no_excuse(margin, noise):
    assert verdict_of_flip(margin, noise) is Verdict.FAIL
