"""What a module computes when it is built is had in float64 where building it again gives it."""

import math
import random

import numpy as np
import torch

from parity.frameworks.batch import Batch
from parity.frameworks.purity import AGAIN
from parity.frameworks.torch.constants import constants
from parity.frameworks.torch.leaves import cast_torch, torch_leaves
from parity.frameworks.torch.module import spec
from parity.frameworks.torch.runner import TorchRunner

ROOT = math.sqrt(5)


class Rotary(torch.nn.Module):
    """Keeps what it is built with, as published ones keep their configs."""

    def __init__(self, width: int, base: float = 1e4):
        super().__init__()
        self.width, self.base = width, base
        angles = 1.0 / base ** (torch.arange(0, width, 2).float() / width)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x):
        return x + self.angles.sin()


class Factor(torch.nn.Module):
    """Does not keep what it is built with."""

    def __init__(self, number: float):
        super().__init__()
        self.factor = torch.tensor(number)
        self.register_buffer("noise", torch.rand(3), persistent=False)
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 0.5]), persistent=False)

    def forward(self, x):
        return x * self.factor


class Net(torch.nn.Module):
    def __init__(self, number: float):
        super().__init__()
        self.linear, self.rotary = torch.nn.Linear(4, 4), Rotary(8, 100.0)
        self.scale = Factor(number)

    def forward(self, x):
        return self.scale(self.rotary(self.linear(x)))


TRUE_ANGLES = 1.0 / 100.0 ** (torch.arange(0, 8, 2).double() / 8)


def test_constants_are_computed_again_by_attributes_or_by_what_built_the_model():
    net = Net(ROOT)
    state = random.getstate(), np.random.get_state()[1][0], torch.get_rng_state()
    alone, built = constants(net), constants(net, lambda: Net(ROOT))
    assert torch.equal(alone["rotary.angles"], TRUE_ANGLES)
    assert alone["scale.factor"].dtype == torch.float32
    assert built["scale.factor"] == ROOT and built["scale.factor"].dtype == torch.float64
    for found in (alone, built):
        assert torch.equal(found["scale.noise"], net.scale.noise)
        assert torch.equal(found["scale.signs"], net.scale.signs)
    assert state[:2] == (random.getstate(), np.random.get_state()[1][0])
    assert torch.equal(state[2], torch.get_rng_state())
    assert net.rotary.angles.dtype == net.scale.factor.dtype == torch.float32


def test_what_was_built_otherwise_than_now_stays_as_it_is_held():
    net = Net(ROOT)
    net.rotary.angles *= 1.001
    net.rotary.base = 101.0
    for found in (constants(net), constants(net, lambda: Net(2.0))):
        assert torch.equal(found["rotary.angles"], net.rotary.angles)
        assert found["scale.factor"].dtype == torch.float32
    assert constants(net, lambda: 1 / 0).keys() == found.keys()


def test_a_runner_computes_with_them_says_so_and_moves_the_others():
    net, batch = Net(ROOT), Batch((np.ones((2, 4)),))
    run = TorchRunner(spec(net), torch_leaves(net), "float64", torch.device("cpu"), lift=True)
    weight, bias = (net.linear.get_parameter(x).double() for x in ("weight", "bias"))
    x = torch.nn.functional.linear(torch.ones(2, 4).double(), weight, bias) + TRUE_ANGLES.sin()
    factor = float(str(np.float32(ROOT)))  # as it is held
    apart = run.outputs(batch)[""] - (x * factor).detach().numpy()
    assert np.abs(apart).max() < 1e-15
    moved = run.moved().outputs(batch)[""] / run.outputs(batch)[""] - 1
    assert np.allclose(np.abs(moved), 2.0**-23 / ROOT, rtol=1e-6)
    words = list(run.forward_purity(batch).lifted)
    assert any(x.startswith("float32 constant scale.factor at Factor.forward") for x in words)
    assert any(x.startswith("float32 constant rotary.angles") and AGAIN in x for x in words)
    narrow = TorchRunner(spec(net), torch_leaves(net), "float32", torch.device("cpu"), lift=True)
    assert narrow.outputs(batch)[""].dtype == np.float32


def test_complex_buffers_stay_complex_when_a_module_is_cast():
    net = torch.nn.Module()
    net.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
    net.register_buffer("places", torch.arange(3))
    wide, half = cast_torch(net, "float64"), cast_torch(net, "bfloat16")
    assert wide.turns.dtype == torch.complex128 and wide.turns.imag.any()
    assert half.turns.dtype == torch.complex64 and half.places.dtype == torch.int64
