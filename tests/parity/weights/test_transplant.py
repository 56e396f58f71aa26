"""The transplant is strict, bitwise, and lists all problems at once."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.check.metrics import different_bits
from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.torch.leaves import from_numpy, load_torch, to_numpy, torch_leaves
from parity.weights.layouts import Layout
from parity.weights.randomize import randomized
from parity.weights.rules import Rule, Rules
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant
from parity.weights.weight_map import TransplantError, resolve

SIZES = dict(
    vocab_size=61, context_length=29, embed_dim=15, num_layers=2, num_heads=3, mlp_dim=23
)  # fmt: skip


@pytest.fixture
def models():
    """A Flax twin with random leaves and a PyTorch twin of zeros."""
    flax = flax_gpt.GPT(flax_gpt.GPTConfig(**SIZES))
    load_flax(flax, randomized(flax_leaves(flax), seed=3))
    return flax, torch_gpt.GPT(torch_gpt.GPTConfig(**SIZES))


def test_there_and_back_changes_no_bit_and_uses_every_leaf_once(models):
    flax, port = models
    before = flax_leaves(flax)
    weight_map = transplant(flax, port, TWINS)
    used = [name for link in weight_map.links for name in link.flax]
    assert sorted(used) == sorted(before) and len(weight_map.links) == len(torch_leaves(port))
    load_flax(flax, {name: leaf * 0 for name, leaf in before.items()})
    transplant(port, flax, TWINS)
    assert all(different_bits(before[name], leaf) == 0 for name, leaf in flax_leaves(flax).items())


def test_strange_floats_survive_in_both_directions(models):
    flax, port = models
    leaves = flax_leaves(flax)
    leaves["norm.bias"][:4] = [np.nan, -0.0, np.inf, 1e-45]
    load_flax(flax, leaves)
    transplant(flax, port, TWINS)
    assert different_bits(torch_leaves(port)["norm.bias"], leaves["norm.bias"]) == 0


def test_all_problems_are_listed_in_one_error_and_the_target_is_untouched(models):
    flax, port = models
    rules = [rule for rule in TWINS.rules if rule.torch not in ("norm.bias", "norm.weight")]
    rules += [Rule("norm.weight", "norm.gain"), Rule("nothing.*", "nowhere.*")]
    rules += [Rule("blocks.0.mlp.up.bias", "blocks.0.mlp.up.bias")]
    with pytest.raises(TransplantError) as caught:
        transplant(flax, port, Rules(tuple(rules)))
    assert set(caught.value.problems) == {
        "no rule for torch leaf norm.bias",
        "torch leaf norm.weight wants flax leaf norm.gain, which does not exist",
        "2 rules for torch leaf blocks.0.mlp.up.bias",
        "no torch leaf for flax leaf norm.bias",
        "no torch leaf for flax leaf norm.scale",
        "no torch leaf for flax leaf blocks.0.mlp.up.bias",
        "rule nothing.* <-> nowhere.* (same) matches nothing",
    }
    assert "Every leaf must be used exactly once" in str(caught.value)
    # Native norms start at one, everything else was zero.
    assert all(np.unique(leaf).size == 1 for leaf in torch_leaves(port).values())


def test_two_torch_leaves_cannot_share_a_flax_leaf(models):
    flax, port = models
    rules = [rule for rule in TWINS.rules if rule.torch != "norm.bias"]
    rules.append(Rule("norm.bias", "norm.scale"))
    with pytest.raises(TransplantError, match=r"flax leaf norm\.scale is used by 2 torch leaves"):
        transplant(flax, port, Rules(tuple(rules)))


def test_a_wrong_shape_is_named_with_both_shapes(models):
    flax, _ = models
    port = torch_gpt.GPT(torch_gpt.GPTConfig(**SIZES | {"mlp_dim": 22}))
    with pytest.raises(TransplantError) as caught:
        transplant(flax, port, TWINS)
    assert len(caught.value.problems) == 6
    wanted = "torch leaf blocks.0.mlp.up.weight is [22, 15], flax blocks.0.mlp.up.kernel makes"
    assert f"{wanted} [23, 15]" in caught.value.problems


def test_a_wrong_dtype_is_refused_and_not_cast(models):
    flax, port = models
    with pytest.raises(TransplantError, match=r"norm\.bias is float64, flax norm\.bias is float32"):
        transplant(flax, port.double(), TWINS)


def test_fused_leaves_are_split_and_joined_along_the_output_axis():
    rules = Rules((Rule("qkv.weight", "{query,key,value}.kernel", Layout.TRANSPOSED),))
    rng = np.random.default_rng(0)
    parts = {f"{name}.kernel": rng.normal(size=(5, n)) for name, n in
             (("query", 4), ("key", 2), ("value", 3))}  # fmt: skip
    fused = {"qkv.weight": np.zeros((9, 5))}
    weight_map = resolve(rules, fused, parts)
    joined = weight_map.to_torch(parts)["qkv.weight"]
    assert np.array_equal(joined[4:6], parts["key.kernel"].T)
    back = weight_map.to_flax({"qkv.weight": joined})
    assert all(different_bits(back[name], parts[name]) == 0 for name in parts)


def test_a_declared_tie_is_verified_before_it_is_dropped():
    rules = Rules(
        (Rule("embedding.weight", "embedding"),), ties=(("head.weight", "embedding.weight"),)
    )
    table = np.arange(6.0).reshape(3, 2)
    weight_map = resolve(
        rules, {"embedding.weight": table, "head.weight": table.copy()}, {"embedding": table}
    )
    assert set(weight_map.to_torch({"embedding": table})) == {"embedding.weight", "head.weight"}
    with pytest.raises(TransplantError, match=r"head\.weight is not equal to embedding\.weight"):
        resolve(rules, {"embedding.weight": table, "head.weight": table + 1}, {"embedding": table})


def test_ignored_leaves_are_reported_and_kept():
    class WithMask(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("mask", torch.ones(4))

    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    rules = Rules(
        (Rule("linear.weight", "kernel", Layout.TRANSPOSED), Rule("linear.bias", "bias")),
        ignored=("mask",),
    )
    port = WithMask()
    assert transplant(linear, port, rules).ignored == ("mask",)
    assert torch.equal(port.mask, torch.ones(4))
    with pytest.raises(TransplantError, match="no rule for torch leaf mask"):
        transplant(linear, port, Rules(rules.rules))


def test_bfloat16_crosses_without_a_detour_through_float32():
    bits = np.array([0x7FC1, 0x8000, 0x0001, 0x3F80], np.uint16).view(ml_dtypes.bfloat16)
    assert different_bits(to_numpy(from_numpy(bits)), bits) == 0
    assert from_numpy(bits).dtype == torch.bfloat16


def test_loading_refuses_names_shapes_and_dtypes_that_are_not_the_models():
    linear, port = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2)
    leaves = {"kernel": np.zeros((2, 3), np.float32), "extra": np.zeros(1)}
    problems = r"bias is missing; extra is unknown; kernel is float32\[2, 3\], not float32\[3, 2\]"
    with pytest.raises(ValueError, match=problems):
        load_flax(linear, leaves)
    with pytest.raises(ValueError, match=r"weight is float64\[2, 3\], not float32\[2, 3\]"):
        load_torch(port, {"weight": np.zeros((2, 3)), "bias": np.zeros(2, np.float32)})


def test_random_streams_are_not_weights():
    class Noisy(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    assert set(flax_leaves(Noisy())) == {"linear.kernel", "linear.bias"}


def test_randomizing_changes_every_element_and_keeps_the_size_of_signals():
    leaves = {"kernel": np.zeros((64, 256), np.float32), "scale": np.ones(64, np.float32)}
    random = randomized(leaves, seed=0)
    assert random["kernel"].std() == pytest.approx(1 / 8, rel=0.05)
    assert random["scale"].mean() == pytest.approx(1.0, abs=0.1) and random["scale"].std() > 0.1
    assert all(np.all(random[name] != leaves[name]) for name in leaves)
    assert all(random[name].dtype == np.float32 for name in leaves)


def test_float64_weights_keep_their_bits_outside_of_64_bit_mode():
    with jax.enable_x64(True):
        linear = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    leaves = {"kernel": np.full((3, 2), 1 / 3), "bias": np.full(2, 1 / 7)}
    load_flax(linear, leaves)
    assert all(different_bits(flax_leaves(linear)[name], leaves[name]) == 0 for name in leaves)


def test_two_models_of_one_framework_are_refused(models):
    flax, port = models
    for pair, kinds in (((flax, flax), "GPT into GPT"), ((port, port), "GPT into GPT")):
        with pytest.raises(ValueError, match=f"transplant: {kinds}. Weights move between"):
            transplant(*pair, TWINS)
