"""Layouts say what the layers do: an own product in one framework is that of the other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.weights.layouts import Layout, Link
from parity.weights.rules import Rule, Rules, as_line
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


# A layout, the shapes of its torch and flax leaves, and what stacks them.
AXES = [
    ("(n h) d -> d n h", [(24, 20)], [(20, 4, 6)], {}),
    ("o i h w -> (h w i) o", [(5, 3, 2, 2)], [(12, 5)], {}),
    ("o (c h=2 w) -> h=2 w c o", [(5, 12)], [(2, 2, 3, 5)], {}),
    ("o (c h=2 w=2) -> (h=2 w=2 c) o", [(5, 12)], [(12, 5)], {}),
    ("o i 1 -> i o", [(5, 3, 1)], [(3, 5)], {}),
    ("t d -> 1 t d", [(5, 3)], [(1, 5, 3)], {}),
    ("i o ~... -> ... i o", [(3, 5, 2, 4)], [(2, 4, 3, 5)], {}),
    ("o i -> [layer] i o", [(5, 3)] * 4, [(4, 3, 5)], {"[layer]": 4}),
    ("o i -> i [layer] o", [(5, 3)] * 4, [(3, 4, 5)], {"[layer]": 4}),
    ("o i -> [layer] [expert] i o", [(5, 3)] * 6, [(2, 3, 3, 5)], {"[layer]": 2, "[expert]": 3}),
    ("[expert] i o -> i o", [(4, 3, 5)], [(3, 5)] * 4, {"[expert]": 4}),
    ("(n h) d -> {} d n h", [(24, 20)] * 2, [(2, 20, 4, 6)], {}),
    ("{} o i -> i o", [(3, 5, 4)], [(4, 5)] * 3, {}),
    ("o+ i -> i o", [(5, 3), (4, 3)], [(3, 9)], {}),
    ("(n=4 o+) i -> i (n=4 o)", [(8, 3), (4, 3)], [(3, 12)], {}),
    ("(n+ h) d -> d n h", [(24, 5)], [(5, 4, 3), (5, 2, 3), (5, 2, 3)], {}),
    ("o i -> [layer] {} i o", [(5, 3)] * 8, [(4, 2, 3, 5)], {"[layer]": 4}),
    ("o+ i -> [layer] i o", [(15, 3)] * 4, [(4, 3, 5), (4, 3, 4), (4, 3, 6)], {"[layer]": 4}),
]


def as_axes(layout, torch_shapes, flax_shapes, stacks, rng):
    """Return a link and leaves of both sides, those of flax empty."""
    torch = {f"t{i}": rng.normal(size=shape) for i, shape in enumerate(torch_shapes)}
    flax = {f"f{i}": np.zeros(shape) for i, shape in enumerate(flax_shapes)}
    return Link(tuple(torch), tuple(flax), layout, stacks=tuple(stacks.items())), torch, flax


@pytest.mark.parametrize("layout, torch_shapes, flax_shapes, stacks", AXES, ids=lambda x: str(x))
def test_axes_move_every_number_and_back(layout, torch_shapes, flax_shapes, stacks, rng):
    link, leaves, blank = as_axes(layout, torch_shapes, flax_shapes, stacks, rng)
    assert not link.misfits(leaves, blank)
    moved = link.to_flax(leaves, {name: leaf.shape for name, leaf in blank.items()})
    assert {x: y.shape for x, y in moved.items()} == {x: y.shape for x, y in blank.items()}
    numbers = (np.concatenate([x.ravel() for x in y.values()]) for y in (leaves, moved))
    assert np.array_equal(*(np.sort(x) for x in numbers))
    back = link.to_torch(moved, {name: leaf.shape for name, leaf in leaves.items()})
    assert all(np.array_equal(back[name], leaf) for name, leaf in leaves.items())
    wrong = {name: np.zeros((7, *leaf.shape)) for name, leaf in blank.items()}
    assert len(link.misfits(leaves, wrong)) == 1


def test_axes_say_where_every_number_goes(rng):
    def moved(layout, torch, flax_shape):
        link = Link(("t",), ("f",), layout)
        return link.to_flax({"t": torch}, {"f": flax_shape})["f"]

    x = rng.normal(size=(24, 20))
    assert np.array_equal(moved("(n h) d -> d n h", x, (20, 4, 6)),
                          x.reshape(4, 6, 20).transpose(2, 0, 1))  # fmt: skip
    x = rng.normal(size=(5, 3, 2, 2))
    by_window = np.einsum("oihw->hwio", x).reshape(12, 5)
    assert np.array_equal(moved("o i h w -> (h w i) o", x, (12, 5)), by_window)
    assert np.array_equal(moved("a b ~c d -> d c b a", x, (2, 2, 3, 5)), x[:, :, ::-1].T)
    link, leaves, _ = as_axes("o i -> i [layer] o", [(2, 3)] * 4, [(3, 4, 2)], {"[layer]": 4}, rng)
    whole = link.to_flax(leaves, {"f0": (3, 4, 2)})["f0"]
    assert np.array_equal(whole[:, 2], leaves["t2"].T)


@pytest.mark.parametrize("layout, flax_shape, complaint", [
    ("(n h) d -> d n h", (20, 4, 5), r"t0 is \[24, 20\], flax f0 makes \[20, 20\]"),
    ("(n h) d -> d n h", (20, 4), r"as \(n h\) d -> d n h: \[24, 20\] and \[20, 4\]"),
    ("(n h) d -> (h n) d", (24, 20), "the size of n is open, say n=4"),
    ("(n=5 h) d -> d (n=5 h)", (20, 24), "24 is not n=5 times h"),
])  # fmt: skip
def test_sizes_that_clash_are_a_line_with_both_shapes(layout, flax_shape, complaint, rng):
    link, leaves, blank = as_axes(layout, [(24, 20)], [flax_shape], {}, rng)
    (problem,) = link.misfits(leaves, blank)
    assert re.search(complaint, problem) and "\n" not in problem


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
        (("decoder.table", "table"),),
        ("generator.*",),
    )
    path = tmp_path / "rules.toml"
    path.write_text(rules.to_toml())
    assert Rules.load(path) == rules


def test_a_line_of_the_map_is_a_rule():
    text = 'rest = "auto"\nmap."a.[n].weight" = "b.kernel: o i -> [n] i o"\nmap."c" = "d"\n'
    rules = Rules.parse(text)
    stack, plain = Rule("a.[n].weight", "b.kernel", "o i -> [n] i o"), Rule("c", "d", "")
    assert rules == Rules((stack, plain), rest="auto")
    assert [as_line(rule) for rule in rules.rules] == text.splitlines()[1:]


def test_stacks_are_resolved_with_stars_and_braces_and_stay_bitwise(rng):
    rules = Rules((
        Rule("*.layers.[n].{gate,up}.weight", "*.layers.gate_up", "o i -> [n] {} i o"),
        Rule("expert", "experts.[e].kernel", "[e] i o -> i o"),
        Rule("table", "table"),
    ), flax_ties=(("copy", "table"),), flax_ignored=("head.*",))  # fmt: skip
    torch = {
        f"{stack}.layers.{n}.{name}.weight": rng.normal(size=(4, 3))
        for stack in ("encoder", "decoder")
        for n in (9, 10)
        for name in ("gate", "up")
    }
    torch |= {"expert": rng.normal(size=(3, 2, 5)), "table": np.arange(3)}
    flax = {f"{stack}.layers.gate_up": np.zeros((2, 2, 3, 4)) for stack in ("encoder", "decoder")}
    flax |= {f"experts.{n}.kernel": np.zeros((2, 5)) for n in range(3)}
    flax |= {name: np.zeros(3, np.int32) for name in ("table", "copy")} | {"head.x": np.ones(1)}
    weight_map = resolve(rules, torch, flax)
    moved = weight_map.to_flax(torch)
    assert moved.keys() == flax.keys() - {"head.x"} and moved["copy"].dtype == np.int32
    # Layer 10 comes after layer 9.
    up = moved["decoder.layers.gate_up"][1, 1]
    assert np.array_equal(up, torch["decoder.layers.10.up.weight"].T)
    assert np.array_equal(moved["experts.2.kernel"], torch["expert"][2])
    back = weight_map.to_torch(moved)
    assert all(np.array_equal(back[x], y) and back[x].dtype == y.dtype for x, y in torch.items())
    with pytest.raises(ValueError, match="table is int32 and is to hold"):
        weight_map.to_flax(torch | {"table": np.full(3, 1 << 40)})
    summed = weight_map.sum_of_ties({"table": np.ones(3), "copy": np.ones(3), "head.x": np.ones(1)})
    assert summed.keys() == {"table", "copy"} and np.array_equal(summed["copy"], np.full(3, 2.0))


@pytest.mark.parametrize("text, complaint", [
    ("[[rule]]\ntorch = 3", "a rule without torch"),
    ('[[rule]]\ntorch = "a.*"\nflax = "b"', "have 1 and 0 stars"),
    ('[[rule]]\ntorch = "a"\nflax = "b"\nlayout = "odd"', "layout 'odd': no layout"),
    ('[[rule]]\ntorch = "a"\nflax = "b"\nshape = 3', "unexpected keyword argument 'shape'"),
    ('[[rule]]\ntorch = "a.[n]"\nflax = "b"\nlayout = "o i -> i o"', "has no stacked axis"),
    ('map."a" = "b: o i -> i"', "every axis has one name, which stands once on either side"),
    ('map.a.b = "c"', "quote the name"),
    ('rest = "guess"', "it is auto, or left out"),
    ('ignored = "a"', "it is a list of names"),
    ("rule = ", "A rules file is TOML"),
    ('[[tie]]\nalias = "a"', "'original'"),
])  # fmt: skip
def test_a_bad_rules_file_is_refused_in_a_line(text, complaint, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        Rules.load(path)
    assert str(caught.value).startswith(f"rules {path}: ") and "\n" not in str(caught.value)
