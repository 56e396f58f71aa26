"""Healthy models in the styles that people publish raise no alarm, and slips in them do."""

import math

import pytest
import torch
from torch import nn

from parity.doctor import DETECTORS, as_model, examine
from parity.report.record import Verdict
from tests.parity.doctor import healthy

IN_TORCH = [name for name in healthy.HEALTHY if not name.startswith("nnx")]


def answers(model, *names):
    """Return verdicts by question, of those that are named or of all."""
    asked = [x for x in DETECTORS if not names or x.name in names]
    found = examine(as_model(model, "own"), detectors=asked, stop_early=False)
    return {x.detector.name: x.finding for x in found.answers}


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_healthy_style_raises_no_alarm(name):
    found = answers(healthy.HEALTHY[name]())
    wrong = {x: y.sentence for x, y in found.items() if y.verdict in (Verdict.FAIL, Verdict.ERROR)}
    assert not wrong


# All questions of the NNX styles take minutes to compile; two are asked here.
@pytest.mark.parametrize("name", [x for x in healthy.HEALTHY if x.startswith("nnx")])
def test_a_healthy_nnx_style_keeps_its_constants(name):
    found = answers(healthy.HEALTHY[name](), "causality", "residual-stream")
    assert not [y.sentence for y in found.values() if y.verdict in (Verdict.FAIL, Verdict.ERROR)]


def test_at_least_thirty_styles_are_asked():
    assert len(healthy.HEALTHY) >= 30


class Weak(healthy.Fused):
    """A mask of -1e4."""

    def scores(self, q, k):
        T = q.shape[2]
        scores = q @ k.transpose(-2, -1) * healthy.H**-0.5
        return scores.masked_fill(self.tril[:, :, :T, :T] == 0, -1e4)


class Leaking(healthy.Fused):
    """A buffer that shows one slot too many."""

    def __init__(self):
        super().__init__()
        self.tril = torch.ones_like(self.tril).tril(1)


class Unnormed(healthy.Block):
    """A block that gives what it should add."""

    def forward(self, x):
        return self.mlp(self.ln_2(self.attn(self.ln_1(x))))


class Graphless(healthy.GPT):
    @torch.inference_mode()
    def forward(self, idx):
        return super().forward(idx)


class NoPlaces(healthy.GPT):
    """A table that is looked up and not added."""

    def embedded(self, idx):
        return self.wte(idx) + 0.0 * self.wpe(torch.arange(idx.size(1)))


class Unused(healthy.Experts):
    """A bias that nothing reads."""

    def __init__(self):
        super().__init__()
        self.forgotten = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: healthy.GPT(attention=Weak), "mask-strength"),
        (lambda: healthy.GPT(attention=Weak, norm=lambda _: nn.Identity()), "mask-strength"),
        (lambda: healthy.GPT(attention=Leaking), "causality"),
        (lambda: healthy.GPT(block=Unnormed, zero_head=True), "residual-stream"),
        (NoPlaces, "position-sensitivity"),
        (lambda: healthy.GPT(feed=Unused), "gradient-coverage"),
    ],
)
def test_a_slip_in_such_a_style_is_seen(model, name):
    assert answers(model(), name)[name].verdict is Verdict.FAIL


def test_that_no_gradient_comes_out_is_one_finding():
    found = answers(Graphless())
    wrong = [name for name, y in found.items() if y.verdict in (Verdict.FAIL, Verdict.ERROR)]
    assert wrong == ["gradient-coverage"]
    assert "inference_mode" in found["gradient-coverage"].sentence


def test_a_table_of_positions_is_known_by_what_it_is_looked_up_with():
    tables = {
        "relative": None,
        "padded": "wpe.weight",
        "zero_positions": "pos_emb",
        "time_first": "wpe.weight",
        "alibi": None,
    }
    for name, table in tables.items():
        assert as_model(healthy.HEALTHY[name](), name).position_table == table


def test_constants_stay_as_they_are_when_weights_are_drawn():
    model = as_model(healthy.GPT(attention=healthy.OneMinus), "own")
    constants = {x for x in model.weights() if x.endswith(("tril", "seen"))}
    assert len(constants) == 2 * healthy.LAYERS and not constants & model.trained_names()


def test_an_error_of_a_question_is_not_the_models(monkeypatch):
    model = as_model(healthy.GPT(), "own")
    asked = [x for x in DETECTORS if x.name == "causality"]
    monkeypatch.setattr("parity.doctor.detectors.forward.gap", math.log)
    found = examine(model, detectors=asked)
    assert found.fired == () and found.exit_code == 2
    assert found.answers[0].finding.verdict is Verdict.ERROR
