"""Layouts say what the layers do: an own product in one framework is that of the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.weights.layouts import Layout, Link
from parity.weights.rules import Rule, Rules
from parity.weights.transplant import transplant
from parity.weights.weight_map import TransplantError, resolve

SHAPES = {
    Layout.SAME: (3, 4),
    Layout.TRANSPOSED: (3, 4),
    Layout.CONV: (2, 5, 3, 4),
    Layout.CONV_TRANSPOSE: (2, 5, 3, 4),
    Layout.CONV_TRANSPOSE_KERNEL: (2, 5, 3, 4),
    Layout.HEADS_OUT: (6, 2, 3),
    Layout.HEADS_IN: (2, 3, 6),
    Layout.FLAT: (2, 3),
}


@pytest.mark.parametrize("layout", Layout)
def test_there_and_back_keeps_every_number_in_its_place(layout, rng):
    link = Link(("torch",), ("flax",), layout)
    leaf = rng.normal(size=SHAPES[layout])
    moved = link.to_torch({"flax": leaf})["torch"]
    back = link.to_flax({"torch": moved}, {"flax": leaf.shape})["flax"]
    assert np.array_equal(back, leaf) and moved.flags.c_contiguous and back.flags.c_contiguous
    assert not link.misfits({"torch": moved}, {"flax": leaf})
    assert link.misfits({"torch": moved[:-1]}, {"flax": leaf})


@pytest.mark.parametrize("turned", [False, True])
def test_a_transposed_convolution_moves_as_it_computes(turned):
    rngs = nnx.Rngs(0)
    flax = nnx.ConvTranspose(
        3, 5, (4, 4), strides=2, padding="VALID", transpose_kernel=turned, rngs=rngs
    )
    port = torch.nn.ConvTranspose2d(3, 5, 4, 2)
    layout = Layout.CONV_TRANSPOSE_KERNEL if turned else Layout.CONV_TRANSPOSE
    transplant(flax, port, Rules((Rule("weight", "kernel", layout), Rule("bias", "bias"))))
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = port(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).numpy()
    ours = np.asarray(flax(jnp.asarray(x)))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5


def test_leaves_fused_in_flax_are_split_for_torch(rng):
    rules = Rules((Rule("{q,k,v}.weight", "qkv.kernel", Layout.TRANSPOSED),))
    fused = rng.normal(size=(5, 9))
    parts = {f"{name}.weight": np.zeros((rows, 5)) for name, rows in (("q", 4), ("k", 2), ("v", 3))}
    weight_map = resolve(rules, parts, {"qkv.kernel": fused})
    moved = weight_map.to_torch({"qkv.kernel": fused})
    assert np.array_equal(moved["k.weight"], fused[:, 4:6].T)
    assert np.array_equal(weight_map.to_flax(moved)["qkv.kernel"], fused)
    with pytest.raises(TransplantError, match=r"wants torch leaf v\.weight, which does not exist"):
        resolve(rules, {n: x for n, x in parts.items() if n[0] != "v"}, {"qkv.kernel": fused})


def test_packed_attention_weights_are_those_of_three_projections():
    port = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    flax = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))
    rules = Rules((
        Rule("in_proj_weight", "{query,key,value}.kernel", Layout.HEADS_OUT),
        Rule("in_proj_bias", "{query,key,value}.bias", Layout.FLAT),
        Rule("out_proj.weight", "out.kernel", Layout.HEADS_IN),
        Rule("out_proj.bias", "out.bias"),
    ))  # fmt: skip
    transplant(port, flax, rules)
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    with torch.no_grad():
        theirs = port(*[torch.from_numpy(x)] * 3, need_weights=False)[0].numpy()
    assert np.abs(np.asarray(flax(jax.numpy.asarray(x))) - theirs).max() < 1e-5


def test_rules_are_what_their_file_says(tmp_path):
    rules = Rules(
        (Rule("a.*.w", "b.*.{x,y}", Layout.TRANSPOSED, 4, True), Rule("c", "d")),
        (("head", "c"),),
        ("*.mask",),
    )
    path = tmp_path / "rules.toml"
    path.write_text(rules.to_toml())
    assert Rules.load(path) == rules


@pytest.mark.parametrize("text, complaint", [
    ("[[rule]]\ntorch = 3", "a rule without torch"),
    ('[[rule]]\ntorch = "a.*"\nflax = "b"', "have 1 and 0 stars"),
    ('[[rule]]\ntorch = "a"\nflax = "b"\nlayout = "odd"', "layout 'odd': no layout"),
    ('[[rule]]\ntorch = "a"\nflax = "b"\nshape = 3', "unexpected keyword argument 'shape'"),
    ("rule = ", "A rules file is TOML"),
    ('[[tie]]\nalias = "a"', "'original'"),
])  # fmt: skip
def test_a_bad_rules_file_is_refused_in_a_line(text, complaint, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        Rules.load(path)
    assert str(caught.value).startswith(f"rules {path}: ") and "\n" not in str(caught.value)
