"""rules="auto" finds the map, and says when nothing tells candidates apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.check.modules import pair_of
from parity.faults.selftest import PAIRS, pair_module
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.weights.infer import infer_rules
from parity.weights.layouts import Layout, Link
from parity.weights.rules import Rule, Rules
from parity.weights.weight_map import resolve


@pytest.mark.parametrize("name", PAIRS)
def test_the_map_of_a_port_is_found_by_names_and_shapes_alone(name):
    with pair_module(name) as module:
        port, flax = module.torch_net(), module.flax_net()
    rules = infer_rules(port, flax)
    leaves = torch_leaves(port), flax_leaves(flax)
    weight_map = resolve(rules, *leaves)
    assert Rules.parse(rules.to_toml()) == rules
    counters = {x for x in leaves[0] if x.endswith("num_batches_tracked")}
    assert {*weight_map.ignored} == counters


def test_layers_share_a_line_and_packed_attention_is_taken_apart():
    with pair_module("encoder") as module:
        rules = infer_rules(module.torch_net(), module.flax_net()).rules
    packed = "layers.*.self_attn.{query,key,value}"
    assert Rule("layers.*.self_attn.in_proj_weight", f"{packed}.kernel", Layout.HEADS_OUT) in rules
    assert Rule("layers.*.self_attn.out_proj.weight", "layers.*.self_attn.out.kernel",
                Layout.HEADS_IN) in rules  # fmt: skip
    assert len(rules) == 12


class Torch(torch.nn.Module):
    """Three square layers whose names say nothing."""

    def __init__(self, names: str):
        super().__init__()
        for name in names.split():
            self.add_module(name, torch.nn.Linear(4, 4))
        self.order = names.split()

    def forward(self, x):
        for number, name in enumerate(self.order):
            x = torch.tanh(self.get_submodule(name)(x)) + number
        return x


class Flax(nnx.Module):
    def __init__(self, names: str, offset: float = 0.0):
        for name in names.split():
            setattr(self, name, nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        self.order, self.offset = nnx.static(names.split()), offset

    def __call__(self, x):
        for number, name in enumerate(self.order):
            x = jnp.tanh(getattr(self, name)(x)) + number + self.offset
        return x


def test_what_names_leave_open_is_found_by_running_both():
    x = np.random.default_rng(0).normal(size=(2, 4))
    pair = pair_of(Torch("red green blue"), Flax("one two three"), x)
    links = resolve(pair.rules, torch_leaves(Torch("red green blue")),
                    flax_leaves(Flax("one two three"))).links  # fmt: skip
    kernel = Link(("green.weight",), ("two.kernel",), Layout.TRANSPOSED)
    assert kernel in links


def test_what_no_run_proves_goes_by_order_and_is_said_with_lines_to_copy():
    port, flax = Torch("red green blue"), Flax("one two three", offset=0.1)
    names = torch_leaves(port), flax_leaves(flax)
    for rules, why in (
        (pair_of(port, flax, np.ones((2, 4))).rules, "none makes the outputs equal"),
        (infer_rules(port, flax), "there are no inputs to try them on"),
    ):
        assert Link(("blue.bias",), ("three.bias",)) in resolve(rules, *names).links
        (note,) = rules.notes
        assert 'map."green.weight" = "two.kernel: transposed"' in note and why in note
        assert rules.to_toml().startswith("# by names and order, not proven")


def test_many_layers_without_names_go_by_their_order():
    names = [f"{word}{end}" for word in ("x", "y") for end in "abcdef"]
    others = [f"{word}{end}" for word in ("r", "s") for end in "ghijkl"]
    rules = infer_rules(Torch(" ".join(names)), Flax(" ".join(others)))
    found = {rule.torch: rule.flax for rule in rules.rules}
    assert all(found[f"{a}.weight"] == f"{b}.kernel" for a, b in zip(names, others, strict=True))


def test_a_leaf_without_a_counterpart_is_named_with_its_shape():
    with pytest.raises(ValueError, match=r"flax has nothing for torch b\.weight \[4, 4\]"):
        infer_rules(Torch("a b"), Flax("a"))


class Loose(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(4, 4))
        self.register_buffer("table", torch.ones(3))

    def forward(self, x):
        return x @ self.matrix.T


class LooseFlax(nnx.Module):
    def __init__(self):
        self.matrix = nnx.Param(jax.numpy.ones((4, 4)))

    def __call__(self, x):
        return x @ self.matrix[...]


def test_a_square_matrix_of_no_layer_is_turned_by_experiment():
    pair = pair_of(Loose(), LooseFlax(), np.random.default_rng(0).normal(size=(3, 4)))
    assert pair.rules == Rules((Rule("matrix", "matrix", Layout.TRANSPOSED),), ignored=("table",))


def test_a_tensor_under_two_names_is_a_tie():
    with pair_module("gpt2") as module:
        rules = infer_rules(module.torch_net(), module.flax_net())
    assert rules.ties == (("model.lm_head.weight", "model.transformer.wte.weight"),)
