"""One change of a torch module's own code is found and named; what no change explains is not."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from parity.check.causes.forward import Suspect, describe_match
from parity.check.causes.replay import Replay

X = torch.tensor(np.random.default_rng(0).normal(size=(3, 5, 6)))
IDS = torch.tensor([[4, 6, 9], [5, 4, 8]])


class Code(torch.nn.Module):
    """Run a function as a module that holds a norm, a table, a cell, and a number."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.frequency = function, 17.0
        self.norm, self.table = torch.nn.LayerNorm(6), torch.nn.Embedding(12, 6)
        self.bag = torch.nn.EmbeddingBag(12, 6, mode="sum")
        self.cell = torch.nn.LSTMCell(6, 4)
        self.conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(5, 4, 2))
        with torch.no_grad():
            for x in self.parameters():
                x.normal_()

    def forward(self, x):
        return self.function(self, x)


def cause(wrong, right, x=X):
    code, other = Code(wrong).double(), Code(right).double()
    target = other(x).detach().numpy()
    return describe_match([Suspect(Replay(code, (x,), {}, {}), target)], {})


def turned(x):
    return x.flip(-1) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=x.dtype)


def weight_of(m, axes):
    g, v = (getattr(m.conv.parametrizations.weight, f"original{n}") for n in (0, 1))
    return g * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)


def forgetful(m, x):
    bias = m.cell.bias_ih + torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(4).to(x)
    parts = functional.linear(x[:, 0], m.cell.weight_ih, bias) + m.cell.bias_hh
    i, f, g, o = parts.chunk(4, -1)
    return torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * 0.5)


@pytest.mark.parametrize(
    ("wrong", "right", "x", "words"),
    [
        (
            lambda m, x: torch.softmax(x @ x.mT, -1) @ x,
            lambda m, x: torch.softmax(x @ x.mT * 0.37, -1) @ x,
            X,
            "a scale of 0.37 (matmul",
        ),
        (
            lambda m, x: torch.sin(x + 0.25) * 1.5,
            lambda m, x: torch.sin(x + 0.31) * 1.5,
            X,
            "the number 0.31 (add",
        ),
        (lambda m, x: torch.sin(x * 1.0), lambda m, x: torch.sin(x * 17.0), X, "17, not 1 (mul"),
        (
            lambda m, x: torch.tanh(torch.tanh(x)),
            lambda m, x: torch.tanh(torch.tanh(x) + 0.75),
            X,
            "plus 0.75 (tanh",
        ),
        (
            lambda m, x: turned(x) @ turned(x).mT,
            lambda m, x: turned(x) @ x.mT,
            X,
            "operand 1 of flip",
        ),
        (
            lambda m, x: torch.log_softmax(x, 1),
            lambda m, x: torch.softmax(x, 1),
            X,
            "softmax in place of log_softmax",
        ),
        (lambda m, x: x[:, 0] + 1, lambda m, x: x.mean(1) + 1, X, "the mean along axis 1"),
        (
            lambda m, x: x[torch.arange(3), torch.tensor([1, 0, 2])],
            lambda m, x: x[:, -1],
            X,
            "the last along axis 1",
        ),
        (lambda m, x: (1 + m.norm.weight) * x, lambda m, x: m.norm.weight * x, X, "x + 1"),
        (
            lambda m, x: torch.cat([x, 2 * x, 3 * x], -1),
            lambda m, x: torch.cat([x, 3 * x, 2 * x], -1),
            X,
            "parts in the order 1, 3, 2",
        ),
        (
            lambda m, x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
            lambda m, x: functional.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],
            X,
            "parts in the order 2, 1",
        ),
        (lambda m, x: m.bag(x), lambda m, x: m.bag(x) / 3, IDS, "mode=mean in embedding_bag"),
        (lambda m, x: m.table(x), lambda m, x: m.table(x - 4), IDS, "ids shifted by -4"),
        (
            lambda m, x: m.table(x.clamp(max=7)),
            lambda m, x: m.table(x.clamp(max=6)),
            IDS,
            "max=6 in clamp",
        ),
        (
            lambda m, x: functional.conv1d(functional.pad(x, (2, 0)), m.conv.weight, dilation=2),
            lambda m, x: functional.conv1d(functional.pad(x, (1, 0)), m.conv.weight),
            X,
            "a dilation of 1",
        ),
        (
            lambda m, x: functional.conv1d(x, m.conv.weight),
            lambda m, x: functional.conv1d(x, weight_of(m, (1,))),
            X,
            "the norm over axis 1 alone",
        ),
        (
            lambda m, x: m.cell(x[:, 0], (x[:, 0, :4] * 0, x[:, 0, :4] * 0 + 0.5))[0],
            forgetful,
            X,
            "1 added to part 2 of 4",
        ),
    ],
)
def test_a_change_is_found_and_named(wrong, right, x, words):
    assert words in (cause(wrong, right, x) or "")


@pytest.mark.parametrize(
    "right",
    [
        lambda m, x: torch.tanh(x) + 0.1 * x**3,
        lambda m, x: torch.tanh(x) + 1e-6 * x.flip(1) ** 2,
        lambda m, x: torch.tanh(1.3 * x) * 0.9,
    ],
)
def test_what_no_change_explains_is_not_named(right):
    assert cause(lambda m, x: torch.tanh(x), right) is None


def test_outputs_in_each_others_place_are_named_and_one_that_spoils_another_is_not():
    code = Code(lambda m, x: (x.exp(), x.sin(), x.cos())).double()
    arrays = Replay(code, (X,), {}, {}).outputs()
    others = dict(zip(arrays, (arrays[path] for path in ("0", "2", "1")), strict=True))
    replay = Replay(code, (X,), {}, {}, leaf="1")
    suspect = Suspect(replay, others["1"], others=others)
    assert "outputs 1 and 2 exchanged" in (describe_match([suspect], {}) or "")
    both = Code(lambda m, x: (y := x * 1.0, y.sin() * 1.0)).double()
    target = both(X)
    # What makes the second output right makes the first one wrong.
    wanted = {"0": target[0].detach().numpy(), "1": (X * 3).sin().numpy()}
    suspect = Suspect(Replay(both, (X,), {}, {}, leaf="1"), wanted["1"], others=wanted)
    assert describe_match([suspect], {}) is None
