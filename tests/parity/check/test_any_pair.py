"""The harness on pairs that are not the twins: what it can judge, it judges; else it says why."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.check.check import check
from parity.frameworks.batch import Batch
from parity.frameworks.spec import ModelSpec
from parity.pair.pair import Pair
from parity.report.record import Verdict
from parity.weights.layouts import Layout
from parity.weights.rules import Rule, Rules

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class FlaxNet(nnx.Module):
    def __init__(self, dtype: str):
        self.first = nnx.Linear(5, 7, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(7, 7, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return {"y": self.dropout(self.second(jnp.tanh(self.first(x))))}


class TorchNet(torch.nn.Module):
    def __init__(self, dtype: str):
        super().__init__()
        self.first = torch.nn.Linear(5, 7, dtype=DTYPES[dtype])
        self.second = torch.nn.Linear(7, 7, dtype=DTYPES[dtype])
        self.dropout = torch.nn.Dropout(0.5)
        self.slope = 1.0

    def forward(self, x):
        return {"y": self.dropout(self.second(input=torch.tanh(self.first(x) * self.slope)))}


def pair(slope: float = 1.0) -> Pair:
    """Two small nets with dropout, a dict for an output, and keyword calls on one side."""

    def build(dtype: str) -> TorchNet:
        net = TorchNet(dtype)
        net.slope = slope
        return net

    x = np.random.default_rng(0).normal(size=(3, 5))
    return Pair(
        flax=ModelSpec(
            "flax net", FlaxNet, lambda m, x: m(x)["y"], lambda m, x: (m(x)["y"] ** 2).sum()
        ),
        torch=ModelSpec(
            "torch net", build, lambda m, x: m(x)["y"], lambda m, x: (m(x)["y"] ** 2).sum()
        ),
        rules=Rules((Rule("*.weight", "*.kernel", Layout.TRANSPOSED), Rule("*.bias", "*.bias"))),
        probes={"normal": Batch((x,)), "large": Batch((10 * x,))},
        training_batch=lambda step: Batch((x,)),
    )


def test_a_pair_without_trainer_and_decoder_passes_and_abstains_there():
    report = check(pair())
    verdicts = {level.name: level.verdict for level in report.levels}
    assert [verdicts[name] for name in ("weights", "logits", "gradients")] == [Verdict.PASS] * 3
    others = ("optimizer", "trajectory", "cache", "tokens")
    assert [verdicts[name] for name in others] == [Verdict.ABSTAIN] * 4
    assert report.verdict == "PASS" and report.exit_code == 0


def test_wrong_code_between_modules_is_laid_to_the_model_that_holds_it():
    report = check(pair(slope=1.001))
    assert report.exit_code == 1
    assert report.divergence.where == "TorchNet"
    assert "before second is called" in report.divergence.detail


def test_a_side_that_gives_another_shape_differs_and_is_no_error():
    made = pair()
    short = dataclasses.replace(made.torch, forward=lambda m, x: m(x)["y"][:, :-1])
    report = check(dataclasses.replace(made, torch=short), levels=["logits"])
    assert report.levels[0].verdict is Verdict.FAIL and report.exit_code == 1


def test_what_failed_before_a_side_raised_still_differs():
    made = pair(slope=1.001)

    def forward(module, x):
        if float(abs(x).max()) > 8:
            raise RuntimeError("too large")
        return module(x)["y"]

    raising = dataclasses.replace(made.torch, forward=forward)
    report = check(dataclasses.replace(made, torch=raising), levels=["logits"])
    assert report.levels[0].records[-1].verdict is Verdict.ERROR
    assert report.levels[0].verdict is Verdict.FAIL and report.exit_code == 1


def test_float32_cannot_be_its_own_truth():
    with pytest.raises(ValueError, match="float64 is the truth that judges float32"):
        check(pair(), dtypes=("float32",))
