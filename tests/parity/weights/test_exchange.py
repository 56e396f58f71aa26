"""Names that mislead: a right port passes by another map, unless it takes equal names apart."""

import jax
import pytest
import torch
from flax import nnx
from torch.nn import functional

from parity import check_pair
from parity.check.experiment import PairExperiment
from parity.check.modules import pair_of
from parity.weights.rules import Rules

WIDTH, HIDDEN, BLOCKS = 6, 10, 2
SETTINGS = dict(levels=("weights", "logits"), dtypes=("float64",))
# Which of the port's layers has the name of another.
RIGHT = {
    "q": "q", "k": "k", "gate": "gate", "up": "up",
    "input_norm": "pre_attn_norm", "post_attention_norm": "post_norm",
    "pre_feedforward_norm": "pre_mlp_norm", "post_feedforward_norm": "last_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_strangers_write():
    with jax.numpy_rank_promotion("allow"):
        yield


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in list(RIGHT)[4:]:
            self.add_module(name, torch.nn.LayerNorm(WIDTH))
        for name in ("q", "k", "v", "o"):
            self.add_module(name, torch.nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate, self.up = (torch.nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        y = self.input_norm(x)
        probs = torch.softmax(self.q(y) @ self.k(y).mT, -1)
        x = x + self.post_attention_norm(self.o(probs @ self.v(y)))
        y = self.pre_feedforward_norm(x)
        return x + self.post_feedforward_norm(self.down(functional.silu(self.gate(y)) * self.up(y)))


class PortBlock(nnx.Module):
    def __init__(self, names, has_fault):
        rngs = nnx.Rngs(0)
        for name in list(names.values())[4:]:
            setattr(self, name, nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs))
        hidden = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            size, own = hidden.get(name, (WIDTH, WIDTH)), names.get(name, name)
            setattr(self, own, nnx.Linear(*size, use_bias=False, rngs=rngs))
        self.names, self.act = nnx.static(names), jax.nn.gelu if has_fault else jax.nn.silu

    def __call__(self, x):
        layer = {name: getattr(self, its) for name, its in self.names.items()}
        y = layer["input_norm"](x)
        probs = jax.nn.softmax(layer["q"](y) @ layer["k"](y).swapaxes(1, 2), -1)
        x = x + layer["post_attention_norm"](self.o(probs @ self.v(y)))
        y = layer["pre_feedforward_norm"](x)
        y = self.down(self.act(layer["gate"](y)) * layer["up"](y))
        return x + layer["post_feedforward_norm"](y)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Port(nnx.Module):
    def __init__(self, names, has_fault=False):
        self.layers = nnx.List([PortBlock(names, has_fault) for _ in range(BLOCKS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


NAMES = {
    "norms": RIGHT,
    "query and key": RIGHT | {"q": "key_first", "k": "query_second"},
    "gate and up": RIGHT | {"gate": "up_first", "up": "gate_second"},
}
EXCHANGED = {
    "query and key": RIGHT | {"q": "k", "k": "q"},
    "query and key by other words": RIGHT | {"q": "wk", "k": "wq"},
    "gate and up": RIGHT | {"gate": "up", "up": "gate"},
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_a_right_port_with_misleading_names_passes(names, rng):
    pair = pair_of(Net(), Port(names), rng.normal(size=(2, 4, WIDTH)))
    assert PairExperiment(pair).gap(pair.rules) < 1e-12
    flax = {rule.torch.removeprefix("blocks.*."): rule.flax for rule in pair.rules.rules}
    assert all(names[x] in flax[f"{x}.weight"].split(".") for x in names)
    mislead = names != RIGHT
    assert any("not as names suggest" in note for note in pair.rules.notes) is mislead
    assert not pair.rules.exchange


@pytest.mark.parametrize("names", EXCHANGED.values(), ids=EXCHANGED)
def test_a_port_that_exchanges_weights_of_equal_names_fails_with_that_cause(names, rng):
    # Weights that are moved by name would give another function.
    report = check_pair(Net(), Port(names), rng.normal(size=(2, 4, WIDTH)), **SETTINGS)
    assert report.exit_code == 1
    moved = [x for x in names if names[x] != RIGHT[x]]
    lines = [f'map."blocks.*.{x}.weight" = "layers.*.{names[x]}.kernel: transposed"' for x in moved]
    assert all(line in report.divergence.cause for line in lines), report.divergence
    pair = pair_of(Net(), Port(names), rng.normal(size=(2, 4, WIDTH)), rules=rules_of(lines))
    assert PairExperiment(pair).gap(pair.rules) < 1e-12


def rules_of(lines):
    return Rules.parse("\n".join(['rest = "auto"', *lines]))


def test_a_fault_elsewhere_keeps_the_likely_map_and_fails(rng):
    inputs = rng.normal(size=(2, 4, WIDTH))
    pair = pair_of(Net(), Port(RIGHT, has_fault=True), inputs)
    flax = {rule.torch.removeprefix("blocks.*."): rule.flax for rule in pair.rules.rules}
    assert all(RIGHT[x] in flax[f"{x}.weight"].split(".") for x in RIGHT)
    report = check_pair(Net(), Port(RIGHT, has_fault=True), inputs, rules=pair.rules, **SETTINGS)
    assert not report.ok and report.divergence.where.startswith("blocks.0")
