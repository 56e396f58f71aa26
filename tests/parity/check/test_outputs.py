"""Outputs of any kind are compared leaf by leaf; each rule has a fault and a clean control."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, struct
from jax.lax import stop_gradient

from parity import ModuleUse, check_pair
from parity.check.outputs import paired
from parity.report.record import Verdict

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
MANY = np.random.default_rng(0).normal(size=(4000, 4))
PASS, FAIL = "PASS", "FAIL"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(x)


class Port(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


class Named(NamedTuple):
    a: object
    b: object


@dataclasses.dataclass
class Data:
    a: object
    b: object


@struct.dataclass
class Struct:
    a: object
    b: object


class Cache:
    """No tree."""


def compare(torch_output, flax_output, inputs=X, levels=("logits",)):
    """Check two modules that give these functions of one linear layer and an array library."""
    uses = dict(
        torch=ModuleUse(call=lambda module, x: torch_output(module(x), torch)),
        flax=ModuleUse(call=lambda module, x: flax_output(module(x), jnp)),
    )
    return check_pair(Net(), Port(), inputs, levels=levels, **uses)


def both(output):
    return output, output


TREES = {
    "a data class and a dict": (lambda h, n: Data(h, h + 1), lambda h, n: {"a": h, "b": h + 1}),
    "a named tuple and a struct": (lambda h, n: Named(h, -h), lambda h, n: Struct(h, -h)),
    "names and positions": (lambda h, n: {"x": h, "y": h.sum(0)}, lambda h, n: (h, h.sum(0))),
    "one array and a tuple of one": (lambda h, n: (h,), lambda h, n: h),
    "lists and tuples": (lambda h, n: [h, (h, [-h])], lambda h, n: (h, [h, (-h,)])),
    "a generator": (lambda h, n: (x for x in (h, -h)), lambda h, n: (h, -h)),
    "dicts of any order and keys": (
        lambda h, n: {"b": h, 1: -h, (2, "c"): h},
        lambda h, n: {1: -h, "b": h, (2, "c"): h},
    ),
    "sets and numbers": (
        lambda h, n: (h, {1, 2}, h.numel() / 10),
        lambda h, n: (h, {2, 1}, h.size / 10),
    ),
    "NumPy": (lambda h, n: (h, h.detach().numpy()), lambda h, n: (h, h)),
    "texts": both(lambda h, n: (h, "logits", {"b", "a"})),
    "None": both(lambda h, n: {"a": h, "b": None}),
    "complex": (lambda h, n: torch.fft.fft(h), lambda h, n: jnp.fft.fft(h)),
    "integers and booleans": both(lambda h, n: (h, h.argmax(-1), h > 0)),
    "floats and integers": (lambda h, n: (h, (h > 0).sum()), lambda h, n: (h, (h > 0).sum() / 1)),
    "large": both(lambda h, n: 1e6 * h),
    "small": both(lambda h, n: 1e-9 * h),
    "a scalar": both(lambda h, n: h.sum()),
}


@pytest.mark.parametrize("name", TREES)
def test_equal_leaves_pass_whatever_holds_them(name):
    report = compare(*TREES[name])
    assert report.verdict == PASS, report


FAULTS = {
    "a": (lambda h, n: Data(h, h), lambda h, n: {"a": h + 1e-6, "b": h}),
    "a.1": (lambda h, n: {"a": (h, h)}, lambda h, n: {"a": (h,)}),
    "b": (lambda h, n: {"a": h, "b": None}, lambda h, n: {"a": h, "b": h}),
    "1": (lambda h, n: (h, 3), lambda h, n: (h, 4)),
    "1.0": (lambda h, n: (h, {1, 2}), lambda h, n: (h, {0, 2})),
    "x.y": (lambda h, n: {"x": {"y": h > 0}}, lambda h, n: {"x": {"y": h > 1}}),
    "2": (lambda h, n: (h, h, h[:, :1]), lambda h, n: (h, h, h[:, 0])),
    "name": (lambda h, n: {"h": h, "name": "a"}, lambda h, n: {"h": h, "name": "b"}),
    "nan": (lambda h, n: {"nan": n.where(h > 1, n.nan, h)}, lambda h, n: {"nan": h}),
    "small": (lambda h, n: {"small": 1e-9 * h}, lambda h, n: {"small": 1.00001e-9 * h}),
    "large": (lambda h, n: {"large": 1e6 * h}, lambda h, n: {"large": 1e6 * h + 0.01}),
    "imaginary": (
        lambda h, n: {"imaginary": torch.fft.fft(h)},
        lambda h, n: {"imaginary": jnp.fft.fft(h).conj()},
    ),
    "swapped": (
        lambda h, n: {"swapped": h, "a": -h},
        lambda h, n: {"a": h, "swapped": -h},
    ),
    "rounded": (lambda h, n: {"rounded": n.round(9 * h)}, lambda h, n: {"rounded": n.floor(9 * h)}),
}


@pytest.mark.parametrize("path", FAULTS)
def test_a_leaf_that_differs_or_is_on_one_side_alone_fails_at_its_path(path):
    report = compare(*FAULTS[path])
    failed = [x for x in report.levels[0].records if x.verdict is Verdict.FAIL]
    assert report.exit_code == 1 and failed[0].where == path
    assert failed[0].name.startswith("inputs, output")
    assert path in f"{report.divergence.where} {report.divergence.detail}"


def test_what_is_paired_by_its_order_is_said():
    record = compare(*TREES["names and positions"]).levels[0].records[0]
    assert record.note == "paired by their order: flax 0 as torch x, flax 1 as torch y"


def test_what_is_no_array_is_named_and_an_output_of_nothing_else_is_an_error():
    report = compare(*both(lambda h, n: {"y": h, "past": Cache()}))
    assert report.verdict == PASS and "past (Cache)" in report.levels[0].records[0].note
    for output in (lambda h, n: Cache(), lambda h, n: None):
        assert compare(*both(output)).exit_code == 2


def test_equal_infinities_and_nan_are_equal_and_their_gradient_is_not_judged():
    output = both(lambda h, n: n.where(h > 1, n.nan * h, h))
    report = compare(*output, levels=("logits", "gradients", "optimizer"))
    notes = [record.note or "" for level in report.levels for record in level.records]
    verdicts = [level.verdict for level in report.levels]
    assert verdicts == [Verdict.PASS, Verdict.ABSTAIN, Verdict.ABSTAIN], report
    assert "NaN on both sides in the same places" in notes[0]
    assert any("not finite on both sides" in note for note in notes)
    masked = both(lambda h, n: n.where(n.arange(5) > 3, -n.inf, h))
    assert compare(*masked, levels=("logits", "gradients")).verdict == PASS


def test_an_output_without_floats_has_no_gradient_and_an_empty_one_only_a_shape():
    levels = ("logits", "gradients", "optimizer")
    report = compare(*both(lambda h, n: h.argmax(-1)), levels=levels)
    verdicts = [level.verdict for level in report.levels]
    assert verdicts == [Verdict.PASS, Verdict.ABSTAIN, Verdict.ABSTAIN], report
    report = compare(*both(lambda h, n: h), inputs=X[:0], levels=levels)
    assert report.exit_code == 0 and report.levels[0].verdict is Verdict.ABSTAIN


def test_steps_choices_and_cancellation_raise_no_alarm_in_float32():
    rounded = compare(*both(lambda h, n: n.round(300 * h)), inputs=MANY)
    chosen = compare(*both(lambda h, n: n.floor(1000 * h)), inputs=MANY)
    centred = compare(
        lambda h, n: (h - h.mean(-1, keepdim=True)).sum(-1),
        lambda h, n: (h - h.mean(-1, keepdims=True)).sum(-1),
    )
    assert rounded.ok and chosen.ok and centred.ok, (rounded, chosen, centred)
    assert any(record.verdict is Verdict.TIE for record in rounded.levels[0].records)


def test_a_gradient_is_taken_of_leaves_that_both_sides_derive():
    output = lambda h, n: (h, float(h.detach().sum()))  # noqa: E731
    report = compare(output, lambda h, n: (h, h.sum()), levels=("logits", "gradients"))
    assert report.verdict == PASS, report


@pytest.mark.parametrize(
    ("flax", "torch", "paths"),
    [
        (["0", "1"], ["logits", "past"], [("0", "logits"), ("1", "past")]),
        (["0.x", "1"], ["a.x", "b"], [("0.x", "a.x"), ("1", "b")]),
        (["a"], ["b"], [("", "b"), ("a", "")]),
        ([""], ["a", "b"], [("", "a"), ("", "b")]),
        (["b", "a"], ["a", "b"], [("a", "a"), ("b", "b")]),
    ],
)
def test_leaves_are_paired_by_path_and_positions_by_order(flax, torch, paths):
    sides = ({path: np.zeros(2) for path in side} for side in (flax, torch))
    assert [(leaf.flax_path, leaf.torch_path) for leaf in paired(*sides)] == paths


def test_a_batch_of_another_size_is_tried_where_both_modules_take_it():
    name = "inputs, another batch size"
    for output, is_tried in ((lambda h, n: h, True), (lambda h, n: h.reshape(6, 5), False)):
        report = compare(*both(output))
        assert report.ok and (name in {x.name for x in report.levels[0].records}) is is_tried
    report = compare(lambda h, n: h, lambda h, n: h[:5] if len(h) != 6 else h)
    assert report.ok and report.levels[0].verdict == "PASS"
    report = compare(lambda h, n: h, lambda h, n: h[:3] if len(h) != 6 else h)
    assert report.ok and "a number of rows is fixed" in str(report)
    report = compare(lambda h, n: h, lambda h, n: h * (1.0 if len(h) == len(X) else 1.001))
    failed = [x for x in report.levels[0].records if x.verdict is Verdict.FAIL]
    assert report.exit_code == 1 and failed[0].name == name
    assert report.divergence.where == "Net"


def test_outputs_that_no_weight_moves_are_not_compared_in_silence():
    report = compare(*both(lambda h, n: 0.0 * h), levels=("gradients", "trajectory"))
    gradients, _ = report.levels
    assert gradients.verdict == "ABSTAIN" and "no weight moves an output" in str(report)
    report = compare(lambda h, n: h, lambda h, n: stop_gradient(h), levels=("gradients",))
    assert report.exit_code == 1 and "no weight moves" not in str(report)


def test_losses_of_large_outputs_are_judged_by_their_size():
    report = compare(*both(lambda h, n: 1e6 * h), levels=("optimizer", "trajectory"))
    assert report.ok, report


def test_what_computes_in_16_bits_in_places_is_decided_by_float64():
    def net(h, n):
        with torch.autocast("cpu", torch.bfloat16):
            return (h @ torch.eye(5)).float()

    report = compare(net, lambda h, n: h, levels=("logits", "gradients"))
    assert report.ok and "computed in bfloat16 in places" in str(report.to_json())
    report = compare(net, lambda h, n: 1.0001 * h)
    assert report.exit_code == 1
