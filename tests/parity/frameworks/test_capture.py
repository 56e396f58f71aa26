"""Capture from outside: complete, in order, and without a trace left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.check.locate import first_divergence, float64_gap
from parity.check.metrics import max_abs
from parity.frameworks.capture import Trace
from parity.frameworks.flax.capture import backward_flax, capture_flax
from parity.frameworks.torch.capture import backward_torch, capture_torch


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(x), None


class Outer(Inner):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.parts = nnx.List([Inner(rngs), Inner(rngs)])

    def __call__(self, x):
        x, _ = super().__call__(x)
        for part in self.parts:
            x, _ = part(x)
        return x


class TorchInner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x), None


class TorchOuter(TorchInner):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([TorchInner(), TorchInner()])

    def forward(self, x):
        x, _ = super().forward(x)
        for part in self.parts:
            x, _ = part(x)
        return x


ORDER = ["linear", "parts.0.linear", "parts.0", "parts.1.linear", "parts.1", ""]


def test_both_frameworks_list_the_same_calls_in_order_of_completion():
    flax, port = Outer(nnx.Rngs(0)), TorchOuter()
    flax_traces, torch_traces = [], []
    capture_flax(flax, lambda: flax(jnp.ones((2, 4))), flax_traces.append)
    capture_torch(port, lambda: port(torch.ones(2, 4)), torch_traces.append)
    assert [trace.path for trace in flax_traces] == ORDER
    assert [trace.path for trace in torch_traces] == ORDER
    assert np.array_equal(flax_traces[0].inputs[0], np.ones((2, 4)))
    assert max_abs(flax_traces[0].output, flax_traces[1].inputs[0]) == 0


def test_capture_changes_no_result_and_restores_every_call():
    model = Outer(nnx.Rngs(0))
    calls = {cls: vars(cls)["__call__"] for cls in (Outer, Inner, nnx.Linear)}
    x = jnp.ones((2, 4))
    before = np.asarray(model(x))
    traces = []
    capture_flax(model, lambda: model(x), traces.append)
    assert np.array_equal(traces[-1].output, before)
    assert {cls: vars(cls)["__call__"] for cls in calls} == calls


def test_capture_restores_every_call_when_the_model_raises():
    model, port = Outer(nnx.Rngs(0)), TorchOuter()
    original = vars(nnx.Linear)["__call__"]
    with pytest.raises(TypeError):
        capture_flax(model, lambda: model(jnp.ones((2, 3))), [].append)
    assert vars(nnx.Linear)["__call__"] is original
    with pytest.raises(RuntimeError):
        capture_torch(port, lambda: port(torch.ones(2, 3)), [].append)
    assert not port._forward_hooks and not port.linear._forward_hooks


def test_models_that_are_merged_anew_in_every_call_are_captured():
    model = Outer(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    traces = []
    capture_flax(
        model,
        lambda: [nnx.merge(graphdef, state)(jnp.ones((2, 4))) for _ in range(2)],
        traces.append,
    )
    assert [trace.path for trace in traces] == ORDER * 2


def trace(path: str, x: float, y: float) -> Trace:
    """A call that took x and gave y."""
    return Trace(path, (np.array([x]),), np.array([y]))


def test_the_guilty_module_is_named_and_not_its_victims():
    a = [trace("p.0", 1, 2), trace("p.1", 2, 3), trace("p.2", 3, 4), trace("", 1, 4)]
    b = [trace("p.0", 1, 2), trace("p.1", 2, 9), trace("p.2", 9, 8), trace("", 1, 8)]
    found = first_divergence(a, b, float64_gap, "Model", "forward")
    assert (found.where, found.value) == ("p.1", 6.0)


def test_wrong_code_between_modules_is_laid_to_the_parent():
    a = [trace("p.0.q", 1, 2), trace("p.0.r", 2, 3), trace("p.0", 1, 3), trace("", 1, 3)]
    b = [trace("p.0.q", 1, 2), trace("p.0.r", 5, 6), trace("p.0", 1, 6), trace("", 1, 6)]
    found = first_divergence(a, b, float64_gap, "Model", "forward")
    assert found.where == "p.0" and "before p.0.r is called" in found.detail
    found = first_divergence(a[:2], b[:2], float64_gap, "Model", "forward")
    assert found.where == "Model"


def test_equal_traces_have_no_divergence_and_a_nan_is_one():
    a = [trace("p", 1, 2), trace("", 1, 2)]
    assert first_divergence(a, a, float64_gap, "Model", "forward") is None
    b = [trace("p", 1, np.nan), trace("", 1, np.nan)]
    assert first_divergence(a, b, float64_gap, "Model", "forward").where == "p"


def test_the_second_call_of_a_module_is_compared_with_the_second():
    a = [trace("p", 1, 2), trace("p", 2, 3), trace("", 1, 3)]
    b = [trace("p", 1, 2), trace("p", 2, 7), trace("", 1, 7)]
    assert first_divergence(a, b, float64_gap, "Model", "forward").value == 4.0


def twin_models() -> tuple[Outer, TorchOuter]:
    """The same weights in both."""
    flax, port = Outer(nnx.Rngs(0)), TorchOuter()
    modules = dict(nnx.iter_modules(flax))
    with torch.no_grad():
        for path, linear in port.named_modules():
            if isinstance(linear, torch.nn.Linear):
                parts = tuple(int(x) if x.isdecimal() else x for x in path.split("."))
                linear.weight.copy_(torch.from_numpy(np.array(modules[parts].kernel[...]).T))
                linear.bias.copy_(torch.from_numpy(np.array(modules[parts].bias[...])))
    return flax, port


def test_both_frameworks_pass_the_same_gradients_back_and_put_every_call_back():
    flax, port = twin_models()
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    original = vars(nnx.Linear)["__call__"]
    ours = backward_flax(flax, lambda: (flax(jnp.asarray(x)) ** 2).sum())
    theirs = backward_torch(port, lambda: (port(torch.from_numpy(x)) ** 2).sum())
    # The last to start is the first to pass a gradient back.
    order = ["parts.1.linear", "parts.1", "parts.0.linear", "parts.0", "linear", ""]
    assert [call.path for call in ours] == [call.path for call in theirs] == order
    for a, b in zip(ours, theirs, strict=True):
        for left, right in zip((a.output, *a.inputs), (b.output, *b.inputs), strict=True):
            assert np.abs(left).max() > 0 and max_abs(left, right) <= 1e-5
    assert vars(nnx.Linear)["__call__"] is original
    assert not port._forward_hooks and not port._forward_pre_hooks


def test_a_gradient_is_that_of_one_call_and_not_of_the_others_that_read_the_same():
    class Doubling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = torch.nn.ReLU(inplace=True)

        def forward(self, x):
            y = x * 1.0
            return 3 * y + self.relu(y)

    class FlaxRelu(nnx.Module):
        def __call__(self, x):
            return nnx.relu(x)

    class FlaxDoubling(nnx.Module):
        def __init__(self):
            self.relu = FlaxRelu()

        def __call__(self, x):
            return 3 * x + self.relu(x)

    port, flax = Doubling(), FlaxDoubling()
    theirs = backward_torch(port, lambda: port(torch.tensor([2.0, -1.0])).sum())
    ours = backward_flax(flax, lambda: flax(jnp.array([2.0, -1.0])).sum())
    for back in (ours, theirs):
        relu, model = back
        assert relu.path == "relu" and model.path == ""
        assert relu.inputs[0].tolist() == [1.0, 0.0] and relu.output.tolist() == [1.0, 1.0]
        assert model.inputs[0].tolist() == [4.0, 3.0]


def test_what_runs_in_the_body_of_a_scan_is_passed_over():
    class Scanning(nnx.Module):
        def __init__(self, rngs):
            self.step, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            h, _ = jax.lax.scan(lambda h, _: (self.step(h), None), x, None, length=3)
            return self.head(h)

    model = Scanning(nnx.Rngs(0))
    back = backward_flax(model, lambda: model(jnp.ones((2, 4))).sum())
    assert [call.path for call in back] == ["head", ""]
    assert np.abs(back[1].inputs[0]).max() > 0
