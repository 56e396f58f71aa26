"""`check_pair` on modules of others: what passes, what does not, and what it leaves behind."""

import copy

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from parity import ModuleUse, ParityError, check_pair
from parity.check.levels.names import HORIZON
from parity.faults import Edit
from parity.faults.selftest import PAIRS, clean, pair_module
from parity.frameworks.capture import lockstep
from parity.frameworks.flax.capture import capture_flax
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.capture import capture_torch
from parity.frameworks.torch.leaves import torch_leaves
from parity.pair.text import Corpus
from parity.report.record import Verdict

COMPARED = "weights", "logits", "gradients", "optimizer", "trajectory"
FORWARD = dict(levels=["weights", "logits"], dtypes=("float64",))


def modules(name: str, *edits: Edit):
    """Both modules of a port and its inputs, with some places that read differently."""
    with pair_module(name, edits) as module:
        return module.torch_net(), module.flax_net(), module.inputs


@pytest.mark.parametrize("name", PAIRS)
def test_a_port_passes_every_level_that_it_has(name):
    report = clean(name, 0, Corpus.load())
    verdicts = {level.name: level.verdict for level in report.levels}
    assert {verdicts[name] for name in COMPARED} == {Verdict.PASS}, report
    assert verdicts["cache"] is verdicts["tokens"] is Verdict.ABSTAIN
    assert report.ok and report.exit_code == 0


def test_a_check_leaves_modules_and_random_states_as_they_were():
    port, flax, inputs = modules("convnet")
    port.train()
    torch.manual_seed(3)
    before = copy.deepcopy((torch_leaves(port), flax_leaves(flax)))
    state, calls = torch.get_rng_state(), vars(nnx.Conv)["__call__"]
    assert check_pair(port, flax, inputs, **FORWARD).ok
    after = torch_leaves(port), flax_leaves(flax)
    for old, new in zip(before, after, strict=True):
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert port.training and torch.equal(torch.get_rng_state(), state)
    assert vars(nnx.Conv)["__call__"] is calls and not port.conv1._forward_hooks


def test_a_difference_is_placed_explained_and_raised():
    port, flax, inputs = modules("mlp", Edit("mlp.py", "epsilon=1e-5, ", ""))
    report = check_pair(port, flax, inputs, **FORWARD)
    assert report.divergence.where == "1"
    with pytest.raises(ParityError, match=r"first differs at 1 \(forward\).*eps=1e-06") as caught:
        report.raise_if_diverged()
    assert caught.value.report is report and "logits" in str(caught.value)


def test_the_biased_running_variance_of_flax_is_a_difference_that_training_shows():
    edit = Edit("convnet.py", "if not self.use_running_average:", "if False:")
    port, flax, inputs = modules("convnet", edit)
    report = check_pair(port, flax, inputs, dtypes=("float64",), steps=HORIZON)
    failed = [level.name for level in report.levels if level.verdict is Verdict.FAIL]
    assert failed == ["optimizer"] and report.divergence.where.endswith(".var")


def test_what_computes_in_float32_inside_is_lifted_and_decided_in_float64():
    edit = Edit("encoder.py", "attention_fn=attend, ", "")
    port, flax, inputs = modules("encoder", edit)
    report = check_pair(port, flax, inputs, levels=["weights", "logits"])
    assert report.levels[1].verdict is Verdict.PASS and report.ok
    assert report.levels[1].records[0].gap <= report.levels[1].records[0].bound == 1e-12
    assert any("computes narrower, lifted" in (x.note or "") for x in report.levels[1].records)
    port.layers[0].activation = torch.nn.functional.gelu
    report = check_pair(port, flax, inputs, levels=["weights", "logits"])
    assert report.exit_code == 1 and report.divergence.where == "layers.0"


def sgd(rate: float) -> dict:
    return dict(
        torch=ModuleUse(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
        flax=ModuleUse(optimizer=optax.sgd(rate)),
    )


@pytest.mark.parametrize("rate, verdict", [(0.1, Verdict.PASS), (0.11, Verdict.FAIL)])
def test_optimizers_of_the_user_are_compared_too(rate, verdict):
    port, flax, inputs = modules("mlp")
    report = check_pair(port, flax, inputs, dtypes=("float64",), steps=HORIZON, **sgd(rate))
    assert report.verdict is verdict, report
    levels = {level.name: level.verdict for level in report.levels}
    assert levels["gradients"] is Verdict.PASS and levels["optimizer"] is verdict


def test_the_weights_of_the_torch_module_can_be_the_ones():
    port, flax, inputs = modules("mlp")
    assert check_pair(port, flax, inputs, weights="torch", **FORWARD).ok


@pytest.mark.parametrize("change, complaint", [
    (dict(inputs=np.array(["a"])), r"inputs inputs, argument 0: <U1"),
    (dict(inputs={}), "inputs: none"),
    (dict(inputs=np.array([np.nan])), "not finite"),
    (dict(torch=ModuleUse(optimizer=torch.optim.SGD)), "optimizer of one side alone"),
    (dict(flax=ModuleUse(loss=lambda module, x: 0.0)), "loss of one side alone"),
    (dict(weights="flax"), "there are random and torch"),
    (dict(torch_module=3), "int and FlaxNet. A pair is a torch.nn.Module and a flax.nnx.Module"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused_in_a_line(change, complaint):
    port, flax, inputs = modules("mlp")
    given = dict(torch_module=port, flax_module=flax, inputs=inputs) | change
    with pytest.raises(ValueError, match=complaint) as caught:
        check_pair(**given)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_a_module_are_refused_with_the_line_to_write():
    port, flax, _ = modules("mlp")
    with pytest.raises(ValueError, match=r"\(x float64\[2, 6\]\) raised .* def call\(module"):
        check_pair(port, flax, np.ones((2, 6)), **FORWARD)


class Scanned(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jax.lax.scan(lambda carry, row: (carry, self.linear(row)), 0, x)[1]


def test_modules_inside_a_scan_have_no_numbers_and_are_passed_over():
    model, traces = Scanned(), []
    capture_flax(model, lambda: model(np.ones((2, 3), np.float32)), traces.append)
    assert [trace.path for trace in traces] == [""]


def test_captures_run_in_step_and_put_everything_back_when_they_are_left():
    port, flax, _ = modules("mlp")
    seen = []
    x = np.ones((2, 5), np.float32)
    call = vars(nnx.Linear)["__call__"]
    with lockstep(
        lambda on_trace: capture_torch(port, lambda: port(torch.from_numpy(x)),
                                   lambda trace: (seen.append(trace.path), on_trace(trace))),
        lambda on_trace: capture_flax(flax, lambda: flax(x), on_trace),
    ) as (ours, theirs):  # fmt: skip
        assert next(ours).path == "0" and next(theirs).path == "up"
        assert len(seen) <= 2  # no more than is asked for, and the next one in waiting
    assert vars(nnx.Linear)["__call__"] is call
    assert not any(module._forward_hooks for module in port.modules())


def test_what_a_capture_raises_reaches_the_reader():
    port, _, _ = modules("mlp")
    wrong = torch.ones(2, 6)
    with lockstep(lambda on_trace: capture_torch(port, lambda: port(wrong), on_trace)) as (traces,):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            list(traces)


@pytest.mark.parametrize("mode", [nnx.set_graph_mode, nnx.set_graph_updates])
def test_modules_are_captured_in_the_other_modes_of_nnx_too(mode):
    port, flax, inputs = modules(
        "convnet", Edit("convnet.py", "nn.relu(self.norm1(", "nn.relu(2 * self.norm1(")
    )
    with mode(False):
        report = check_pair(port, flax, inputs, **FORWARD)
        assert report.divergence.where == "TorchNet" and "conv2" in report.divergence.detail
        detached = Edit("convnet.py", "head(x.tr", "head(jax.lax.stop_gradient(x).tr")
        port, flax, inputs = modules("convnet", detached)
        report = check_pair(port, flax, inputs, levels=["gradients"], dtypes=("float64",))
        assert report.divergence.where == "TorchNet" and "norm2" in report.divergence.detail
