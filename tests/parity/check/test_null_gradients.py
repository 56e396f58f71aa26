"""Null directions are found by both gradients and named once per kind."""

import numpy as np

from parity.check.null_gradients import NullDirections, kinds_of, null_leaves

RNG = np.random.default_rng(0)
ZERO = 1e-12


def gradients(**leaves: np.ndarray) -> dict[str, np.ndarray]:
    return {"kernel": RNG.normal(size=(4, 3))} | leaves


def test_a_leaf_is_null_only_where_both_frameworks_have_rounding():
    rounding, number = np.full(3, 1e-17), np.ones(3)
    both = gradients(bias=rounding), gradients(bias=rounding)
    assert null_leaves(both, ZERO) == ("bias",)
    assert null_leaves((gradients(bias=rounding), gradients(bias=number)), ZERO) == ()


def test_a_mean_that_vanishes_along_an_axis_is_a_null_direction():
    centred = RNG.normal(size=(4, 3))
    centred -= centred.mean(axis=1, keepdims=True)
    found = NullDirections.find(gradients(out=centred), gradients(out=centred.copy()), ZERO)
    assert found.leaves == () and found.means == (("out", 1),)
    assert str(found) == "the mean over axis 1 of out"


def test_nan_is_not_null():
    bad = gradients(bias=np.full(3, np.nan))
    assert null_leaves((bad, bad), ZERO) == ()


def test_layers_of_one_kind_are_named_once():
    names = ["blocks.0.bias", "blocks.11.bias", "head.bias"]
    assert kinds_of(names) == ["blocks.*.bias", "head.bias"]
