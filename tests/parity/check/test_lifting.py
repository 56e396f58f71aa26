"""Models that compute narrower inside are decided in float64; the report says what was lifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.check.modules import check_pair
from parity.report.record import IMPURE, Verdict

ROOT = 7**0.5


@torch.library.custom_op("parity_test::third", mutates_args=())
def third(x: torch.Tensor) -> torch.Tensor:
    """Divide by three in float32, the only type that is taken."""
    assert x.dtype == torch.float32
    return x / 3


third.register_autograd(lambda context, gradient: gradient / 3)


class Net(torch.nn.Module):
    """Norms in float32, and a factor that is held in float32; with a third, refuses float64."""

    def __init__(self, factor: float, with_third: bool = False):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(11, 7), torch.nn.Linear(7, 5)
        self.register_buffer("scale", torch.tensor(factor), persistent=False)
        self.with_third = with_third

    def forward(self, ids):
        x = self.embed(ids)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.with_third:
            y = third(y)
        return self.head(y.to(x.dtype) * self.scale.to(x.dtype))


class Port(nnx.Module):
    """The same, with the factor in the type of the run."""

    def __init__(self, epsilon: float = 1e-5, share: float = 1.0, square=7.0):
        self.embed = nnx.Embed(11, 7, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(7, 5, rngs=nnx.Rngs(0))
        self.epsilon, self.share, self.square = epsilon, share, square

    def __call__(self, ids):
        x = self.embed(ids)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + self.epsilon)
        return self.head((y * self.share).astype(x.dtype) * jnp.sqrt(self.square))


def _checked(net: Net, port: Port, dtypes=("float64",)):
    ids = np.arange(12).reshape(3, 4) % 11
    return check_pair(net, port, ids, levels=("logits",), dtypes=dtypes)


def _notes(report) -> str:
    return " ".join(record.note or "" for record in report.levels[0].records)


def test_a_right_pair_passes_by_what_rounding_did_to_its_constant_and_says_so():
    report = _checked(Net(ROOT), Port())
    assert report.ok, report
    first = report.levels[0].records[0]
    assert 1e-12 < first.gap < first.bound < 1e-5 and first.noise > 1e-9
    assert "rounding of float32 constant scale at Net.forward" in first.note
    notes = _notes(report)
    assert notes.count("Net (torch) computes narrower, lifted: float32 ") == 1
    assert "float32 cast at Net.forward (test_lifting.py:" in notes
    assert "float32 cast at Port.__call__ (test_lifting.py:" in notes


@pytest.mark.parametrize(
    "net, port, cause",
    [
        (Net(ROOT * 1.001), Port(), None),
        (Net(2.0), Port(1e-6, square=4.0), "eps=1e-06"),
        (Net(ROOT), Port(1e-6), "eps=1e-06"),
    ],
    ids=["constant", "epsilon", "epsilon beside a constant"],
)
def test_a_wrong_constant_and_a_wrong_epsilon_under_a_cast_fail(net, port, cause):
    report = _checked(net, port)
    assert report.verdict is Verdict.FAIL
    assert cause is None or cause in (report.divergence.cause or "")


def test_a_held_constant_draws_no_blame_from_the_module_that_is_wrong():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.tensor(ROOT), persistent=False)

        def forward(self, x):
            return x * self.factor

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.scale = torch.nn.Embedding(11, 7), Scale()
            self.norm, self.head = torch.nn.LayerNorm(7, eps=1e-5), torch.nn.Linear(7, 5)

        def forward(self, ids):
            return self.head(self.norm(self.scale(self.embed(ids))))

    class PortScale(nnx.Module):
        def __call__(self, x):
            return x * jnp.sqrt(7.0)

    class PortScaled(nnx.Module):
        def __init__(self, epsilon):
            rngs = nnx.Rngs(0)
            self.embed, self.scale = nnx.Embed(11, 7, rngs=rngs), PortScale()
            self.norm = nnx.LayerNorm(7, epsilon=epsilon, rngs=rngs)
            self.head = nnx.Linear(7, 5, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.norm(self.scale(self.embed(ids))))

    assert _checked(Scaled(), PortScaled(1e-5)).ok
    found = _checked(Scaled(), PortScaled(1e-3)).divergence
    assert found.where == "norm" and "eps=0.001" in found.cause


def test_where_an_operation_refuses_float64_float32_decides_and_its_line_is_named():
    net = Net(2.0, with_third=True)
    report = _checked(net, Port(share=1 / 3, square=4.0), ("float64", "float32"))
    assert report.ok, report
    kept = [x for x in report.levels[0].records if x.verdict is Verdict.ABSTAIN]
    assert kept and all(x.note.startswith(IMPURE) for x in kept)
    assert "float32 third at Net.forward (test_lifting.py:" in kept[0].note
    assert "beyond the rounding of float32" in report.summary
    wrong = _checked(net, Port(share=0.33, square=4.0), ("float64", "float32"))
    assert wrong.verdict is Verdict.FAIL


@pytest.mark.parametrize("epsilon, ok", [(1e-5, True), (0.1, False)])
def test_a_model_that_raises_only_lifted_runs_as_it_is_and_its_line_is_named(epsilon, ok):
    class Strict(Net):
        def forward(self, ids):
            assert self.embed(ids).float().dtype == torch.float32
            return super().forward(ids)

    report = _checked(Strict(2.0), Port(epsilon, square=4.0), ("float64", "float32"))
    assert report.ok is ok, report
    assert "AssertionError at Strict.forward (test_lifting.py:" in _notes(report)


def test_models_of_16_bits_are_judged_by_ratio_and_it_is_said():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 5, dtype=torch.bfloat16)

        def forward(self, x):
            return self.linear(x).tanh()

    class HalfPort(nnx.Module):
        def __init__(self):
            kind = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0), **kind)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    x = np.random.default_rng(0).normal(size=(4, 6))
    report = check_pair(Half(), HalfPort(), x, levels=("logits",))
    assert report.ok, report
    halves = [x for x in report.levels[0].records if x.dtype == "bfloat16"]
    assert halves and halves[0].metric == "error_ratio" and "in bfloat16" in halves[0].note
